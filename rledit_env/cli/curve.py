"""`rledit compare --curve`: each editor at several strengths, the curve of score against KL, and a pick for each
bound."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rledit_env.cli.attempts import TABLES_TURN, Job, begin, claims_of, compute
from rledit_env.cli.command import FAILED, OK, warn

if TYPE_CHECKING:
    from agents.running.comparison import Comparison
    from agents.running.curve import Curve, Point
    from agents.running.editors import Editor
    from rledit_env.reporting.tables import Row

PICTURES = {"curve.png": "png", "curve.svg": "svg"}
POINTS = "curve_points.csv"
TABLES = ("curve.txt", "curve.md", "curve.tex", "curve.csv")
FILES = (*TABLES, POINTS, *PICTURES)
BEST = 5  # number of editors at each bound that are scored on longer streams
NO_PICK = "none"  # shown instead of the scores if no strength is within the bound
SCORES = {"mean": "Mean", "selection_kl": "KL (choosing)", "kl": "KL", "efficacy": "Eff.", "generalization": "Gen.",
          "specificity": "Spe."}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the curve of score against KL",
        "Each editor edits one stream of held-out training facts at a few strengths of its\n"
        "own: step size, λ or learning rate. For each bound on KL (0.05, 0.1, 0.3 and 1 nats a\n"
        "token) the best strength within it is its pick; only picks are scored on the evaluation\n"
        "split.",
    )
    group.add_argument("--curve", action="store_true", help="draw the curve, and score each editor's picks")
    group.add_argument("--curve-batches", type=int, default=20, metavar="T", help="batches of the training stream")
    group.add_argument("--strengths", type=float, nargs="+", metavar="FACTOR",
                       help="factors of every editor's strength (default: the editor's own, such as 0.5 1 2)")
    group.add_argument("--then-batches", type=int, metavar="T",
                       help=f"also score the picks of the {BEST} editors that are best at each bound on longer streams "
                       "of T batches")


def check(options: argparse.Namespace) -> None:
    """Check the options of the curve.

    Raises:
        ValueError: an option's value is wrong, or pictures cannot be drawn.
    """
    from rledit_env.cli.command import check_positive
    from rledit_env.reporting import check_pictures

    if not options.curve:
        names = [name for name in ("strengths", "then_batches") if getattr(options, name) is not None]
        if names:
            raise ValueError(f"--{names[0].replace('_', '-')} is for the curve; give --curve, too")
        return
    check_positive(options, "curve_batches", *(["then_batches"] if options.then_batches is not None else []))
    wrong = [factor for factor in options.strengths or () if not 0 < factor < float("inf")]
    if wrong:
        raise ValueError(f"--strengths has {wrong[0]:g}; give positive numbers")
    check_pictures()


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        options: the command's options.
        comparison: the comparison on the evaluation split.
        curve: the curve on the training stream.
        longer: the comparison on longer streams of the evaluation split; None without --then-batches.
        editors: all configured editors.
    """

    options: argparse.Namespace
    comparison: Comparison
    curve: Curve
    longer: Comparison | None
    editors: Sequence[Editor]

    @property
    def seeds(self) -> range:
        return range(self.options.seeds)

    def check_cells(self) -> None:
        """Read every cell, so that an unusable one is refused before anything is computed.

        Raises:
            ValueError: a cell has other settings.
        """
        from agents.running.curve import SEED

        for editor in self.editors:
            for variant in self.curve.variants(editor):
                self.curve.cell(variant, SEED)
                for comparison in (self.comparison, *([self.longer] if self.longer is not None else [])):
                    for seed in self.seeds:
                        comparison.cell(variant, seed)

    def picks(self, bound: float) -> dict[str, Point | None]:
        """Editor's name → its pick for a bound, for the editors with all their points."""
        from agents.running.curve import pick

        by_editor = {editor.name: self.curve.points(editor) for editor in self.editors}
        return {name: pick(points, bound) for name, points in by_editor.items() if points is not None}

    def picked(self) -> list[Editor]:
        """The editors of the picks for all bounds, each once."""
        from agents.running.curve import BOUNDS

        return _distinct(point.editor for bound in BOUNDS for point in self.picks(bound).values() if point is not None)

    def best(self) -> list[Editor]:
        """The picks that are scored on longer streams."""
        from agents.running.curve import BOUNDS, best_picks

        if self.longer is None:
            return []
        by_bound = [self.picks(bound) for bound in BOUNDS]
        best = [picks[name] for picks in by_bound for name in best_picks(picks, BEST)]
        return _distinct(point.editor for point in best if point is not None)

    def missing(self, comparison: Comparison, variants: Iterable[Editor]) -> list[Editor]:
        """The variants without all their cells."""
        return [v for v in variants if None in [comparison.cell(v, seed) for seed in self.seeds]]

    def rows(self, comparison: Comparison, bound: float, names: Sequence[str] | None = None) -> list[Row]:
        """The table's rows for a bound, for these editors or all."""
        from rledit_env.reporting.tables import Row

        rows, picks = [], self.picks(bound)
        for editor in self.editors:
            if editor.name not in picks or (names is not None and editor.name not in names):
                continue
            point, compared = picks[editor.name], editor.name != "none"
            if point is None:
                not_applicable = [p.cell for p in self.curve.points(editor) or () if "not_applicable" in p.cell]
                rows.append(Row(editor.name, editor.title, not_applicable, compared, instead=NO_PICK))
                continue
            cells = [cell for seed in self.seeds if (cell := comparison.cell(point.editor, seed)) is not None]
            if len(cells) == len(self.seeds):
                rows.append(Row(editor.name, _title(editor, point), cells, compared))
        return rows


