"""The facts now presented: what an agent has to ask its environment where the observation does not say it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium as gym

from rledit_env.encoding import EncodedRecord
from rledit_env.interface import EditingEnv, editing_env


@dataclass(frozen=True)
class FactRows:
    """A fact in an observation.

    Attributes:
        rows: of the observation that are its own; the facts' rows follow one another.
        answers: its answer tokens.
    """

    rows: int
    answers: int


def facts_themselves(env: EditingEnv) -> list[EncodedRecord]:
    """The facts now presented, for an agent that reads them instead of the observation, or needs to know whose each row
    is.

    Raises:
        ValueError: the environment presents them behind contexts as well, which such an agent would ignore.
        gymnasium.error.ResetNeeded: none are presented.
    """
    if env.contexts:
        raise ValueError(f"this agent reads the facts themselves, but the environment presents them behind "
                         f"{env.contexts} more contexts; make it with contexts=0 (--contexts 0)")
    return env.current_batch()


class PresentedFacts:
    """Knows the environment that an agent edits in, and asks it which facts are presented.

    Args:
        env: that environment; None if it is not known yet.
    """

    def __init__(self, env: gym.Env | None) -> None:
        self.env = env

    @contextmanager
    def by(self, env: gym.Env) -> Iterator[None]:
        """Within it, the facts are those of this environment."""
        before, self.env = self.env, env
        try:
            yield
        finally:
            self.env = before

    def facts(self, rows: int) -> list[FactRows]:
        """The facts of an observation with so many rows, in its order.

        Raises:
            ValueError: the environment is not known, presents nothing or facts behind contexts, or its facts have other
            rows than these.
        """
        if rows == 0:
            return []
        if self.env is None:
            raise ValueError("this agent asks its environment which facts are presented; load it with env=… or give it "
                             "with set_env(env)")
        inner = editing_env(self.env)
        mend = "name the environment that it edits in with set_env(env)"
        holder = inner.lm.holder() if inner.lm.holder is not None else None
        if holder is not None and holder is not inner:
            raise ValueError(f"another environment has begun an episode on the agent's LLM since; {mend}")
        try:
            records = facts_themselves(inner)
        except gym.error.ResetNeeded as error:
            raise ValueError(f"the agent's environment presents no facts; {mend}") from error
        found = [FactRows(len(r.edit.chosen_positions(inner.token)), len(r.edit.targets)) for r in records]
        if sum(fact.rows for fact in found) != rows:
            raise ValueError(
                f"the observation has {rows} rows, but the facts that the agent's environment presents have "
                f"{sum(fact.rows for fact in found)}; {mend}"
            )
        return found
