"""Second moments of keys, and the text that they are gathered from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from agents.corpus import generated_corpus, sample_continuations, text_corpus
from agents.key_statistics import fingerprint, key_statistics, second_moments
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[1-2].mlp.down_proj"


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    return tiny_lm("tiny-llama", MODULES)


def test_the_stream_gives_the_second_moment_of_all_keys(lm: EditableLM) -> None:
    module = list(lm.module_shapes)[0]
    ids = torch.randint(3, 200, (40, 32), generator=torch.Generator().manual_seed(0))  # more than one pass
    keys: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keys.append(args[0][0])

    handle = lm.model.get_submodule(module).register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in ids:
            lm.model(input_ids=row[None])
    handle.remove()
    every = torch.cat(keys)
    assert ids.numel() > lm.max_tokens_per_pass
    torch.testing.assert_close(second_moments(lm, [module], ids)[module], every.T @ every / len(every))


def test_the_generated_corpus_is_the_same_for_the_same_seed_only(lm: EditableLM) -> None:
    once, again, other = (generated_corpus(lm, 256, seed) for seed in (0, 0, 1))
    assert once.shape == (4, 64)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_continuations_are_drawn_from_the_models_distribution(lm: EditableLM) -> None:
    start = torch.tensor(lm.tokenizer("ab")["input_ids"])
    drawn = sample_continuations(lm, start.repeat(4000, 1), 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lm.model(input_ids=start[None]).logits[0, -1]
    logits[lm.tokenizer.all_special_ids] = -torch.inf
    shares = torch.bincount(drawn[:, -1], minlength=len(logits)) / 4000
    assert torch.equal(drawn[:, :-1], start.repeat(4000, 1))
    assert shares[lm.tokenizer.all_special_ids].sum() == 0
    assert float((shares - logits.softmax(0)).abs().max()) < 4 * (0.25 / 4000) ** 0.5  # four standard deviations


def test_a_text_file_is_cut_into_rows_of_its_tokens(lm: EditableLM, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"Line {i} says something.\n" for i in range(400))
    path.write_text(text, encoding="utf-8")
    ids = text_corpus(lm, path, 1000)
    assert ids.shape == (15, 64)  # whole rows, at most as many tokens as asked for
    assert lm.tokenizer.decode(ids.flatten()) == text[:960]  # a byte a token


def test_a_missing_or_too_short_text_is_refused(lm: EditableLM, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="generated"):
        key_statistics(lm, list(lm.module_shapes), tmp_path / "none.txt", cache=tmp_path)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(ValueError, match="5 tokens"):
        key_statistics(lm, list(lm.module_shapes), tmp_path / "short.txt", cache=tmp_path)


def test_statistics_come_from_the_cache_the_second_time(
    lm: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = list(lm.module_shapes)
    first = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    monkeypatch.setattr("agents.corpus.sample_continuations", None)
    monkeypatch.setattr("agents.key_statistics.second_moments", None)
    second = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    assert second.source == first.source and "wrote itself" in first.source and first.tokens == 256
    assert all(torch.equal(first.second_moments[m], second.second_moments[m]) for m in modules)


def test_a_damaged_cache_is_written_anew(lm: EditableLM, tmp_path: Path) -> None:
    modules = list(lm.module_shapes)
    first = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged"):
        second = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    assert torch.equal(first.second_moments[modules[0]], second.second_moments[modules[0]])


def test_statistics_are_those_of_the_pretrained_weights(lm: EditableLM, tmp_path: Path) -> None:
    lower, upper = lm.module_shapes
    before = key_statistics(lm, [upper], tokens=256, cache=tmp_path / "1", progress=False)
    lm.add({lower: torch.ones(lm.module_shapes[lower][::-1])})
    after = key_statistics(lm, [upper], tokens=256, cache=tmp_path / "2", progress=False)
    assert torch.equal(before.second_moments[upper], after.second_moments[upper])


def test_another_model_has_another_fingerprint(lm: EditableLM, tiny_lm: Callable[..., EditableLM]) -> None:
    before = fingerprint(lm)
    assert before == fingerprint(lm) != fingerprint(tiny_lm("tiny-qwen2", MODULES))
    lm.add({m: torch.ones(shape[::-1]) for m, shape in lm.module_shapes.items()})
    assert fingerprint(lm) != before


def test_what_the_statistics_took_is_known_when_they_come_from_the_cache_too(lm: EditableLM, tmp_path: Path) -> None:
    modules = list(lm.module_shapes)
    first = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    again = key_statistics(lm, modules, tokens=256, cache=tmp_path, progress=False)
    one = key_statistics(lm, modules[:1], tokens=256, cache=tmp_path, progress=False)
    assert first.seconds == again.seconds > one.seconds > 0
