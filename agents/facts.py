"""The facts now presented, which an agent asks its environment for when it needs more than the observation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium as gym

from rledit_env.encoding import EncodedRecord
from rledit_env.interface import EditingEnv, Environment, editing_env

MEND = "name the environment that it edits in with set_env(env)"


@dataclass(frozen=True)
class FactRows:
    """A fact in an observation.

    Attributes:
        rows: number of its rows; the rows of the facts follow one another.
        answers: number of its answer tokens.
    """

    rows: int
    answers: int


def facts_themselves(env: EditingEnv) -> list[EncodedRecord]:
    """The facts now presented, for an agent that reads them instead of the observation, or needs each row's fact.

    Raises:
        ValueError: the environment also presents the facts behind contexts, which such an agent would ignore.
        gymnasium.error.ResetNeeded: no facts are presented.
    """
    if env.contexts:
        raise ValueError(f"this agent reads the facts themselves, but the environment presents them behind "
                         f"{env.contexts} more contexts; make it with contexts=0 (--contexts 0)")
    return env.current_batch()


class PresentedFacts:
    """Asks the environment that an agent edits in which facts are presented.

    Args:
        env: that environment; None if it is not known yet.
    """

    def __init__(self, env: Environment | None) -> None:
        self.env = env

    @contextmanager
    def by(self, env: Environment) -> Iterator[None]:
        """Ask this environment within the context."""
        former_env, self.env = self.env, env
        try:
            yield
        finally:
            self.env = former_env

    def facts(self, rows: int) -> list[FactRows]:
        """The facts of an observation with this number of rows, in its order.

        Raises:
            ValueError: the environment is not known, presents no facts or facts behind contexts, or its facts have
                another number of rows.
        """
        if rows == 0:
            return []
        inner = self._presenting_env()
        try:
            records = facts_themselves(inner)
        except gym.error.ResetNeeded as error:
            raise ValueError(f"the agent's environment presents no facts; {MEND}") from error
        facts = [FactRows(len(r.edit.chosen_positions(inner.token)), len(r.edit.targets)) for r in records]
        if sum(fact.rows for fact in facts) != rows:
            raise ValueError(
                f"the observation has {rows} rows, but the facts that the agent's environment presents have "
                f"{sum(fact.rows for fact in facts)}; {MEND}"
            )
        return facts

    def for_the_first_time(self) -> bool:
        """Whether this is the first presentation of the facts' batch.

        Raises:
            ValueError: the environment is not known.
        """
        inner = self._presenting_env()
        return inner.position % inner.steps_per_batch == 0

    def _presenting_env(self) -> EditingEnv:
        """The environment that presents facts.

        Raises:
            ValueError: it is not known, or another one has begun an episode on its LLM.
        """
        if self.env is None:
            raise ValueError("this agent asks its environment which facts are presented; load it with env=… or give it "
                             "with set_env(env)")
        inner = editing_env(self.env)
        holder = inner.lm.holder() if inner.lm.holder is not None else None
        if holder is not None and holder is not inner:
            raise ValueError(f"another environment has begun an episode on the agent's LLM since; {MEND}")
        return inner
