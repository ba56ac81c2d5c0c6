"""DAFNet: a hypernetwork with attention within a fact and across the facts of a sequence (Zhang et al., ACL 2024)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import used_rows
from agents.hypernetwork import Hypernetwork, HypernetworkConfig, StepRecord
from agents.rledit import RLEditAgent, RLEditConfig
from rledit_env.reward import RewardConfig

# The environment's settings that the editor is used with, and those that it is trained with: sequences of facts.
RECOMMENDED: dict[str, Any] = {"token": "all", "steps_per_batch": 1}
TRAINING: dict[str, Any] = {
    **RECOMMENDED, "reward": RewardConfig.with_efficacy(efficacy=0.5, locality=1.0, samples=1),
}  # fmt: skip


@dataclass(frozen=True)
class DAFNetNetworkConfig(HypernetworkConfig):
    """DAFNet's network; the defaults are the published configuration's for a model of 7B parameters.

    Attributes:
        rank: inner width of the attention within a fact.
        blocks: layers.
        step_size: initial η_l.
        feed_forward: inner width of the feed-forward part.
        attention: width of a head of the attention across facts.
        heads: of it.
    """

    rank: int = 1024
    blocks: int = 2
    aggregation: Any = "mend"
    step_size: float = 1e-4
    normaliser: Any = "lifetime"
    warm_up: bool = False
    prior: float = 0.0
    feed_forward: int = 1536
    attention: int = 1024
    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation != "mend":
            raise ValueError(f"aggregation is {self.aggregation!r}; DAFNet's is 'mend', the sum of rank-1 updates")


@dataclass(frozen=True)
class DAFNetConfig(RLEditConfig):
    """DAFNet's defaults: Adam at 1e-6 on the network, the gradient clipped at the norm 100. The paper learns the step
    sizes directly, at the rate 1e-4; here log η_l is learned."""

    network: HypernetworkConfig = field(default_factory=DAFNetNetworkConfig)
    learning_rate: float = 1e-6
    step_size_learning_rate: float = 1e-2
    max_gradient_norm: float = 100.0


@dataclass(frozen=True)
class FusionRecord(StepRecord):
    """What the second pass needs of a step.

    Attributes:
        lengths: rows of each fact, in the batch's order.
        earlier: group of modules → layer by layer, the representations (M, P, width) of the stream's P earlier facts.
    """

    lengths: tuple[int, ...] = ()
    earlier: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


class FusionLayer(nn.Module):
    """One layer of dynamic auxiliary fusion, of all M modules of one shape; the weights are shared, but each module has
    a scale and a shift of its own.

    Every part begins as zero, so that the untrained layer is the identity.
    """

    def __init__(self, width: int, modules: int, config: DAFNetNetworkConfig) -> None:
        super().__init__()
        inner = config.heads * config.attention
        self.heads = config.heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.token = nn.Sequential(nn.Linear(width, config.rank), nn.ReLU(), _zero(nn.Linear(config.rank, width)))
        self.token_score = nn.Sequential(nn.Linear(width, config.rank), nn.ReLU(), nn.Linear(config.rank, 1))
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.across = _zero(nn.Linear(inner, width))
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.feed_forward), nn.ReLU(), _zero(nn.Linear(config.feed_forward, width))
        )
        self.scale = nn.Parameter(torch.ones(modules, width))
        self.shift = nn.Parameter(torch.zeros(modules, width))

    def forward(self, z: Tensor, lengths: Sequence[int], earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Transformed tokens (M, N, width) and the facts' representations (M, n, width), given those of earlier facts
        (M, P, width); ``lengths`` are the tokens of each of the n facts."""
        owner = torch.arange(len(lengths), device=z.device).repeat_interleave(torch.tensor(lengths, device=z.device))
        transformed = self.token(self.norms[0](z))
        weighted = transformed * softmax_by_fact(self.token_score(transformed), lengths)  # (M, N, width)
        facts = z.new_zeros(len(z), len(lengths), z.shape[2]).index_add(1, owner, weighted)  # (M, n, width)
        z = z + weighted
        z = z + self._attend(self.norms[1](facts), self.norms[1](torch.cat([earlier, facts], 1)))[:, owner]
        return z + self.scale[:, None] * self.feed_forward(self.norms[2](z)) + self.shift[:, None], facts

    def _attend(self, facts: Tensor, every: Tensor) -> Tensor:
        """What each of the last n of P + n facts takes from itself and the facts before it, (M, n, width)."""
        n, past = facts.shape[1], every.shape[1] - facts.shape[1]
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(facts), self.key(every), self.value(every))
        )  # (M, heads, n or P + n, width of a head)
        allowed = torch.ones(n, past + n, dtype=torch.bool, device=facts.device).tril(past)
        taken = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.across(taken.transpose(1, 2).flatten(2))


