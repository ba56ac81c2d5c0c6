"""Components of the reward that ask what scores ask: which of two answers is the likelier, whether a free answer ends
where it should, and whether other questions about an edited subject keep their answers.

They stand beside the paper's (see `rledit_env.reward`). Its likelihood of the new answer on a paraphrase grows without
end, long after the new answer is the preferred one, and pays for that with everything else; CounterFact's scores, which
compare two answers, do not see the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rledit_env.answers import ENDS
from rledit_env.encoding import EncodedRecord
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import kl_divergence, membership_loss, preference_loss

# What is asked of a subject beside the facts' own questions: properties that an encyclopedia has of many things.
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
PAIR = 2**32  # a passage of two answers has one target: the token that should be the likelier + PAIR · the other one


@dataclass(frozen=True)
class Preference:
    """softplus(margin − log p(a) + log p(b)), where the answer a should be likelier than b: the comparison that
    CounterFact's Efficacy, Generalization and Specificity make (Meng et al., NeurIPS 2022), at the first token in which
    the two answers differ. It is next to nothing once a is the likelier by more than the margin.

    Attributes:
        on: "edit", the fact's prompt, or "paraphrases", one of its paraphrases: the new answer against the one before;
            "unrelated", one of its unrelated facts: that one's answer against the new one, or, where these are the
            same, against the one before. A fact without an answer before, and two answers of which one begins with the
            other, add nothing.
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
        """One passage a fact, up to where the answers part."""
        asked = [
            self._asked(encoded, choice)
            for encoded, choice in zip(records, choices, strict=True)
            if encoded.record.original is not None
        ]
        sides = [[_tokenized(lm, prompt, answer, origin) for answer in answers] for prompt, answers, origin in asked]
        parted = [_parting(a, b) for a, b in sides if a is not None and b is not None]
        return [passage for passage in parted if passage is not None]

    def _asked(self, encoded: EncodedRecord, choice: float) -> tuple[str, tuple[str, str], str]:
        """The prompt, the answer that should be the likelier with the other one, and where the fact is from."""
        record = encoded.record
        if self.on == "unrelated":
            fact = record.unrelated[int(choice * len(record.unrelated))]
            rival = record.target if fact.answer != record.target else str(record.original)
            return fact.prompt, (fact.answer, rival), record.origin
        wordings = (record.prompt,) if self.on == "edit" else record.paraphrases
        return wordings[int(choice * len(wordings))], (record.target, str(record.original)), record.origin

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return preference_loss(lm.forward, hidden, targets % PAIR, targets // PAIR, self.margin)


def _tokenized(lm: EditableLM, prompt: str, answer: str, origin: str) -> Passage | None:
    """A prompt with an answer that is not its fact's own; None where they do not fit the LLM's context."""
    try:
        return lm.tokenize(prompt, answer, origin=origin)
    except ValueError:
        return None


def _parting(one: Passage, other: Passage) -> Passage | None:
    """What two answers to a prompt have in common, with the pair of tokens that come next; None if none does."""
    ids, others = ((*p.input_ids, p.targets[-1]) for p in (one, other))
    begin = len(one.input_ids) + 1 - len(one.targets)  # the prompt's tokens
    for place in range(begin, min(len(ids), len(others))):
        if ids[place] != others[place]:
            return Passage(ids[:place], (ids[place] + PAIR * others[place],))
    return None


@dataclass(frozen=True)
class Ending:
    """−log p(the answer ends) after a fact's prompt and its new answer: at a line's end, at punctuation that closes a
    phrase, or at the end of the text (`rledit_env.answers.is_exact`). Free answers break on it when an edit makes an
    LLM say the answer again and again."""

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
        whole = [(*r.edit.input_ids, r.edit.targets[-1]) for r in records]
        return [Passage(ids, (0,)) for ids in whole if len(ids) <= lm.context_length]

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        tokens = ending_tokens(lm.tokenizer)
        known = tokens[tokens < lm.forward.output.size]  # a tokenizer may have more than the LLM can say
        return membership_loss(lm.forward, hidden, known.to(hidden.device))


@lru_cache(maxsize=8)
def ending_tokens(tokenizer: Any) -> Tensor:
    """The ids (E,) of all tokens that end an answer."""
    pattern = re.compile(rf"[^\S\n]*(?:\n|[{re.escape(ENDS)}])")
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ids = {i for i, text in enumerate(texts) if pattern.match(text)} | {tokenizer.eos_token_id}
    return torch.tensor(sorted(i for i in ids if i is not None))


@dataclass(frozen=True)
class OtherQuestions:
    """KL(p_θ₀ ‖ p_W) on what the other facts of a batch are asked, asked of a fact's own subject: an edit of one thing
    about a subject is not to change all that is said of it. KnowEdit's Specificity on ZsRE asks such questions.

    With ``statements`` every second fact is asked for a property instead, in one of two forms, "The native language of
    X is" and "X native language", at the one position that the answer begins at.

    A fact without a subject adds nothing, nor does one that is to be asked a question in a batch in which no other fact
    has a subject in its prompt.

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
        """For each fact another one's prompt with this one's subject, and the other one's answer."""
        known = [(e.record, e.record.subject_span) for e in records]
        passages = []
        for (record, _), choice in zip(known, choices, strict=True):
            if record.subject is not None and self.statements and int(choice * 1000) % 2:
                prompt = FORMS[int(choice * 10_000) % len(FORMS)].format(
                    x=record.subject, p=PROPERTIES[int(choice * 1e6) % len(PROPERTIES)]
                )
                asked = _tokenized(lm, prompt, "the", record.origin)
                if asked is not None:
                    begin = len(asked.input_ids) + 1 - len(asked.targets)
                    passages.append(Passage(asked.input_ids[:begin], asked.targets[:1]))
                continue
            others = [
                (other, span) for other, span in known
                if span is not None and other.subject != record.subject and other.prompt != record.prompt
            ]  # fmt: skip
            if record.subject is None or not others:
                continue
            other, (begin, end) = others[int(choice * len(others))]
            prompt = other.prompt[:begin] + record.subject + other.prompt[end:]
            if (asked := _tokenized(lm, prompt, other.original or other.target, other.origin)) is not None:
                passages.append(asked)
        return passages

    def loss(self, lm: EditableLM, hidden: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return kl_divergence(lm.forward, hidden, reference)
