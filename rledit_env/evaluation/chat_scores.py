"""Scores of edits in a chat: the facts are asked for through the LLM's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rledit_env.answers import contains
from rledit_env.knowledge import EditRecord
from rledit_env.lm.chat import ChatTemplate
from rledit_env.lm.editable import EditableLM

ANSWER_TOKENS = 48  # enough for a sentence or two around the target
CHUNK = 64  # records that are asked for at once
CHAT_MEANING = (f"a fact took in a chat if the model's greedy answer to the prompt as a user's message, "
                f"{ANSWER_TOKENS} tokens at most, contains the target as whole words")


@dataclass(frozen=True)
class ChatScores:
    """Scores of an LLM's answers in a chat, in percent: each record's score, then the mean over records.

    Attributes:
        chat_efficacy: share of edit prompts whose answer contains the target (`rledit_env.answers.contains`).
        chat_generalization: the same share for the paraphrases, the mean over records of each record's share.
        taken: for each record, whether the answer to its edit prompt contains the target.
        answers: the answers to the edit prompts, one for each record.
    """

    chat_efficacy: float
    chat_generalization: float
    taken: tuple[bool, ...]
    answers: tuple[str, ...]

    def as_dict(self) -> dict[str, float]:
        """The two scores by name."""
        return {"chat_efficacy": self.chat_efficacy, "chat_generalization": self.chat_generalization}


def chat_scores(
    lm: EditableLM,
    records: Sequence[EditRecord],
    template: ChatTemplate | None = None,
    progress: Callable[[int], object] | None = None,
) -> ChatScores:
    """Ask for the facts in a chat at the current weights, each edit prompt and each paraphrase in its own chat.

    The answers are free text, decoded greedily, and must contain the target.

    Args:
        lm: the edited LLM.
        records: the facts, with plain prompts.
        template: the LLM's chat template; None makes it.
        progress: called after each chunk with its number of records.

    Raises:
        ValueError: no records, an LLM without a chat template, or a prompt that does not fit it (`ChatTemplate`).
    """
    if not records:
        raise ValueError("no fact has been edited yet; take at least one step first")
    template = template or ChatTemplate(lm.tokenizer, lm.name or "the model")
    taken: list[bool] = []
    answers: list[str] = []
    general: list[float] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        prompts = [template(prompt, r.origin) for r in chunk for prompt in (r.prompt, *r.paraphrases)]
        written = iter(lm.generate(prompts, extra=ANSWER_TOKENS))
        for record in chunk:
            answers.append(next(written).strip())
            taken.append(contains(answers[-1], record.target))
            general.append(fmean(contains(next(written), record.target) for _ in record.paraphrases))
        if progress is not None:
            progress(len(chunk))
    return ChatScores(100 * fmean(taken), 100 * fmean(general), tuple(taken), tuple(answers))
