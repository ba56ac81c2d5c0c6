"""`rledit ledger`: list an edit ledger, verify it, undo a batch, or rebuild the model at any step."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from rledit_env.cli.command import FAILED, OK, Command, model_source, say_loading, source_arguments, warn
from rledit_env.cli.paths import check_paths, model_inputs, written_path
from rledit_env.outputs import Input, Output, PathError, whole

if TYPE_CHECKING:
    from rledit_env.ledger import EditLedger
    from rledit_env.lm.editable import EditableLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what in (
        ("list", "print the entries"),
        ("verify", "check every entry's checksum and place; with --weights also that the updates lead to the recorded "
                   "weights"),
        ("undo", "take a batch's update out, by an entry that subtracts it"),
        ("replay", "rebuild the model after some of the entries and write it out"),
    ):
        sub = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        sub.add_argument("ledger", type=written_path, metavar="DIR", help="the ledger's folder")
        if name == "verify":
            sub.add_argument("--weights", action="store_true", help="load the model and rebuild its weights, too")
        if name == "undo":
            sub.add_argument("--batch", type=int, required=True, metavar="i", help="which batch, from 1")
        if name == "replay":
            sub.add_argument("--to", type=int, metavar="k", help="entries to replay; 0 is the pre-trained model "
                             "(default: all)")
        if name in ("undo", "replay"):
            sub.add_argument("--out", type=written_path, required=name == "replay", metavar="MODEL",
                             help="folder for the model as it then is")
            sub.add_argument("--overwrite", action="store_true", help="replace MODEL, if it is not empty and rledit "
                             "wrote all that is in it")
        if name != "list":
            sub.add_argument("--model", help="registry name, hub id or folder (default: the ledger's)")
            sub.add_argument("--dtype", help="precision of the frozen weights (default: the ledger's)")
            source_arguments(sub)
            sub.add_argument("--device", default="auto", help="such as 'cpu' or 'cuda:0'")
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error arose")


def run(options: argparse.Namespace) -> int:
    from rledit_env.ledger import EditLedger

    return {"list": _list, "verify": _verify, "undo": _undo, "replay": _replay}[options.action](
        EditLedger(options.ledger), options
    )


def _list(ledger: EditLedger, options: argparse.Namespace) -> int:
    print(f"{ledger.folder}: edits of {ledger.header['model']}, {len(ledger.shapes)} modules")
    print(f"{'entry':>7} {'kind':<9}{'batch':>7} {'presented':>10} {'facts':>6} {'norm':>11}  weights after")
    for entry in ledger.entries():
        print(f"{entry.index + 1:>7} {entry.kind:<9}{entry.batch + 1:>7} {entry.presentation + 1:>10} "
              f"{len(entry.facts):>6} {entry.norm:>11.4g}  {entry.weights_after[:16]}")
    return _damage(ledger)


def _verify(ledger: EditLedger, options: argparse.Namespace) -> int:
    ledger.verify(_load(ledger, options) if options.weights else None)
    if not ledger.damage:
        print(f"{ledger.folder}: all {len(ledger)} entries are whole"
              + (" and lead to the recorded weights" if options.weights else ""))
    return _damage(ledger)


def _damage(ledger: EditLedger) -> int:
    if ledger.damage:
        warn(f"damaged: {ledger.damage}")
        warn(f"usable: the first {len(ledger)} entries")
        return FAILED
    return OK


def _undo(ledger: EditLedger, options: argparse.Namespace) -> int:
    _check_paths(options, ledger)
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}; batches are counted from 1")
    lm = _load(ledger, options)
    ledger.lock()
    try:
        if ledger.verify() is not None:
            return _damage(ledger)
        ledger.undo(lm, options.batch - 1)
    finally:
        ledger.close()
    print(f"batch {options.batch} is undone, by entry {len(ledger)}")
    return _write(lm, options)


def _replay(ledger: EditLedger, options: argparse.Namespace) -> int:
    _check_paths(options, ledger)
    ledger.verify()
    if ledger.damage and options.to is None:
        return _damage(ledger)
    lm = _load(ledger, options)
    ledger.replay(lm, options.to)
    print(f"replayed {len(ledger) if options.to is None else options.to} entries")
    return _write(lm, options)


def _check_paths(options: argparse.Namespace, ledger: EditLedger) -> None:
    """Check the outputs: the model, and for an undo the ledger."""
    outputs = [whole("--out", options.out, options.overwrite)] if options.out is not None else []
    reads = model_inputs(f"the ledger's model ({ledger.header['model']})", ledger.header["model"])
    if options.action == "undo":
        outputs.append(Output("the ledger", options.ledger, lambda folder: None))
    else:
        reads.append(Input(f"the ledger ({options.ledger})", options.ledger))
    check_paths(options, *outputs, reads=reads)


def _load(ledger: EditLedger, options: argparse.Namespace) -> EditableLM:
    from rledit_env.lm.editable import EditableLM

    name = options.model or ledger.header["model"]
    say_loading(name)
    dtype, source = options.dtype or ledger.header["dtype"], model_source(options, ledger.header)
    return EditableLM.load(name, list(ledger.shapes), dtype, options.device, **source)


def _write(lm: EditableLM, options: argparse.Namespace) -> int:
    if options.out is not None:
        try:
            lm.save_pretrained(options.out, options.overwrite)
        except OSError as error:
            raise PathError(f"{error}; the ledger holds everything, write the model with: rledit ledger replay "
                            f"{shlex.quote(str(options.ledger))} --out MODEL") from error
        print(f"written: {options.out}, for AutoModelForCausalLM.from_pretrained")
    return OK


COMMAND = Command(
    "ledger",
    "list, check, undo or replay what `edit --ledger` recorded",
    "Every update of `rledit edit --ledger DIR` is on the disk before it takes effect. Entries and batches are\n"
    "counted from 1.",
    """\
examples:
  rledit ledger list runs/ledger
  rledit ledger verify runs/ledger --weights
  rledit ledger undo runs/ledger --batch 3 --out without-batch-3
  rledit ledger replay runs/ledger --to 40 --out after-40-updates
""",
    add_arguments,
    run,
    lambda options: f"interrupted; {options.ledger} is as it was",
)