def run(
    options: argparse.Namespace, comparison: Comparison, editors: Sequence[Editor], say_inputs: Callable[[], None]
) -> int:
    """Compute the points, then the picks' scores; existing cells are not computed again.

    Args:
        options: the command's options.
        comparison: the comparison on the evaluation split.
        editors: the configured editors.
        say_inputs: prints the data and the model, after all checks.
    """
    from agents.running.curve import SEED

    curve_run = _run(options, comparison, editors)
    curve, longer = curve_run.curve, curve_run.longer
    curve_run.check_cells()
    unfinished = [editor for editor in editors if curve.points(editor) is None]
    points = sum(len(curve.variants(editor)) for editor in editors)
    say_inputs()
    print(f"editors  {', '.join(editor.name for editor in editors)}")
    print(f"curve    {points} points on {options.curve_batches} × {options.batch_size} of {curve.setting.test.source}; "
          f"{len(unfinished)} editors to run", flush=True)
    jobs = [Job(editor.name, editor.title, curve.variants(editor)) for editor in unfinished]
    failed = _compute(curve_run, "points", curve, jobs, [SEED])
    picked = curve_run.missing(comparison, curve_run.picked())
    failed += _compute(curve_run, "picks", comparison, [Job(v.label, v.title, [v]) for v in picked], curve_run.seeds)
    if longer is not None:
        best = curve_run.missing(longer, curve_run.best())
        failed += _compute(curve_run, "longer", longer, [Job(v.label, v.title, [v]) for v in best], curve_run.seeds)
    with claims_of(comparison).turn(TABLES_TURN):
        texts = _write(curve_run)
    print(texts["curve.txt"], flush=True)
    for editor in editors:
        reasons = [p.cell["not_applicable"] for p in curve.points(editor) or () if "not_applicable" in p.cell]
        if reasons:
            print(f"{editor.title}: not applicable, {reasons[0]}")
    print(f"written: {', '.join(str(options.out / name) for name in FILES)}; every number is in {curve.out}/cells and "
          f"{options.out}/cells")
    if failed:
        warn(f"failed: {', '.join(failed)}; the same command tries them again")
        return FAILED
    return OK


def _run(options: argparse.Namespace, comparison: Comparison, editors: Sequence[Editor]) -> Run:
    """The run that the options ask for.

    Raises:
        ValueError: there are too few facts for its streams.
    """
    from agents.running.comparison import Comparison
    from agents.running.curve import Curve
    from rledit_env.knowledge import KnowledgeStream

    setting = comparison.setting
    try:
        curve = Curve(comparison, options.curve_batches, options.strengths)
    except ValueError as error:
        raise ValueError(f"the training stream of --curve: {error}; its batches are --curve-batches") from error
    longer = None
    if options.then_batches is not None:
        KnowledgeStream(setting.test, options.then_batches, options.batch_size)
        folder = options.out / f"then-{options.then_batches}"
        longer = Comparison(replace(setting, num_batches=options.then_batches), comparison.views, folder,
                            trainer=comparison)  # fmt: skip
    return Run(options, comparison, curve, longer, editors)


def _compute(
    run: Run, title: str, comparison: Comparison, jobs: Sequence[Job], seeds: Sequence[int]
) -> list[str]:
    """Compute a comparison's cells, together with other processes; returns the names of the jobs that failed."""
    if jobs:
        begin(run.options, run.comparison)
    return compute(run.options, comparison, jobs, seeds, lambda: _write(run, pictures=comparison is run.curve),
                   f"{title} ")  # fmt: skip


def _distinct(editors: Iterable[Editor]) -> list[Editor]:
    return list({editor.label: editor for editor in editors}.values())


def _title(editor: Editor, point: Point) -> str:
    return editor.title if editor.strength is None else f"{editor.title} ×{point.editor.factor:g}"


# -- output ----------------------------------------------------------------------------------------------------------


def _write(run: Run, pictures: bool = True) -> dict[str, str]:
    """Write all files with the results so far, with or without the ``pictures``; returns the texts by name."""
    from rledit_env.files import write_bytes, write_text

    texts = _texts(run)
    for name, text in texts.items():
        write_text(run.options.out / name, text)
    for name, picture in _pictures(run).items() if pictures else ():
        write_bytes(run.options.out / name, picture)
    return texts


