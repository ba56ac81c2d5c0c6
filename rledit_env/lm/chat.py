"""Puts plain prompts into the chat template of a model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rledit_env.knowledge import EditRecord, ImpliedFact
from rledit_env.lm.tokens import TextEncoder

CHAT_FORMS = {"only": "in the chat template", "also": "as it is and in the chat template"}
_MARK = "\ufffc8215\ufffc"  # a message that no template holds


class ChatTemplate:
    """A tokenizer's chat template around one user message, ready for the model to answer.

    Args:
        tokenizer: the model's tokenizer.
        name: the model's name in messages.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not take a single user message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the model") -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template; take a model made for chat, or the prompts as they are")
        self.tokenizer, self.name = tokenizer, name
        self.special_tokens = TextEncoder(tokenizer).special_tokens
        before, mark, _ = self._render(_MARK).partition(_MARK)
        if not mark:
            raise ValueError(f"the chat template of {name} leaves a user's message out; take the prompts as they are")
        self.lead = len(before)  # characters before the message

    def __call__(self, prompt: str, origin: str = "") -> str:
        """The prompt as a user message, followed by the beginning of the answer.

        Raises:
            ValueError: the prompt contains special tokens of a chat already, or the template fails on it.
        """
        self.check(prompt, origin)
        return self._render(prompt)

    def check(self, prompt: str, origin: str = "") -> None:
        """Check that a prompt may be put into the template.

        Raises:
            ValueError: the prompt contains special tokens of a chat already.
        """
        token = next((token for token in self.special_tokens if token in prompt), None)
        if token is not None:
            raise ValueError(f"{origin or 'chat'}: the prompt holds {token!r} already: {prompt!r}; give the plain "
                             "prompt, or take all prompts as they are")

    def wrapped(self, record: EditRecord) -> EditRecord:
        """The record with all its prompts in the template: the edit's, the paraphrases' and those only scored."""

        def chat(prompt: str) -> str:
            return self(prompt, record.origin)

        def asked(fact: ImpliedFact) -> ImpliedFact:
            needs = tuple((chat(prompt), target) for prompt, target in fact.needs)
            return replace(fact, prompt=chat(fact.prompt), needs=needs)

        prompt, span = chat(record.prompt), record.subject_span
        # Many templates trim the message.
        message = record.prompt if prompt.startswith(record.prompt, self.lead) else record.prompt.strip()
        if not prompt.startswith(message, self.lead):
            raise ValueError(f"{record.origin or 'chat'}: the chat template of {self.name} changes the prompt "
                             f"{record.prompt!r}; give it as it is to stand in the chat")
        trimmed = record.prompt.index(message)
        return replace(
            record,
            prompt=prompt,
            paraphrases=tuple(map(chat, record.paraphrases)),
            unrelated=tuple(replace(fact, prompt=chat(fact.prompt)) for fact in record.unrelated),
            implied=tuple(asked(fact) for fact in record.implied),
            variants=tuple(asked(fact) for fact in record.variants),
            subject_start=None if span is None else span[0] + self.lead - trimmed,
            lead=self.lead,
        )

    def asked(self, record: EditRecord, form: str) -> tuple[EditRecord, ...]:
        """The record in the form asked for: "only" in the template, or "also" in it, after the record as it is.

        Raises:
            ValueError: as for :meth:`wrapped`, or there is no such form.
        """
        if form not in CHAT_FORMS:
            raise ValueError(f"chat is {form!r}; give one of {', '.join(map(repr, CHAT_FORMS))}")
        return (record, self.wrapped(record)) if form == "also" else (self.wrapped(record),)

    def _render(self, message: str) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template of {self.name} does not take a user's message ({reason}); take the "
                             "prompts as they are") from error
        return str(text)


def in_chat(
    records: Sequence[EditRecord], tokenizer: PreTrainedTokenizerBase, name: str, form: str = "only"
) -> tuple[EditRecord, ...]:
    """The records with every prompt in the chat template of the model's tokenizer (see `ChatTemplate.asked`)."""
    template = ChatTemplate(tokenizer, name)
    return tuple(asked for record in records for asked in template.asked(record, form))
