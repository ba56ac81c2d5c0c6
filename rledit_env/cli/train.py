"""`rledit train`: train the RLEdit agent."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from rledit_env.cli.command import (
    OK,
    Command,
    chat_argument,
    check_positive,
    dtype_name,
    environment_arguments,
    kind_of,
    model_source,
    option_or,
    probability,
    say_loading,
    skipped_rows,
)
from rledit_env.cli.paths import check_paths, going_on, written_path
from rledit_env.outputs import growing

if TYPE_CHECKING:
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.lm.editable import EditableLM


# The options that are settings of `HypernetworkConfig`, by its names.
NETWORK_OPTIONS = (
    "rank", "blocks", "aggregation", "step_size", "damping", "prior", "prior_source", "text", "text_tokens",
    "normaliser", "warm_up", "precision",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from agents.rledit.config import AGGREGATIONS, RECOMMENDED, HypernetworkConfig, RLEditConfig
    from rledit_env.knowledge import HELD_OUT
    from rledit_env.lm.forward import TOKEN_CHOICES

    network, config = HypernetworkConfig(), RLEditConfig()
    environment_arguments(parser, required=True)
    parser.add_argument("--out", type=written_path, required=True, metavar="RUN",
                        help="the run's folder: best/, last/ and TensorBoard's logs")
    parser.add_argument("--no-resume", dest="resume", action="store_false",
                        help="start anew, even if RUN holds an interrupted run (which is otherwise continued)")

    group = parser.add_argument_group("the stream")
    group.add_argument("--num-batches", type=int, default=10, metavar="T", help="batches of a training stream")
    group.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    group.add_argument("--token", choices=TOKEN_CHOICES, default=RECOMMENDED["token"],
                       help="positions whose keys and value gradients the agent sees")
    group.add_argument("--steps-per-batch", type=int, default=RECOMMENDED["steps_per_batch"],
                       help="how often a batch is presented, its state recomputed each time")
    group.add_argument("--present-until", type=probability, metavar="P",
                       help="present a batch until the model gives every token of its answers this probability, and "
                       "--steps-per-batch times at most (default: always that often)")
    group.add_argument("--contexts", type=int, default=0, metavar="K",
                       help="present each fact plainly and behind K short texts that the model writes, all at once")
    group.add_argument("--edit-steps-per-batch", type=int, metavar="N",
                       help="how often a batch is presented when the trained agent edits; the selection does so, too, "
                       "and it is recorded with the agent (default: --steps-per-batch)")
    group.add_argument("--edit-present-until", type=probability, metavar="P",
                       help="until which probability it is presented then (default: --present-until)")
    group.add_argument("--edit-contexts", type=int, metavar="K",
                       help="behind how many texts it is presented then (default: --contexts)")
    chat_argument(group, "every fact")

    group = parser.add_argument_group("the reward")
    group.add_argument("--reward", choices=("efficacy", "paper", "keeping"), default="efficacy",
                       help="the paper's; the paper's with a term for the edit prompt and one sampled earlier batch; "
                       "or 'keeping', which also keeps the rest of the model: the data set's own comparisons, answers "
                       "that end, and the model's own text")
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
    group.add_argument("--kl-bound", type=float, metavar="NATS",
                       help="hold the divergence on the model's own text at this many nats a token, by a Lagrange "
                       "multiplier, and choose the best checkpoint among those within it")
    group.add_argument("--kl-rate", type=float, default=1.0,
                       help="the multiplier's rise an update for each nat above the bound (--kl-bound)")
    group.add_argument("--every-step", action="store_true",
                       help="score every step, not only a batch's last presentation (slower)")

    group = parser.add_argument_group("the network")
    group.add_argument("--start", metavar="RUN",
                       help="begin with the policy of a saved agent (a run's folder, an agent's folder, or 'default') "
                       "instead of an untrained one; its network is what it is, so that no other option of this group "
                       "can be given")
    group.add_argument("--start-scale", type=float, default=1.0, metavar="FACTOR",
                       help="multiply that policy's step sizes")
    group.add_argument("--aggregation", choices=AGGREGATIONS, default=network.aggregation,
                       help="how rows become an update; least_squares is the paper's")
    group.add_argument("--rank", type=int, default=network.rank, help="inner width of a residual block")
    group.add_argument("--blocks", type=int, default=network.blocks, help="residual blocks; 0 leaves only step sizes")
    group.add_argument("--precision", choices=("float32", "bfloat16"), default=network.precision,
                       help="of the blocks' matrix products")
    group.add_argument("--step-size", type=float, default=network.step_size, help="initial step size of a module")
    group.add_argument("--damping", type=float, default=network.damping, help="initial ridge of the least squares")
    group.add_argument("--prior", type=float, default=network.prior,
                       help="training facts' worth of keys that the recursion starts with")
    group.add_argument("--prior-source", choices=["facts", "text"], default=network.prior_source,
                       help="whose keys: of training facts, or of ordinary text, which keeps the rest of the model")
    group.add_argument("--text", default=network.text, metavar="FILE",
                       help="the text for --prior-source text: a file, or what the model writes itself")
    group.add_argument("--text-tokens", type=int, default=network.text_tokens, help="how much of it")
    group.add_argument("--normaliser", choices=("stream", "lifetime"), default=network.normaliser,
                       help="whether the inputs' moments start anew with each stream")
    group.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=network.warm_up,
                       help="whether they start from moments of training facts, without which single facts do not take")

    group = parser.add_argument_group("learning")
    group.add_argument("--trajectories", type=int, default=40, help="training streams in all")
    group.add_argument("--credit", choices=("trajectory", "step"), default=config.credit,
                       help="the gradient of the whole return, or of each step's own reward")
    group.add_argument("--learning-rate", type=float, default=config.learning_rate, help="Adam's, of the blocks")
    group.add_argument("--step-size-learning-rate", type=float, default=config.step_size_learning_rate,
                       help="Adam's, of the step sizes' and dampings' logarithms")
    group.add_argument("--max-gradient-norm", type=float, default=config.max_gradient_norm)
    group.add_argument("--trajectories-per-update", type=int, default=config.trajectories_per_update)
    group.add_argument("--batches-per-update", type=int, metavar="B",
                       help="learn along a stream, from the return of B batches at a time (default: once a stream)")
    group.add_argument("--discount", type=float, default=config.discount)
    group.add_argument("--policy-average", type=float, default=config.policy_average, metavar="DECAY",
                       help="evaluate and keep a running mean of the policy over the updates, such as 0.9; 0: none")
    group.add_argument("--drift-limit", type=float, default=config.drift_limit,
                       help="a training stream is cut at this mean relative change of the weights")
    group.add_argument("--seed", type=int, default=0, help="of the initial network and the streams")

    group = parser.add_argument_group("selection of the best checkpoint")
    group.add_argument("--select-on", choices=("held-out", "eval"), default="held-out",
                       help=f"the last {HELD_OUT:.0%} of the training split (then not trained on), or the eval split; "
                       "never report a result on facts that selected the agent".replace("%", "%%"))
    group.add_argument("--eval-num-batches", type=int, metavar="T",
                       help="batches of the selection's stream (default: twice a training stream's, or what there is)")
    group.add_argument("--eval-every", type=int, default=5, help="updates between two evaluations")
    group.add_argument("--patience", type=int, default=4, help="evaluations without a better score before it stops")
    group.add_argument("--calibrate-num-batches", type=int, metavar="T",
                       help="afterwards scale the step sizes to what suits a stream of T batches best: give as many as "
                       "you will edit (default: leave them as trained)")
    group.add_argument("--calibrate-kl-bound", type=float, metavar="NATS",
                       help="to what suits it best among those within this divergence on the model's own text "
                       "(default: --kl-bound)")
    group.add_argument("--save-precision", choices=("float32", "bfloat16"), default="float32",
                       help="of the blocks' weights in the best agent's file; bfloat16 makes it smaller")


def run(options: argparse.Namespace) -> int:
    import torch

    from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
    from agents.files import RUN, RUN_PARTS, run_folder
    from rledit_env.lm.editable import EditableLM

    check_paths(options, growing("--out", options.out, RUN, RUN_PARTS))
    training, selection = _training_data(options)
    check_positive(options, "num_batches", "batch_size", "steps_per_batch", "trajectories", "eval_every", "patience",
              "trajectories_per_update")
    optional = ("calibrate_num_batches", "edit_steps_per_batch")
    check_positive(options, *(name for name in optional if getattr(options, name) is not None))
    _check_calibration(options)
    held = options.eval_num_batches or max(1, min(2 * options.num_batches, len(selection) // options.batch_size))
    # What can be wrong without the model is found before it is loaded.
    reward = _reward(options)
    start = _start(options)
    if start is None:
        network = HypernetworkConfig(**{name: getattr(options, name) for name in NETWORK_OPTIONS})
    else:
        network = RLEditAgent.load(start).config.network
    config = RLEditConfig(
        network=network, credit=options.credit, learning_rate=options.learning_rate,
        step_size_learning_rate=options.step_size_learning_rate, max_gradient_norm=options.max_gradient_norm,
        trajectories_per_update=options.trajectories_per_update, discount=options.discount, kl_bound=options.kl_bound,
        drift_limit=options.drift_limit, policy_average=options.policy_average,
        batches_per_update=options.batches_per_update,
    )
    say_loading(options.model)
    lm = EditableLM.load(
        options.model, options.edit_modules, options.dtype, options.device, **model_source(options)
    )
    if options.chat:
        training, selection = (_in_chat(facts, lm, options.chat) for facts in (training, selection))
    common = {
        "model": lm, "batch_size": options.batch_size, "token": options.token,
        "steps_per_batch": options.steps_per_batch, "present_until": options.present_until or None,
        "contexts": options.contexts, "array_backend": "torch", "disable_env_checker": True,
    }
    editing = common | {
        "steps_per_batch": options.edit_steps_per_batch or options.steps_per_batch,
        "present_until": option_or(options.edit_present_until, options.present_until) or None,
        "contexts": option_or(options.edit_contexts, options.contexts),
    }
    streams = {"data": training, "num_batches": options.num_batches, "reward": reward, "reward_gradient": True}
    env = gym.make(options.env, **streams, **common)
    eval_env = gym.make(options.env, data=selection, num_batches=held, reward="none", **editing)
    longer = options.calibrate_num_batches and gym.make(
        options.env, data=selection, num_batches=options.calibrate_num_batches, reward="none", **editing
    )
    agent = RLEditAgent(env, config, seed=options.seed)
    if start is not None:
        agent.load_policy_state(RLEditAgent.load(start, env).policy_state())
        agent.scale_step_sizes(options.start_scale)

    size = sum(p.numel() for p in agent.network.parameters())
    print(f"data      {training.source}: {len(training):,} facts to train on", *skipped_rows(training))
    print(f"selection {selection.source}: {len(selection):,} facts, streams of {held} × {options.batch_size}")
    print(f"model     {lm.name} ({dtype_name(lm)}, {lm.device}), {len(lm.module_shapes)} modules: {_modules(lm)}")
    most = "at most " if options.present_until else ""
    behind = f" and behind {options.contexts} contexts" if options.contexts else ""
    print(f"streams   {options.num_batches} × {options.batch_size} facts{behind}, {most}{options.steps_per_batch} "
          f"steps a batch, token {options.token}, reward {options.reward}{_preserving(reward)}")
    print(f"agent     {size:,} parameters, {json.dumps(_flat(config))}")
    if start is not None:
        print(f"start     {start}, step sizes × {options.start_scale:g}")
    print(f"run       {options.out} (tensorboard --logdir {shlex.quote(str(options.out))})", flush=True)
    run_folder(options.out, options.command_line)
    horizon = options.num_batches * options.steps_per_batch
    with going_on():
        agent.learn(
            options.trajectories * horizon, log_dir=options.out, eval_env=eval_env, eval_every=options.eval_every,
            patience=options.patience, resume=options.resume,
            # A stream whose batches end early has fewer steps than it could have.
            callback=lambda _: agent.updates * options.trajectories_per_update < options.trajectories,
        )
    if longer is not None:
        scores = agent.calibrate(longer, kl_bound=options.calibrate_kl_bound)
        tried = ", ".join(f"× {factor:g}: {score:.1f}" for factor, score in scores.items())
        facts = f"{options.calibrate_num_batches} × {options.batch_size} facts"
        print(f"step sizes scaled for {facts}; mean scores: {tried}", flush=True)
    if editing != common:
        agent.set_env(gym.make(options.env, **streams, **editing))  # as it is recorded with the agent
    agent.save(options.out / "best", getattr(torch, options.save_precision))
    score = f", mean score {agent.best_score:.1f} on the selection's facts" if agent.best_score > -1 else ""
    print(f"trained: {agent.updates} updates{score}; the agent is in {options.out / 'best'}")
    print(f"next: rledit evaluate --env {options.env} --agent {shlex.quote(str(options.out))} --data {options.data} "
          "--split eval --json result.json")
    return OK


def _training_data(options: argparse.Namespace) -> tuple[KnowledgeDataset, KnowledgeDataset]:
    """The facts to train on, and those that select the checkpoint; no fact is in both."""
    from rledit_env.knowledge import held_out, load_knowledge

    kind = kind_of(options.env)
    whole = load_knowledge(kind, options.data, "train", options.on_error)
    if options.select_on == "eval":
        return whole, load_knowledge(kind, options.data, "eval", options.on_error)
    return held_out(whole)


def _start(options: argparse.Namespace) -> Path | None:
    """The folder of the agent that training begins with, if it is to begin with one.

    Raises:
        ValueError: an option says otherwise what its network is, or there is none whose step sizes could be scaled.
    """
    from agents import HypernetworkConfig, find_agent

    if options.start is None:
        if options.start_scale != 1:
            raise ValueError(f"--start-scale is {options.start_scale:g}, but no agent is started from; give --start "
                             "RUN, or set the first step sizes by --step-size")
        return None
    if not 0 < options.start_scale < float("inf"):
        raise ValueError(f"--start-scale is {options.start_scale:g}; give a positive number")
    default = HypernetworkConfig()
    for name in NETWORK_OPTIONS:
        if getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {getattr(options, name)}, but the network is that of --start {options.start}; "
                             f"leave {flag} out, or train an agent from the beginning without --start")
    return find_agent(options.start, kind_of(options.env))


def _in_chat(facts: KnowledgeDataset, lm: EditableLM, form: str) -> KnowledgeDataset:
    from rledit_env.lm.chat import CHAT_FORMS, in_chat

    records = in_chat(facts.records, lm.tokenizer, lm.name, form)
    # The agent's record names the source, so that a run is not gone on with on other prompts.
    return replace(facts, records=records, source=f"{facts.source}, {CHAT_FORMS[form]}")


def _check_calibration(options: argparse.Namespace) -> None:
    bound = options.calibrate_kl_bound
    if bound is None:
        return
    if options.calibrate_num_batches is None:
        raise ValueError("--calibrate-kl-bound is for --calibrate-num-batches T; give that, too")
    if not 0 < bound < float("inf"):
        raise ValueError(f"--calibrate-kl-bound is {bound:g}; give a positive number of nats")


def _reward(options: argparse.Namespace) -> Any:
    from rledit_env.preservation import Constraint, Continuation, OwnText
    from rledit_env.reward import RewardConfig

    efficacy, locality = options.efficacy_weight, options.locality_weight
    if options.reward == "keeping":
        config = RewardConfig.keeping(kind_of(options.env))
        weights = {"efficacy": efficacy, "locality": locality}
        for name, weight in weights.items():
            if weight is not None:
                config = config.replace(name, weight, config.components[name][1])
    elif options.reward == "paper":
        config = RewardConfig.paper(0.6 if locality is None else locality)
    else:
        own = 1.0 if efficacy is None else efficacy
        config = RewardConfig.with_efficacy(own, 1.0 if locality is None else locality)
    if options.own_text_weight is not None:
        text = config.components.get("own_text", (0.0, OwnText()))[1]
        config = config.replace("own_text", options.own_text_weight, text)
    if options.continuation_weight:
        config = config.replace("continuation", options.continuation_weight, Continuation())
    constraint = None if options.kl_bound is None else Constraint(bound=options.kl_bound, rate=options.kl_rate)
    return replace(config, every_step=options.every_step, constraint=constraint)


def _preserving(reward: Any) -> str:
    """What of the reward keeps the rest of the model, in words."""
    names = ("own_text", "continuation")
    parts = [f"{n} × {reward.components[n][0]:g}" for n in names if reward.components.get(n, (0.0,))[0]]
    if reward.constraint is not None:
        parts.append(f"{reward.constraint.component} ≤ {reward.constraint.bound:g}")
    return "".join(f", {part}" for part in parts)


def interrupted(options: argparse.Namespace) -> str:
    if not (options.out / "last" / "agent.json").exists():
        return "interrupted before the first checkpoint; nothing was saved"
    from agents import agent_settings

    updates = agent_settings(options.out / "last")["updates"]
    return (
        f"interrupted; {options.out / 'last'} holds the state after update {updates}. "
        f"Go on with the same command:\n  {options.command_line}"
    )


def _flat(config: Any) -> dict[str, Any]:
    values = asdict(config)
    return {**values.pop("network"), **values}


def _modules(lm: EditableLM) -> str:
    names = list(lm.module_shapes)
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"


COMMAND = Command(
    "train",
    "train an agent to edit, on a stream of facts",
    "Train the RLEdit agent: whole streams of facts are edited into the model, and the gradient of the whole\n"
    "stream's reward teaches the agent. An interrupted run is continued by the same command.",
    """\
examples:
  # on the sample that ships with the package, a first agent
  rledit train --env RLEdit-CounterFact-v0 --out runs/first --trajectories 10

  # on your own data: a file, or a folder with counterfact_train.jsonl
  rledit train --env RLEdit-CounterFact-v0 --data counterfact_train.jsonl --out runs/counterfact

  # the paper's agent and reward
  rledit train --env RLEdit-ZsRE-v0 --aggregation least_squares --reward paper --out runs/paper

  # watch it
  tensorboard --logdir runs
""",
    add_arguments,
    run,
    interrupted,
)
