"""Runs editors one after the other on the same streams of the same LLM, cell by cell, each kept once it is finished."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from tqdm.auto import tqdm

from agents.base import Agent, NotApplicable
from agents.locate_then_edit.locate import LocateAgent
from agents.rledit.agent import RLEditAgent
from agents.running.editing import edit_stream
from agents.running.editors import ENVIRONMENT, Editor
from agents.running.saved import agent_settings, find_agent, load_agent
from rledit_env.evaluation.general.scored_text import drifts, scored_texts
from rledit_env.evaluation.metrics import METRICS_VERSION, check_metrics, evaluate
from rledit_env.files import write_text
from rledit_env.interface import editing_env
from rledit_env.knowledge import KnowledgeDataset, held_out
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.loading.registry import default_edit_modules

SAID = ("efficacy", "generalization", "specificity", "mean")  # of a cell's scores, as soon as they are known


class Views:
    """Editable views of one LLM, which is loaded once; only one view is alive at a time, and it begins pre-trained.

    Args:
        model: registry name, hub id or folder.
        dtype, device: as for :meth:`EditableLM.load`, and so is ``source`` (revision, trust_remote_code).
    """

    def __init__(self, model: str, dtype: str = "auto", device: str = "auto", **source: Any) -> None:
        self.model, self.dtype, self.device, self.source = model, dtype, device, source
        self._view: EditableLM | None = None
        self._patterns: tuple[str, ...] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the LLM has been loaded."""
        return self._view is not None

    def get(self, edit_modules: Sequence[str] | str | None) -> EditableLM:
        """The view with these edited modules (None: the model's default ones), pre-trained and with empty caches."""
        patterns = (edit_modules,) if isinstance(edit_modules, str) else tuple(edit_modules or ()) or None
        self.restore()
        if self._view is None:
            self._view = EditableLM.load(self.model, patterns, self.dtype, self.device, **self.source)
        elif patterns != self._patterns:
            model, tokenizer = self._view.model, self._view.tokenizer
            self._view = None  # its copies of the weights are gone before the new ones are made
            wanted = patterns or default_edit_modules(self.model, model)
            revision = self.source.get("revision")
            self._view = EditableLM(model, tokenizer, wanted, self.model, revision=revision, optimize=True)
        self._patterns = patterns
        return self._view

    def of(self, editor: Editor, edit_modules: Sequence[str] | str | None = None) -> EditableLM:
        """The view that an editor edits: of these modules, else of those that it names, else of its method's default
        ones."""
        modules = edit_modules or editor.env.get("edit_modules")
        agent = editor.agent_class()
        if modules is None and issubclass(agent, LocateAgent):
            modules = agent.default_modules(self.get(None))
        return self.get(modules)

    def restore(self) -> None:
        """Make the LLM the pre-trained one, with empty caches, so that the next one finds what the first one found."""
        if self._view is not None:
            self._view.restore()
            self._view.prefix_cache.clear()
            self._view.reference_cache.clear()


@dataclass(frozen=True)
class Setting:
    """What all editors of a comparison share.

    Attributes:
        env_id: the environment.
        test: the facts that are edited and scored.
        training: gives the facts that editors train on; called when the first one needs them.
        num_batches, batch_size: T and n.
        edit_modules: modules that all edit; None leaves the choice to each editor.
        generate: whether to decode freely as well (slower).
        metrics: how the facts are scored (see `rledit_env.evaluation.metrics.evaluate`).
        text: a file of human-written text that divergence is measured on, too; None takes the help topics of Python.
    """

    env_id: str
    test: KnowledgeDataset
    training: Callable[[], KnowledgeDataset]
    num_batches: int
    batch_size: int
    edit_modules: tuple[str, ...] | None = None
    generate: bool = True
    metrics: str = "paper"
    text: Path | None = None

    def __post_init__(self) -> None:
        check_metrics(self.metrics)


