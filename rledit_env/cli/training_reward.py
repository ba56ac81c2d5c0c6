"""The reward of `rledit train`: its flags, and the `RewardConfig` that they give."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from rledit_env.cli.command import kind_of
from rledit_env.cli.config_flags import CommandParser, values_of

if TYPE_CHECKING:
    from rledit_env.reward import RewardConfig


def reward_arguments(parser: CommandParser) -> None:
    """Add --reward, the weights of its components, and the other settings of `RewardConfig`."""
    from rledit_env.reward import RewardConfig

    group = parser.add_argument_group("the reward")
    group.add_argument("--reward", choices=("efficacy", "paper", "keeping"), default="efficacy",
                       help="'paper', the paper's; 'efficacy', the paper's with a term for the edit prompt and one "
                       "sampled earlier batch; or 'keeping', which also preserves the rest of the model: the data "
                       "set's own comparisons, answers that end, and the model's own text")
    group.add_argument("--efficacy-weight", type=float,
                       help="of the loss on the edit prompt (default: 1.0, and 2.0 for --reward keeping)")
    group.add_argument("--locality-weight", type=float,
                       help="of the divergence on unrelated facts (default: 1.0, 0.6 for --reward paper, and 0.5, or "
                       "4 on FEVER, for --reward keeping)")
    group.add_argument("--own-text-weight", type=float,
                       help="of the divergence on text that the model wrote before editing (default: 0, not scored; 60 "
                       "on CounterFact and 20 otherwise with --reward keeping)")
    group.add_argument("--continuation-weight", type=float, default=0.0,
                       help="of the divergence on what the unedited model writes after a new fact (0: not scored)")
    group.add_argument("--kl-rate", type=float, default=1.0,
                       help="rate of the Lagrange multiplier that keeps the divergence on the model's own text at "
                       "--kl-bound: its increase in an update for each nat above the bound")
    parser.add_config(
        "reward", RewardConfig, leave_out=("components", "penalty", "constraint"),
        about="The defaults are those of --reward efficacy; 'paper' and 'keeping' have their own.",
        default=lambda options: replace(_named(options, "facts"), every_step=False),
    )  # fmt: skip


def reward_of(options: argparse.Namespace) -> RewardConfig:
    """The reward of the options.

    Raises:
        ValueError: a setting has a wrong value.
    """
    from rledit_env.preservation import Constraint, Continuation, OwnText

    config = _named(options, kind_of(options.env))
    if options.own_text_weight is not None:
        text = config.components.get("own_text", (0.0, OwnText()))[1]
        config = config.replace("own_text", options.own_text_weight, text)
    if options.continuation_weight:
        config = config.replace("continuation", options.continuation_weight, Continuation())
    constraint = None if options.kl_bound is None else Constraint(bound=options.kl_bound, rate=options.kl_rate)
    return replace(config, constraint=constraint, **values_of(options, type(config)))


def _named(options: argparse.Namespace, kind: str) -> RewardConfig:
    """The reward of --reward for a kind of facts, with the weights of its own components."""
    from rledit_env.reward import RewardConfig

    efficacy, locality = options.efficacy_weight, options.locality_weight
    if options.reward == "paper":
        return RewardConfig.paper(0.6 if locality is None else locality)
    if options.reward == "efficacy":
        weight = 1.0 if efficacy is None else efficacy
        return RewardConfig.with_efficacy(weight, 1.0 if locality is None else locality)
    config = RewardConfig.keeping(kind)
    for name, given_weight in {"efficacy": efficacy, "locality": locality}.items():
        if given_weight is not None:
            config = config.replace(name, given_weight, config.components[name][1])
    return config


def keeping_terms(reward: RewardConfig) -> str:
    """The components of the reward that preserve the rest of the model, in words."""
    names = ("own_text", "continuation")
    parts = [f"{n} × {reward.components[n][0]:g}" for n in names if reward.components.get(n, (0.0,))[0]]
    if reward.constraint is not None:
        parts.append(f"{reward.constraint.component} ≤ {reward.constraint.bound:g}")
    return "".join(f", {part}" for part in parts)
