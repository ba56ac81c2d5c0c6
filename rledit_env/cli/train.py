"""`rledit train`: train the RLEdit agent."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from rledit_env.cli.command import (
    OK,
    Command,
    chat_argument,
    check_contexts,
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
from rledit_env.cli.config_flags import CommandParser, values_of
from rledit_env.cli.paths import check_paths, going_on, written_path
from rledit_env.cli.training_reward import keeping_terms, reward_arguments, reward_of
from rledit_env.outputs import growing
from rledit_env.type_aliases import JsonObject, Settings

if TYPE_CHECKING:
    from agents import RLEditAgent, RLEditConfig
    from rledit_env.interface import Environment
    from rledit_env.knowledge import KnowledgeDataset
    from rledit_env.lm.editable import EditableLM
    from rledit_env.reward import RewardConfig


def add_arguments(parser: CommandParser) -> None:
    from agents.rledit.config import HypernetworkConfig, RLEditConfig

    environment_arguments(parser, required=True)
    parser.add_argument("--out", type=written_path, required=True, metavar="RUN",
                        help="the run's folder: best/, last/ and TensorBoard's logs")
    parser.add_argument("--no-resume", dest="resume", action="store_false",
                        help="start anew, even if RUN holds an interrupted run (which is otherwise continued)")
    _stream_arguments(parser)
    reward_arguments(parser)
    group = parser.add_argument_group("a saved agent to start from")
    group.add_argument("--start", metavar="RUN",
                       help="start from the policy of a saved agent (a run's folder, an agent's folder, or 'default') "
                       "instead of an untrained one; its network is kept, so no network option can be given")
    group.add_argument("--start-scale", type=float, default=1.0, metavar="FACTOR",
                       help="multiply that policy's step sizes")
    group = parser.add_argument_group("the training")
    group.add_argument("--trajectories", type=int, default=40, help="training streams in all")
    group.add_argument("--seed", type=int, default=0, help="of the initial network and the streams")
    _selection_arguments(parser)
    parser.add_config("learning", RLEditConfig, leave_out=("network",))
    parser.add_config("network", HypernetworkConfig)


def _stream_arguments(parser: CommandParser) -> None:
    """Add the arguments of the stream and its presentations."""
    from agents.rledit.config import RECOMMENDED
    from rledit_env.lm.forward import TOKEN_CHOICES

    group = parser.add_argument_group("the stream")
    group.add_argument("--num-batches", type=int, default=10, metavar="T", help="batches of a training stream")
    group.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    group.add_argument("--token", choices=TOKEN_CHOICES, default=RECOMMENDED["token"],
                       help="positions whose keys and value gradients the agent sees")
    group.add_argument("--steps-per-batch", type=int, default=RECOMMENDED["steps_per_batch"],
                       help="how often a batch is presented, its state recomputed each time")
    group.add_argument("--present-until", type=probability, metavar="P",
                       help="present a batch until the model gives every token of its answers this probability, at "
                       "most --steps-per-batch times (default: always that often)")
    group.add_argument("--contexts", type=int, default=0, metavar="K",
                       help="present each fact plainly and behind K short texts that the model writes, all at once")
    group.add_argument("--edit-steps-per-batch", type=int, metavar="N",
                       help="--steps-per-batch for the trained agent's editing, which is saved with the agent and used "
                       "in the selection, too (default: --steps-per-batch)")
    group.add_argument("--edit-present-until", type=probability, metavar="P",
                       help="--present-until for the trained agent's editing (default: --present-until)")
    group.add_argument("--edit-contexts", type=int, metavar="K",
                       help="--contexts for the trained agent's editing (default: --contexts)")
    chat_argument(group, "every fact")


def _selection_arguments(parser: CommandParser) -> None:
    """Add the arguments of the selection of the best checkpoint, and of its calibration and file."""
    from rledit_env.knowledge import HELD_OUT

    group = parser.add_argument_group("selection of the best checkpoint")
    group.add_argument("--select-on", choices=("held-out", "eval"), default="held-out",
                       help=f"the last {HELD_OUT:.0%} of the training split (then not trained on), or the eval split; "
                       "never report a result on facts that selected the agent".replace("%", "%%"))
    group.add_argument("--eval-num-batches", type=int, metavar="T",
                       help="batches of the selection's stream (default: twice a training stream's, or fewer if there "
                       "are not enough facts)")
    group.add_argument("--eval-every", type=int, default=5, help="updates between two evaluations")
    group.add_argument("--patience", type=int, default=4, help="evaluations without a better score before it stops")
    group.add_argument("--calibrate-num-batches", type=int, metavar="T",
                       help="after training, scale the step sizes by the factor that scores best on a stream of T "
                       "batches: give as many as you will edit (default: leave them as trained)")
    group.add_argument("--calibrate-kl-bound", type=float, metavar="NATS",
                       help="take the best factor within this divergence on the model's own text (default: --kl-bound)")
    group.add_argument("--save-precision", choices=("float32", "bfloat16"), default="float32",
                       help="of the blocks' weights in the best agent's file; bfloat16 makes it smaller")


def run(options: argparse.Namespace) -> int:
    from agents.files import RUN, RUN_PARTS, run_folder
    from rledit_env.lm.editable import EditableLM

    check_paths(options, growing("--out", options.out, RUN, RUN_PARTS))
    training, selection = _training_data(options)
    _check_numbers(options)
    most = len(selection) // options.batch_size
    eval_batches = options.eval_num_batches or max(1, min(2 * options.num_batches, most))
    # Settings that can be checked without the model are checked before it is loaded.
    reward = reward_of(options)
    start = _start(options)
    config = _config(options, start)
    say_loading(options.model)
    lm = EditableLM.load(
        options.model, options.edit_modules, options.dtype, options.device, **model_source(options)
    )
    if options.chat:
        training, selection = (_in_chat(facts, lm, options.chat) for facts in (training, selection))
    streams = Streams(options, lm, training, selection, eval_batches, reward)
    env = streams.to_learn_from(_presentation(options))
    eval_env = streams.to_select_on(eval_batches)
    calibration_env = streams.to_select_on(options.calibrate_num_batches) if options.calibrate_num_batches else None
    agent = _agent(env, config, options, start)
    _say_inputs(streams, agent, start)
    run_folder(options.out, options.command_line)
    with going_on():
        agent.learn(
            options.trajectories * options.num_batches * options.steps_per_batch, log_dir=options.out,
            eval_env=eval_env, eval_every=options.eval_every, patience=options.patience, resume=options.resume,
            # With present_until episodes may be shorter, so the number of steps does not bound the trajectories.
            callback=lambda _: agent.updates * options.trajectories_per_update < options.trajectories,
        )
    if calibration_env is not None:
        _calibrate(agent, calibration_env, options)
    _save(agent, streams)
    return OK


@dataclass(frozen=True)
class Streams:
    """The environments of a training.

    Attributes:
        options: the command's options.
        lm: the model.
        training: the facts to learn from.
        selection: the facts that select the checkpoint.
        selection_batches: batches of the selection's stream.
        reward: the reward's configuration.
    """

    options: argparse.Namespace
    lm: EditableLM
    training: KnowledgeDataset
    selection: KnowledgeDataset
    selection_batches: int
    reward: RewardConfig

    def to_learn_from(self, presentation: Settings) -> Environment:
        """The training environment."""
        return self._make(self.training, self.options.num_batches, presentation, reward=self.reward,
                          reward_gradient=True)  # fmt: skip

    def to_select_on(self, num_batches: int) -> Environment:
        """An environment of the selection's facts, presented as when the trained agent edits."""
        return self._make(self.selection, num_batches, _presentation(self.options, editing=True), reward="none")

    def _make(self, data: KnowledgeDataset, num_batches: int, presentation: Settings, **more: Any) -> Environment:
        options = self.options
        return gym.make(
            options.env, model=self.lm, data=data, num_batches=num_batches, batch_size=options.batch_size,
            token=options.token, array_backend="torch", disable_env_checker=True, **presentation, **more,
        )  # fmt: skip