class Comparison:
    """The cells of a comparison: one an editor and stream, each a file under ``out/cells``.

    A cell that is there is not computed again; a training that was interrupted goes on from its checkpoint.

    Args:
        setting: what all editors share.
        views: the LLM.
        out: the comparison's folder.
        progress_bar: show what is being done.
        trainer: another comparison whose trained editors are taken, and trained there if need be; None trains here.
    """

    def __init__(
        self, setting: Setting, views: Views, out: str | Path, progress_bar: bool = True,
        trainer: Comparison | None = None,
    ) -> None:  # fmt: skip
        self.setting, self.views, self.out, self.progress_bar = setting, views, Path(out), progress_bar
        self.trainer = trainer or self
        self._texts: dict[str, list[Passage]] | None = None  # of the divergences; the same for every editor

    def cell_path(self, editor: Editor, seed: int) -> Path:
        return self.out / "cells" / editor.label / f"seed-{seed}.json"

    def cell(self, editor: Editor, seed: int) -> dict[str, Any] | None:
        """A finished cell; None if it is not finished.

        Raises:
            ValueError: it was computed with other settings of the editor, or scored by another version of the metrics
                or otherwise.
        """
        path = self.cell_path(editor, seed)
        if not path.exists():
            return None
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "not_applicable" not in cell:
            _check_scores(path, cell, self.setting.metrics)
        mine, theirs = editor.description(), _by_name(cell["editor"])
        different = sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
        if different:
            raise ValueError(f"{path} was computed with another {', '.join(different)} of the editor; delete it to "
                             "compute it anew, or give another folder")
        return cell

    def run(self, editor: Editor, seeds: Sequence[int]) -> None:
        """Compute the editor's cells that are missing: build it, train it if need be, and edit a stream a seed."""
        missing = [seed for seed in seeds if self.cell(editor, seed) is None]
        if not missing:
            return
        try:
            agent, env, one_off = self._ready(editor)
            for seed in missing:
                result = {**self._measure(editor, agent, env, seed), "one_off_seconds": one_off}
                self._say(editor, seed, result)  # before it is written, which a full disk may prevent
                self._write(editor, seed, result)
        except NotApplicable as reason:
            for seed in missing:
                self._write(editor, seed, {"not_applicable": str(reason)})
        finally:
            self.views.restore()

    def _say(self, editor: Editor, seed: int, result: dict[str, Any]) -> None:
        if self.progress_bar:
            scores = ", ".join(f"{name} {result[name]:.1f}" for name in SAID if result[name] is not None)
            tqdm.write(f"{editor.title}, stream {seed}: {scores}", file=sys.stderr)

    def _write(self, editor: Editor, seed: int, result: dict[str, Any]) -> None:
        cell = {"seed": seed, **result, "editor": editor.description()}
        write_text(self.cell_path(editor, seed), json.dumps(cell, indent=1) + "\n")

    # -- getting an editor ready ---------------------------------------------------------------------------------

    def _ready(self, editor: Editor) -> tuple[Agent, gym.Env, float | None]:
        """The editor's agent, the environment that it edits in, and the seconds that it took once and for all (None if
        nobody knows)."""
        settings = dict(editor.env)
        if editor.saved is not None:
            trained = agent_settings(find_agent(editor.saved, self.setting.test.kind))["environment"]
            settings = {k: trained[k] for k in ENVIRONMENT if k in trained} | settings
        lm = self.views.of(replace(editor, env=settings), self.setting.edit_modules)
        settings.pop("edit_modules", None)
        env = self._env(lm, self.setting.test, self.setting.num_batches, self.setting.batch_size, settings)
        if editor.saved is not None:
            return scaled(load_agent(find_agent(editor.saved, self.setting.test.kind), env), editor), env, None
        if editor.training is None:
            agent = editor.agent_class()(env, editor.configuration())
            started = time.perf_counter()
            agent.learn(0, progress_bar=self.progress_bar)
            # Statistics may have been kept from an earlier run; the agent then knows what they took.
            measured = time.perf_counter() - started
            return agent, env, float(getattr(agent, "one_off_seconds", measured))
        trainer = editor.trainer or editor
        train_env, folder, seconds = self.trainer._trained(trainer, lm, settings)
        agent = editor.agent_class().load(folder, train_env)
        if agent.config != trainer.configuration():  # such as an earlier version's defaults
            raise ValueError(f"the agent in {folder} was trained with other settings of {trainer.name!r} than it has "
                             f"now; delete {folder.parent} to train it anew, or give another folder")
        agent.config = editor.configuration()
        agent.set_env(env)
        return scaled(agent, editor), env, seconds

    def _env(
        self, lm: EditableLM, data: KnowledgeDataset, num_batches: int, batch_size: int, settings: dict[str, Any],
        reward: Any = "none", reward_gradient: bool = False,
    ) -> gym.Env:  # fmt: skip
        return gym.make(
            self.setting.env_id, model=lm, data=data, num_batches=num_batches, batch_size=batch_size, reward=reward,
            reward_gradient=reward_gradient, array_backend="torch", disable_env_checker=True, **settings,
        )

    def _trained(self, editor: Editor, lm: EditableLM, settings: dict[str, Any]) -> tuple[gym.Env, Path, float]:
        """Train an editor, or go on with its training, unless that is done: the environment that it trains in, the
        agent's folder, and the seconds that its training took, over all interruptions."""
        training, folder = editor.training, self.out / "trained" / editor.name
        assert training is not None
        facts, selection = held_out(self.setting.training())
        size = training.batch_size or self.setting.batch_size
        if training.steps_per_batch is not None:
            settings = {**settings, "steps_per_batch": training.steps_per_batch}
        length = self.setting.num_batches if training.num_batches is None else training.num_batches
        env = self._env(lm, facts, length, size, settings, editor.reward(), reward_gradient=True)
        finished = folder / "finished.json"
        if not finished.exists():
            clock = _Clock(folder / "seconds.json")
            agent = editor.agent_class()(env, editor.configuration(), seed=0)
            eval_env = longer = None
            if training.select_batches:
                eval_env = self._env(lm, selection, training.select_batches, self.setting.batch_size, settings)
            if training.calibrate_batches:
                longer = self._env(lm, selection, training.calibrate_batches, self.setting.batch_size, settings)
            agent.learn(
                training.trajectories * editing_env(env).episode_steps, callback=clock, progress_bar=self.progress_bar,
                log_dir=folder, eval_env=eval_env, eval_every=training.eval_every, patience=training.patience,
            )  # fmt: skip
            if longer is not None:
                agent.calibrate(longer)
            agent.save(folder / "agent")
            write_text(finished, json.dumps({"seconds": clock.seconds, "updates": agent.updates}) + "\n")
        lm.restore()
        return env, folder / "agent", float(json.loads(finished.read_text(encoding="utf-8"))["seconds"])

    # -- editing -------------------------------------------------------------------------------------------------

    def _measure(self, editor: Editor, agent: Agent, env: gym.Env, seed: int) -> dict[str, Any]:
        """Edit one stream and score all its facts at the end, those too that came after the LLM broke."""
        inner = editing_env(env)
        inner.lm.prefix_cache.clear()
        inner.lm.reference_cache.clear()
        agent.reset()
        total = self.setting.num_batches * self.setting.batch_size
        with tqdm(total=total, desc=f"{editor.title}, stream {seed}", unit="fact", disable=not self.progress_bar,
                  leave=False) as bar:
            log = edit_stream(env, agent, progress=bar.update, seed=seed)
        records = [record for t in range(self.setting.num_batches) for record in inner.stream.batch(t)]
        setting = self.setting
        metrics = evaluate(inner.lm, records, inner.dataset.kind, generate=setting.generate, metrics=setting.metrics)
        return {
            **metrics.as_dict(),
            "metrics": setting.metrics,
            "metrics_version": METRICS_VERSION,
            **self._divergences(inner.lm),
            "seconds_per_fact": log.seconds_per_fact,
            "drift": log.drift,
            "diverged": log.diverged,
            "facts": total,
            "edited_facts": log.facts,
            "modules": len(inner.lm.module_shapes),
            "dtype": str(inner.lm.dtype).removeprefix("torch."),
            "device": str(inner.lm.device),
        }

    def _divergences(self, lm: EditableLM) -> dict[str, float | None]:
        """The divergence from the unedited LLM in nats a token, on text of its own ("kl"), that people wrote and on
        answers in its chat template; None where it is not finite, or there is no such text."""
        if self._texts is None:
            self._texts = scored_texts(lm, self.setting.text)
        found = {key: drift.kl for key, drift in drifts(lm, self._texts).items()}
        columns = {"kl": found.get("self"), "kl_human": found.get("human"), "kl_chat": found.get("chat")}
        return {key: kl if kl is not None and math.isfinite(kl) else None for key, kl in columns.items()}


