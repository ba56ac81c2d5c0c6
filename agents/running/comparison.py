"""Compares editors on the same streams and the same LLM, cell by cell; every finished cell is written to disk."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
from tqdm.auto import tqdm

from agents.base import Agent, NotApplicable
from agents.rledit.agent import RLEditAgent
from agents.rledit.policy import HypernetworkPolicy
from agents.running.claims import Claims
from agents.running.editing import edit_stream
from agents.running.editors import ENVIRONMENT, Editor, Training
from agents.running.saved import agent_settings, find_agent, load_agent
from agents.running.views import Views as Views
from rledit_env.evaluation.general.scored_text import drifts, scored_texts
from rledit_env.evaluation.metrics import METRICS_VERSION, check_metrics, evaluate
from rledit_env.files import write_text
from rledit_env.interface import Environment, editing_env
from rledit_env.knowledge import KnowledgeDataset, held_out
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.reward import RewardConfig
from rledit_env.type_aliases import JsonObject, Settings

SHOWN_SCORES = ("efficacy", "generalization", "specificity", "mean")  # printed when a cell is finished
FINISHED = "finished.json"  # in the folder of a trained editor


@dataclass(frozen=True)
class Setting:
    """The settings that all editors of a comparison share.

    Attributes:
        env_id: the environment's id.
        test: the facts that are edited and scored.
        training: returns the facts that editors train on; called when the first editor needs them.
        num_batches, batch_size: T and n.
        edit_modules: modules that all editors edit; None leaves the choice to each editor.
        generate: whether to decode freely as well (slower).
        metrics: how the facts are scored (see `rledit_env.evaluation.metrics.evaluate`).
        text: a file of human-written text to measure the divergence on; None takes the help topics of Python.
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
    """The cells of a comparison: one for each editor and stream, each a file under ``out/cells``.

    Existing cells are not computed again, and an interrupted training resumes from its checkpoint.

    Args:
        setting: the settings that all editors share.
        views: the LLM.
        out: the comparison's folder.
        progress_bar: show progress bars and scores.
        trainer: another comparison that trains the editors; None trains them here.
        claims: divides the cells with other processes that compute the same comparison; None computes all of them here.
            A comparison with a ``trainer`` has that one's claims.
    """

    def __init__(
        self, setting: Setting, views: Views, out: str | Path, progress_bar: bool = True,
        trainer: Comparison | None = None, claims: Claims | None = None,
    ) -> None:  # fmt: skip
        self.setting, self.views, self.out, self.progress_bar = setting, views, Path(out), progress_bar
        self.trainer = trainer or self
        self.claims: Claims | None = claims if trainer is None else trainer.claims
        self.claims_root: Path = self.out if trainer is None else trainer.claims_root
        self._texts: dict[str, list[Passage]] | None = None  # for the divergences; the same for every editor

    def cell_path(self, editor: Editor, seed: int) -> Path:
        return self.out / "cells" / editor.label / f"seed-{seed}.json"

    def cell(self, editor: Editor, seed: int) -> JsonObject | None:
        """A finished cell; None if it is not finished.

        Raises:
            ValueError: the cell was computed with other settings of the editor, other metrics, or another version of
                the metrics.
        """
        path = self.cell_path(editor, seed)
        if not path.exists():
            return None
        cell: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        if "not_applicable" not in cell:
            _check_scores(path, cell, self.setting.metrics)
        present, saved = editor.description(), _with_class_names(cell["editor"])
        different = sorted(k for k in present | saved if present.get(k) != saved.get(k))
        if different:
            raise ValueError(f"{path} was computed with another {', '.join(different)} of the editor; delete it to "
                             "compute it anew, or give another folder")
        return cell

    def run(self, editor: Editor, seeds: Sequence[int]) -> None:
        """Compute the editor's missing cells that no other process computes: build the agent, train it if necessary,
        and edit one stream a seed."""
        prepared: tuple[Agent, Environment, float | None] | None = None
        reason = None
        try:
            for seed in seeds:
                with self._claimed(editor, seed) as held:
                    if not held:
                        continue
                    try:
                        if reason is None:
                            prepared = prepared or self._prepare(editor)
                            agent, env, one_off = prepared
                            result = {**self._measure(editor, agent, env, seed), "one_off_seconds": one_off}
                            self._print_scores(editor, seed, result)  # first, since a full disk may prevent writing
                            self._write(editor, seed, result)
                            continue
                    except NotApplicable as error:
                        reason = str(error)
                    self._write(editor, seed, {"not_applicable": reason})
        finally:
            self.views.restore()

    def claim_name(self, editor: Editor, seed: int) -> str:
        """The name of a cell's claim."""
        return self.cell_path(editor, seed).relative_to(self.claims_root).with_suffix("").as_posix()

    @contextmanager
    def _claimed(self, editor: Editor, seed: int) -> Iterator[bool]:
        """Context in which a missing cell is this process's to compute; False if it is finished or another's."""
        if self.cell(editor, seed) is not None:
            yield False
        elif self.claims is None:
            yield True
        else:
            name = self.claim_name(editor, seed)
            held = self.claims.claim(name)
            try:
                yield held and self.cell(editor, seed) is None  # it may have been finished before it was claimed
            finally:
                self.claims.release(name)

    def _print_scores(self, editor: Editor, seed: int, result: JsonObject) -> None:
        if self.progress_bar:
            scores = ", ".join(f"{name} {result[name]:.1f}" for name in SHOWN_SCORES if result[name] is not None)
            tqdm.write(f"{editor.title}, stream {seed}: {scores}", file=sys.stderr)

    def _write(self, editor: Editor, seed: int, result: JsonObject) -> None:
        cell = {"seed": seed, **result, "editor": editor.description()}
        write_text(self.cell_path(editor, seed), json.dumps(cell, indent=1) + "\n")

    # -- preparing an editor -------------------------------------------------------------------------------------

    def _prepare(self, editor: Editor) -> tuple[Agent, gym.Env, float | None]:
        """The editor's agent, the environment that it edits in, and the seconds of its training or statistics (None if
        they are unknown)."""
        settings = dict(editor.env)
        if editor.saved is not None:
            saved_settings = agent_settings(find_agent(editor.saved, self.setting.test.kind))["environment"]
            settings = {k: saved_settings[k] for k in ENVIRONMENT if k in saved_settings} | settings
        lm = self.views.of(replace(editor, env=settings), self.setting.edit_modules)
        settings.pop("edit_modules", None)
        env = self._env(lm, self.setting.test, self.setting.num_batches, self.setting.batch_size, settings)
        if editor.saved is not None:
            return self._ready(load_agent(find_agent(editor.saved, self.setting.test.kind), env), editor), env, None
        if editor.training is None:
            agent = editor.agent_class()(env, editor.configuration())
            started = time.perf_counter()
            agent.learn(0, progress_bar=self.progress_bar)
            # Statistics may come from the cache of an earlier run; the agent then knows how long they took.
            measured = time.perf_counter() - started
            return agent, env, float(getattr(agent, "one_off_seconds", measured))
        trainer = editor.trainer or editor
        train_env, folder, seconds = self.trainer._train(trainer, lm, settings)
        agent = editor.agent_class().load(folder, train_env)
        if agent.config != trainer.configuration():  # for example, an earlier version's defaults
            raise ValueError(f"the agent in {folder} was trained with other settings of {trainer.name!r} than it has "
                             f"now; delete {folder.parent} to train it anew, or give another folder")
        agent.config = editor.configuration()
        agent.set_env(env)
        return self._ready(agent, editor), env, seconds

    def _ready(self, agent: Agent, editor: Editor) -> Agent:
        """A trained agent at the editor's strength and with its restraint, and with the curvature of text that it
        uses."""
        if isinstance(agent, HypernetworkPolicy):
            energy = editor.configuration().network.crisp_energy
            if editor.saved is not None and energy:
                agent.restrain(energy)
            if agent.wants_curvature:
                agent.take_curvature(self.progress_bar)
        return scaled(agent, editor)

    def _env(
        self, lm: EditableLM, data: KnowledgeDataset, num_batches: int, batch_size: int, settings: Settings,
        reward: RewardConfig | str = "none", reward_gradient: bool = False,
    ) -> Environment:  # fmt: skip
        return gym.make(
            self.setting.env_id, model=lm, data=data, num_batches=num_batches, batch_size=batch_size, reward=reward,
            reward_gradient=reward_gradient, array_backend="torch", disable_env_checker=True, **settings,
        )

    def _train(self, editor: Editor, lm: EditableLM, settings: Settings) -> tuple[Environment, Path, float]:
        """Train an editor, or resume its training, unless it is finished; wait for another process that trains it.

        Returns:
            The training environment, the agent's folder, and the seconds of training over all interruptions.
        """
        training, folder = editor.training, self.out / "trained" / editor.name
        assert training is not None
        size = training.batch_size or self.setting.batch_size
        if training.steps_per_batch is not None:
            settings = {**settings, "steps_per_batch": training.steps_per_batch}
        length = self.setting.num_batches if training.num_batches is None else training.num_batches
        facts, selection = held_out(self.setting.training())
        env = self._env(lm, facts, length, size, settings, editor.reward(), reward_gradient=True)
        finished = folder / FINISHED
        with self._turn(f"trained/{editor.name}", finished.exists):
            if not finished.exists():
                self._learn(editor, training, env, selection, settings, folder)
        lm.restore()
        return env, folder / "agent", float(json.loads(finished.read_text(encoding="utf-8"))["seconds"])

    def _learn(
        self, editor: Editor, training: Training, env: Environment, selection: KnowledgeDataset, settings: Settings,
        folder: Path,
    ) -> None:  # fmt: skip
        """Train an editor in ``env``, and save it; ``selection``: the facts that its checkpoint is chosen on."""
        lm, clock = editing_env(env).lm, _Clock(folder / "seconds.json")
        agent = editor.agent_class()(env, editor.configuration(), seed=0)
        eval_env = calibration_env = None
        if training.select_batches:
            eval_env = self._env(lm, selection, training.select_batches, self.setting.batch_size, settings)
        if training.calibrate_batches:
            batches = training.calibrate_batches
            calibration_env = self._env(lm, selection, batches, self.setting.batch_size, settings)
        agent.learn(
            training.trajectories * editing_env(env).episode_steps, callback=clock, progress_bar=self.progress_bar,
            log_dir=folder, eval_env=eval_env, eval_every=training.eval_every, patience=training.patience,
        )  # fmt: skip
        if calibration_env is not None:
            agent.calibrate(calibration_env)
        agent.save(folder / "agent")
        write_text(folder / FINISHED, json.dumps({"seconds": clock.seconds, "updates": agent.updates}) + "\n")

    def _turn(self, name: str, done: Callable[[], bool]) -> AbstractContextManager[object]:
        """Context in which no other process does this."""
        return nullcontext() if self.claims is None else self.claims.turn(name, done)

    # -- editing -------------------------------------------------------------------------------------------------

    def _measure(self, editor: Editor, agent: Agent, env: Environment, seed: int) -> JsonObject:
        """Edit one stream and score all its facts at the end, including those that came after the LLM broke."""
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
        """The divergence from the unedited LLM in nats a token, on its own text ("kl"), on human-written text
        ("kl_human") and on answers in its chat template ("kl_chat"); None if it is not finite or there is no text."""
        if self._texts is None:
            self._texts = scored_texts(lm, self.setting.text)
        by_text = {key: drift.kl for key, drift in drifts(lm, self._texts).items()}
        columns = {"kl": by_text.get("self"), "kl_human": by_text.get("human"), "kl_chat": by_text.get("chat")}
        return {key: kl if kl is not None and math.isfinite(kl) else None for key, kl in columns.items()}


