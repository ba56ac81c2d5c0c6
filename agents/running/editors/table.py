"""The table of editors: every editor is registered here, and found by its name or group."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from agents.fine_tuning import (
    CrispEditAgent,
    CrispEditConfig,
    FineTuningAgent,
    FineTuningConfig,
    FTLAgent,
    FTLConfig,
    FTMAgent,
    FTMConfig,
    NoEditAgent,
)
from agents.hypernetworks import (
    DAFNetAgent,
    DAFNetConfig,
    MALMENAgent,
    MALMENConfig,
    MENDAgent,
    MENDConfig,
    StableEditAgent,
    StableEditConfig,
    UltraEditAgent,
    UltraEditConfig,
    malmen_rledit,
    mend_rledit,
)
from agents.locate_then_edit import AlphaEditAgent, MEMITAgent, PRUNEAgent, RECTAgent, ROMEAgent
from agents.locate_then_edit.locate import LocateAgent
from agents.rledit import RLEditAgent, RLEditConfig, rledit_paper, rledit_untrained
from agents.running.editors.editor import Editor, Strength, Training
from rledit_env.type_aliases import Settings

TRAINED = Strength()
STEP_SIZE = Strength(("step_size",))
BOX = Strength(("learning_rate", "epsilon"))
LEARNING_RATE = Strength(("learning_rate",))
# ROME always writes the whole value; its strength is how far the value moves: Adam's step size and the clamp.
VALUE = Strength(("value.learning_rate", "value.clamp"))
# With λ well below kᵀC⁻¹k the whole value is written, and a smaller λ changes nothing: only larger ones are tried.
COVARIANCE = Strength(divided=("covariance_weight",), factors=(0.1, 0.3, 1.0))
RIDGE = Strength(divided=("ridge",), factors=(0.1, 0.3, 1.0))
TEXT_PRIOR = 300.0  # c, the number of text keys in the prior
CRISP_ENERGY = 0.9  # share of the curvature whose directions are removed
ANSWER: Settings = {"token": "answer", "steps_per_batch": 1}
PRESENTATIONS = (8, 16, 3)  # many weak presentations change the rest of an LLM less than few strong ones
LONG = Training(num_batches=20, reward={"batch_stride": 5}, select_batches=20)


def _trajectory(name: str, title: str, config: Callable[[], RLEditConfig] = RLEditConfig, **more: Any) -> Editor:
    """An editor whose hypernetwork is trained by the gradient of whole trajectories."""
    return Editor(name, title, "trajectory", RLEditAgent, config, strength=TRAINED, **more)


def _starred(editor: Editor) -> Editor:
    """The editor, trained again on the current weights after every third batch (RLEdit, Appendix A.2)."""
    return replace(
        editor, name=f"{editor.name}*", title=f"{editor.title}*", settings={"retrain_every": 3}, training=None,
        trained_as=editor.name,
    )  # fmt: skip


def _recursive(editor: Editor) -> Editor:
    """The editor with all earlier keys in its least squares (SimIE, ICML 2025; RLSEdit, arXiv 2601.15686)."""
    variant = _variant(editor, "recursion", recursion=True)
    if variant.strength == COVARIANCE:  # both weights in the least squares oppose the update
        variant = replace(variant, strength=replace(COVARIANCE, divided=("covariance_weight", "anchor")))
    return variant


def _anchored(editor: Editor) -> Editor:
    """The editor with every value rescaled to the norm of the original model's values (NAS, arXiv 2602.02543)."""
    return _variant(editor, "nas", norm_anchor=True)


def _textual(editor: Editor) -> Editor:
    """The editor with a prior of text in its least squares (see `agents.rledit.text_prior`)."""
    return _variant(editor, "text", text_prior=TEXT_PRIOR)


def _restrained(editor: Editor) -> Editor:
    """The editor without the directions of highest curvature in its updates (see `agents.curvature`)."""
    return _variant(editor, "crisp", network={"crisp_energy": CRISP_ENERGY})


def _variant(editor: Editor, plugin: str, **settings: Any) -> Editor:
    title = plugin.upper() if plugin == "nas" else plugin
    return replace(
        editor, name=f"{editor.name}+{plugin}", title=f"{editor.title}+{title}",
        settings={**editor.settings, **settings}, variant_of=editor.variant_of or editor.name,
    )  # fmt: skip


def _located(agent: type[LocateAgent], title: str, strength: Strength) -> Editor:
    """An editor that finds each fact's value at its subject and solves for the weights."""
    return Editor(
        agent.name, title, "locate", agent, agent.config_class, env={"token": "subject", "steps_per_batch": 1},
        strength=strength,
    )  # fmt: skip


ROME = _located(ROMEAgent, "ROME", VALUE)
MEMIT = _located(MEMITAgent, "MEMIT", COVARIANCE)
ALPHAEDIT = _located(AlphaEditAgent, "AlphaEdit", RIDGE)
MEND = Editor(
    "mend", "MEND", "hypernetwork", MENDAgent, MENDConfig, env={"token": "all", "steps_per_batch": 1},
    training=Training(
        num_batches=1, batch_size=1, trajectories=2000,
        reward={
            "components": {"generalization": 0.1, "locality": 1.0}, "backtracking_depth": 0, "regularisation": 0.0
        },
    ),
    strength=TRAINED,
)  # fmt: skip
MALMEN = Editor(
    "malmen", "MALMEN", "hypernetwork", MALMENAgent, MALMENConfig, env=ANSWER,
    training=Training(
        num_batches=1, trajectories=200,
        reward={
            "components": {"generalization": 1.0, "locality": 1.0}, "backtracking_depth": 0, "regularisation": 0.0
        },
    ),
    strength=TRAINED,
)  # fmt: skip
DAFNET = Editor(
    "dafnet", "DAFNet", "hypernetwork", DAFNetAgent, DAFNetConfig, env={"token": "all", "steps_per_batch": 1},
    training=Training(
        num_batches=10, trajectories=40,
        reward={
            "components": {"efficacy": 0.5, "generalization": 0.5, "locality": 1.0}, "backtracking_samples": 1,
            "regularisation": 0.0,
        },
    ),
    strength=TRAINED,
)  # fmt: skip
ULTRAEDIT = Editor(
    "ultraedit", "UltraEdit", "training-free", UltraEditAgent, UltraEditConfig, env=ANSWER, step_size=("step_size",),
    presentations=PRESENTATIONS, strength=STEP_SIZE,
)  # fmt: skip
STABLEEDIT = replace(ULTRAEDIT, name="stableedit", title="StableEdit", agent=StableEditAgent, config=StableEditConfig)

