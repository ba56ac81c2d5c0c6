"""Tests of the tiny models and their tokenizer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_config, tiny_model, tiny_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  two  spaces,\ttabs\nand 'quotes' do n't change ; nor does space before .",
    "Ångström, naïve, Łódź, Владимир, 東京, 🎉👩‍🔬",
    "".join(map(chr, range(128))),
]
SENTENCE = "The mother tongue of Danielle Darrieux, who was born in Bordeaux, is French."


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def sentence_ids(name: str) -> torch.Tensor:
    return tiny_tokenizer(name)(SENTENCE, return_tensors="pt").input_ids


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_same_seed_gives_the_same_model_and_leaves_the_global_random_state_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first = tiny_model(name).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    second, other = tiny_model(name).state_dict(), tiny_model(name, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_outputs_are_finite_and_far_from_uniform(name: str) -> None:
    output = logits(tiny_model(name), sentence_ids(name))
    assert torch.isfinite(output).all()
    assert output.std(dim=-1).mean() > 1
    assert len(output.argmax(-1).unique()) > 5


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_parameter_matters(name: str) -> None:
    model = tiny_model(name)
    logits_with_gradient = model(input_ids=sentence_ids(name)).logits
    logits_with_gradient.log_softmax(-1)[..., 5].sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", TINY_NAMES)
def test_bfloat16_holds_the_rounded_float32_weights(name: str) -> None:
    exact, rounded = tiny_model(name).state_dict(), tiny_model(name, torch.bfloat16).state_dict()
    assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_eager_attention_gives_the_same_logits_as_the_default(name: str) -> None:
    model, ids = tiny_model(name), sentence_ids(name)
    default = logits(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, ids), default, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-gemma2", "tiny-gemma3"])
def test_the_sliding_window_changes_what_a_long_sentence_gives_and_not_what_a_short_one_does(name: str) -> None:
    config = tiny_config(name)
    window = config.sliding_window
    config.sliding_window = 512
    sliding, full, ids = tiny_model(name), tiny_model(name, config=config), sentence_ids(name)
    assert 8 <= window <= 16
    torch.testing.assert_close(logits(sliding, ids)[:, :window], logits(full, ids)[:, :window])
    assert (logits(sliding, ids) - logits(full, ids))[:, window:].abs().max() > 0.1


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma2_soft_capping_changes_the_logits(cap: str) -> None:
    config = tiny_config("tiny-gemma2")
    setattr(config, cap, None)
    ids = sentence_ids("tiny-gemma2")
    capped, uncapped = logits(tiny_model("tiny-gemma2"), ids), logits(tiny_model("tiny-gemma2", config=config), ids)
    assert (capped - uncapped).abs().max() > 0.1


def test_the_architectures_differ_where_real_ones_do() -> None:
    configs = {name: tiny_config(name) for name in TINY_NAMES}
    grouped = [name for name, config in configs.items() if name != "tiny-gpt2"]
    assert all(configs[name].num_key_value_heads < configs[name].num_attention_heads for name in grouped)
    assert len({configs[name].head_dim for name in ("tiny-llama", "tiny-mistral", "tiny-qwen3")}) == 3
    assert {configs["tiny-qwen2"].num_key_value_heads, configs["tiny-llama"].num_key_value_heads} == {1, 2}


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("text", TEXTS, ids=["sentence", "spaces", "unicode", "ascii"])
def test_text_comes_back_exactly(name: str, text: str) -> None:
    tokenizer = tiny_tokenizer(name)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", TEXTS, ids=["sentence", "spaces", "unicode", "ascii"])
def test_every_token_is_a_byte_and_its_offsets_are_those_of_its_character(text: str) -> None:
    encoded = tiny_tokenizer()(text, return_offsets_mapping=True)
    assert [token - 3 for token in encoded.input_ids] == list(text.encode())
    characters = [index for index, character in enumerate(text) for _ in character.encode()]
    assert encoded.offset_mapping == [(index, index + 1) for index in characters]


def test_gemma_puts_a_start_token_first_and_the_others_do_not() -> None:
    with_start = {
        name for name in TINY_NAMES if tiny_tokenizer(name)("a").input_ids[0] == tiny_tokenizer().bos_token_id
    }
    assert with_start == {"tiny-gemma2", "tiny-gemma3"}


def test_padding_is_masked() -> None:
    batch = tiny_tokenizer()(["a", "abc"], padding=True)
    assert batch.input_ids[0][1:] == [0, 0]
    assert batch.attention_mask == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_saved_model_and_tokenizer_load_again(name: str, tmp_path) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), sentence_ids(name)
    assert torch.equal(logits(again, ids), logits(copy.deepcopy(model), ids))
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[2]).input_ids == tokenizer(TEXTS[2]).input_ids
