"""The editors by name: what each one is, how it is built, and with which hyperparameters for which model."""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import Component, Efficacy, Generalization, Locality, RewardConfig, TextComponent

CONFIGS = Path(__file__).parents[1] / "configs"
# Settings of the environment that an editor may choose.
ENVIRONMENT = ("edit_modules", "token", "steps_per_batch", "present_until")
COMPONENTS: dict[str, type[Component] | type[TextComponent]] = {
    "efficacy": Efficacy, "generalization": Generalization, "locality": Locality, "own_text": OwnText,
    "continuation": Continuation,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How long and on what an editor with something to learn is trained.

    Attributes:
        num_batches: batches of a training stream; None is as many as are edited.
        batch_size: facts of a training batch; None is as many as are edited at once.
        steps_per_batch: presentations of a batch; None is as many as when it edits.
        trajectories: training streams.
        reward: the reward's components by name and weight, and any other of `RewardConfig`'s numbers; "constraint"
            holds a `Constraint`'s.
        select_batches: batches of the held-out streams that choose the best checkpoint; 0 takes the last.
        eval_every: updates between two such evaluations.
        patience: evaluations without a better score before training ends.
        calibrate_batches: afterwards the step sizes are suited to held-out streams of so many batches; 0 leaves them.
    """

    num_batches: int | None = 5
    batch_size: int | None = None
    steps_per_batch: int | None = None
    trajectories: int = 20
    reward: Mapping[str, Any] = field(default_factory=dict)
    select_batches: int = 0
    eval_every: int = 10
    patience: int = 4
    calibrate_batches: int = 0


@dataclass(frozen=True)
class Strength:
    """What makes an editor edit more or less, as one factor: 2 is twice as strongly.

    Where no number is named, it is the step sizes that training gave that are multiplied
    (`RLEditAgent.scale_step_sizes`), so that nothing is trained again.

    Attributes:
        multiplied: the numbers of the configuration that are multiplied by the factor, such as a step size; those of a
            nested configuration with a dot, "value.clamp".
        divided: those that are divided by it: weights of what is to stay as it is, such as λ.
        factors: what `rledit compare --curve` tries.
    """

    multiplied: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def of_training(self) -> bool:
        """Whether it is the step sizes that training gave."""
        return not self.multiplied and not self.divided

    def scaled(self, config: Any, factor: float) -> dict[str, Any]:
        """The numbers of a configuration with this factor, nested as :func:`changed` takes them."""
        powers = [(name, factor) for name in self.multiplied] + [(name, 1 / factor) for name in self.divided]
        numbers: dict[str, Any] = {}
        for name, power in powers:
            *parents, last = name.split(".")
            inner, place = config, numbers
            for parent in parents:
                inner, place = getattr(inner, parent), place.setdefault(parent, {})
            place[last] = getattr(inner, last) * power
        return numbers


@dataclass(frozen=True)
class Editor:
    """An editor that can be compared.

    Attributes:
        name: what the command line calls it.
        title: what a table calls it.
        group: which editors it belongs with.
        agent: its class, "module:name", built as ``agent(env, config, seed=seed)``.
        config: its configuration's class, or a function that gives the default configuration, "module:name".
        env: settings of the environment; without edit_modules the model's default ones are edited, and a saved agent
            keeps those that it was trained with.
        settings: what of the default configuration is otherwise, by (nested) name.
        training: how it is trained; None if there is nothing to train, only perhaps statistics to gather, which is
            then ``learn(0)``'s work.
        trained_as: it goes on from what this editor's training gave, and has its settings beside its own.
        trainer: that editor, as it is configured.
        variant_of: what a file says of this editor's settings holds for it too, beside what it says of its own.
        saved: a trained agent to take instead, as `agents.find_agent` knows it.
        step_size: which numbers of its configuration scale its updates; the first is called its step size, the others
            keep their ratio to it. Empty where there is no such number.
        presentations: how often a batch may be presented: what a search of the step size tries, in this order.
        strength: what makes it edit more or less strongly; None where nothing does.
        factor: how strongly it edits, as a factor of its strength as it is configured, or trained.
    """

    name: str
    title: str
    group: str
    agent: str
    config: str | None = None
    env: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Training | None = None
    trained_as: str | None = None
    trainer: Editor | None = None
    variant_of: str | None = None
    saved: str | None = None
    step_size: tuple[str, ...] = ()
    presentations: tuple[int, ...] = (1,)
    strength: Strength | None = None
    factor: float = 1.0

    @property
    def label(self) -> str:
        """Its name, with the factor of its strength where that is not 1: what a folder of its results is called."""
        return self.name if self.factor == 1 else f"{self.name}@{self.factor:g}"

    @property
    def scales_trained(self) -> bool:
        """Whether its factor is one of the step sizes that training gave, not of numbers of its configuration."""
        return self.saved is not None or (self.strength is not None and self.strength.of_training)

    @property
    def training_free(self) -> bool:
        """Whether it edits without having been trained."""
        return self.training is None and self.trained_as is None

    def agent_class(self) -> Any:
        return _named(self.agent)

    def configuration(self) -> Any:
        """The configuration that the agent is built with; None for an agent that has none.

        Raises:
            ValueError: a setting is unknown or out of its range.
        """
        if self.config is None:
            _known(self.settings, (), f"editor {self.name!r}, config")
            return None
        config = changed(_named(self.config)(), self.settings, f"editor {self.name!r}, config")
        if self.factor == 1 or self.strength is None or self.scales_trained:
            return config
        place = f"editor {self.name!r} at {self.factor:g} times its strength"
        return changed(config, self.strength.scaled(config, self.factor), place)

    def reward(self) -> RewardConfig:
        """What it is trained with; see :attr:`Training.reward`.

        Raises:
            ValueError: a component or a number is unknown.
        """
        numbers = dict(self.training.reward if self.training else {})
        weights = numbers.pop("components", None)
        if weights is not None:
            _known(weights, COMPONENTS, f"editor {self.name!r}, train.reward.components")
            numbers["components"] = {name: (weight, COMPONENTS[name]()) for name, weight in weights.items()}
        place = f"editor {self.name!r}, train.reward"
        if isinstance(constraint := numbers.get("constraint"), Mapping):
            numbers["constraint"] = changed(Constraint(), constraint, f"{place}.constraint")
        return changed(RewardConfig(), numbers, place)

    def description(self) -> dict[str, Any]:
        """All that its results depend on, as JSON holds it; classes by their names, wherever they lie."""
        left_out = ["title", "group", "trainer", "step_size", "presentations", "strength"]
        if self.factor == 1:  # as the results of earlier versions say nothing of it
            left_out.append("factor")
        described = {k: v for k, v in asdict(self).items() if k not in left_out}
        described |= {k: class_name(described[k]) for k in ("agent", "config")}
        trainer = self.trainer.description() if self.trainer else None
        return json.loads(json.dumps({**described, "trainer": trainer}))


def class_name(place: str | None) -> str | None:
    """What "module:name" names."""
    return None if place is None else place.rpartition(":")[2]


def _trajectory(name: str, title: str, config: str = "agents.rledit:RLEditConfig", **more: Any) -> Editor:
    """A hypernetwork that is trained by the gradient of whole trajectories."""
    return Editor(name, title, "trajectory", "agents.rledit:RLEditAgent", config, strength=TRAINED, **more)


def _starred(editor: Editor) -> Editor:
    """The same network, trained again on the current weights after every third batch (RLEdit, Appendix A.2)."""
    return replace(
        editor, name=f"{editor.name}*", title=f"{editor.title}*", settings={"retrain_every": 3}, training=None,
        trained_as=editor.name,
    )  # fmt: skip


def _recursive(editor: Editor) -> Editor:
    """The same with all earlier keys in its least squares (SimIE, ICML 2025; RLSEdit, arXiv 2601.15686)."""
    made = _variant(editor, "recursion", recursion=True)
    if made.strength == COVARIANCE:  # the whole of what stands against the keys
        made = replace(made, strength=replace(COVARIANCE, divided=("covariance_weight", "anchor")))
    return made


def _anchored(editor: Editor) -> Editor:
    """The same with every value rescaled to the norm that values have in the original model (NAS, arXiv 2602.02543)."""
    return _variant(editor, "nas", norm_anchor=True)


def _textual(editor: Editor) -> Editor:
    """The same with a prior on text in its least squares (see `agents.rledit.text_prior`)."""
    return _variant(editor, "text", text_prior=TEXT_PRIOR)


def _variant(editor: Editor, plugin: str, **settings: Any) -> Editor:
    title = plugin.upper() if plugin == "nas" else plugin
    return replace(
        editor, name=f"{editor.name}+{plugin}", title=f"{editor.title}+{title}",
        settings={**editor.settings, **settings}, variant_of=editor.variant_of or editor.name,
    )  # fmt: skip


def _located(name: str, title: str, strength: Strength) -> Editor:
    """An editor that finds each fact's value at its subject and solves for the weights."""
    return Editor(
        name, title, "locate", f"agents.locate_then_edit:{title}Agent",
        f"agents.locate_then_edit:{title}Config",
        env={"token": "subject", "steps_per_batch": 1}, strength=strength,
    )  # fmt: skip


TRAINED = Strength()
STEP_SIZE = Strength(("step_size",))
BOX = Strength(("learning_rate", "epsilon"))
# How far a value is moved: Adam's steps, and what they may add up to. ROME writes a value whole, whatever it weighs.
VALUE = Strength(("value.learning_rate", "value.clamp"))
# With λ well below kᵀC⁻¹k a value is written whole, so that a smaller λ changes nothing: only larger ones are tried.
COVARIANCE = Strength(divided=("covariance_weight",), factors=(0.1, 0.3, 1.0))
RIDGE = Strength(divided=("ridge",), factors=(0.1, 0.3, 1.0))
TEXT_PRIOR = 300.0  # c: keys of text that weigh as much as the keys of so many facts
ANSWER: Mapping[str, Any] = {"token": "answer", "steps_per_batch": 1}
PRESENTATIONS = (8, 16, 3)  # many weak ones move the rest of an LLM less than few strong ones
LONG = Training(num_batches=20, reward={"batch_stride": 5}, select_batches=20)
ROME = _located("rome", "ROME", VALUE)
MEMIT = _located("memit", "MEMIT", COVARIANCE)
ALPHAEDIT = _located("alphaedit", "AlphaEdit", RIDGE)
MEND = Editor(
    "mend", "MEND", "hypernetwork", "agents.hypernetworks:MENDAgent", "agents.hypernetworks:MENDConfig",
    env={"token": "all", "steps_per_batch": 1},
    training=Training(
        num_batches=1, batch_size=1, trajectories=2000,
        reward={
            "components": {"generalization": 0.1, "locality": 1.0}, "backtracking_depth": 0, "regularisation": 0.0
        },
    ),
    strength=TRAINED,
)  # fmt: skip
MALMEN = Editor(
    "malmen", "MALMEN", "hypernetwork", "agents.hypernetworks:MALMENAgent", "agents.hypernetworks:MALMENConfig",
    env=ANSWER,
    training=Training(
        num_batches=1, trajectories=200,
        reward={
            "components": {"generalization": 1.0, "locality": 1.0}, "backtracking_depth": 0, "regularisation": 0.0
        },
    ),
    strength=TRAINED,
)  # fmt: skip
DAFNET = Editor(
    "dafnet", "DAFNet", "hypernetwork", "agents.hypernetworks:DAFNetAgent", "agents.hypernetworks:DAFNetConfig",
    env={"token": "all", "steps_per_batch": 1},
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
    "ultraedit", "UltraEdit", "training-free", "agents.hypernetworks:UltraEditAgent",
    "agents.hypernetworks:UltraEditConfig", env=ANSWER, step_size=("step_size",), presentations=PRESENTATIONS,
    strength=STEP_SIZE,
)  # fmt: skip

# In the order of a table.
EDITORS: dict[str, Editor] = {
    editor.name: editor
    for editor in (
        Editor("none", "no edit", "reference", "agents.fine_tuning:NoEditAgent"),
        Editor(
            "fine-tuning", "gradient", "reference", "agents.fine_tuning:FineTuningAgent",
            "agents.fine_tuning:FineTuningConfig", env=ANSWER, step_size=("step_size",), presentations=PRESENTATIONS,
            strength=STEP_SIZE,
        ),
        Editor(
            "ft-l", "FT-L", "reference", "agents.fine_tuning:FTLAgent", "agents.fine_tuning:FTLConfig", env=ANSWER,
            step_size=("learning_rate", "epsilon"), strength=BOX,
        ),
        Editor(
            "ft-m", "FT-M", "reference", "agents.fine_tuning:FTMAgent", "agents.fine_tuning:FTMConfig", env=ANSWER,
            step_size=("learning_rate", "epsilon"), strength=BOX,
        ),
        ROME,
        _anchored(ROME),
        MEMIT,
        _recursive(MEMIT),
        _anchored(MEMIT),
        _located("prune", "PRUNE", COVARIANCE),
        _located("rect", "RECT", COVARIANCE),
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
        _trajectory(
            "mend+rledit", "MEND+RLEdit", "agents.hypernetworks:mend_rledit",
            env={"token": "all", "steps_per_batch": 1}, training=LONG,
        ),
        _trajectory("malmen+rledit", "MALMEN+RLEdit", "agents.hypernetworks:malmen_rledit", env=ANSWER, training=LONG),
        _trajectory(  # the published training to the letter
            "rledit-paper", "RLEdit (paper)", "agents.rledit:rledit_paper", env=ANSWER,
            training=Training(
                num_batches=None, trajectories=1,
                reward={"locality_reference": "previous", "regularisation_gradient": False},
            ),
        ),
        _trajectory(  # what training starts from: the moments of training facts, and nothing learned
            "rledit-untrained", "RLEdit, untrained", "agents.rledit:rledit_untrained",
            env={"token": "subject", "steps_per_batch": 8, "present_until": 0.8}, training=Training(trajectories=0),
        ),
        _trajectory(
            "rledit", "RLEdit", env={"token": "subject", "steps_per_batch": 5},
            training=Training(
                reward={
                    "components": {"efficacy": 1.0, "generalization": 1.0, "locality": 1.0}, "backtracking_samples": 1,
                    "every_step": False,
                },
                select_batches=10,
            ),
        ),
    )
}  # fmt: skip
SHORT_NAMES = {"recursion": "ultraedit+recursion"}


def find_editor(name: str) -> Editor:
    """The editor of this name.

    Raises:
        ValueError: there is none.
    """
    found = EDITORS.get(SHORT_NAMES.get(name, name))
    if found is None:
        close = difflib.get_close_matches(name, [*EDITORS, *SHORT_NAMES], n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"editor {name!r} is unknown{meant}; editors are {', '.join([*EDITORS, *SHORT_NAMES])}")
    return found


def training_free_editors() -> list[str]:
    """Names of the editors that edit without training."""
    return [name for name, editor in EDITORS.items() if editor.training_free]


def chosen_editors(names: Iterable[str]) -> list[Editor]:
    """Editors by name or group, or "all", in the order of a table, each once.

    Raises:
        ValueError: a name is neither an editor's nor a group's.
    """
    wanted = [SHORT_NAMES.get(name, name) for name in names]
    groups = list(dict.fromkeys(editor.group for editor in EDITORS.values()))
    unknown = [name for name in wanted if name != "all" and name not in (*EDITORS, *groups)]
    if unknown:
        raise ValueError(
            f"editor {unknown[0]!r} is unknown; editors are {', '.join(EDITORS)}; groups are {', '.join(groups)}, all"
        )
    return [e for e in EDITORS.values() if "all" in wanted or e.name in wanted or e.group in wanted]


def find_configs(model: str) -> Path | None:
    """The file of hyperparameters that ships for a model; None if there is none, and the editors' defaults hold."""
    for path in sorted(CONFIGS.glob("*.json")):
        patterns = json.loads(path.read_text(encoding="utf-8"))["models"]
        if any(fnmatch.fnmatch(model.lower(), pattern) for pattern in patterns):
            return path
    return None


def load_configs(path: str | Path | None, kind: str) -> dict[str, dict[str, Any]]:
    """Hyperparameters by editor for a kind of facts, from a file ``{"models": [...], "editors": {name: entry}}``.

    An entry may hold "env", "config", "train" and "saved" (see `Editor`), and "kinds", which says for some kinds of
    facts what is otherwise. "note" is for the reader.

    Raises:
        ValueError: the file is damaged, or a name in it is unknown.
        OSError: it cannot be read.
    """
    if path is None:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["editors"]
        found = {name: merged(entry, entry.get("kinds", {}).get(kind, {})) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no file of hyperparameters ({error!r}); it is {{"editors": {{NAME: {{"env": …, '
                         '"config": …, "train": …}}}}') from error
    _known(found, EDITORS, f"{path}, editors")
    for name, entry in found.items():
        _known(entry, ("env", "config", "train", "saved", "kinds", "note"), f"{path}, editor {name!r}")
    return found


def configured(editor: Editor, entries: Mapping[str, Mapping[str, Any]]) -> Editor:
    """The editor with what the entries of :func:`load_configs` say otherwise.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """
    place, entry = f"editor {editor.name!r}", entries.get(editor.name, {})
    if editor.variant_of is not None:
        entry = merged(entries.get(editor.variant_of, {}), entry)
    saved = entry.get("saved", editor.saved)
    env = {} if saved is not None else dict(editor.env)  # a saved agent knows its own
    settings, training, trainer = dict(editor.settings), editor.training, None
    if editor.trained_as is not None:
        trainer = configured(EDITORS[editor.trained_as], entries)
        training = trainer.training
        env, settings = env | dict(trainer.env), merged(trainer.settings, settings)
    env |= entry.get("env", {})
    _known(env, ENVIRONMENT, f"{place}, env")
    if "train" in entry:
        training = changed(training or Training(), entry["train"], f"{place}, train")
    made = replace(
        editor, env=env, settings=merged(settings, entry.get("config", {})), training=training, trainer=trainer,
        saved=saved,
    )  # fmt: skip
    made.configuration()
    made.reward()
    return made


def configured_step_size(editor: Editor) -> float:
    """The step size that the editor is configured with."""
    return float(getattr(editor.configuration(), editor.step_size[0]))


def with_step_size(editor: Editor, step_size: float, steps_per_batch: int) -> Editor:
    """The editor with this step size and so many presentations of a batch.

    Raises:
        ValueError: it has no step size, or refuses this one.
    """
    if not editor.step_size:
        raise ValueError(f"editor {editor.name!r} has no step size; its strength is its configuration's")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step size is {step_size}; give a positive number")
    config, factor = editor.configuration(), step_size / configured_step_size(editor)
    numbers = {name: getattr(config, name) * factor for name in editor.step_size[1:]} | {editor.step_size[0]: step_size}
    made = replace(
        editor, settings=merged(editor.settings, numbers), env={**editor.env, "steps_per_batch": steps_per_batch},
        factor=1.0,
    )  # fmt: skip
    made.configuration()
    return made


def with_strength(editor: Editor, factor: float) -> Editor:
    """The editor with so many times the strength that it is configured, or was trained, with.

    Raises:
        ValueError: it has no strength, or refuses this one.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"strength is {factor}; give a positive number")
    if factor == 1:
        return editor
    if editor.strength is None:
        raise ValueError(f"editor {editor.name!r} has no strength; nothing makes it edit more or less")
    made = replace(editor, factor=factor, title=f"{editor.title} ×{factor:g}")
    made.configuration()
    return made


def changed(config: Any, values: Mapping[str, Any], place: str) -> Any:
    """A frozen configuration with other values, by name; nested configurations by nested dictionaries.

    Raises:
        ValueError: a name is unknown, or a value is refused.
    """
    _known(values, [f.name for f in fields(config)], place)
    others: dict[str, Any] = {}
    for name, value in values.items():
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            value = changed(current, value, f"{place}.{name}")
        others[name] = tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value
    try:
        return replace(config, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _known(given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any], place: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{place}: {unknown[0]!r} is unknown; known are {', '.join(known) or 'none'}")


def merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the other's values, nested dictionaries merged likewise."""
    result = dict(base)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
