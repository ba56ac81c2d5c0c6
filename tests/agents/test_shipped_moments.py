"""Second moments of keys that ship with the package: their files, and where they are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agents.corpus import generated_corpus, text_key
from agents.key_statistics import expected_seconds, key_statistics, second_moments
from agents.running import ship_moments
from agents.shipped_moments import FOLDER, INDEX, is_positive_definite, pack, ship, shipped_moments, unpacked
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[0-1].mlp.{gate,up,down}_proj"
SHIPPED = sorted((FOLDER / "smollm2-135m" / "moments").glob("*.safetensors"))


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    return tiny_lm("tiny-llama", MODULES)


def moments(lm: EditableLM, tokens: int = 4096) -> dict[str, torch.Tensor]:
    return second_moments(lm, list(lm.module_shapes), generated_corpus(lm, tokens))


def test_a_moment_read_from_its_file_is_the_same_to_half_precision_and_positive_definite() -> None:
    rows = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 60)
    rows[:, 1] = rows[:, 0] + 1e-3 * rows[:, 1]  # nearly the same as another
    moment = rows.T @ rows / len(rows)
    packed = pack(moment)
    assert packed["triangle"].dtype == torch.float16 and len(packed["triangle"]) == 60 * 61 // 2
    again = unpacked(packed)
    root = moment.diagonal().sqrt()
    assert float(((again - moment) / torch.outer(root, root)).abs().max()) < 1e-3
    assert is_positive_definite(again)


def test_a_moment_without_full_rank_is_refused() -> None:
    rows = torch.randn(5, 20)
    with pytest.raises(torch.linalg.LinAlgError):
        pack(rows.T @ rows)


def test_modules_with_the_same_input_share_a_file(lm: EditableLM, tmp_path: Path) -> None:
    index = json.loads(ship(lm, moments(lm), 6.0, text_key(4096), tmp_path).read_text(encoding="utf-8"))
    files = {name.split(".", 2)[2]: entry["file"] for name, entry in index["modules"].items()}
    assert files["0.mlp.gate_proj"] == files["0.mlp.up_proj"] != files["0.mlp.down_proj"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert {entry["seconds"] for entry in index["modules"].values()} == {1.0}


def test_moments_are_found_by_weights_text_and_module(lm: EditableLM, tmp_path: Path) -> None:
    down = [m for m in lm.module_shapes if "down" in m]
    computed = moments(lm)
    ship(lm, {m: computed[m] for m in down}, 1.0, text_key(4096), tmp_path)
    found = shipped_moments(lm, list(lm.module_shapes), text_key(4096), tmp_path)
    assert set(found) == set(down)
    for module in down:
        torch.testing.assert_close(found[module]["second_moment"], computed[module], rtol=1e-3, atol=1e-4)
    assert not shipped_moments(lm, down, text_key(4096, seed=1), tmp_path)
    assert not shipped_moments(lm, down, text_key(2048), tmp_path)
    lm.add({m: torch.ones(lm.module_shapes[m][::-1]) for m in down})
    assert not shipped_moments(lm, down, text_key(4096), tmp_path)


def test_statistics_that_ship_need_neither_text_nor_time(
    lm: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = list(lm.module_shapes)
    computed = key_statistics(lm, modules, tokens=4096, cache=tmp_path / "cache", progress=False)
    ship(lm, computed.second_moments, computed.seconds, text_key(4096), tmp_path / "shipped")
    monkeypatch.setattr("agents.key_statistics.shipped_moments",
                        lambda *arguments: shipped_moments(*arguments, tmp_path / "shipped"))
    monkeypatch.setattr("agents.key_statistics.generated_corpus", None)
    found = key_statistics(lm, modules, tokens=4096, cache=tmp_path / "empty")
    assert (found.tokens, found.source) == (computed.tokens, computed.source)
    assert found.seconds == pytest.approx(computed.seconds, abs=0.01)
    assert expected_seconds(lm, modules, 4096, cache=tmp_path / "empty") == 0.0
    assert "once for this model" not in capsys.readouterr().out
    with pytest.raises(TypeError):  # would write the text
        key_statistics(lm, modules, tokens=4096, cache=tmp_path / "empty", progress=False, shipped=False)


def test_a_missing_moment_is_announced_with_its_time(
    lm: EditableLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_statistics(lm, list(lm.module_shapes), tokens=256, cache=tmp_path)
    assert "once for this model: second moments of 6 modules' inputs over 256 tokens" in capsys.readouterr().out


def test_the_command_writes_moments_that_are_found(
    lm: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLEDIT_CACHE", str(tmp_path / "cache"))
    arguments = ["tiny-llama", "--modules", MODULES, "--tokens", "4096", "--out", str(tmp_path / "out")]
    assert ship_moments.main(arguments) == 0
    assert "6 modules over 4,096 tokens" in capsys.readouterr().out
    assert set(shipped_moments(lm, list(lm.module_shapes), text_key(4096), tmp_path / "out")) == set(lm.module_shapes)
    assert ship_moments.main(["no-such-model", "--modules", MODULES]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_moments_that_ship_are_small_and_positive_definite() -> None:
    from safetensors.torch import load_file

    assert len(SHIPPED) == 17  # gate and up of twelve layers, and down_proj of the five of the locate-then-edit editors
    assert sum(path.stat().st_size for path in SHIPPED) < 25e6
    assert all(is_positive_definite(unpacked(load_file(path))) for path in SHIPPED)


def test_the_moments_that_ship_are_for_the_modules_that_the_default_models_editors_edit() -> None:
    from fnmatch import fnmatch

    from agents.running.editors import find_configs

    index = json.loads((SHIPPED[0].parent / INDEX).read_text(encoding="utf-8"))
    assert index["text"] == text_key(65_536)
    editors = json.loads(Path(find_configs("smollm2-135m")).read_text(encoding="utf-8"))["editors"]
    patterns = editors["memit"]["env"]["edit_modules"], editors["alphaedit"]["env"]["edit_modules"]
    assert set(patterns) == {"model.layers.[4-8].mlp.down_proj"}
    assert sum(fnmatch(module, patterns[0]) for module in index["modules"]) == 5
    assert sum(module.endswith(("gate_proj", "up_proj")) for module in index["modules"]) == 24


@pytest.mark.real
def test_the_moments_that_ship_are_near_those_of_few_tokens() -> None:
    """Of 2,048 tokens, 1/32 of the text: the traces agree to a tenth (measured: 0.6 to 5.2 %), and the inputs of gate
    and up to a quarter of their norm (0.13 to 0.21). `down_proj`'s norm is that of rare tokens, and is not compared.
    """
    lm = EditableLM.load("smollm2-135m", ["model.layers.[4-8].mlp.{gate,down}_proj"])
    modules = list(lm.module_shapes)
    shipped = shipped_moments(lm, modules, text_key(65_536))
    fresh = second_moments(lm, modules, generated_corpus(lm, 2048))
    for module in modules:
        moment = shipped[module]["second_moment"]
        assert float(fresh[module].trace() / moment.trace()) == pytest.approx(1, abs=0.1)
        if module.endswith("gate_proj"):
            assert float((fresh[module] - moment).norm() / moment.norm()) < 0.25
