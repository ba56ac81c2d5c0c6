"""Tests of rledit_env.lm.kernels.attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.kernels.attention import short_attention
from rledit_env.lm.kernels.packing import NAME, Packing, Past, packed
from rledit_env.lm.loading.loader import load_model


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-gpt2"])
def test_a_half_precision_model_attends_in_float32_and_gives_its_logits(name: str) -> None:
    plain, tokenizer = load_model(name, torch.bfloat16)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    expected = plain(input_ids=ids).logits
    lm = EditableLM.load(name, dtype="bfloat16", device="cpu")
    assert lm.model.config._attn_implementation == NAME
    logits = lm.model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("heads, groups, length", [(4, 4, 7), (6, 2, 12), (4, 1, 1), (4, 2, 80)])
@pytest.mark.parametrize("masked", [None, 1, 3])
def test_it_is_causal_or_masked_attention_and_so_are_its_gradients(
    heads: int, groups: int, length: int, masked: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (
        torch.randn(3, n, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, groups, groups, heads)
    )
    mask = torch.rand(masked, 1, length, length, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask |= torch.eye(length, dtype=torch.bool)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    scores = (query @ keys.mT * 0.3).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    output, _ = short_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(output, expected)
    gradients = [
        torch.autograd.grad(x, (query, key, value), cotangent.transpose(1, 2), retain_graph=True)
        for x in (output, expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("lengths", [[5], [4, 4], [3, 9, 1, 8, 2], [2, 64, 2]])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("padding", [0, 3])
def test_packed_sequences_attend_each_to_itself_and_so_do_their_gradients(
    lengths: list[int], heads: int, groups: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (
        torch.randn(1, n, sum(lengths) + padding, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, groups, groups, heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    with packed(Packing(lengths)):
        output, _ = short_attention(module, query, key, value, None, scaling=0.3)
    parts = zip(*(x.split([*lengths, padding], dim=2)[: len(lengths)] for x in (query, key, value)), strict=True)
    expected = torch.cat([short_attention(module, *part, None, scaling=0.3)[0] for part in parts], dim=1)
    tokens = sum(lengths)
    torch.testing.assert_close(output[:, :tokens], expected)
    assert output.shape[1] == tokens + padding and not output[:, tokens:].any()
    wanted = torch.autograd.grad(expected, (query, key, value), cotangent[:, :, :tokens].transpose(1, 2))
    found = torch.autograd.grad(output, (query, key, value), cotangent.transpose(1, 2))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


PATHS = [[0, 1, 2], [0, 1, 3, 4, 5, 6, 7], [0, 1, 2], [8], [0, 1], [0, 1, 3, 9], [10, 11, 12]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("padding", [0, 3])
def test_sequences_that_share_tokens_attend_as_they_do_apart(
    heads: int, groups: int, padding: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 13
    query, key, value, cotangent = (
        torch.randn(1, n, tokens + padding, 8, generator=generator).to(dtype).requires_grad_()
        for n in (heads, groups, groups, heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    with packed(Packing([len(path) for path in PATHS], PATHS)):
        output, _ = short_attention(module, query, key, value, None, scaling=0.3)
    assert not output[:, tokens:].any()
    expected, seen = torch.zeros(1, tokens + padding, heads, 8, dtype=dtype), 0
    for path in PATHS:
        alone, _ = short_attention(module, *(x[:, :, path] for x in (query, key, value)), None, scaling=0.3)
        own = [place for place in path if place >= seen]
        seen = max(seen, path[-1] + 1)
        if own:
            expected = expected.index_copy(1, torch.tensor(own), alone[:, len(path) - len(own) :])
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, expected, **tolerance)
    found, wanted = (
        torch.autograd.grad(x, (query, key, value), cotangent.transpose(1, 2)) for x in (output, expected)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


HEADS = [[0, 1, 2], [0, 1, 3, 4], [], [0, 1, 2]]  # the first tokens of four sequences, in the row that ran before
OWN = [2, 1, 3, 2]  # and how many follow


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_row_attends_to_the_keys_and_values_of_one_that_ran_before(
    heads: int, groups: int, padding: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    first, later = ([torch.randn(1, n, tokens + padding, 8, generator=generator).to(dtype).requires_grad_()
                     for n in (heads, groups, groups)] for tokens in (5, 8))  # fmt: skip
    module = torch.nn.Module()
    module.num_key_value_groups, module.layer_idx = heads // groups, 3
    before = Packing([3, 4], [[0, 1, 2], [0, 1, 3, 4]])
    before.written = past = Past(before.tokens)
    with packed(before), torch.no_grad():
        short_attention(module, *first, None, scaling=0.3)
    starts = [5, 7, 8, 11]
    paths = [[*head, *range(start, start + own)] for head, start, own in zip(HEADS, starts, OWN, strict=True)]
    with packed(Packing([len(path) for path in paths], paths, past)):
        output, _ = short_attention(module, *later, None, scaling=0.3)
    assert output.shape[1] == 8 + padding and not output[:, 8:].any()
    expected = torch.zeros_like(output)
    for path, own in zip(paths, OWN, strict=True):
        rows = [torch.cat([a[:, :, :5].detach(), b], dim=2)[:, :, path] for a, b in zip(first, later, strict=True)]
        alone, _ = short_attention(module, *rows, None, scaling=0.3)
        expected = expected.index_copy(1, torch.tensor(path[-own:]) - 5, alone[:, -own:])
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, expected, **tolerance)
    cotangent = torch.randn(output.shape, generator=generator).to(dtype)
    found, wanted = (torch.autograd.grad(x, later, cotangent) for x in (output, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_what_cannot_keep_packed_sequences_apart_says_so() -> None:
    query = torch.randn(1, 2, 4, 8)
    with packed(Packing([1, 3])), pytest.raises(ValueError, match="keeps packed sequences apart"):
        short_attention(torch.nn.Module(), query, query, query, torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_models_with_other_attention_than_pytorchs_keep_it() -> None:
    assert EditableLM.load("tiny-gemma2", dtype="bfloat16").model.config._attn_implementation == "eager"


def test_a_saved_model_does_not_ask_for_it(tmp_path: Path) -> None:
    EditableLM.load("tiny-llama", dtype="bfloat16", device="cpu").save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
