"""What is loaded from a folder or the hub, what is refused before it is, and that a tokenizer is written as it was."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from agents.settings import environment_settings
from rledit_env.cli import main
from rledit_env.lm.delta import save_lora
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading import fetching
from rledit_env.lm.loading.loader import load_model, stored_dtype
from rledit_env.lm.loading.registry import ModelError
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, as save_pretrained writes it."""
    tiny_model("tiny-llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, file: str = "config.json", **settings: Any) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **settings}, indent=3))


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("load", [load_model, stored_dtype])
def test_a_quantised_model_is_refused_before_its_weights_are_read(folder: Path, method: str, load: Any) -> None:
    change(folder, quantization_config=QUANTISED[method])
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=rf"is quantised \({method}\), and quantised weights cannot be edited; name "):
        load(folder)


def test_a_quantised_language_model_inside_another_is_refused_too(folder: Path) -> None:
    change(folder, text_config={"quantization_config": QUANTISED["awq"]})
    with pytest.raises(ModelError, match=r"is quantised \(awq\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "distilbert"}, "no causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
    ],
)
def test_a_model_that_does_not_continue_texts_is_refused_by_its_kind(folder: Path, settings: dict, what: str) -> None:
    change(folder, **settings)
    with pytest.raises(ModelError, match=rf"\({settings['model_type']}\) is {what}; rledit edits decoder-only"):
        load_model(folder)


CODE = '''
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
'''


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "mine.py").write_text(CODE)
    change(folder, model_type="mine", architectures=["MineForCausalLM"],
           auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"})  # fmt: skip
    for load in (load_model, stored_dtype):
        with pytest.raises(ModelError, match=r"needs code that comes with it.*trust_remote_code=True \(--trust-remote"):
            load(folder)
    lm = EditableLM.load(str(folder), device="cpu", dtype="stored", trust_remote_code=True)
    assert type(lm.model).__name__ == "MineForCausalLM"
    assert lm.trace([lm.tokenize("Rome is in", "Peru")]).loss > 0


def test_a_tokenizer_that_needs_code_is_named_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="MineTokenizer",
           auto_map={"AutoTokenizer": ["mine.MineTokenizer", None]})  # fmt: skip
    with pytest.raises(ModelError, match=r"needs code that comes with it.*--trust-remote-code"):
        load_model(folder)


def test_a_revision_reaches_the_hub_and_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_env: Any
) -> None:
    asked: list[str | None] = []

    def download(name: str, revision: str | None = None, **_: Any) -> str:
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    lm = EditableLM.load("owner/name", device="cpu", dtype="stored", revision="v2")
    assert set(asked) == {"v2"}
    settings = environment_settings(make_env(model=lm))
    assert settings is not None and (settings["model"], settings["revision"]) == ("owner/name", "v2")
    save_lora(lm, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["revision"] == "v2"


@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m", "folder"])
def test_a_revision_of_what_has_none_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"has no revision 'v2'; leave it out, or give a hub id"):
        fetching.fetch(str(folder) if name == "folder" else name, revision="v2")


def test_the_command_line_passes_revision_and_trust_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        return name

    monkeypatch.setattr(fetching, "fetch", fetch)
    assert main(["fetch", "owner/name", "--revision", "v2", "--trust-remote-code"]) == 0
    assert (asked[0]["revision"], asked[0]["trust_remote_code"]) == ("v2", True)


def test_the_command_line_refuses_a_quantised_model_in_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    change(folder, quantization_config=QUANTISED["gptq"])
    arguments = ["train", "--env", "RLEdit-ZsRE-v0", "--model", str(folder), "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rledit train: error: model") and "is quantised (gptq)" in last


@pytest.mark.parametrize("command", ["train", "evaluate", "edit", "probe", "compare", "ledger verify", "fetch"])
def test_every_command_that_loads_a_model_takes_a_revision(command: str, capsys: Any) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert "--revision" in said and "--trust-remote-code" in said


# -- written as it was read


def peculiar_tokenizer(folder: Path) -> None:
    """A tokenizer with an end token appended and no pad token, padding on the left, an added token, and files of an
    older form: settings that nobody knows, a chat template among them, a map of special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.add_tokens(["<new>"])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)
    change(folder, "tokenizer_config.json", mine=1, chat_template="{{ messages[0]['content'] }}",
           tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    change(folder, "special_tokens_map.json", eos_token="<eos>")


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_tokenizer_and_generation_settings_are_written_byte_by_byte_as_they_were_read(
    folder: Path, tmp_path: Path
) -> None:
    peculiar_tokenizer(folder)
    change(folder, "generation_config.json", do_sample=False, temperature=0.6, eos_token_id=[1, 2], mine=3)
    lm = EditableLM.load(str(folder), device="cpu", dtype="stored")
    lm.generate(["Rome is in", "2"])
    lm.trace([lm.tokenize("Rome is in", "Peru")])
    lm.save_pretrained(tmp_path / "edited")
    assert files(tmp_path / "edited") >= files(folder) and "chat_template.jinja" not in files(tmp_path / "edited")
    for name in {*TOKENIZER, "generation_config.json"}:
        assert filecmp.cmp(folder / name, tmp_path / "edited" / name, shallow=False), name


def test_generation_settings_that_a_model_did_not_come_with_are_not_written(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    EditableLM.load(str(folder), device="cpu", dtype="stored").save_pretrained(tmp_path / "edited")
    assert "generation_config.json" not in files(tmp_path / "edited")


def test_what_the_user_changed_since_loading_is_written(folder: Path, tmp_path: Path) -> None:
    lm = EditableLM.load(str(folder), device="cpu", dtype="stored")
    lm.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    lm.model.generation_config.max_new_tokens = 7
    lm.save_pretrained(tmp_path / "edited")
    assert (tmp_path / "edited" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}!"
    assert json.loads((tmp_path / "edited" / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_a_tokenizer_of_no_folder_is_written_as_it_is(tmp_path: Path) -> None:
    lm = EditableLM(tiny_model("tiny-llama"), tiny_tokenizer(), ["*.1.mlp.*"])
    lm.save_pretrained(tmp_path / "edited")
    model, tokenizer = load_model(tmp_path / "edited", torch.float32)
    assert tokenizer("Rome")["input_ids"] == lm.tokenizer("Rome")["input_ids"]
