"""RLEdit: the hypernetwork trained by the gradient of the whole trajectory's return (ICML 2025)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from agents.base import Agent, factor_action, module_shapes, require_modules, run_stream, used_rows
from agents.facts import PresentedFacts
from agents.files import (
    TRAINING_STATE,
    agent_folder,
    built_from,
    check_counters,
    check_size,
    known_best,
    moments_of,
    read_description,
    read_tensors,
    run_folder,
)
from agents.logs import log, summary_writer
from agents.rledit.credit import CreditAccumulator
from agents.rledit.distributed import Processes, evaluate_sharded
from agents.rledit.hypernetwork import Hypernetwork, HypernetworkConfig, StepRecord, moments_state
from agents.rledit.moments import MissingMomentsWarning, Moments, take
from agents.rledit.text_prior import start_from_text, turn_by_text
from agents.selection import divergence, within_bound
from agents.settings import environment_settings, setting_differences
from rledit_env.evaluation.metrics import METRICS_VERSION
from rledit_env.files import write_tensors, write_text
from rledit_env.preservation import Multiplier

# The environment's settings that the agent is best trained and used with.
RECOMMENDED: Mapping[str, Any] = {"token": "subject", "steps_per_batch": 5}
POLICY = ("network.", "prior.", "moments.", "lifetime.", "stream.")  # what the names of a policy's tensors begin with
FLOAT32_EPSILON = 2.0**-23  # what the published code of MALMEN, RLEdit and UltraEdit adds to a standard deviation
AT_END = "constrained_at_end"  # a trajectory's number: the component under a bound, last scored
Callback = Callable[[dict[str, float]], bool | None]


@dataclass(frozen=True)
class RLEditConfig:
    """How the agent is trained.

    Attributes:
        network: the hypernetwork.
        credit: "trajectory", the gradient of the whole return, or "step", each step's own reward only.
        learning_rate: Adam's, for the residual blocks.
        step_size_learning_rate: Adam's, for log η_l, or η_l itself, and log λ_l.
        max_gradient_norm: the policy gradient is clipped to this norm.
        clipping: of what: "update", the mean gradient of an update, divided by the trajectory's steps; or "running
            sum", the sum over the trajectory's steps, again after each of them (see :func:`rledit_paper`).
        trajectories_per_update: trajectories whose gradients are averaged for one policy update.
        discount: γ.
        prior_batches: batches of training facts that the recursion's prior C, unless it is of text, and the moments
            that streams start from are gathered from before the first update (see `HypernetworkConfig.prior` and
            ``warm_up`` there).
        drift_limit: a training trajectory is cut once the mean ‖W_t − W₀‖ / ‖W₀‖ exceeds this, before the LLM breaks:
            gradients through a broken LLM spoil the policy. None cuts none.
        kl_bound: the best checkpoint, and the best step sizes of :meth:`RLEditAgent.calibrate`, are those with the
            highest score among those whose divergence from the unedited LLM, in nats a token on text of its own, is at
            most this (see `agents.selection`); where none is within it, the one that comes nearest. None: the highest
            score of all.
        policy_average: decay of a running mean of the parameters over the updates, such as 0.9, which is the policy
            that is evaluated, kept as the best and held at the end; streams to learn from are edited with the
            parameters themselves. A policy's score swings by points from one update to the next, its mean's does not.
            0: no mean.
        graph_bytes: graphs of the network's passes are kept for the gradient up to this many bytes a trajectory; for
            the steps beyond them the network runs a second time. It changes nothing but the time.
    """

    network: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    credit: Literal["trajectory", "step"] = "trajectory"
    learning_rate: float = 2e-3
    step_size_learning_rate: float = 4e-2
    max_gradient_norm: float = 1.0
    trajectories_per_update: int = 1
    discount: float = 1.0
    prior_batches: int = 40
    drift_limit: float | None = 0.6
    graph_bytes: int = 2**28
    kl_bound: float | None = None
    policy_average: float = 0.0
    clipping: Literal["update", "running sum"] = "update"

    def __post_init__(self) -> None:
        if self.credit not in ("trajectory", "step"):
            raise ValueError(f"credit is {self.credit!r}; give 'trajectory' or 'step'")
        if self.clipping not in ("update", "running sum"):
            raise ValueError(f"clipping is {self.clipping!r}; give 'update' or 'running sum'")
        if self.kl_bound is not None and not self.kl_bound > 0:
            raise ValueError(f"kl_bound is {self.kl_bound}; give a positive number of nats, or None for no bound")
        if not 0 <= self.policy_average < 1:
            raise ValueError(f"policy_average is {self.policy_average}; give a decay from 0 to below 1")


def rledit_paper_network(rank: int = 1024, step_size: float = 1e-6, **settings: Any) -> HypernetworkConfig:
    """RLEdit's network as published, for models of several billion parameters: 4 blocks, A ~ N(0, 1), η_l learned
    directly, least squares, and one normaliser for all modules of a shape, which goes on from training while editing.
    """
    defaults: dict[str, Any] = {
        "blocks": 4, "aggregation": "least_squares", "damping": 1.0, "prior": 0.0, "normaliser": "continued",
        "warm_up": False, "normaliser_scope": "shape", "normaliser_variance": "published",
        "normaliser_epsilon": FLOAT32_EPSILON, "initial_weights": "unit", "step_size_parameter": "direct",
    }  # fmt: skip
    return HypernetworkConfig(rank=rank, step_size=step_size, **defaults | settings)


def rledit_paper(network: HypernetworkConfig | None = None, **settings: Any) -> RLEditConfig:
    """RLEdit's training as its published code does it, to the letter; best with `RewardConfig.published()`, which holds
    what of it is the reward's.

    The code does what the paper does not say:

    - Credit is per step: the gradient of a step's own loss with respect to its own update ("step"), not of the return.
    - Each step's gradient is added to those before it, and the running sum is clipped to the norm 1 each time.
    - Adam takes one step for a whole trajectory, at 1e-5 on every parameter, η_l itself (1e-6) and log λ_l among them.
      The published configuration trains on one trajectory (``n_epochs: 1``), as long as the stream that is then edited.
      Adam's first step moves each parameter by the rate, whatever its gradient: η_l becomes 1.1e-5 or −9e-6, B and b
      ±1e-5, so that most of what is learned is the sign of η_l.
    - The normaliser multiplies the batch's unbiased variance by N, and takes the stream that is edited in, too.
    - Locality is measured from the weights of before the step, and the regularisation has no gradient (the reward's).

    One thing stays the paper's: k is 10 earlier batches, where the code's ``back_depth: 10`` counts the current one
    (``backtracking_depth=9`` in `RewardConfig`).

    What learns more is the same network with the gradient of the whole return, and as many updates as it takes:
    `agents.malmen_rledit` (with the same rates, 2 blocks and MALMEN's rank); and what we recommend is `RLEditConfig()`.
    """
    defaults: dict[str, Any] = {
        "credit": "step", "learning_rate": 1e-5, "step_size_learning_rate": 1e-5, "max_gradient_norm": 1.0,
        "clipping": "running sum", "drift_limit": None,
    }  # fmt: skip
    return RLEditConfig(network=network or rledit_paper_network(), **defaults | settings)


def rledit_ridge(step_size: float = 1.0, damping: float = 1.0, **settings: Any) -> RLEditConfig:
    """RLEdit that begins as ridge regression on the gradient itself: the zero action of
    `rledit_env.wrappers.ScaledUpdate` with this step size and damping, for streams of few facts.

    Where a standard algorithm scales that rule by a number or two, what is learned here is each module's step size and
    damping and what the residual blocks add, by the gradient of the whole return.
    """
    rule = HypernetworkConfig(
        aggregation="least_squares", output_units="input", prior=0.0, step_size=step_size, damping=damping
    )
    return RLEditConfig(network=rule, **{"learning_rate": 1e-3, "step_size_learning_rate": 0.02} | settings)


def rledit_untrained(step_size: float = 1.4e-3, prior: float = 1000.0, **network: Any) -> RLEditConfig:
    """The rule that RLEdit's training starts from, without the residual blocks: recursive least squares on normalised
    rows, with a prior on the keys of ordinary text, so that an update stays out of the directions that text lives in.

    Args:
        step_size: η of every module.
        prior: c, how many keys of text the least squares start with.
        network: other settings of the network.
    """
    rule = HypernetworkConfig(blocks=0, step_size=step_size, prior=prior, prior_source="text", **network)
    return RLEditConfig(network=rule)


class RLEditAgent(Agent):
    """The RLEdit agent.

    Where the network wants the gradients of a fact's own loss (see `HypernetworkConfig.loss`), the agent asks its
    environment which facts are presented: name the one that it edits in with :meth:`set_env`, unless that is ``env``.

    Args:
        env: a `LifelongEditEnv` made with ``array_backend="torch"`` (and ``reward_gradient=True`` to learn); None for
            an agent that only predicts, given ``shapes``.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training streams.
    """

    name: ClassVar[str] = "rledit"  # what agent.json calls the class
    config_type: ClassVar[type[RLEditConfig]] = RLEditConfig
    network_type: ClassVar[type[Hypernetwork]] = Hypernetwork
    # What the first format's network did where its file does not say it, beside the settings' own defaults.
    first_format: ClassVar[Mapping[str, Any]] = {"warm_up": False}

    def __init__(
        self,
        env: gym.Env | None = None,
        config: RLEditConfig | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.env, self.config, self.seed = env, config or self.config_type(), seed
        self.presented = PresentedFacts(env)
        if shapes is None:
            if env is None:
                raise ValueError("give an environment or the edited modules' shapes")
            shapes = module_shapes(env)
        self.network = self.network_type(shapes, self.config.network, seed)
        if env is not None:  # beside the LLM, so that no factor travels through the host
            self.network.to(_inner(env).lm.device)
            self.network.normalisers = self.network.first_normalisers()
        self.optimizer = self._make_optimizer()
        self.updates = 0
        self.timesteps = 0
        self._begun = 0  # timesteps at the start of the run
        self._finished = False  # whether the run has ended
        self.best_score = -math.inf
        self._best: dict[str, Tensor] | None = None  # the policy with the best score, as _policy() gives it
        self._mean: dict[str, Tensor] = {}  # of the parameters over the updates, by name
        self._mean_updates = 0  # that it has seen
        self._waited = 0  # evaluations since then
        self._evaluated: int | None = None  # the update that was evaluated last

    def _make_optimizer(self) -> torch.optim.Optimizer:
        network, config = self.network, self.config
        return torch.optim.Adam(
            [
                {"params": list(network.networks.parameters()), "lr": config.learning_rate},
                {"params": [network.step_size_parameter, network.log_damping], "lr": config.step_size_learning_rate},
            ]
        )

    # -- acting --------------------------------------------------------------------------------------------------

    def set_env(self, env: gym.Env[Any, Any]) -> None:
        require_modules(env, self.network.shapes, "this agent", f"make one for its modules: {type(self).__name__}(env)")
        if self.env is None or env.unwrapped.lm is not self.env.unwrapped.lm:  # type: ignore[attr-defined]
            self.network.forget_curvature()
        super().set_env(env)
        self.presented = PresentedFacts(env)

    def reset(self) -> None:
        self.network.reset()

    def memory(self) -> dict[str, Tensor] | None:
        return self.network.memory_state()

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        self.network.load_memory_state(memory)

    @torch.no_grad()
    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Update factors for an observation in either array backend; the policy is deterministic."""
        if self.network.wants_curvature:
            self._turn(progress_bar=False)
        record = self._observe(observation, adapt=False)
        return self._action(observation, record, *self.network.factors(record)), None

    def _observe(self, observation: Any, adapt: bool) -> StepRecord:
        keys, gradients = used_rows(observation, self.network.device)
        return self.network.observe(keys, self._of_loss(gradients), adapt)

    def _of_loss(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """δ (N, d_out) by module of the loss in `HypernetworkConfig.loss`, given those of the batch's mean loss."""
        loss, rows = self.config.network.loss, len(next(iter(gradients.values())))
        if loss == "batch" or (loss == "rows" and self.network.training_moments):  # with which the network does so
            return gradients
        if loss == "rows":
            return {m: rows * g for m, g in gradients.items()}
        facts = self.presented.facts(rows)
        answers = sum(fact.answers for fact in facts)
        if loss == "sum":
            return {m: answers * g for m, g in gradients.items()}
        factors = [answers / fact.answers for fact in facts for _ in range(fact.rows)]
        column = torch.tensor(factors, device=self.network.device)[:, None]  # (N, 1)
        return {m: column.to(g.dtype) * g for m, g in gradients.items()}

    def _action(
        self, observation: Any, record: StepRecord, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The environment's action for the step's factors, in the array backend of the observation."""
        return factor_action(observation, keys, values)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = True,
        reset_num_timesteps: bool = True,
        log_dir: str | Path | None = None,
        eval_env: gym.Env | None = None,
        eval_every: int = 5,
        patience: int = 4,
        eval_seed: int = 12345,
        checkpoint_every: int = 5,
        resume: bool = True,
        processes: Processes | None = None,
    ) -> RLEditAgent:
        """Train by whole-trajectory updates: each ends with one step of Adam on the gradient of the return.

        A run in ``log_dir`` that was interrupted, however roughly, is finished, counted from its own start: it goes on
        from its last checkpoint and ends as it would have ended. An agent that has finished it takes further steps;
        a new agent takes it as it is. Ctrl-C writes a checkpoint of the last finished update first.

        Args:
            total_timesteps: further environment steps to take, rounded up to whole trajectories (and to as many for
                each process).
            callback: called after every update with its numbers; training stops when it returns False.
            progress_bar: show one.
            reset_num_timesteps: count ``timesteps`` from 0 again; False counts on.
            log_dir: TensorBoard's folder (each update's numbers, and in ``steps`` those of each environment step, the
                drift among them); checkpoints ``last`` and ``best`` are written there too, and training goes on from
                ``last`` if it is there.
            eval_env: a held-out stream, best a longer one than the training streams (a policy trained on one horizon
                need not be stable beyond it). Its metrics choose the best checkpoint, which the agent holds at the
                end. It may share the LLM with the training environment.
            eval_every: updates between two evaluations; the untrained policy and the last one are evaluated too.
            patience: evaluations without a better score before training stops early.
            eval_seed: the seed that ``eval_env`` is always reset with.
            checkpoint_every: updates between two checkpoints; one is written at every evaluation as well.
            resume: go on from ``last``; False starts anew and writes over it.
            processes: those that train together (`Processes.started()`), each with its own environment of the same
                settings. Each edits ``trajectories_per_update`` streams of its own for an update, whose gradient is the
                mean over all; the first one writes the files. One process with as many trajectories does the same.

        Raises:
            ValueError: the environment does not give tensors and reward gradients, or ``log_dir`` holds a run with
                other settings.
            FileExistsError: ``log_dir`` holds a file that would be overwritten and that no training wrote.
        """
        env = self._training_env(self.env)
        folder = Path(log_dir) if log_dir is not None else None
        self._waited, self._evaluated = 0, None
        processes = processes or Processes()
        if processes.count > 1 and self.config.network.normaliser != "stream":
            kind = self.config.network.normaliser
            raise ValueError(f"normaliser is {kind!r}, but every process would have moments of its own streams; give "
                             "normaliser='stream', or train in one process")
        if not processes.first:
            folder, progress_bar = None, False
        own = self.updates  # before what the folder holds
        found = folder is not None and resume and (folder / "last" / TRAINING_STATE).exists()
        if folder is not None and found:
            self._resume(folder / "last" / TRAINING_STATE)
        if processes.from_first(found):
            theirs = processes.from_first(self._training_state() if processes.first else None)
            if not processes.first:
                self._load_training_state(*theirs)
        begins = not processes.from_first(found) or (self._finished and own == self.updates)  # else it goes on with one
        if begins:
            self.timesteps = 0 if reset_num_timesteps else self.timesteps
            self._begun = self.timesteps
            self._mean = {}
        self._finished = False
        end = self._begun + total_timesteps
        if folder is not None:
            run_folder(folder)
        writer = summary_writer(folder, self.updates)
        step_writer = summary_writer(folder and folder / "steps", self.timesteps)
        bar = tqdm(total=total_timesteps, initial=self.timesteps - self._begun, unit="step", disable=not progress_bar)
        horizon = _inner(env).episode_steps
        state = self._training_state()
        if begins and found:  # or a process killed before its first checkpoint would find the finished run
            self._checkpoint(folder, state)

        def judge(at_end: bool = False) -> None:
            nonlocal state
            due = at_end or self.updates % eval_every == 0 or self._evaluated is None
            if eval_env is not None and due and self._evaluated != self.updates:
                with self._holding_mean():
                    better = self._evaluate(eval_env, eval_seed, writer, processes)
                self._waited = 0 if better or self._evaluated is None else self._waited + 1
                self._evaluated = self.updates
                state = self._training_state()
                self._checkpoint(folder, state)

        try:
            if self.network.wants_curvature:
                self._turn(progress_bar)
            if self.network.wants_prior or self.network.wants_moments:
                self._gather(env, self.network.wants_prior, self.network.wants_moments, progress_bar)
            judge()
            while self.timesteps < end and not (eval_env is not None and self._waited >= patience):
                gradients: list[list[Tensor]] = []
                measured: list[float] = []  # what the reward's constraint is on, at the trajectories' ends
                numbers: dict[str, float] = {}
                left = math.ceil((end - self.timesteps) / (horizon * processes.count))
                count = min(self.config.trajectories_per_update, left)
                first = processes.rank * count
                for place in range(first, first + count):
                    gradient, numbers = self._trajectory(env, self.seed + self.updates * 1000 + place)
                    gradients.append(gradient)
                    measured += [numbers[AT_END]] if AT_END in numbers else []
                    for step, numbers_of_step in enumerate(_inner(env).history):
                        log(step_writer, "step", numbers_of_step, self.timesteps + step + 1)
                    until = _inner(env).present_until is not None  # then a stream's steps are only known at its end
                    steps = sum(processes.gathered(len(_inner(env).history))) if until else horizon * processes.count
                    self.timesteps += steps
                    bar.update(steps)
                numbers = _averaged(processes.gathered(numbers)) | self._update(gradients, processes)
                self._hold_bound([value for theirs in processes.gathered(measured) for value in theirs])
                state = self._training_state()
                bar.set_postfix({k: f"{numbers[k]:.3g}" for k in ("return", "drift") if k in numbers})
                log(writer, "train", numbers, self.updates)
                judge()
                if self.updates % checkpoint_every == 0:
                    self._checkpoint(folder, state)
                stop = callback is not None and callback(numbers) is False
                if any(processes.gathered(stop)):
                    break
            judge(at_end=True)
        except KeyboardInterrupt:
            # Whatever was half done is dropped: what counts is the state after the last finished update.
            self._load_training_state(*state)
            self._checkpoint(folder, state)
            raise
        finally:
            bar.close()
            for one in (writer, step_writer):
                if one is not None:
                    one.close()
        if eval_env is not None and self._waited >= patience:
            tqdm.write(f"stopped early at update {self.updates}: no better score in {self._waited} evaluations")
        self._finished = True
        self._checkpoint(folder, (state[0], {**state[1], "finished": True}))
        if self._best is not None:
            self._load_policy(self._best)
        elif self._mean:
            self._load_policy(self._with_mean(state[0]))
        return self

    def scale_step_sizes(self, factor: float) -> None:
        """Multiply every module's η_l."""
        if not factor > 0:
            raise ValueError(f"factor is {factor}; give a positive number")
        self.network.scale_step_sizes(factor)

    def calibrate(
        self, env: gym.Env, factors: Sequence[float] = (1.0, 0.85, 0.7, 0.6, 0.5, 0.35), seed: int = 12345,
        kl_bound: float | None = None,
    ) -> dict[float, float]:  # fmt: skip
        """Scale the step sizes by the factor that scores best on a held-out stream, best as long as those to come.

        Training on short streams favours steps that are too large for long ones: what a step gains for its own batch
        it takes from the weights that all later batches share. From the largest factor on, each is tried until the
        score falls; with a bound on the divergence, what is beyond it counts less than any score.

        Args:
            env: the held-out stream; ``steps_per_batch`` may differ from training's.
            factors: what to try.
            seed: ``env`` is reset with it.
            kl_bound: the most that the LLM may diverge on its own text, in nats a token; None takes the
                configuration's.

        Returns:
            Factor → mean of Efficacy, Generalization and Specificity of those tried: −∞ where the LLM broke, and how
            far the divergence is beyond ``kl_bound``, as a negative number, where it is.
        """
        bound = self.config.kl_bound if kl_bound is None else kl_bound
        start = self.network.step_size_parameter.detach().clone()
        scores: dict[float, float] = {}
        best = 1.0
        try:
            for factor in sorted(factors, reverse=True):
                self.network.scale_step_sizes(factor, start)
                with self.presented.by(env):
                    _, info = run_stream(env, self, seed=seed)
                score = -math.inf if info["diverged"] else _inner(env).evaluate(generate=False).mean
                if bound is not None:
                    score = within_bound(score, divergence(_inner(env).lm), bound)
                scores[factor] = score
                if -math.inf < scores[factor] < max(scores.values()):
                    break
            if max(scores.values()) == -math.inf:
                tried = ", ".join(f"{factor:g}" for factor in scores)
                warnings.warn(f"the LLM broke with every factor ({tried}); the step sizes stay as they were. Give "
                              "smaller factors", stacklevel=2)
            else:
                best = max(scores, key=scores.__getitem__)
        finally:  # an interruption too leaves the step sizes as they were
            self.network.scale_step_sizes(best, start)
            self.reset()
        return scores

    def _training_env(self, env: gym.Env | None) -> gym.Env:
        """The environment, which must give what training needs."""
        if env is None:
            raise ValueError("this agent has no environment to learn in; load it with env=…, or give it with "
                             "set_env(env)")
        inner = _inner(env)
        if inner.array_backend != "torch" or not inner.reward_gradient:
            raise ValueError(
                "the environment must be made with array_backend='torch' and reward_gradient=True, so that a "
                "trajectory can be differentiated"
            )
        if inner.reward_config is None:
            raise ValueError("the environment was made with reward='none', which leaves nothing to learn from")
        return env

    def gather_moments(self, env: gym.Env, progress_bar: bool = True) -> None:
        """Let streams start from the moments of an environment's facts (see `HypernetworkConfig.warm_up`), as
        :meth:`learn` does before its first update: of the first batches of ``prior_batches`` streams, under the
        pre-trained weights. The agent begins a new stream.

        Args:
            env: of training facts, made with the agent's modules and token; no reward is needed.
            progress_bar: show one.
        """
        self._gather(env, prior=False, moments=True, progress_bar=progress_bar)

    def _turn(self, progress_bar: bool) -> None:
        """Let the network know the outputs' curvature of the environment's LLM."""
        if self.env is None:
            raise ValueError("output_curvature needs the environment's LLM; load the agent with env=…, or give it with "
                             "set_env(env)")
        turn_by_text(self.network, _inner(self.env).lm, progress_bar)

    def _gather(self, env: gym.Env, prior: bool, moments: bool, progress_bar: bool) -> None:
        """Give the network its prior from text; show it some training batches, the first of as many streams, for what
        is of facts."""
        if prior and self.config.network.has_text_prior:
            start_from_text(self.network, _inner(env).lm, progress_bar)
            prior = False
        if not prior and not moments:
            return
        batches = self.config.prior_batches
        gathered: Moments = {}
        _forget_states(env)
        for i in trange(batches, desc="moments of training facts", unit="batch", disable=not progress_bar, leave=False):
            observation, _ = env.reset(seed=self.seed * batches + i)
            keys, gradients = used_rows(observation, self.network.device)
            if not observation["mask"].any():  # all of the batch's facts have taken already
                continue
            if prior:
                self.network.gather(keys)
            if moments:
                take(gathered, keys, gradients)
        if moments:
            self.network.start_from(gathered)

    def _trajectory(self, env: gym.Env, seed: int, **reset: Any) -> tuple[list[Tensor], dict[str, float]]:
        """One stream: the policy gradient (negative, for descent) and the trajectory's numbers."""
        with self.presented.by(env):
            return self._differentiated(env, seed, **reset)

    def _differentiated(self, env: gym.Env, seed: int, **reset: Any) -> tuple[list[Tensor], dict[str, float]]:
        _forget_states(env)
        observation, _ = env.reset(seed=seed, **reset)
        self.network.reset()
        for_keys = self.network.learns_keys
        credit = CreditAccumulator(self.config.credit, for_keys, self.network.shrinks)
        records: list[StepRecord] = []
        infos: list[dict[str, Any]] = []
        total, done, kept = 0.0, False, 0
        while not done:
            record = self._observe(observation, adapt=True)
            needed = self.network.graph_bytes(len(next(iter(record.keys.values()))))
            kept += needed
            with torch.set_grad_enabled(kept <= self.config.graph_bytes):
                factors = self.network.factors(record)
            if kept <= self.config.graph_bytes:
                record = replace(record, factors=factors)
            keys, values = ({m: f.detach() for m, f in part.items()} for part in factors)
            action = self._action(observation, record, keys, values)
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if info["diverged"]:
                warnings.warn(f"the LLM broke at step {len(records)} of a training stream; that step is left out of "
                              "the gradient. Lower the step size or drift_limit", stacklevel=2)
                break
            credit.add(keys, values, info.pop("reward_gradient", None), info["action_gradient"],
                       self.config.discount ** len(records), record.retained)
            records.append(record)
            infos.append({k: v for k, v in info.items() if isinstance(v, float)} | {"reward": float(reward)})
            total += float(reward)
            limit = self.config.drift_limit
            if limit is not None and info["drift"] > limit and not done:
                warnings.warn(f"drift {info['drift']:.2f} passed drift_limit at step {len(records)}: the trajectory is "
                              "cut here, before the LLM breaks", stacklevel=2)
                break
        if not records:
            return [torch.zeros_like(p) for p in self._parameters()], {"return": float(reward), "steps": 0.0}
        numbers = {k: float(np.mean([i[k] for i in infos if k in i])) for k in infos[-1]}
        numbers |= {"return": total, "steps": float(len(records)), "drift": infos[-1]["drift"]}
        numbers["step_size"] = float(self.network.step_sizes().detach().mean())
        if (multiplier := _inner(env).multiplier) is not None:
            constrained = [i[multiplier.constraint.component] for i in infos if multiplier.constraint.component in i]
            numbers |= {AT_END: constrained[-1]} if constrained else {}
        return self._policy_gradient(records, credit), numbers

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _policy_gradient(self, records: list[StepRecord], credit: CreditAccumulator) -> list[Tensor]:
        """−∂R/∂φ per step of the stream, or with `RLEditConfig.clipping` "running sum" of the whole stream: the
        network's graph, kept or made a second time, step by step, with the cotangents."""
        parameters = self._parameters()
        running = self.config.clipping == "running sum"
        sign = -1.0 if running else -1 / len(records)
        self.optimizer.zero_grad()
        for record, credited in zip(records, credit.finish(), strict=True):
            for_keys, for_values = ({m: g.mul_(sign) for m, g in part.items()} for part in credited)
            self.network.accumulate(record, for_keys, for_values, self.config.graph_bytes)
            if running:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.max_gradient_norm)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.optimizer.zero_grad()
        return gradient

    def _update(self, gradients: list[list[Tensor]], processes: Processes | None = None) -> dict[str, float]:
        """One step of Adam on the mean of the trajectories' gradients, those of the other processes among them."""
        own = [torch.stack(pieces).mean(0) for pieces in zip(*gradients, strict=True)]
        for parameter, gradient in zip(self._parameters(), (processes or Processes()).mean(own), strict=True):
            parameter.grad = gradient
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.max_gradient_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            warnings.warn(f"the policy gradient of update {self.updates + 1} is not finite; this update is left out, "
                          "and the policy stays as it was", stacklevel=2)
        self.optimizer.zero_grad()
        self.updates += 1
        self._take_into_mean()
        return {"gradient_norm": norm}

    def _take_into_mean(self) -> None:
        """Let the running mean of the parameters follow them, the faster the fewer updates it has seen."""
        if not self.config.policy_average:
            return
        count = self._mean_updates = self._mean_updates + 1 if self._mean else 1
        decay = min(self.config.policy_average, (count - 1) / count)
        for name, parameter in self.network.named_parameters():
            mean = self._mean.setdefault(name, parameter.detach().clone())
            mean.lerp_(parameter.detach(), 1 - decay)

    def _with_mean(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A policy's tensors, with the running mean of the parameters where there is one."""
        return {**tensors, **{f"network.{name}": mean for name, mean in self._mean.items()}}

    @contextmanager
    def _holding_mean(self) -> Iterator[None]:
        """Within it the network has the running mean of its parameters, where there is one."""
        if not self._mean:
            yield
            return
        learning = self._policy()
        self._load_policy(self._with_mean(learning))
        try:
            yield
        finally:
            self._load_policy(learning)

    def _hold_bound(self, measured: Sequence[float]) -> None:
        """Dual ascent of the reward's constraint, if it has one, on what it is on at the ends of trajectories."""
        multiplier = self._multiplier()
        if multiplier is not None and measured:
            multiplier.update(float(np.mean(measured)))

    def _multiplier(self) -> Multiplier | None:
        return None if self.env is None else _inner(self.env).multiplier

    def _evaluate(self, eval_env: gym.Env, seed: int, writer: Any, processes: Processes) -> bool:
        """Score the policy on the held-out stream and keep it if it is the best so far. Every process edits the stream,
        which is one chain of steps, and scores its share of the facts."""
        _forget_states(eval_env)
        with self.presented.by(eval_env):
            _, info = run_stream(eval_env, self, seed=seed)
        inner = _inner(eval_env)
        metrics = evaluate_sharded(processes, inner.lm, inner.edited_records(), inner.dataset.kind)
        score = -math.inf if info["diverged"] else metrics.mean
        numbers = {k: v for k, v in metrics.as_dict().items() if v is not None} | {"drift": info["drift"]}
        if self.config.kl_bound is not None:
            numbers["kl"] = divergence(inner.lm)
            score = within_bound(score, numbers["kl"], self.config.kl_bound)
        log(writer, "eval", numbers, self.updates)
        say = tqdm.write if processes.first else (lambda _: None)
        say(
            f"update {self.updates}: held-out efficacy {metrics.efficacy:.1f}, generalization "
            f"{metrics.generalization:.1f}, specificity {metrics.specificity:.1f}, mean {metrics.mean:.1f}, top-1 "
            f"{metrics.top1:.1f}, drift {info['drift']:.3f}"
            + (f", KL {numbers['kl']:.3f}" if "kl" in numbers else "")
        )
        if score <= self.best_score:
            return False
        self.best_score = score
        self._best = self._policy()
        return True

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the network, its normalisers and its memory as safetensors, and its configuration as JSON.

        Args:
            path: a folder, made if need be.
            dtype: of the blocks' weights in the file; ``torch.bfloat16`` halves it.
        """
        blocks = {f"network.{k}" for k, _ in self.network.named_parameters() if k.startswith("networks.")}
        tensors = {k: v.to(dtype) if k in blocks else v for k, v in self._parameters_by_name().items()}
        stream = {f"stream.{k}": v for k, v in self.network.memory_state().items()}
        self._write_agent(Path(path), tensors | stream)

    def _write_agent(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        agent_folder(folder)
        write_tensors(folder / "agent.safetensors", tensors)
        write_text(folder / "agent.json", json.dumps(self._description(), indent=1) + "\n")

    def _description(self) -> dict[str, Any]:
        return {
            "agent": self.name,
            "format": 1,
            "seed": self.seed,
            "config": asdict(self.config),
            "shapes": {m: list(s) for m, s in self.network.shapes.items()},
            "updates": self.updates,
            "timesteps": self.timesteps,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "metrics_version": METRICS_VERSION,
            "environment": environment_settings(self.env),
        }

    @classmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> RLEditAgent:
        """The agent in a folder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no agent there.
            ValueError: it was trained for other modules than the environment's.
        """
        folder = Path(path)
        description = read_description(folder)
        tensors, _ = read_tensors(folder / "agent.safetensors")
        with built_from(folder):
            lacks_moments = "warm_up" not in description["config"]["network"]  # as agents of earlier versions do
            network = type(cls.config_type().network)(**cls.first_format | description["config"]["network"])
            config = cls.config_type(**description["config"] | {"network": network})
            check_counters(description, "seed", "updates", "timesteps")
            shapes = {m: (s[0], s[1]) for m, s in description["shapes"].items()}
            check_size(cls.network_type.parameter_count(shapes, network), tensors)
            if env is not None:
                require_modules(env, shapes, str(folder), "make the environment with the settings in "
                                f"{folder / 'agent.json'}")
            agent = cls(env, config, shapes, description["seed"])
            agent._load_policy(tensors)
            if lacks_moments and network.normaliser == "stream" and not agent.network.training_moments:
                warnings.warn(f"the agent in {folder} was saved without moments of training facts, and a batch of one "
                              "or few facts will hardly take; add them with: python -m agents.running.add_moments "
                              f"{folder}",
                              MissingMomentsWarning, stacklevel=2)
            agent.updates, agent.timesteps = description["updates"], description["timesteps"]
        return agent

    def _parameters_by_name(self) -> dict[str, Tensor]:
        parameters = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        prior = {f"prior.{m}": v for m, v in self.network.prior_state().items()}
        prior |= {f"lifetime.{k}": v.clone() for k, v in self.network.lifetime.items()}
        return parameters | prior | {f"moments.{k}": v for k, v in moments_state(self.network.training_moments).items()}

    def _policy(self) -> dict[str, Tensor]:
        """Copies of what a policy consists of between two streams: the parameters, and moments that outlive streams."""
        tensors = self._parameters_by_name()
        if self.config.network.normaliser == "lifetime":
            tensors |= {f"stream.{k}": v for k, v in self.network.memory_state().items() if k[:11] == "normaliser."}
        return {k: v.detach().clone() for k, v in tensors.items()}

    def _load_policy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of :meth:`_policy` or of a saved agent; a stream they do not hold begins anew."""
        self.network.load_state_dict(_under("network.", tensors))
        self.network.load_prior_state(_under("prior.", tensors))
        self.network.load_moments(_under("moments.", tensors))
        if self.config.network.normaliser == "continued":
            self.network.load_lifetime(_under("lifetime.", tensors))
        stream = _under("stream.", tensors)
        if stream:
            self.network.load_memory_state(stream)
        else:
            self.network.reset()

    def _training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all that the rest of the training depends on: tensors, and the counters."""
        tensors = self._policy()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{self._place(parameter)}.{name}"] = value.detach().clone()
        tensors |= {f"best.{k}": v for k, v in (self._best or {}).items()}
        tensors |= {f"mean.{k}": v.clone() for k, v in self._mean.items()}
        counters = {
            **self._description(), "begun": self._begun, "finished": self._finished, "waited": self._waited,
            "evaluated": self._evaluated, "mean_updates": self._mean_updates,
        }  # fmt: skip
        if (multiplier := self._multiplier()) is not None:
            counters["multiplier"] = multiplier.value
        return tensors, counters

    def _place(self, parameter: Tensor) -> int:
        """The parameter's index in the optimiser's own numbering."""
        flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        return next(i for i, p in enumerate(flat) if p is parameter)

    def _load_training_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        policy = {k: v for k, v in tensors.items() if k.startswith(POLICY)}
        best = _under("best.", tensors)
        if best and {k: v.shape for k, v in best.items()} != {k: v.shape for k, v in policy.items()}:
            raise ValueError("the best policy has other tensors than the last one")
        moments = moments_of(self.optimizer, _under("optimizer.", tensors))
        self._load_policy(policy)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self._best = best or None
        self._mean, self._mean_updates = _under("mean.", tensors), counters.get("mean_updates", 0)
        self.best_score = known_best(counters)
        self.updates, self.timesteps = counters["updates"], counters["timesteps"]
        # Earlier versions did not say these: their runs began at 0, and went on whenever they were short of the total.
        self._begun, self._finished = counters.get("begun", 0), counters.get("finished", False)
        self._waited, self._evaluated = counters["waited"], counters["evaluated"]
        if (multiplier := self._multiplier()) is not None:
            multiplier.value = counters["multiplier"]

    def _resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is damaged, or of a run with other settings, or this agent has been trained further
                elsewhere; the agent is as it was.
        """
        try:
            tensors, metadata = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; give another log_dir, or resume=False to start anew") from error
        with built_from(path.parent):
            counters = json.loads(metadata["training"])
            config = counters["config"]
            network = config["network"]  # a run of an earlier version does not say what was not a setting then
            if "warm_up" not in network:
                network["warm_up_rows"] = self.config.network.warm_up_rows
            counters["config"] = _defaults(RLEditConfig) | config
            counters["config"]["network"] = _defaults(HypernetworkConfig) | dict(self.first_format) | network
            mine = json.loads(json.dumps(self._description()))
            found = setting_differences(counters, mine)
            different = [f"{name}: {old!r} there, {new!r} here" for name, old, new in found]
            mend = "give the same settings, another log_dir, or resume=False to start anew"
            run = path.parent.parent
            if different:
                raise ValueError(f"{run} holds a run with other settings ({'; '.join(different)}); {mend} "
                                 f"({path.parent})")
            if counters["updates"] < self.updates:
                raise ValueError(
                    f"{run} holds a run after update {counters['updates']}, but this agent has already made "
                    f"{self.updates}; {mend} ({path.parent})"
                )
            before = self._training_state()
            try:
                self._load_training_state(tensors, counters)
            except BaseException:
                self._load_training_state(*before)
                raise
        tqdm.write(f"going on from {path.parent} (update {self.updates}, step {self.timesteps})")

    def _checkpoint(self, folder: Path | None, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Write ``last`` and ``best``; ``last`` also holds the state to go on from, in one file, so that a process
        killed at any moment leaves either the earlier state or this one."""
        if folder is None:
            return
        tensors, counters = state
        self._write_agent(folder / "last", self._whole_policy(self._with_mean(tensors)))
        if self._best is not None:
            self._write_agent(folder / "best", self._whole_policy(self._best))
        write_tensors(folder / "last" / TRAINING_STATE, tensors, {"training": json.dumps(counters)})

    def _whole_policy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A policy's tensors with those of a stream not yet begun, so that :meth:`load` finds all it needs."""
        fresh = {f"stream.normaliser.{k}": v for k, v in moments_state(self.network.first_normalisers()).items()}
        fresh |= {f"stream.normaliser.{k}": v.clone() for k, v in _under("lifetime.", tensors).items()}
        return fresh | {k: v for k, v in tensors.items() if k.startswith(POLICY)}


def _defaults(config: type) -> dict[str, Any]:
    """A configuration's plain default values by name."""
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _inner(env: gym.Env) -> Any:
    """The `LifelongEditEnv` inside the wrappers."""
    return env.unwrapped


def _averaged(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over those that have it."""
    names = {name for one in numbers for name in one}
    return {name: float(np.mean([one[name] for one in numbers if name in one])) for name in sorted(names)}


def _forget_states(env: gym.Env) -> None:
    """Drop the LLM's cached states: what a passage's were computed together with changes their last bits, and a run
    that is taken up from a checkpoint, with nothing cached, must end as the uninterrupted one, bit for bit."""
    lm = _inner(env).lm
    lm.prefix_cache.clear()
    lm.reference_cache.clear()