def _presentation(options: argparse.Namespace, editing: bool = False) -> Settings:
    """How a batch is presented in training, or when the trained agent edits."""
    steps, until, contexts = options.steps_per_batch, options.present_until, options.contexts
    if editing:
        steps, until = options.edit_steps_per_batch or steps, option_or(options.edit_present_until, until)
        contexts = option_or(options.edit_contexts, contexts)
    return {"steps_per_batch": steps, "present_until": until or None, "contexts": contexts}


def _training_data(options: argparse.Namespace) -> tuple[KnowledgeDataset, KnowledgeDataset]:
    """The facts to train on, and those that select the checkpoint; no fact is in both."""
    from rledit_env.knowledge import held_out, load_knowledge

    kind = kind_of(options.env)
    training = load_knowledge(kind, options.data, "train", options.on_error)
    if options.select_on == "eval":
        return training, load_knowledge(kind, options.data, "eval", options.on_error)
    return held_out(training)


def _check_numbers(options: argparse.Namespace) -> None:
    check_positive(options, "num_batches", "batch_size", "steps_per_batch", "trajectories", "eval_every", "patience",
                   "trajectories_per_update")
    optional = ("calibrate_num_batches", "edit_steps_per_batch")
    check_positive(options, *(name for name in optional if getattr(options, name) is not None))
    check_contexts(options.contexts, options.token)
    if options.edit_contexts is not None:
        check_contexts(options.edit_contexts, options.token, "--edit-contexts")
    bound = options.calibrate_kl_bound
    if bound is None:
        return
    if options.calibrate_num_batches is None:
        raise ValueError("--calibrate-kl-bound is for --calibrate-num-batches T; give that, too")
    if not 0 < bound < float("inf"):
        raise ValueError(f"--calibrate-kl-bound is {bound:g}; give a positive number of nats")


