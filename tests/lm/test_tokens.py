"""Prompts and answers as token ids: joined as the model needs it, whatever the tokenizer's habits."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rledit_env.knowledge import load_knowledge
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_model, tiny_tokenizer
from rledit_env.lm.tokens import TextEncoder

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = ["The capital of France is Paris", "Bergen is in Norway", "法国的首都是里昂", "is Paris is Bergen\n"] * 9


@cache
def byte_level(add_prefix_space: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """Trained merges, such as " Paris"; optionally a space before each text, or GPT-2's text end after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, _trainer(pre_tokenizers.ByteLevel.alphabet()))
    if ends:
        end = tokenizer.token_to_id("</s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A "▁" before each text and for each space, and a beginning-of-sequence token before, a text end behind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXTS, _trainer(list(string.ascii_lowercase + "(")))
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _trainer(alphabet: list[str]) -> trainers.BpeTrainer:
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    return trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


TOKENIZERS = {
    "byte level": byte_level, "with a space before": lambda: byte_level(add_prefix_space=True),
    "with a text end": lambda: byte_level(ends=True), "sentencepiece": sentencepiece_like,
}  # fmt: skip


@pytest.fixture(params=TOKENIZERS)
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return TextEncoder(TOKENIZERS[request.param]())


@pytest.mark.parametrize("kind", ["zsre", "counterfact", "fever"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "byte level"])
def test_bundled_facts_are_tokenised_as_prompt_space_answer(kind: str, name: str) -> None:
    tokenizer = byte_level() if name == "byte level" else tiny_tokenizer(name)
    assert_joined_by_a_space(tokenizer, kind, "bundled")


@pytest.mark.data
@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_published_facts_are_tokenised_as_prompt_space_trimmed_answer(kind: str) -> None:
    if not PUBLISHED.is_dir():
        pytest.skip("the published data (../shared/data) is not beside the project")
    assert_joined_by_a_space(byte_level(), kind, PUBLISHED)


def assert_joined_by_a_space(tokenizer: PreTrainedTokenizerFast, kind: str, data: Any) -> None:
    records = load_knowledge(kind, data, "eval", on_error="skip").records[::20]
    pairs = [(p, r.target) for r in records for p in (r.prompt, *r.paraphrases)]
    pairs += [(u.prompt, u.answer) for r in records for u in (*r.unrelated, *r.implied)]
    prompts, answers = [p for p, _ in pairs], [a for _, a in pairs]
    expected = tokenizer([f"{p} {a.strip()}" for p, a in pairs], return_offsets_mapping=True)
    rows = TextEncoder(tokenizer).pairs(prompts, answers)
    assert [ids for ids, _, _ in rows] == expected["input_ids"]
    firsts = [next(i for i, (_, end) in enumerate(offsets) if end > len(prompt))
              for offsets, prompt in zip(expected["offset_mapping"], prompts, strict=True)]
    assert [first for _, _, first in rows] == firsts


def test_the_answer_s_first_token_holds_the_space_before_it(encoder: TextEncoder) -> None:
    ((ids, _, first),) = encoder.pairs(["The capital of France is"], ["Paris"])
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[first:] in (["ĠParis"], ["▁Paris"])


@pytest.mark.parametrize(
    "prompt", ["The capital of France is ", "is\n", "is\n\n", "<|im_start|>", "<|im_end|>\n<|im_start|>is\n"]
)
@pytest.mark.parametrize("answer", ["Paris", " Paris", "Bergen"])
def test_after_white_space_and_special_tokens_the_answer_begins_without_a_space(
    encoder: TextEncoder, prompt: str, answer: str
) -> None:
    ((ids, offsets, first),) = encoder.pairs([prompt], [answer])
    assert ids[:first] == encoder.encode(prompt)  # what the model is given when it is to answer
    tokens = "".join(encoder.tokenizer.convert_ids_to_tokens(ids)[first:])
    # Some tokenizers begin anew after a special token: what their models have seen there stays.
    anew = prompt == "<|im_start|>" and encoder.tokenizer.tokenize(prompt + "is")[1].startswith("Ġ")
    assert tokens == "Ġ" * anew + answer.strip()
    assert len(offsets) == len(ids)


def test_chinese_is_joined_without_a_space(encoder: TextEncoder) -> None:
    ((ids, _, first),) = encoder.pairs(["法国的首都是"], ["里昂"])
    assert ids[:first] == encoder.encode("法国的首都是")
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() == "法国的首都是里昂"


@pytest.mark.parametrize(
    "prompt, answer, text",
    [
        ("is ", "\nParis", "is \nParis"), ("is", "\nParis", "is\nParis"), ("is\n", "\nBergen", "is\n\nBergen"),
        ("is ", " Paris ", "is Paris"), ("is", "Paris\n", "is Paris\n"), ("is (", "Paris", "is (Paris"),
    ],
)  # fmt: skip
def test_the_tokens_spell_the_joined_text(encoder: TextEncoder, prompt: str, answer: str, text: str) -> None:
    ((ids, _, first),) = encoder.pairs([prompt], [answer])
    assert encoder.joined(prompt, answer) == text
    assert 0 < first < len(ids)
    spelled = encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spelled.removeprefix(" ") == text


def test_nothing_is_appended_to_a_text_or_put_in_its_middle(encoder: TextEncoder) -> None:
    end = encoder.tokenizer.eos_token_id
    assert end not in encoder.encode("The capital of France is")
    for prompt in ("The capital of France is", "is ", "法国的首都是"):
        ((ids, _, _),) = encoder.pairs([prompt], ["Paris"])
        assert end not in ids


def test_a_text_that_holds_the_beginning_token_gets_no_second_one() -> None:
    encoder = TextEncoder(sentencepiece_like())
    begin = encoder.tokenizer.bos_token_id
    for text in ("is", "<s>is", "<s><|im_start|>is\n"):
        assert encoder.encode(text).count(begin) == 1
        ((ids, _, _),) = encoder.pairs([text], ["Paris"])
        assert ids.count(begin) == 1 and ids[0] == begin


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_answer_is_what_the_tokens_after_the_prompt_spell(name: str) -> None:
    lm = EditableLM(tiny_model(name), tiny_tokenizer(name), ["*.[1-3].*"])
    for prompt, answer, tail in [
        ("Rome is in", "Peru", " Peru"), ("Rome is in ", "Peru", "Peru"), ("在", "里昂", "里昂"),
        ("a\n", " Peru", "Peru"), ("a", "\nb", "\nb"), ('"', "Peru", "Peru"),
    ]:  # fmt: skip
        passage = lm.tokenize(prompt, answer)
        assert lm.tokenizer.decode(passage.targets) == tail
        assert list(passage.input_ids[: passage.positions[0] + 1]) == lm.encode(prompt)


def test_an_answer_is_generated_from_a_prompt_without_an_appended_text_end() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    plain = EditableLM(tiny_model("tiny-llama"), tiny_tokenizer(), ["model.layers.[1-3].*"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", end)]
    )
    ending = EditableLM(tiny_model("tiny-llama"), tokenizer, ["model.layers.[1-3].*"])
    assert tokenizer("a")["input_ids"][-1] == end
    assert ending.generate(["Rome is in"], ["Peru"]) == plain.generate(["Rome is in"], ["Peru"])
    assert ending.tokenize("Rome is in", "Peru").targets == plain.tokenize("Rome is in", "Peru").targets


def test_the_subject_s_last_token_is_that_of_the_whole_word_or_of_the_place_given(
    tiny_lm: Callable[..., EditableLM],
) -> None:
    lm, prompt = tiny_lm(), "Nigeria borders Niger, whose capital is"
    assert lm.tokenize(prompt, "Oslo", "Niger").subject_position == len("Nigeria borders Niger") - 1
    assert lm.tokenize(prompt, "Oslo", (0, 5)).subject_position == len("Niger") - 1
