"""What `rledit evaluate` measures while a stream is edited, and what it prints and keeps of that."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.cli.results import print_general, print_points, print_retention
from rledit_env.type_aliases import JsonObject

if TYPE_CHECKING:
    from agents import EditLog
    from rledit_env.evaluation.clock import BatchClock
    from rledit_env.evaluation.general import GeneralEvery
    from rledit_env.evaluation.journal import Journal, Probe
    from rledit_env.evaluation.metrics import Metrics
    from rledit_env.evaluation.points import ScoreProbe
    from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
    from rledit_env.interface import Environment

MEASUREMENTS = "measurements.jsonl"  # the journal, in the ledger's folder
MIB = 2**20


def probe_arguments(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> None:
    """Add the options of the measurements during the stream."""
    group.add_argument("--retention", action="store_true", help="every batch's Efficacy after later batches")
    group.add_argument("--retention-every", type=int, default=1, metavar="k", help="batches between two measurements")
    group = parser.add_argument_group("long streams")
    group.add_argument("--score-every", type=int, metavar="k",
                       help="also score the model every k batches: the scores, the exact match and the divergence on "
                       "--score-facts of the facts edited so far (chosen by --seed, the same for every agent and "
                       "editor), and on all facts at the end")
    group.add_argument("--score-facts", type=int, default=500, metavar="N", help="facts of such a measurement")
    group.add_argument("--log-dir", metavar="DIR", help="also log these scores there for TensorBoard")


@dataclass(frozen=True)
class Probes:
    """The measurements while a stream is edited; None for those that were not asked for."""

    clock: BatchClock
    drift: DriftProbe
    retention: RetentionProbe | None
    general: GeneralEvery | None
    points: ScoreProbe | None

    def callbacks(self, env: Environment, journal: Journal | None) -> list[Callable[[int], object]]:
        """The probes as callbacks of `agents.edit_stream`, with what the journal has of an interrupted run."""
        from rledit_env.evaluation.journal import Journalled
        from rledit_env.interface import editing_env

        named: dict[str, Probe | None] = {"batch": self.clock, "drift": self.drift, "points": self.points,
                                          "retention": self.retention, "general": self.general}  # fmt: skip
        lm = editing_env(env).lm
        probes = [Journalled(name, probe, lm, journal) for name, probe in named.items() if probe is not None]
        return [*probes, self.clock.start]

    def seconds(self, log: EditLog) -> float:
        """Seconds of editing; batches in which a run was resumed count as the others."""
        known = [(s, log.batch_sizes[batch - 1]) for batch, s in self.clock.seconds.items() if s is not None]
        facts = sum(size for _, size in known)
        return sum(seconds for seconds, _ in known) * log.facts / facts if facts else log.seconds


def make_probes(
    options: argparse.Namespace, env: Environment, sources: Sequence[str], say: Callable[..., object]
) -> Probes:
    """The probes of the options; general ability is measured on these ``sources``."""
    from rledit_env.evaluation.clock import BatchClock
    from rledit_env.evaluation.general import GeneralAbility, GeneralEvery, scored_texts
    from rledit_env.evaluation.points import ScoreProbe
    from rledit_env.evaluation.retention import DriftProbe, RetentionProbe
    from rledit_env.interface import editing_env

    lm, clock = editing_env(env).lm, BatchClock()
    retention = RetentionProbe(env, options.retention_every, metrics=options.metrics) if options.retention else None
    ability = None
    if sources:
        ability = GeneralAbility(lm, sources, options.general_shots, options.general_limit, options.seed, options.text)
    general = GeneralEvery(env, ability, options.general_every) if ability is not None else None
    points = None
    if options.score_every is not None:
        texts = ability.texts if ability is not None and ability.texts else scored_texts(lm, options.text, options.seed)
        points = ScoreProbe(env, options.score_every, options.score_facts, texts, options.seed, options.metrics,
                            _point_sayer(options, clock, say))  # fmt: skip
    return Probes(clock, DriftProbe(env), retention, general, points)


def _point_sayer(
    options: argparse.Namespace, clock: BatchClock, say: Callable[..., object]
) -> Callable[[JsonObject], None]:
    """A function that adds the time and the memory of editing to a point, prints it, and logs it for TensorBoard."""
    from agents.logs import log, summary_writer

    writer = summary_writer(None if options.log_dir is None else Path(options.log_dir))

    def note(point: JsonObject) -> None:
        batches = point["batches"]
        seconds = clock.seconds_of(max(1, batches - options.score_every + 1), batches)
        memory, device = clock.memory.get(batches), clock.device_memory.get(batches)
        point["seconds_per_batch"] = seconds
        point["memory_mib"] = None if memory is None else memory / MIB
        if device is not None:
            point["device_memory_mib"] = device / MIB
        shown = {"mean": "mean", "exact_match": "exact match", "kl": "KL", "seconds_per_batch": "seconds a batch",
                 "memory_mib": "MiB"}  # fmt: skip
        numbers = [f"{title} {point[name]:.4g}" for name, title in shown.items() if point.get(name) is not None]
        say(f"after {point['facts']:,} facts, on {point['scored_facts']:,} of them: {', '.join(numbers)}")
        log(writer, "stream", {name: value for name, value in point.items() if value is not None}, point["facts"])
        if writer is not None:
            writer.flush()

    return note


def say_probes(
    probes: Probes, options: argparse.Namespace, metrics: Metrics, facts: int, say: Callable[..., object]
) -> JsonObject:
    """Print the probes' measurements; returns the result's entries for them.

    Args:
        probes: the probes, after the stream.
        options: the command's options.
        metrics: the scores of all facts at the end.
        facts: their number.
        say: prints a line.
    """
    clock, retention, general, points = probes.clock, probes.retention, probes.general, probes.points
    content: JsonObject = {
        "module_drift": probes.drift.by_module, "batch_seconds": list(clock.seconds.values()),
        "batch_memory_mib": [None if memory is None else round(memory / MIB, 1) for memory in clock.memory.values()],
    }  # fmt: skip
    if retention is not None and retention.measured:
        content["retention"] = retention.result.as_dict()
        print_retention(retention.result, say)
    if points is not None:
        points.conclude(max(clock.seconds, default=0), metrics, facts)
        content["points"] = list(points.points.values())
        print_points(content["points"], say)
    if general is not None:
        content["general"] = {"sources": general.ability.sources, "shots": options.general_shots,
                              "scores": {str(edited): scores for edited, scores in general.scores.items()}}
        print_general(general.scores, say)
    return content