def _pictures(run: Run) -> dict[str, bytes]:
    from agents.running.curve import BOUNDS
    from rledit_env.reporting import tradeoff_curves

    curves: dict[str, list[tuple[float, float]]] = {}
    broke: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    for editor in run.editors:
        for point in run.curve.points(editor) or ():
            if point.kl is None or point.score is None:
                continue
            if editor.strength is None:
                levels[editor.title] = point.score
            else:
                place = broke if point.broke else curves
                place.setdefault(editor.title, []).append((point.kl, point.score))
    return {name: tradeoff_curves(curves, levels, BOUNDS, broke, form) for name, form in PICTURES.items()}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Section:
    """The table for one bound and one length of stream."""

    bound: float
    batches: int
    rows: list[Row]


def _sections(run: Run) -> list[Section]:
    from agents.running.curve import BOUNDS, best_picks

    sections = [Section(bound, run.options.batches, run.rows(run.comparison, bound)) for bound in BOUNDS]
    if run.longer is not None:
        for bound in BOUNDS:
            names = best_picks(run.picks(bound), BEST)
            sections.append(Section(bound, run.options.then_batches, run.rows(run.longer, bound, names)))
    return sections


def _texts(run: Run) -> dict[str, str]:
    """The content of the text files, by name."""
    from rledit_env.reporting import tables

    options, size = run.options, run.options.batch_size
    streams = f"{options.seeds} streams, mean ± standard deviation" if options.seeds > 1 else "1 stream"
    scored = "" if options.metrics == "paper" else f", with metrics {options.metrics!r}"
    lead = (
        f"{options.model}. ×: of the editor's own strength, chosen on {options.curve_batches}×{size} facts of "
        f"{run.curve.setting.test.source}, by the mean score among those whose KL from the unedited model is within "
        "the bound on text of its own that is kept for choosing. Scored on facts of "
        f"{run.comparison.setting.test.source}, {streams}, in percent after the last edit{scored}. KL: on other text "
        "of its own, nats a token."
    )
    sections = _sections(run)
    headings = [f"KL ≤ {section.bound:g}, {section.batches}×{size} facts" for section in sections]
    points, header = _points(run), ["Editor", "Strength", *SCORES.values(), "Broke"]
    training = f"The curve: {options.curve_batches}×{size} training facts"
    text = [f"{training}\n\n{_point_text(header, points)}"]
    markdown = ["![Score against KL](curve.png)", lead, f"### {training}", _point_markdown(header, points)]
    latex = []
    for heading, section in zip(headings, sections, strict=True):
        text.append(f"{heading}\n\n{tables.as_text(section.rows)}")
        markdown += [f"### {heading}", tables.as_markdown(section.rows)]
        latex.append(tables.as_latex(section.rows, f"{heading}: {lead}".replace("±", "and").replace("≤", "at most")))
    flat = [(section, row) for section in sections for row in section.rows]
    leading: dict[str, Sequence[object]] = {
        "kl_bound": [section.bound for section, _ in flat], "batches": [section.batches for section, _ in flat],
        "strength": [_strength(run, row.name, section.bound) for section, row in flat],
    }  # fmt: skip
    return {
        "curve.txt": "\n\n".join([*text, f"{lead} *: best."]) + "\n",
        "curve.md": "\n\n".join(part.rstrip("\n") for part in markdown) + "\n",
        "curve.tex": "\n".join(latex),
        "curve.csv": tables.as_csv([row for _, row in flat], leading),
        POINTS: _point_csv(run),
    }


def _strength(run: Run, name: str, bound: float) -> float | str:
    """The factor of an editor's pick; empty if there is no pick or the editor has no strength."""
    point = run.picks(bound)[name]
    return "" if point is None or point.editor.strength is None else point.editor.factor


def _points(run: Run) -> list[tuple[Editor, Point]]:
    return [(editor, point) for editor in run.editors for point in run.curve.points(editor) or ()
            if "not_applicable" not in point.cell]


def _point_line(editor: Editor, point: Point) -> list[str]:
    from agents.running.curve import SELECTION_KL

    factor = "–" if editor.strength is None else f"×{point.editor.factor:g}"
    values = [(point.cell.get(key), 3 if key in (SELECTION_KL, "kl") else 1) for key in SCORES]
    numbers = ["–" if value is None else f"{value:.{digits}f}" for value, digits in values]
    return [editor.title, factor, *numbers, "yes" if point.broke else ""]


def _point_text(header: Sequence[str], points: Sequence[tuple[Editor, Point]]) -> str:
    from rledit_env.reporting import text_table

    return text_table(header, [_point_line(*point) for point in points])


def _point_markdown(header: Sequence[str], points: Sequence[tuple[Editor, Point]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)]]
    lines += [[cell.replace("*", "\\*") for cell in _point_line(*point)] for point in points]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _point_csv(run: Run) -> str:
    """One line for each point; a missing number is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["editor", "title", "strength", *SCORES, "broke"])
    for editor, point in _points(run):
        cell: Mapping[str, object] = point.cell
        numbers = ["" if cell.get(key) is None else cell[key] for key in SCORES]
        factor = "" if editor.strength is None else point.editor.factor
        writer.writerow([editor.name, editor.title, factor, *numbers, int(point.broke)])
    return out.getvalue()