def scaled(agent: Agent, editor: Editor) -> Agent:
    """A trained agent whose step sizes are multiplied by the editor's factor.

    Raises:
        ValueError: it has none.
    """
    if editor.factor != 1:
        if not isinstance(agent, RLEditAgent):
            raise ValueError(f"editor {editor.name!r} is a trained {type(agent).__name__}, which has no step sizes to "
                             f"multiply by {editor.factor:g}; try it with --strengths 1 only")
        agent.scale_step_sizes(editor.factor)
    return agent


def _by_name(described: dict[str, Any]) -> dict[str, Any]:
    """An editor's description with its classes by name alone; earlier versions gave "module:name"."""
    classes = {key: place and place.rpartition(":")[2] for key in ("agent", "config") for place in [described.get(key)]}
    trainer = described.get("trainer")
    return {**described, **classes, "trainer": _by_name(trainer) if trainer else None}


def _check_scores(path: Path, cell: dict[str, Any], metrics: str) -> None:
    """Make sure that a cell's scores may stand beside those of this version with these ``metrics``.

    Raises:
        ValueError: they may not.
    """
    mend = f"delete {path} to compute it anew, or give another folder"
    version = cell.get("metrics_version", 1)
    if version != METRICS_VERSION:
        raise ValueError(f"{path} holds scores of metrics version {version}, which do not compare with those of "
                         f"version {METRICS_VERSION} (docs/metrics.md); {mend}")
    if cell["metrics"] != metrics:
        raise ValueError(f"{path} was scored with metrics {cell['metrics']!r}, not {metrics!r}; {mend}")


class _Clock:
    """Seconds spent so far, over all runs of an interrupted training; a callback that keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def __call__(self, numbers: Any) -> None:
        write_text(self.path, json.dumps(self.seconds) + "\n")


def check_disjoint(training: KnowledgeDataset, test: KnowledgeDataset) -> None:
    """Make sure that nothing is trained on that is scored.

    Raises:
        ValueError: most facts of one are in the other: they are one file.

    Warns of single facts that are in both, as published splits have some.
    """
    seen = {(r.prompt, r.target) for r in training}
    both = sum((r.prompt, r.target) in seen for r in test)
    if 2 * both > min(len(training), len(test)):
        raise ValueError(f"the facts to train on ({training.source}) are those to be scored ({test.source}): {both} "
                         "are in both; give the training facts with --train-data")
    if both:
        warnings.warn(f"{both} facts of {test.source} are among those to train on ({training.source})", stacklevel=2)
