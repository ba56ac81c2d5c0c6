"""`rledit report`: write a run's page."""

from __future__ import annotations

import argparse

from rledit_env.cli.command import OK, Command
from rledit_env.cli.paths import check_paths, written_path
from rledit_env.files import FIGURES
from rledit_env.outputs import added, page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=written_path, metavar="RUN",
                        help="a run's folder with results of 'rledit evaluate --json', or what 'rledit edit' wrote")
    parser.add_argument("--out", type=written_path, metavar="FILE", help="the page (default: report.html in RUN)")
    parser.add_argument("--figures", nargs="+", choices=("png", "pdf"), default=[], metavar="FORM",
                        help="also write each picture as 'png' or 'pdf', into a folder 'figures' beside the page")


def run(options: argparse.Namespace) -> int:
    from rledit_env.reporting.run_report import PAGE, RunReport

    if options.run_folder.is_dir():  # otherwise RunReport raises an error
        place = options.out or options.run_folder / PAGE
        outputs = [page("--out" if options.out else "the page", place)]
        if options.figures:
            # The pictures' names are not known yet; they are checked before any picture is written.
            outputs.append(added("the pictures' folder", place.parent / FIGURES))
        check_paths(options, *outputs)
    for path in RunReport(options.run_folder).write(options.out, options.figures):
        print(path)
    return OK


COMMAND = Command(
    "report",
    "show a run as one page, with pictures",
    "Write one HTML page about a run that needs no network when it is opened: scores, facts with the answers before\n"
    "and after, retention, updates by layer, general ability, learning curve, settings, commands and versions.",
    """\
examples:
  rledit evaluate --agent runs/first --retention --general self --json runs/first/result.json
  rledit report runs/first
  rledit report runs/first --figures png pdf
""",
    add_arguments,
    run,
    lambda options: "interrupted; the page was not written",
)
