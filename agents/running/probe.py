"""Searches which modules to edit: scores every linear module alone, then runs of neighbouring layers, and compares the
best in a final."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.rledit.agent import RLEditAgent
from agents.rledit.config import Aggregation, HypernetworkConfig, RLEditConfig
from agents.running.editing import edit_stream
from rledit_env.env import LifelongEditEnv
from rledit_env.evaluation.metrics import METRICS_VERSION, Metrics, evaluate
from rledit_env.files import write_text
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.modules import linear_modules
from rledit_env.lm.names import expand_globs, module_kind, module_layer
from rledit_env.lm.self_check import own_pass
from rledit_env.type_aliases import JsonObject

SCORES = ("efficacy", "generalization", "specificity", "mean")
MOST = 2  # number of a record's paraphrases, and of its unrelated facts, that are scored
NO_EDIT = "no edit"
FINAL = "final: "  # prefix of the names of the final's cells


@dataclass(frozen=True)
class ProbeConfig:
    """The settings of a probe; the defaults take minutes on a model of 135M parameters.

    Attributes:
        step_sizes: step sizes η to try with the editor, an untrained policy (`HypernetworkConfig.step_size`).
        num_batches, batch_size: T and n of the stream that every candidate edits; all edit the same facts.
        steps_per_batch, token: as in `LifelongEditEnv`.
        aggregation: the editor's rule.
        run_lengths: numbers of layers in a run.
        run_kinds: number of kinds of module, the best in the single modules' scores, of which runs are tried: each
            kind, and every pair.
        layer_stride: every so many layers, modules are tried alone.
        finalists: number of the best candidates that are compared on more facts; 0 leaves the final out.
        final_batches, final_batch_size: T and n of the final's stream, of facts that no candidate has edited before. A
            finalist edits it with its best step size, with a third of it and with three times it.
        seed: of the choice of facts.
    """

    step_sizes: tuple[float, ...] = (2e-3, 6e-3, 1.8e-2)
    num_batches: int = 2
    batch_size: int = 8
    steps_per_batch: int = 2
    token: str = "subject"
    aggregation: Aggregation = "recursive"
    run_lengths: tuple[int, ...] = (7,)
    run_kinds: int = 3
    layer_stride: int = 3
    finalists: int = 8
    final_batches: int = 5
    final_batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.step_sizes or not all(size > 0 for size in self.step_sizes):
            raise ValueError(f"step_sizes are {self.step_sizes}; give positive numbers")
        for name in ("num_batches", "batch_size", "steps_per_batch", "layer_stride", "run_kinds", "final_batches",
                     "final_batch_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.finalists < 0:
            raise ValueError(f"finalists is {self.finalists}; give 0 (no final) or more")
        if any(length < 2 for length in self.run_lengths):
            raise ValueError(f"run_lengths are {self.run_lengths}; give 2 or more each")


@dataclass(frozen=True)
class Candidate:
    """Modules to edit together; ``glob`` is their pattern for ``edit_modules``."""

    glob: str
    modules: tuple[str, ...]


class Probe:
    """Edits the same few facts with one candidate after another, and writes the scores to a file.

    Scores in the file are not computed again. Single modules come first, then runs of neighbouring layers with the best
    kinds of module, one kind or two at a time. The best candidates are then compared on more facts.

    Args:
        model: a causal LM, unedited for every candidate.
        tokenizer: its tokenizer.
        facts: the facts to draw from.
        path: the file of scores.
        config: the settings.
        name: the model's name.
        among: names or globs that restrict the modules; None means every linear module of a decoder layer.
        beside: names or globs of modules that are also tried together, and always enter the final.

    Raises:
        ValueError: the file contains scores of other settings, there are too few facts, or a pattern matches nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: KnowledgeDataset,
        path: str | Path,
        config: ProbeConfig | None = None,
        name: str = "",
        among: Sequence[str] | None = None,
        beside: Sequence[str] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.path = model, tokenizer, name, Path(path)
        self.config = config = config or ProbeConfig()
        first = config.num_batches * config.batch_size
        final = config.final_batches * config.final_batch_size if config.finalists else 0
        if len(facts) < first + final:
            raise ValueError(f"{facts.source} has {len(facts)} facts, and {first + final} are needed; give a smaller "
                             "num_batches or batch_size, of the final perhaps")
        order = np.random.default_rng(config.seed).permutation(len(facts))[: first + final]
        records = [facts.records[i] for i in order]
        records = [replace(r, paraphrases=r.paraphrases[:MOST], unrelated=r.unrelated[:MOST]) for r in records]
        self.facts = replace(facts, records=tuple(records[:first]))
        self.final_facts = replace(facts, records=tuple(records[first:]))
        all_linear = linear_modules(model)
        unfit = own_pass(model, tokenizer, all_linear).unfit
        linear = [name for name in all_linear if name not in unfit]
        self.modules = linear if among is None else expand_globs(among, linear)
        extra_modules = tuple(expand_globs(beside, linear)) if beside else ()
        self.beside = [Candidate(run_glob(extra_modules), extra_modules)] if extra_modules else []
        settings = {
            "model": name, "dtype": str(model.dtype), "data": facts.source, "metrics_version": METRICS_VERSION,
            **asdict(config),
        }  # fmt: skip
        self.settings: JsonObject = json.loads(json.dumps(settings))
        self.cells: dict[str, dict[str, float]] = self._read_cells()

    def _read_cells(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        different = [k for k, v in self.settings.items() if stored["settings"].get(k) != v]
        if different:
            raise ValueError(
                f"{self.path} holds scores of other settings ({', '.join(different)}); name another folder"
            )
        cells: dict[str, dict[str, float]] = stored["cells"]
        return cells

    def run(self, progress: Callable[[int, int], object] | None = None) -> ProbeResult:
        """Compute the missing scores.

        Args:
            progress: called after every candidate with the numbers of finished and of all candidates.
        """
        singles = list(self.singles())
        kinds = min(self.config.run_kinds, len(self._kinds()))
        runs = (kinds + math.comb(kinds, 2)) * len(self._runs_of(self._kinds()[:1])) + len(self.beside)
        expected = len(singles) + runs + min(self.config.finalists, len(singles) + runs)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, max(expected, done))

        self._compute_cell(NO_EDIT, lambda: self._unedited(singles[0], self.facts))
        for stage in (lambda: singles, self.runs, lambda: self.beside):  # runs depend on the singles' scores
            for candidate in stage():
                self._score(candidate, {_key(candidate.glob, size): size for size in self.config.step_sizes})
                advance()
        finalists = self._finalists()
        if finalists:
            self._compute_cell(FINAL + NO_EDIT, lambda: self._unedited(singles[0], self.final_facts))
        for candidate, best in finalists:
            self._score(candidate, {FINAL + _key(candidate.glob, s): s for s in (best / 3, best, 3 * best)}, final=True)
            advance()
        return self.result

    @property
    def result(self) -> ProbeResult:
        """The scores so far."""
        candidates = [*self.singles(), *self.runs(), *self.beside]
        return ProbeResult(self.settings, dict(self.cells), {c.glob: c for c in candidates})

    def _finalists(self) -> list[tuple[Candidate, float]]:
        """The candidates in the final, each with its best step size so far."""
        result = self.result
        ranked = result.ranked(first=True)
        finalists = ranked[: self.config.finalists]
        if finalists:
            globs = {glob for glob, _, _ in finalists}
            finalists += [entry for entry in ranked if entry[0] in {c.glob for c in self.beside} - globs]
        return [(result.candidates[glob], size) for glob, size, _ in finalists]

    def singles(self) -> Iterator[Candidate]:
        """One candidate for each module."""
        layers = self._layers()[:: self.config.layer_stride]
        yield from (Candidate(name, (name,)) for name in self.modules if module_layer(name) in layers)

    def runs(self) -> list[Candidate]:
        """Runs of neighbouring layers; none until the single modules are scored."""
        kinds = self._best_kinds()
        groups = [*((kind,) for kind in kinds), *combinations(kinds, 2)]
        return [run for group in groups for run in self._runs_of(group)]

    def _layers(self) -> list[int]:
        return sorted({module_layer(name) for name in self.modules})

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(module_kind(name) for name in self.modules))

    def _runs_of(self, kinds: Sequence[str]) -> list[Candidate]:
        layers = self._layers()
        candidates: dict[str, Candidate] = {}
        for length in self.config.run_lengths:
            if length > len(layers):
                continue
            starts = [*range(0, len(layers) - length, max(length // 2, 1)), len(layers) - length]
            for start in starts:
                members = layers[start : start + length]
                modules = tuple(n for n in self.modules if module_layer(n) in members and module_kind(n) in kinds)
                glob = run_glob(modules)
                candidates[glob] = Candidate(glob, modules)
        return list(candidates.values())

    def _best_kinds(self) -> list[str]:
        """The kinds of the best single modules; none until all single modules are scored."""
        best: dict[str, float] = {}
        for candidate in self.singles():
            values = [self.cells.get(_key(candidate.glob, size)) for size in self.config.step_sizes]
            if None in values:
                return []
            kind = module_kind(candidate.glob)
            best[kind] = max(best.get(kind, -math.inf), *(value["mean"] for value in values if value))
        return sorted(best, key=best.__getitem__, reverse=True)[: self.config.run_kinds]

    def _score(self, candidate: Candidate, step_sizes: Mapping[str, float], final: bool = False) -> None:
        """Compute the missing ones of these cells (cell's name → step size)."""
        missing = {key: size for key, size in step_sizes.items() if key not in self.cells}
        if not missing:
            return
        lm = EditableLM(self.model, self.tokenizer, candidate.modules, self.name, optimize=True)
        env = self._environment(lm, final)
        try:
            for key, size in missing.items():
                self._compute_cell(key, partial(self._edited, env, size))
        finally:  # the next candidate gets the unedited model
            lm.close()

    def _environment(self, lm: EditableLM, final: bool) -> LifelongEditEnv:
        config, facts = self.config, self.final_facts if final else self.facts
        batches, size = config.num_batches, config.batch_size
        if final:
            batches, size = config.final_batches, config.final_batch_size
        return LifelongEditEnv(
            facts.kind, lm, data=facts, num_batches=batches, batch_size=size, token=config.token,
            steps_per_batch=config.steps_per_batch, reward="none", array_backend="torch",
        )  # fmt: skip

    def _edited(self, env: LifelongEditEnv, step_size: float) -> dict[str, float]:
        network = HypernetworkConfig(blocks=0, step_size=step_size, aggregation=self.config.aggregation)
        agent = RLEditAgent(env, RLEditConfig(network=network), seed=0)
        facts = env.dataset
        log = edit_stream(env, agent, seed=0, options={"indices": list(range(len(facts)))})
        if log.diverged:
            return {**dict.fromkeys(SCORES, 0.0), "drift": math.inf}
        return _scores(evaluate(env.lm, facts.records, facts.kind, generate=False)) | {"drift": log.drift}

    def _unedited(self, candidate: Candidate, facts: KnowledgeDataset) -> dict[str, float]:
        lm = EditableLM(self.model, self.tokenizer, candidate.modules, self.name, optimize=True)
        try:
            return _scores(evaluate(lm, facts.records, facts.kind, generate=False)) | {"drift": 0.0}
        finally:
            lm.close()

    def _compute_cell(self, key: str, compute: Callable[[], dict[str, float]]) -> None:
        if key not in self.cells:
            self.cells[key] = compute()
            write_text(self.path, json.dumps({"settings": self.settings, "cells": self.cells}, indent=1) + "\n")


@dataclass(frozen=True)
class ProbeResult:
    """The scores of the candidates.

    Attributes:
        settings: the settings of the measurements.
        cells: "glob @ step size" → scores in percent, and the drift; "no edit" → those of the unedited model. Names of
            the final's cells begin with "final: ".
        candidates: glob → candidate.
    """

    settings: JsonObject
    cells: dict[str, dict[str, float]]
    candidates: dict[str, Candidate]

    def ranked(self, first: bool = False) -> list[tuple[str, float, dict[str, float]]]:
        """Candidates by the mean of Efficacy, Generalization and Specificity, best first; of equal means, the candidate
        with fewer modules first.

        Args:
            first: rank all candidates by the first facts' scores; otherwise rank the finalists by the final's scores,
                if there was a final.

        Returns:
            (glob, its best step size, scores) of each candidate.
        """
        final = not first and FINAL + NO_EDIT in self.cells
        best: dict[str, tuple[str, float, dict[str, float]]] = {}
        for key, cell in self.cells.items():
            if key.startswith(FINAL) != final or key.endswith(NO_EDIT):
                continue
            glob, size = key.removeprefix(FINAL).split(" @ ")
            if glob in self.candidates and (glob not in best or cell["mean"] > best[glob][2]["mean"]):
                best[glob] = glob, float(size), cell
        return sorted(best.values(), key=lambda entry: (-entry[2]["mean"], len(self.candidates[entry[0]].modules)))

    @property
    def unedited(self) -> dict[str, float]:
        """The scores of the unedited model on the facts of `ranked`."""
        return self.cells.get(FINAL + NO_EDIT, self.cells[NO_EDIT])

    def maps(self) -> tuple[list[str], list[int], dict[str, np.ndarray]]:
        """Scores of the single modules, each at its best step size.

        Returns:
            The kinds of module, the layers, and score → array (kinds, layers), NaN where no module was tried.
        """
        singles = [(g, cell) for g, _, cell in self.ranked(first=True) if len(self.candidates[g].modules) == 1]
        kinds = list(dict.fromkeys(module_kind(g) for g in self.candidates if len(self.candidates[g].modules) == 1))
        layers = sorted({module_layer(g) for g, _ in singles})
        maps = {score: np.full((len(kinds), len(layers)), np.nan) for score in SCORES}
        for glob, cell in singles:
            for score in SCORES:
                maps[score][kinds.index(module_kind(glob)), layers.index(module_layer(glob))] = cell[score]
        return kinds, layers, maps


def run_glob(modules: Sequence[str]) -> str:
    """One pattern for modules of the same kinds in neighbouring layers, such as
    ``model.layers.[6-12].mlp.{gate_proj,up_proj}``."""
    layers = sorted({module_layer(name) for name in modules})
    kinds = list(dict.fromkeys(module_kind(name) for name in modules))
    head = modules[0].removesuffix(f"{layers[0]}.{module_kind(modules[0])}")
    parents = {kind.rpartition(".")[0] for kind in kinds}
    place = str(layers[0]) if len(layers) == 1 else f"[{layers[0]}-{layers[-1]}]"
    if len(kinds) == 1:
        tail = kinds[0]
    elif len(parents) == 1:
        tail = f"{parents.pop()}.{{{','.join(kind.rpartition('.')[2] for kind in kinds)}}}"
    else:
        tail = f"{{{','.join(kinds)}}}"
    return f"{head}{place}.{tail}"


def _key(glob: str, step_size: float) -> str:
    return f"{glob} @ {step_size:g}"


def _scores(metrics: Metrics) -> dict[str, float]:
    values = metrics.as_dict()
    return {name: float(values[name] or 0.0) for name in SCORES}