def _zero(linear: nn.Linear) -> nn.Linear:
    """The linear map with all its parameters zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def softmax_by_fact(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax of token scores (M, N, 1) over the tokens of each fact."""
    return torch.cat([piece.softmax(1) for piece in scores.split(list(lengths), 1)], 1)


class DAFNetwork(Hypernetwork):
    """The hypernetwork with fusion layers in place of residual blocks, and the stream's facts as its memory."""

    config: DAFNetNetworkConfig

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: DAFNetNetworkConfig, seed: int = 0) -> None:
        super().__init__(shapes, replace(config, blocks=0), seed)
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleDict(
                {
                    group: nn.ModuleList(
                        [FusionLayer(sum(self.shapes[names[0]]), len(names), config) for _ in range(config.blocks)]
                    )
                    for group, names in self.groups.items()
                }
            )
        self.earlier: dict[str, list[Tensor]] = {}  # as in FusionRecord

    @staticmethod
    def parameter_count(shapes: Mapping[str, tuple[int, int]], config: HypernetworkConfig) -> int:
        """How many numbers a network of these sizes and its normalisers hold, without making one."""
        assert isinstance(config, DAFNetNetworkConfig)
        inner, rank, wide = config.heads * config.attention, config.rank, config.feed_forward
        shared = sum(
            6 * w + (2 * w * rank + rank + w) + (w * rank + 2 * rank + 1) + 3 * (w + 1) * inner + (inner + 1) * w
            + (2 * w * wide + wide + w)
            for w in (sum(shape) for shape in set(shapes.values()))
        )  # fmt: skip
        by_module = 2 * config.blocks * sum(map(sum, shapes.values()))
        return Hypernetwork.parameter_count(shapes, replace(config, blocks=0)) + config.blocks * shared + by_module

    def reset(self) -> None:
        super().reset()
        self.earlier = {}

    @torch.no_grad()
    def observe_facts(
        self, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lengths: Sequence[int], adapt: bool
    ) -> FusionRecord:
        """:meth:`Hypernetwork.observe` of facts with these numbers of rows; they join the stream's memory."""
        plain = self.observe(keys, gradients, adapt)
        earlier = {g: list(self._earlier(g)) for g in self.groups}
        record = FusionRecord(plain.keys, plain.inputs, plain.update_keys, None, tuple(lengths), earlier)
        for group in self.groups if lengths else ():
            facts = self._fused(group, record)[1]
            self.earlier[group] = [torch.cat(pair, 1) for pair in zip(earlier[group], facts, strict=True)]
        return record

    def _earlier(self, group: str) -> list[Tensor]:
        names = self.groups[group]
        nothing = torch.zeros(len(names), 0, sum(self.shapes[names[0]]), device=self.device)
        return self.earlier.get(group) or [nothing] * self.config.blocks

    def _fused(self, group: str, record: FusionRecord) -> tuple[Tensor, list[Tensor]]:
        z, facts = record.inputs[group], []
        layers: Any = self.networks[group]
        for layer, earlier in zip(layers, record.earlier[group], strict=True):
            z, theirs = layer(z, record.lengths, earlier)
            facts.append(theirs)
        return z, facts

    def factors(
        self, record: StepRecord, modules: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update factors ũ (N, d_in) and ṽ (N, d_out) by module, of all or only these; differentiable in the
        parameters. Modules of one shape are computed together all the same."""
        assert isinstance(record, FusionRecord)
        update_keys: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        lengths = torch.tensor(record.lengths, device=self.device)
        shares = (1 / lengths).repeat_interleave(lengths)[:, None]  # (N, 1)
        for group, members in self.groups.items():
            z = self._fused(group, record)[0] if record.lengths else record.inputs[group]
            key_part, gradient_part = z.split(self.shapes[members[0]], dim=2)
            step_size = self.log_step_size[[self.index[m] for m in members]].exp()[:, None, None]
            update_keys |= zip(members, key_part, strict=True)
            values |= zip(members, -step_size * shares * gradient_part, strict=True)
        order = [m for m in record.keys if modules is None or m in modules]
        return {m: update_keys[m] for m in order}, {m: values[m] for m in order}

    def graph_bytes(self, rows: int) -> int:
        """About what keeping the graph of :meth:`factors` takes for N rows, in bytes."""
        c = self.config
        narrow = 3 * c.rank + c.feed_forward + 4 * c.heads * c.attention
        return sum(
            4 * len(names) * rows * ((9 * width + narrow) * c.blocks + 4 * width)
            for names in self.groups.values()
            for width in [sum(self.shapes[names[0]])]
        )

    def memory_state(self) -> dict[str, Tensor]:
        """Normalisers and the representations of the stream's facts as named tensors."""
        facts = {f"facts.{g}.{i}": t for g, layers in self.earlier.items() for i, t in enumerate(layers)}
        return super().memory_state() | facts

    def load_memory_state(self, state: Mapping[str, Any]) -> None:
        """Take the tensors of :meth:`memory_state`."""
        super().load_memory_state(state)
        self.earlier = {
            g: [state[f"facts.{g}.{i}"].to(self.device) for i in range(self.config.blocks)]
            for g in self.groups
            if f"facts.{g}.0" in state
        }


class DAFNetAgent(RLEditAgent):
    """DAFNet (Zhang et al., "DAFNet: Dynamic Auxiliary Fusion for Sequential Model Editing in Large Language Models",
    Findings of ACL 2024, arXiv 2405.20588).

    For each module the normalised z = [u; δ] of all tokens of a fact (``token="all"``) passes through layers of

    1. attention within the fact: a = MLP(z), weighed by a softmax over the fact's tokens; z ← z + a, and the fact's
       representation is r = Σ a over its tokens;
    2. attention across facts: r_f attends to r_1 … r_f, the facts of the whole stream up to itself and none after it,
       and what it takes is added to each of its tokens;
    3. a feed-forward part, with each module's scale and shift.

    Split into (û, δ̂), they give ΔW = −η_l Σ_f 1/N_f Σ_{i in f} δ̂ᵢ ûᵢᵀ, with N_f the tokens of fact f. The network is
    trained on sequences of facts: here by the gradient of whole trajectories, the representations of earlier batches
    being constants of it, as in the published code.

    What is simplified: layers are normalised before each part, not after, and each part's last map starts at zero, so
    that the untrained network is the identity (MEND's start); the keys and gradients are those of the LLM as it is,
    where the published code takes them from the original LLM; the published code also shrinks earlier updates by
    Π (1 − s_f), with s_f the diagonal of a second attention across facts (which it does not train), and here updates
    are only added.

    A fact's rows are not marked in the observation, so that the agent asks the environment which facts are presented:
    name the one it edits in with :meth:`set_env`, unless that is ``env``.

    Args:
        env: the environment to learn in.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training streams.
    """

    name: ClassVar[str] = "dafnet"
    config_type: ClassVar[type[RLEditConfig]] = DAFNetConfig
    network_type: ClassVar[type[Hypernetwork]] = DAFNetwork
    network: DAFNetwork

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._presenting: gym.Env | None = self.env

    def set_env(self, env: gym.Env[Any, Any]) -> None:
        super().set_env(env)
        self._presenting = env

    def _trajectory(self, env: gym.Env, seed: int, **reset: Any) -> tuple[list[Tensor], dict[str, float]]:
        self._presenting = env
        return super()._trajectory(env, seed, **reset)

    def _evaluate(self, eval_env: gym.Env, *arguments: Any) -> bool:
        self._presenting = eval_env
        return super()._evaluate(eval_env, *arguments)

    def calibrate(self, env: gym.Env, *args: Any, **options: Any) -> dict[float, float]:
        """As :meth:`RLEditAgent.calibrate`."""
        self._presenting = env
        return super().calibrate(env, *args, **options)

    def _observe(self, observation: Any, adapt: bool) -> StepRecord:
        keys, gradients = used_rows(observation, self.network.device)
        rows = len(next(iter(keys.values())))
        return self.network.observe_facts(keys, gradients, self._lengths(rows), adapt)

    def _lengths(self, rows: int) -> list[int]:
        """Rows of each fact now presented."""
        if rows == 0:
            return []
        if self._presenting is None:
            raise ValueError("this agent asks its environment which facts are presented; load it with env=… or give it "
                             "with set_env(env)")
        inner: Any = self._presenting.unwrapped
        lengths = [len(record.edit.chosen_positions(inner.token)) for record in inner.current_batch()]
        if sum(lengths) != rows:
            raise ValueError(
                f"the observation has {rows} rows, but the facts that the agent's environment presents have "
                f"{sum(lengths)}; name the environment that it edits in with set_env(env)"
            )
        return lengths