def _start(options: argparse.Namespace) -> Path | None:
    """The folder of the agent of --start; None without one.

    Raises:
        ValueError: an option of the network was given beside --start, or --start-scale without --start.
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
    for name, value in values_of(options, HypernetworkConfig).items():
        if value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}, but the network is that of --start {options.start}; "
                             f"leave {flag} out, or train an agent from the beginning without --start")
    return find_agent(options.start, kind_of(options.env))


def _config(options: argparse.Namespace, start: Path | None) -> RLEditConfig:
    """The configuration of the options, with the network of the agent in ``start`` if there is one."""
    from agents import HypernetworkConfig, RLEditAgent, RLEditConfig

    if start is None:
        network = HypernetworkConfig(**values_of(options, HypernetworkConfig))
    else:
        network = RLEditAgent.load(start).config.network
    return RLEditConfig(network=network, **values_of(options, RLEditConfig))


def _agent(env: Environment, config: RLEditConfig, options: argparse.Namespace, start: Path | None) -> RLEditAgent:
    """The agent before its first update: untrained, or with the policy of the agent in ``start``."""
    from agents import RLEditAgent

    agent = RLEditAgent(env, config, seed=options.seed)
    if start is not None:
        agent.load_policy_state(RLEditAgent.load(start, env).policy_state())
        agent.scale_step_sizes(options.start_scale)
    return agent


def _in_chat(facts: KnowledgeDataset, lm: EditableLM, form: str) -> KnowledgeDataset:
    from rledit_env.lm.chat import CHAT_FORMS, in_chat

    records = in_chat(facts.records, lm.tokenizer, lm.name, form)
    # The source is part of the agent's settings, so that a run is not resumed with other prompts.
    return replace(facts, records=records, source=f"{facts.source}, {CHAT_FORMS[form]}")


def _say_inputs(streams: Streams, agent: RLEditAgent, start: Path | None) -> None:
    """Print the data, the model, the streams, the agent and the run's folder."""
    options, lm, training, selection = streams.options, streams.lm, streams.training, streams.selection
    size = sum(p.numel() for p in agent.network.parameters())
    print(f"data      {training.source}: {len(training):,} facts to train on", *skipped_rows(training))
    print(f"selection {selection.source}: {len(selection):,} facts, streams of {streams.selection_batches} × "
          f"{options.batch_size}")
    print(f"model     {lm.name} ({dtype_name(lm)}, {lm.device}), {len(lm.module_shapes)} modules: {_modules(lm)}")
    most = "at most " if options.present_until else ""
    behind = f" and behind {options.contexts} contexts" if options.contexts else ""
    print(f"streams   {options.num_batches} × {options.batch_size} facts{behind}, {most}{options.steps_per_batch} "
          f"steps a batch, token {options.token}, reward {options.reward}{keeping_terms(streams.reward)}")
    print(f"agent     {size:,} parameters, {json.dumps(_flat(agent.config))}")
    if start is not None:
        print(f"start     {start}, step sizes × {options.start_scale:g}")
    print(f"run       {options.out} (tensorboard --logdir {shlex.quote(str(options.out))})", flush=True)


def _calibrate(agent: RLEditAgent, env: Environment, options: argparse.Namespace) -> None:
    """Scale the step sizes to suit the environment's stream best, and print the factors' scores."""
    scores = agent.calibrate(env, kl_bound=options.calibrate_kl_bound)
    tried = ", ".join(f"× {factor:g}: {score:.1f}" for factor, score in scores.items())
    facts = f"{options.calibrate_num_batches} × {options.batch_size} facts"
    print(f"step sizes scaled for {facts}; mean scores: {tried}", flush=True)


def _save(agent: RLEditAgent, streams: Streams) -> None:
    """Save the trained agent, and print its folder and the next command."""
    import torch

    options = streams.options
    editing = _presentation(options, editing=True)
    if editing != _presentation(options):
        agent.set_env(streams.to_learn_from(editing))  # saving records the settings of this environment
    agent.save(options.out / "best", getattr(torch, options.save_precision))
    score = f", mean score {agent.best_score:.1f} on the selection's facts" if agent.best_score > -1 else ""
    print(f"trained: {agent.updates} updates{score}; the agent is in {options.out / 'best'}")
    print(f"next: rledit evaluate --env {options.env} --agent {shlex.quote(str(options.out))} --data {options.data} "
          "--split eval --json result.json")


def interrupted(options: argparse.Namespace) -> str:
    if not (options.out / "last" / "agent.json").exists():
        return "interrupted before the first checkpoint; nothing was saved"
    from agents import agent_settings

    updates = agent_settings(options.out / "last")["updates"]
    return (
        f"interrupted; {options.out / 'last'} holds the state after update {updates}. "
        f"Go on with the same command:\n  {options.command_line}"
    )


def _flat(config: RLEditConfig) -> JsonObject:
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

  # any setting of the network, of the learning and of the reward
  rledit train --env RLEdit-ZsRE-v0 --block mend --normaliser-scope shape --backtracking-depth 5 --out runs/mine

  # watch it
  tensorboard --logdir runs
""",
    add_arguments,
    run,
    interrupted,
)
