"""`rledit compare`: many editors on the same streams of facts, in one table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rledit_env.cli import curve
from rledit_env.cli.attempts import (
    COMPARISON,
    SETTINGS,
    TABLES_TURN,
    Job,
    begin,
    check_folder,
    claims_of,
    compute,
    own_device,
)
from rledit_env.cli.command import (
    FAILED,
    OK,
    Command,
    check_positive,
    check_text,
    check_text_is_no_prior,
    environment_arguments,
    kind_of,
    metrics_argument,
    model_source,
    skipped_rows,
    text_argument,
    warn,
)
from rledit_env.cli.paths import check_paths, written_path
from rledit_env.outputs import Input, growing

if TYPE_CHECKING:
    from agents.running.comparison import Comparison
    from agents.running.editors import Editor
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.reporting.tables import Row

TABLES = ("table.txt", "table.md", "table.tex", "table.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from agents.running.editors import EDITORS

    groups: dict[str, list[str]] = {}
    for editor in EDITORS.values():
        groups.setdefault(editor.group, []).append(editor.name)
    listed = "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())
    parser.add_argument("--editors", nargs="+", required=True, metavar="NAME",
                        help=f"'all', or editors or groups by name ({listed})")
    environment_arguments(parser, required=True)
    parser.add_argument("--train-data", help="data whose train split editors learn from (default: --data)")
    parser.add_argument("--out", type=written_path, required=True, metavar="FOLDER",
                        help="cells, trained networks and tables; finished cells are not computed again")
    parser.add_argument("--batches", type=int, default=20, metavar="T", help="batches of a stream")
    parser.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    parser.add_argument("--seeds", type=int, default=3, metavar="S",
                        help="streams, with the seeds 0 to S − 1; the same for every editor")
    parser.add_argument("--configs", type=Path, metavar="FILE",
                        help="hyperparameters by editor (default: those that ship for the model, agents/configs)")
    parser.add_argument("--no-generate", dest="generate", action="store_false",
                        help="leave out the free-running exact match, which takes long")
    metrics_argument(parser)
    curve.add_arguments(parser)
    text_argument(parser)


def run(options: argparse.Namespace) -> int:
    from agents.running.editors import chosen_editors, configured, find_configs, load_configs
    from rledit_env.evaluation.metrics import check_metrics

    check_positive(options, "batches", "batch_size", "seeds")
    curve.check(options)
    check_metrics(options.metrics)
    check_text(options)
    kind = kind_of(options.env)
    configs = options.configs or find_configs(options.model)
    entries = load_configs(configs, kind)
    editors = [configured(editor, entries) for editor in chosen_editors(options.editors)]
    for editor in editors:
        check_text_is_no_prior(options, editor.configuration())
    parts = (SETTINGS, *TABLES, "cells/", "trained/", "claims/", *((*curve.FILES, "curve/") if options.curve else ()))
    check_paths(options, growing("--out", options.out, COMPARISON, parts), reads=_saved_agents(editors, kind))
    comparison = _comparison(options, editors)
    test = comparison.setting.test
    check_folder(options, test.source)

    def say_inputs() -> None:
        size = f"{options.batches} × {options.batch_size} of {len(test):,} facts, {options.seeds} streams"
        print(f"data     {test.source} ({test.split}): {size}", *skipped_rows(test))
        print(f"model    {options.model}; hyperparameters: {configs or 'the defaults of the editors'}")

    run_comparison = curve.run if options.curve else _compare
    try:
        return run_comparison(options, comparison, editors, say_inputs)
    finally:
        claims_of(comparison).close()


def _comparison(options: argparse.Namespace, editors: list[Editor]) -> Comparison:
    """The comparison that the options ask for.

    Raises:
        ValueError: there are not enough facts, or some are both trained on and scored.
    """
    from agents.running.claims import Claims
    from agents.running.comparison import Comparison, Setting, Views, check_disjoint
    from rledit_env.knowledge import KnowledgeStream, load_knowledge

    kind = kind_of(options.env)
    test = load_knowledge(kind, options.data, "eval", options.on_error)
    KnowledgeStream(test, options.batches, options.batch_size)  # raises ValueError if there are too few facts

    @functools.cache
    def training() -> KnowledgeDataset:
        facts = load_knowledge(kind, options.train_data or options.data, "train", options.on_error)
        check_disjoint(facts, test)
        return facts

    if options.curve or any(editor.training and not editor.saved for editor in editors):
        training()
    modules = tuple(options.edit_modules) if options.edit_modules else None
    setting = Setting(
        options.env, test, training, options.batches, options.batch_size, modules, options.generate, options.metrics,
        None if options.text is None else Path(options.text),
    )
    views = Views(options.model, options.dtype, own_device(options.device), **model_source(options))
    return Comparison(setting, views, options.out, claims=Claims(options.out / "claims"))


def _compare(
    options: argparse.Namespace, comparison: Comparison, editors: list[Editor], say_inputs: Callable[[], None]
) -> int:
    """Compute the missing cells, and write the tables."""
    seeds, source = range(options.seeds), comparison.setting.test.source
    # Reads every cell, so that an unusable one is refused before anything is computed.
    missing = [e for e in editors if None in [comparison.cell(e, seed) for seed in seeds]]
    say_inputs()
    print(f"editors  {', '.join(e.name for e in editors)}; {len(missing)} to run", flush=True)
    if missing:
        begin(options, comparison)
    jobs = [Job(editor.name, editor.title, [editor]) for editor in missing]
    failed = compute(options, comparison, jobs, seeds,
                     lambda: _write_tables(options, _rows(comparison, editors, seeds), source))  # fmt: skip
    rows = _rows(comparison, editors, seeds)
    print(_tables(options, rows, source)["table.txt"], flush=True)
    with claims_of(comparison).turn(TABLES_TURN):
        _write_tables(options, rows, source)
    for row in rows:
        if row.not_applicable:
            reason = next(c["not_applicable"] for c in row.cells if "not_applicable" in c)
            print(f"{row.title}: not applicable, {reason}")
    print(f"written: {', '.join(str(options.out / name) for name in TABLES)}; every number is in {options.out}/cells")
    if failed:
        warn(f"failed: {', '.join(failed)}; the same command tries them again")
        return FAILED
    return OK


def _rows(comparison: Comparison, editors: list[Editor], seeds: range) -> list[Row]:
    """The rows of the editors that have all their cells."""
    from rledit_env.reporting.tables import Row

    rows = []
    for editor in editors:
        cells = [cell for seed in seeds if (cell := comparison.cell(editor, seed)) is not None]
        if len(cells) == len(seeds):
            rows.append(Row(editor.name, editor.title, cells, editor.name != "none"))
    return rows


def _saved_agents(editors: list[Editor], kind: str) -> list[Input]:
    """The saved agents of editors that were trained elsewhere, as inputs."""
    from agents.running.saved import find_agent

    saved = [(e, find_agent(e.saved, kind)) for e in editors if e.saved is not None]
    return [Input(f"the agent of {e.name} ({e.saved})", folder) for e, folder in saved]


def _write_tables(options: argparse.Namespace, rows: list[Row], source: str) -> None:
    from rledit_env.files import write_text

    for name, text in _tables(options, rows, source).items():
        write_text(options.out / name, text)


def _tables(options: argparse.Namespace, rows: list[Row], source: str) -> dict[str, str]:
    """The content of the table files, by name."""
    from rledit_env.evaluation.general.scored_text import source_of
    from rledit_env.reporting import tables

    streams = f"{options.seeds} streams, mean ± standard deviation" if options.seeds > 1 else "1 stream"
    caption = (f"{options.model}, {options.batches}×{options.batch_size} facts of {source}, {streams}. Scores in "
               f"percent after the last edit{_metrics_note(options)}. KL: from the unedited model on text that it "
               f"wrote, on human text ({source_of(options.text)}) and on its answers in a chat, nats a token. "
               "s/fact in all: with training and statistics, shared by a stream's facts.")
    texts = (
        f"{tables.as_text(rows)}\n\n{caption} *: best.\n", f"{tables.as_markdown(rows)}\n{caption}\n",
        tables.as_latex(rows, caption.replace("±", "and")), tables.as_csv(rows),
    )  # fmt: skip
    return dict(zip(TABLES, texts, strict=True))


def _metrics_note(options: argparse.Namespace) -> str:
    return "" if options.metrics == "paper" else f", with metrics {options.metrics!r}"


def interrupted(options: argparse.Namespace) -> str:
    return (f"interrupted; the finished cells are in {options.out}. Go on with the same command:\n"
            f"  {options.command_line}")


COMMAND = Command(
    "compare",
    "compare editors on the same streams of facts",
    "Let many editors edit the same streams of facts into the same model, and write their scores in one table\n"
    "(text, Markdown, LaTeX, CSV). Editors that learn are trained first. Whatever is finished is kept: an\n"
    "interrupted comparison is continued by the same command, and further editors join with the same --out.\n"
    "The same command started several times, on one machine or on several that share the folder of --out, divides the\n"
    "cells.",
    """\
examples:
  # on the sample that ships with the package
  rledit compare --editors none fine-tuning rledit --env RLEdit-CounterFact-v0 --batches 10 --out runs/compared

  # every editor, on your own data: a folder with counterfact_train.jsonl and counterfact_eval.jsonl
  rledit compare --editors all --env RLEdit-CounterFact-v0 --data data --batches 20 --batch-size 20 --seeds 3 \\
      --out runs/counterfact-20x20

  # each editor's score against its change of the rest of the model: a picture, and the best strength within each bound
  rledit compare --curve --editors none ultraedit rledit --env RLEdit-CounterFact-v0 --data data --then-batches 50 \\
      --out runs/curve

  # four processes, each on a GPU of its own; and the same command on another machine joins
  torchrun --nproc-per-node 4 -m rledit_env.cli compare --editors all --env RLEdit-CounterFact-v0 --data data \\
      --out runs/shared
""",
    add_arguments,
    run,
    interrupted,
)
