"""Components of the reward that measure what the scores measure: which of two answers is likelier, whether a free
answer ends where it should, and whether other questions about an edited subject keep their answers.

They can be added to the paper's components (see `rledit_env.reward`). The paper's likelihood of the new answer on a
paraphrase can always grow further, long after the new answer is the preferred one, at the cost of everything else;
CounterFact's scores, which compare two answers, do not show the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rledit_env.answers import ENDS
from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence, membership_loss, preference_loss

# Properties that subjects are asked for in addition to the facts' questions; an encyclopedia gives them of many things.
PROPERTIES = (
    "headquarters", "founder", "father", "mother", "spouse", "award received", "native language", "religion", "height",
    "mass", "position held", "parent taxon", "constellation", "discoverer", "publisher", "record label", "performer",
    "director", "cast member", "platform", "manufacturer", "architect", "capital", "continent", "currency",
    "population", "area", "elevation", "mouth", "length", "start time", "inception", "cause of death",
    "place of burial", "military rank", "employer", "educated at", "sport", "league", "member of", "participant in",
    "nominated for", "based on", "characters", "colour", "material used", "use", "symptoms", "medical specialty",
    "chromosome", "encoded by", "found in", "family name", "given name", "time period", "owned by", "operator",
    "connecting line", "part of", "named after", "country of citizenship", "taxon rank", "place of birth", "occupation",
    "genre", "country", "date of birth", "date of death", "instance of", "creator", "location", "language", "sex",
)  # fmt: skip
FORMS = ("The {p} of {x} is", "{x} {p}")
PAIR = 2**32  # a passage that compares two answers has one target: the token to prefer + PAIR · the other token


@dataclass(frozen=True)
class Preference:
    """softplus(margin − log p(a) + log p(b)), where the answer a should be likelier than b: the comparison that
    CounterFact's Efficacy, Generalization and Specificity make (Meng et al., NeurIPS 2022), at the first token in which
    the two answers differ. It is almost 0 once a is likelier by more than the margin.

    Attributes:
        on: "edit", the fact's prompt, or "paraphrases", one of its paraphrases: a is the new answer, b the old one;
            "unrelated", the prompt of one of its unrelated facts: a is that fact's answer, b the new one or, where they
            are the same, the old one. Facts without an old answer add nothing, nor do two answers one of which begins
            with the other.
        margin: in nats.

    Raises:
        ValueError: there is no such ``on``.
    """

    on: Literal["edit", "paraphrases", "unrelated"] = "paraphrases"
    margin: float = 1.0

    def __post_init__(self) -> None:
        if self.on not in ("edit", "paraphrases", "unrelated"):
            raise ValueError(f"on is {self.on!r}; give 'edit', 'paraphrases' or 'unrelated'")

    @property
    def needs_reference(self) -> bool:
        return False

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> list[Passage]:
        """One passage per fact, up to the token in which the answers differ."""
        questions = [
            self._question(encoded, choice)
            for encoded, choice in zip(records, choices, strict=True)
            if encoded.record.original is not None
        ]
        sides = [[_tokenize(lm, prompt, answer, origin) for answer in answers] for prompt, answers, origin in questions]
        passages = [_compared(a, b) for a, b in sides if a is not None and b is not None]
        return [passage for passage in passages if passage is not None]

    def _question(self, encoded: EncodedRecord, choice: float) -> tuple[str, tuple[str, str], str]:
        """The prompt, the pair of the answer to prefer and the other one, and where the fact was read from."""
        record = encoded.record
        if self.on == "unrelated":
            fact = record.unrelated[int(choice * len(record.unrelated))]
            rival = record.target if fact.answer != record.target else str(record.original)
            return fact.prompt, (fact.answer, rival), record.origin
        wordings = (record.prompt,) if self.on == "edit" else record.paraphrases
        return wordings[int(choice * len(wordings))], (record.target, str(record.original)), record.origin

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return preference_loss(lm.forward, hidden, targets % PAIR, targets // PAIR, self.margin)


def _tokenize(lm: EditableLM, prompt: str, answer: str, origin: str) -> Passage | None:
    """The passage of a prompt and an answer; None where it does not fit the LLM's context."""
    try:
        return lm.tokenize(prompt, answer, origin=origin)
    except ValueError:
        return None