# The start of training: moments of training facts, and nothing learned.
RLEDIT_UNTRAINED = _trajectory(
    "rledit-untrained", "RLEdit, untrained", rledit_untrained,
    env={"token": "subject", "steps_per_batch": 8, "present_until": 0.8}, training=Training(trajectories=0),
)  # fmt: skip
RLEDIT = _trajectory(
    "rledit", "RLEdit", env={"token": "subject", "steps_per_batch": 5},
    training=Training(
        reward={
            "components": {"efficacy": 1.0, "generalization": 1.0, "locality": 1.0}, "backtracking_samples": 1,
            "every_step": False,
        },
        select_batches=10,
    ),
)  # fmt: skip

# In the order of a table.
EDITORS: dict[str, Editor] = {
    editor.name: editor
    for editor in (
        Editor("none", "no edit", "reference", NoEditAgent),
        Editor(
            "fine-tuning", "gradient", "reference", FineTuningAgent, FineTuningConfig, env=ANSWER,
            step_size=("step_size",), presentations=PRESENTATIONS, strength=STEP_SIZE,
        ),
        Editor(
            "ft-l", "FT-L", "reference", FTLAgent, FTLConfig, env=ANSWER, step_size=("learning_rate", "epsilon"),
            strength=BOX,
        ),
        Editor(
            "ft-m", "FT-M", "reference", FTMAgent, FTMConfig, env=ANSWER, step_size=("learning_rate", "epsilon"),
            strength=BOX,
        ),
        Editor(
            "crispedit", "CrispEdit", "training-free", CrispEditAgent, CrispEditConfig, env=ANSWER,
            step_size=("learning_rate",), strength=LEARNING_RATE,
        ),
        ROME,
        _anchored(ROME),
        MEMIT,
        _recursive(MEMIT),
        _anchored(MEMIT),
        _located(PRUNEAgent, "PRUNE", COVARIANCE),
        _located(RECTAgent, "RECT", COVARIANCE),
        ALPHAEDIT,
        _anchored(ALPHAEDIT),
        MEND,
        _starred(MEND),
        MALMEN,
        _starred(MALMEN),
        _textual(MALMEN),
        _recursive(MALMEN),
        _textual(_recursive(MALMEN)),
        DAFNET,
        ULTRAEDIT,
        _textual(ULTRAEDIT),
        _recursive(ULTRAEDIT),
        _textual(_recursive(ULTRAEDIT)),
        STABLEEDIT,
        _textual(STABLEEDIT),
        _recursive(STABLEEDIT),
        _textual(_recursive(STABLEEDIT)),
        _trajectory(
            "mend+rledit", "MEND+RLEdit", mend_rledit, env={"token": "all", "steps_per_batch": 1}, training=LONG,
        ),
        _trajectory("malmen+rledit", "MALMEN+RLEdit", malmen_rledit, env=ANSWER, training=LONG),
        _trajectory(  # exactly the published training
            "rledit-paper", "RLEdit (paper)", rledit_paper, env=ANSWER,
            training=Training(
                num_batches=None, trajectories=1,
                reward={"locality_reference": "previous", "regularisation_gradient": False},
            ),
        ),
        RLEDIT_UNTRAINED,
        _restrained(RLEDIT_UNTRAINED),
        RLEDIT,
        _restrained(RLEDIT),
    )
}  # fmt: skip
SHORT_NAMES = {"recursion": "ultraedit+recursion"}


def find_editor(name: str) -> Editor:
    """The editor of this name.

    Raises:
        ValueError: the name is unknown.
    """
    editor = EDITORS.get(SHORT_NAMES.get(name, name))
    if editor is None:
        close = difflib.get_close_matches(name, [*EDITORS, *SHORT_NAMES], n=1)
        suggestion = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"editor {name!r} is unknown{suggestion}; editors are {', '.join([*EDITORS, *SHORT_NAMES])}")
    return editor


def training_free_editors() -> list[str]:
    """Names of the editors that edit without training."""
    return [name for name, editor in EDITORS.items() if editor.training_free]


def chosen_editors(names: Iterable[str]) -> list[Editor]:
    """Editors by name, group or "all", each once, in the table's order.

    Raises:
        ValueError: a name is neither an editor's nor a group's.
    """
    names = [SHORT_NAMES.get(name, name) for name in names]
    groups = list(dict.fromkeys(editor.group for editor in EDITORS.values()))
    unknown = [name for name in names if name != "all" and name not in (*EDITORS, *groups)]
    if unknown:
        raise ValueError(
            f"editor {unknown[0]!r} is unknown; editors are {', '.join(EDITORS)}; groups are {', '.join(groups)}, all"
        )
    return [e for e in EDITORS.values() if "all" in names or e.name in names or e.group in names]