def scaled(agent: Agent, editor: Editor) -> Agent:
    """Multiply a trained agent's step sizes by the editor's factor, and return the agent.

    Raises:
        ValueError: the agent has no step sizes.
    """
    if editor.factor != 1:
        if not isinstance(agent, RLEditAgent):
            raise ValueError(f"editor {editor.name!r} is a trained {type(agent).__name__}, which has no step sizes to "
                             f"multiply by {editor.factor:g}; try it with --strengths 1 only")
        agent.scale_step_sizes(editor.factor)
    return agent


def _with_class_names(description: JsonObject) -> JsonObject:
    """An editor's description with its classes' names alone; earlier versions wrote "module:name"."""
    classes = {}
    for key in ("agent", "config"):
        path = description.get(key)
        classes[key] = path and path.rpartition(":")[2]
    trainer = description.get("trainer")
    return {**description, **classes, "trainer": _with_class_names(trainer) if trainer else None}


def _check_scores(path: Path, cell: JsonObject, metrics: str) -> None:
    """Check that a cell's scores are comparable with those of this version and these ``metrics``.

    Raises:
        ValueError: they are not.
    """
    mend = f"delete {path} to compute it anew, or give another folder"
    version = cell.get("metrics_version", 1)
    if version != METRICS_VERSION:
        raise ValueError(f"{path} holds scores of metrics version {version}, which do not compare with those of "
                         f"version {METRICS_VERSION} (docs/metrics.md); {mend}")
    if cell["metrics"] != metrics:
        raise ValueError(f"{path} was scored with metrics {cell['metrics']!r}, not {metrics!r}; {mend}")


class _Clock:
    """A training callback that writes the seconds spent so far to a file, summed over all interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def __call__(self, numbers: object) -> None:
        write_text(self.path, json.dumps(self.seconds) + "\n")


def check_disjoint(training: KnowledgeDataset, test: KnowledgeDataset) -> None:
    """Check that no scored fact is trained on.

    Single facts in both sets, which published splits have, give a warning.

    Raises:
        ValueError: most facts of one set are in the other; they are probably one file.
    """
    training_pairs = {(r.prompt, r.target) for r in training}
    both = sum((r.prompt, r.target) in training_pairs for r in test)
    if 2 * both > min(len(training), len(test)):
        raise ValueError(f"the facts to train on ({training.source}) are those to be scored ({test.source}): {both} "
                         "are in both; give the training facts with --train-data")
    if both:
        warnings.warn(f"{both} facts of {test.source} are among those to train on ({training.source})", stacklevel=2)
