"""`rledit probe`: find the modules to edit and a step size."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rledit_env.cli.command import (
    OK,
    Command,
    environment_arguments,
    kind_of,
    model_source,
    say_loading,
    skipped_rows,
    warn,
)
from rledit_env.cli.config_flags import CommandParser, values_of
from rledit_env.cli.paths import check_paths, going_on, written_path
from rledit_env.outputs import growing

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from agents.running.probe import ProbeResult

LISTED = 10  # candidates that are printed
PROBE = "probe"  # the kind of its folder in the marker
SCORES_FILE = "probe.json"
PICTURE_FORMS: tuple[Literal["png", "pdf"], ...] = ("png", "pdf")
FILES = (SCORES_FILE, *(f"probe.{form}" for form in PICTURE_FORMS))


def add_arguments(parser: CommandParser) -> None:
    from agents.running.probe import ProbeConfig
    from rledit_env.lm.forward import TOKEN_CHOICES

    environment_arguments(parser, required=True, env="RLEdit-CounterFact-v0")
    parser.add_argument("--out", type=written_path, required=True, metavar="DIR",
                        help="folder of the scores and pictures; existing scores are not computed again")
    parser.add_config("probe", ProbeConfig, types={"token": Literal[TOKEN_CHOICES]})


def run(options: argparse.Namespace) -> int:
    from agents.running.probe import Probe, ProbeConfig
    from rledit_env.files import mark
    from rledit_env.knowledge import load_knowledge
    from rledit_env.lm.loading.loader import load_model
    from rledit_env.lm.loading.placement import resolve_device, resolve_dtype

    check_paths(options, growing("--out", options.out, PROBE, FILES))
    config = ProbeConfig(**values_of(options, ProbeConfig))
    facts = load_knowledge(kind_of(options.env), options.data, "train", options.on_error)
    say_loading(options.model)
    device = resolve_device(options.device)
    model, tokenizer = load_model(
        options.model, resolve_dtype(options.dtype, device), device, **model_source(options)
    )
    probe = Probe(
        model, tokenizer, facts, options.out / SCORES_FILE, config, options.model, options.edit_modules,
        None if options.edit_modules else _default_modules(options.model, model),
    )  # fmt: skip
    print(f"data   {facts.source}: {config.num_batches} × {config.batch_size} of {len(facts):,} facts",
          *skipped_rows(facts))
    print(f"model  {options.model}: {len(list(probe.singles()))} modules alone, then runs of layers, at step sizes "
          f"{', '.join(f'{size:g}' for size in config.step_sizes)}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    mark(options.out, PROBE, command=options.command_line, files=FILES)
    with going_on(), _bar() as bar:
        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = probe.run(update)
    _print_candidates(result)
    glob, size, _ = result.ranked()[0]
    settings = f"--edit-modules {shlex.quote(glob)} --token {config.token} --steps-per-batch {config.steps_per_batch}"
    print(f"recommended: {settings} --step-size {size:g}")
    if not min(config.step_sizes) < size < max(config.step_sizes) and len(config.step_sizes) > 1:
        warn(f"note: {size:g} is at the end of the step sizes tried; the best may lie beyond it (--step-sizes)")
    print(f"next: rledit train --env {options.env} --model {options.model} --data {options.data} {settings} "
          f"--step-size {size:g} --out RUN", flush=True)
    _draw(result, options.out)
    return OK


def _bar() -> tqdm:
    from tqdm import tqdm

    return tqdm(desc="probing", unit="candidate")


def _default_modules(name: str, model: PreTrainedModel) -> tuple[str, ...] | None:
    """The modules that are edited by default; None if they are not known for the model."""
    from rledit_env.lm.loading.registry import ModelError, default_edit_modules

    try:
        return default_edit_modules(name, model)
    except (ModelError, ValueError):
        return None


def _print_candidates(result: ProbeResult) -> None:
    """Print the scores of the best candidates and of the unedited model."""
    from agents.running.probe import NO_EDIT, SCORES
    from rledit_env.reporting import text_table

    rows: list[list[object]] = [[NO_EDIT, None, *(result.unedited[score] for score in SCORES)]]
    rows += [[glob, f"{size:g}", *(cell[score] for score in SCORES)] for glob, size, cell in result.ranked()[:LISTED]]
    print(text_table(["modules", "step size", *SCORES], rows, widest=72))


def _draw(result: ProbeResult, folder: Path) -> None:
    """Write the heat map, if matplotlib is installed."""
    from rledit_env.files import write_bytes
    from rledit_env.reporting import module_map

    kinds, layers, maps = result.maps()
    for form in PICTURE_FORMS:
        path = folder / f"probe.{form}"
        try:
            write_bytes(path, module_map(kinds, layers, maps, form))
        except ImportError as error:
            warn(f"note: no heat map: {error}")
            return
        print(f"written: {path}")


def interrupted(options: argparse.Namespace) -> str:
    return (f"interrupted; {options.out / SCORES_FILE} holds what was measured. "
            f"Go on with the same command:\n  {options.command_line}")


COMMAND = Command(
    "probe",
    "find out which weights to edit",
    "Edit the same few facts with every linear module alone, then with runs of neighbouring layers, at a few step\n"
    "sizes; compare the best of them on more facts, and recommend modules and a step size. No agent is needed: the\n"
    "editor is the untrained policy.\n"
    "An interrupted probe is continued by the same command.",
    """\
examples:
  rledit probe --model smollm2-135m --out runs/probe
  rledit probe --env RLEdit-ZsRE-v0 --model owner/name --data zsre_train.jsonl --layer-stride 4 --out runs/probe

  # every layer alone, and shorter runs too
  rledit probe --layer-stride 1 --run-lengths 3 7 --out runs/probe-all

  # only the feed-forward layers
  rledit probe --edit-modules 'model.layers.*.mlp.*' --out runs/probe-mlp
""",
    add_arguments,
    run,
    interrupted,
)