def _compared(preferred: Passage, other: Passage) -> Passage | None:
    """The tokens that two answers share, with the pair of tokens that differ as the target; None if none differ."""
    ids, other_ids = ((*p.input_ids, p.targets[-1]) for p in (preferred, other))
    begin = len(preferred.input_ids) + 1 - len(preferred.targets)  # the prompt's tokens
    for index in range(begin, min(len(ids), len(other_ids))):
        if ids[index] != other_ids[index]:
            return Passage(ids[:index], (ids[index] + PAIR * other_ids[index],))
    return None


@dataclass(frozen=True)
class Ending:
    """−log p(the answer ends) after a fact's prompt and its new answer: by a line end, punctuation that closes a
    phrase, or the end of the text (`rledit_env.answers.is_exact`). It penalises edits that make an LLM repeat
    the answer."""

    @property
    def needs_reference(self) -> bool:
        return False

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> list[Passage]:
        """The fact and its answer; facts that fill the LLM's context are left out."""
        texts = [(*r.edit.input_ids, r.edit.targets[-1]) for r in records]
        return [Passage(ids, (0,)) for ids in texts if len(ids) <= lm.context_length]

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        tokens = ending_tokens(lm.tokenizer)
        ending_ids = tokens[tokens < lm.forward.output.size]  # a tokenizer may have more tokens than the LLM's head
        return membership_loss(lm.forward, hidden, ending_ids.to(hidden.device))


@lru_cache(maxsize=8)
def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids (E,) of all tokens that end an answer."""
    pattern = re.compile(rf"[^\S\n]*(?:\n|[{re.escape(ENDS)}])")
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ids = {i for i, text in enumerate(texts) if pattern.match(text)} | {tokenizer.eos_token_id}
    return torch.tensor(sorted(i for i in ids if i is not None))


@dataclass(frozen=True)
class OtherQuestions:
    """KL(p_θ₀ ‖ p_W) on the questions of a batch's other facts, asked about a fact's own subject: an edit of one
    property of a subject should not change all others. KnowEdit's Specificity on ZsRE asks such questions.

    With ``statements`` about half of the facts are asked for a property instead, in one of two forms, "The native
    language of X is" and "X native language", only at the position where the answer begins.

    A fact without a subject adds nothing, nor does a fact with a question where no other fact of the batch has a
    subject in its prompt.

    Attributes:
        statements: whether properties are asked for, too.
    """

    statements: bool = True

    @property
    def needs_reference(self) -> bool:
        return True

    def draw(
        self,
        lm: EditableLM,
        records: Sequence[EncodedRecord],
        choices: Sequence[float],
        earlier: bool,
        rng: np.random.Generator,
    ) -> list[Passage]:
        """For each fact, another fact's prompt with this fact's subject in it, and the other fact's answer."""
        with_spans = [(e.record, e.record.subject_span) for e in records]
        passages = []
        for (record, _), choice in zip(with_spans, choices, strict=True):
            if record.subject is not None and self.statements and int(choice * 1000) % 2:
                prompt = FORMS[int(choice * 10_000) % len(FORMS)].format(
                    x=record.subject, p=PROPERTIES[int(choice * 1e6) % len(PROPERTIES)]
                )
                question = _tokenize(lm, prompt, "the", record.origin)
                if question is not None:
                    begin = len(question.input_ids) + 1 - len(question.targets)
                    passages.append(Passage(question.input_ids[:begin], question.targets[:1]))
                continue
            others = [
                (other, span) for other, span in with_spans
                if span is not None and other.subject != record.subject and other.prompt != record.prompt
            ]  # fmt: skip
            if record.subject is None or not others:
                continue
            other, (begin, end) = others[int(choice * len(others))]
            prompt = other.prompt[:begin] + record.subject + other.prompt[end:]
            if (question := _tokenize(lm, prompt, other.original or other.target, other.origin)) is not None:
                passages.append(question)
        return passages

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return kl_divergence(lm.forward, hidden, reference)
