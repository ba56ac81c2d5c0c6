"""What a network needs before its first episode: second moments of keys, and moments of training facts."""

from __future__ import annotations

from tqdm.auto import trange

from agents.base import used_rows
from agents.rledit.moments import Moments, take
from agents.rledit.policy import HypernetworkPolicy
from agents.rledit.text_prior import start_from_text
from agents.rledit.trajectory import forget_states
from rledit_env.interface import Environment, editing_env


def warm_up(agent: HypernetworkPolicy, env: Environment, prior: bool, moments: bool, progress_bar: bool) -> None:
    """Give the network its prior, and the moments of training facts.

    A prior from text is computed or read from the cache. A prior from facts and the moments are gathered from the first
    batches of ``prior_batches`` episodes.

    Args:
        agent: the agent of the network.
        env: an environment of training facts.
        prior: whether to give the prior on keys.
        moments: whether to give the moments of training facts.
        progress_bar: show a progress bar.
    """
    if prior and agent.config.network.has_text_prior:
        start_from_text(agent.network, editing_env(env).lm, progress_bar)
        prior = False
    if not prior and not moments:
        return
    batches = agent.config.prior_batches
    gathered: Moments = {}
    forget_states(env)
    for i in trange(batches, desc="moments of training facts", unit="batch", disable=not progress_bar, leave=False):
        observation, _ = env.reset(seed=agent.seed * batches + i)
        keys, gradients = used_rows(observation, agent.network.device)
        if not observation["mask"].any():  # the LLM answers all of the batch's facts already
            continue
        if prior:
            agent.network.key_memory.gather(keys)
        if moments:
            take(gathered, keys, gradients, agent.network.whitened_names)
    if moments:
        agent.network.start_from(gathered)
