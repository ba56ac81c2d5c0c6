"""The edit ledger: what is written is what happened, damage is found and named, and nothing before it is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from rledit_env.ledger import EditLedger, LedgerError, change_norm, weights_hash
from rledit_env.ledger.format import ENTRY_NAME
from rledit_env.lm.editable import EditableLM
from rledit_env.updates import NOTHING, Dense, RankOne, Replacement, Update

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    return tiny_lm(modules="model.layers.[1-2].mlp.{gate,up}_proj")


def original(lm: EditableLM) -> dict[str, Tensor]:
    return {m: lm.original_weight(m).clone() for m in lm.module_shapes}


def random_update(lm: EditableLM, seed: int, form: str = "factors") -> Update:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    shapes = lm.module_shapes.items()
    if form == "factors":
        return RankOne({m: draw(3, d_in) for m, (d_in, _) in shapes}, {m: draw(3, d_out) for m, (_, d_out) in shapes})
    chosen = list(shapes)[1:]  # dense forms may leave modules out
    matrices = {m: draw(d_out, d_in) for m, (d_in, d_out) in chosen}
    return Dense(matrices) if form == "updates" else Replacement(matrices)


def fill(folder: Path, lm: EditableLM, forms: tuple[str, ...] = ("factors",) * 4) -> list[dict[str, Tensor]]:
    """A ledger of one update a batch; the weights before the first and after each."""
    ledger = EditLedger.create(folder, lm)
    states = [original(lm)]
    for batch, form in enumerate(forms):
        update = random_update(lm, batch, form)
        after = update.updated(states[-1], states[0])
        ledger.append("edit", update, after, batch, facts=[batch], norm=change_norm(states[-1], after))
        states.append(after)
    ledger.close()
    return states


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[m], other[m]) for m in one)


def entry_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if ENTRY_NAME.fullmatch(path.name))


MIXED = ("factors", "updates", "accumulated", "factors", "updates")


def test_an_update_has_the_effect_that_its_form_says(lm: EditableLM) -> None:
    start = {m: w + 0.1 for m, w in original(lm).items()}
    factors = random_update(lm, 0)
    assert isinstance(factors, RankOne)
    for m, after in factors.updated(start, original(lm)).items():
        product = sum(torch.outer(v, k) for v, k in zip(factors.values[m], factors.keys[m], strict=True))
        torch.testing.assert_close(after, start[m] + product)
    added = random_update(lm, 1, "updates").updated(start, original(lm))
    replaced = random_update(lm, 1, "accumulated").updated(start, original(lm))
    first, *others = lm.module_shapes
    assert torch.equal(added[first], start[first]) and torch.equal(replaced[first], start[first])
    for m in others:
        dense = random_update(lm, 1, "updates").parts()["updates"][m]
        assert torch.equal(added[m], start[m] + dense)
        assert torch.equal(replaced[m], lm.original_weight(m) + dense)


def test_replay_gives_the_weights_at_every_entry_bit_for_bit(lm: EditableLM, tmp_path: Path) -> None:
    states = fill(tmp_path / "l", lm, MIXED)
    ledger = EditLedger(tmp_path / "l")
    for count, state in enumerate(states):
        ledger.replay(lm, count)
        assert same(lm.snapshot(), state)
    ledger.replay(lm)
    assert same(lm.snapshot(), states[-1])
    assert ledger.verify(lm) is None
    with pytest.raises(ValueError, match="to is 6; .* can be replayed to 0 … 5 entries"):
        ledger.weights(lm, 6)


def test_entries_say_what_was_edited(lm: EditableLM, tmp_path: Path) -> None:
    states = fill(tmp_path / "l", lm)
    entries = list(EditLedger(tmp_path / "l").entries())
    assert [(e.index, e.kind, e.batch, e.facts) for e in entries] == [(i, "edit", i, (i,)) for i in range(4)]
    assert [e.weights_after for e in entries] == [weights_hash(s) for s in states[1:]]
    assert entries[2].norm == pytest.approx(change_norm(states[2], states[3]))


def test_the_hash_changes_with_one_bit_and_with_a_name(lm: EditableLM) -> None:
    weights = original(lm)
    before = weights_hash(weights)
    renamed = {f"{m}x": w for m, w in weights.items()}
    next(iter(weights.values()))[0, 0] += 1e-7
    assert len({before, weights_hash(weights), weights_hash(renamed)}) == 3


@pytest.mark.parametrize("forms", [("factors",) * 4, MIXED])
def test_undo_leaves_all_other_updates(lm: EditableLM, tmp_path: Path, forms: tuple[str, ...]) -> None:
    states = fill(tmp_path / "l", lm, forms)
    ledger = EditLedger(tmp_path / "l")
    ledger.lock()
    ledger.undo(lm, 1)
    wanted = {m: states[-1][m] - (states[2][m] - states[1][m]) for m in states[0]}
    for m, weight in lm.snapshot().items():
        torch.testing.assert_close(weight, wanted[m], rtol=0, atol=1e-6)
    assert ledger.undone() == {1}
    assert len(ledger) == len(forms) + 1, "an undo is an entry more: nothing is erased"
    ledger.close()
    again = EditLedger(tmp_path / "l")
    assert again.verify(lm) is None
    after = lm.snapshot()
    again.replay(lm)
    assert same(lm.snapshot(), after)
    again.lock()
    with pytest.raises(ValueError, match="batch 1 has been undone already"):
        again.undo(lm, 1)
    with pytest.raises(ValueError, match="has batches 0 to"):
        again.undo(lm, 77)


def test_a_rolled_back_update_is_not_in_the_weights(lm: EditableLM, tmp_path: Path) -> None:
    states = fill(tmp_path / "l", lm)
    ledger = EditLedger(tmp_path / "l")
    ledger.lock()
    ledger.append("rollback", NOTHING, states[3], 3)
    ledger.close()
    ledger = EditLedger(tmp_path / "l")
    assert ledger.verify(lm) is None
    assert same(ledger.weights(lm), states[3])
    assert same(ledger.weights(lm, 4), states[4])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "one bit changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "deleted": lambda path: path.unlink(),
    "replaced by its neighbour": lambda path: shutil.copy(entry_files(path.parent)[1], path),
    "a link": lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_named_and_what_is_before_it_stays_usable(
    lm: EditableLM, tmp_path: Path, what: str
) -> None:
    states = fill(tmp_path / "l", lm)
    DAMAGE[what](entry_files(tmp_path / "l")[2])
    ledger = EditLedger(tmp_path / "l")
    damage = ledger.verify()
    assert damage is not None
    assert "2" in damage and str(tmp_path / "l") in damage
    assert len(ledger) == 2
    ledger.replay(lm)
    assert same(lm.snapshot(), states[2])
    resumed = EditLedger.resume(tmp_path / "l", lm)
    assert len(resumed) == 2 and resumed.damage is None
    update = random_update(lm, 9)
    resumed.append("edit", update, update.updated(states[2], states[0]), 2)
    resumed.close()
    assert EditLedger(tmp_path / "l").verify(lm) is None
    assert any((tmp_path / "l" / "damaged").iterdir()), "what was put aside is not lost"


def forge(folder: Path, place: int, lm: EditableLM, **changes: Any) -> None:
    """Replace an entry by one with other content and a right checksum."""
    import hashlib

    from safetensors import safe_open

    old = entry_files(folder)[place]
    with safe_open(old, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["entry"])
    tensors |= changes.pop("tensors", {})
    data = save(tensors, {"entry": json.dumps(described | changes)})
    old.unlink()
    (folder / f"{place:08d}-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": -1}, "no numbers"),
        ({"kind": "erase"}, "its kind"),
        ({"index": 7}, "says that it is entry 7"),
        ({"weights_after": "0" * 64}, "leads to other weights"),
        ({"previous": "../../elsewhere"}, "follows ../../elsewhere"),
        ({"__class__": "os.system"}, "unreadable"),
        ({"tensors": {"keys.unknown": torch.zeros(3, 2)}}, "unreadable"),
        ({"tensors": {"keys.model.layers.1.mlp.up_proj": torch.zeros(3, 7)}}, "has shape"),
        ({"tensors": {"code": torch.zeros(1)}}, "unreadable"),
    ],
)
def test_a_forged_entry_with_a_right_checksum_is_refused(
    lm: EditableLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    states = fill(tmp_path / "l", lm)
    forge(tmp_path / "l", 3, lm, **changes)
    ledger = EditLedger(tmp_path / "l")
    damage = ledger.verify(lm)
    assert damage is not None and message in damage
    assert same(ledger.weights(lm), states[3])


def test_an_exchanged_entry_breaks_the_chain_of_those_after_it(lm: EditableLM, tmp_path: Path) -> None:
    fill(tmp_path / "l", lm)
    forge(tmp_path / "l", 1, lm, facts=[5])
    ledger = EditLedger(tmp_path / "l")
    assert "entry 2" in str(ledger.verify())
    assert len(ledger) == 2


def test_a_ledger_of_another_model_or_run_is_refused(
    lm: EditableLM, tiny_lm: Callable[..., EditableLM], tmp_path: Path
) -> None:
    EditLedger.create(tmp_path / "l", lm, {"token": "answer"}).close()
    with pytest.raises(LedgerError, match="4 modules such as"):
        EditLedger(tmp_path / "l").replay(tiny_lm())
    with pytest.raises(LedgerError, match="not those of 'tiny-qwen2'"):
        EditLedger(tmp_path / "l").replay(tiny_lm("tiny-qwen2", "model.layers.[1-2].mlp.{gate,up}_proj"))
    with pytest.raises(LedgerError, match="token: 'answer' there, 'all' here"):
        EditLedger.resume(tmp_path / "l", lm, {"token": "all"})


def test_two_writers_never_share_a_ledger(lm: EditableLM, tmp_path: Path) -> None:
    ledger = EditLedger.create(tmp_path / "l", lm)
    code = f"from rledit_env.ledger import EditLedger; EditLedger({str(tmp_path / 'l')!r}).lock()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "is being written by another process" in run.stderr
    (tmp_path / "l" / "ledger.json").unlink()  # as long as the other process has not written it
    with pytest.raises(LedgerError, match="is being written by another process"):
        EditLedger.create(tmp_path / "l", lm)
    ledger.close()
    EditLedger.create(tmp_path / "l", lm).close()
    with pytest.raises(LedgerError, match="reading only"):
        EditLedger(tmp_path / "l").append("edit", {}, original(lm), 0)


def test_a_full_disk_is_named_and_leaves_the_ledger_as_it_was(lm: EditableLM, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    states = fill(tmp_path / "l", lm)
    ledger = EditLedger.resume(tmp_path / "l", lm)
    update = random_update(lm, 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large\); free some space"):
            ledger.append("edit", update, update.updated(states[-1], states[0]), 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(ledger) == 4
    assert not list((tmp_path / "l").glob("*.partial"))
    ledger.append("edit", update, update.updated(states[-1], states[0]), 4)
    assert ledger.verify(lm) is None and len(ledger) == 5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "shapes": {"m": [1]}}', "[" * 100000])
def test_a_header_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(LedgerError, match="is damaged|is of format"):
        EditLedger(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        EditLedger(tmp_path / "nowhere")
