"""DAFNet: a hypernetwork with attention within a fact and across the facts of a sequence (Zhang et al., ACL 2024)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import used_rows
from agents.files import read_description
from agents.rledit.agent import RLEditAgent
from agents.rledit.config import HypernetworkConfig, RLEditConfig
from agents.rledit.hypernetwork import Hypernetwork, StepRecord
from rledit_env.reward import Efficacy, Generalization, Locality, RewardConfig

# The environment's settings that the editor is used with, and those that it is trained with: sequences of facts.
RECOMMENDED: dict[str, Any] = {"token": "all", "steps_per_batch": 1}
TRAINING: dict[str, Any] = {
    **RECOMMENDED,
    "reward": RewardConfig(
        components={
            "efficacy": (0.5, Efficacy()), "generalization": (0.5, Generalization()), "locality": (1.0, Locality()),
        },
        backtracking_samples=1, regularisation=0.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DAFNetNetworkConfig(HypernetworkConfig):
    """DAFNet's network; the defaults are the published configuration's for a model of 7B parameters: tokens with δ = 0
    are dropped, δ is of the sum over a fact's answer tokens, modules of one shape share a normaliser and are normalised
    in turn, and η_l is learned directly.

    Attributes:
        rank: inner width of the attention within a fact.
        blocks: layers.
        step_size: initial η_l.
        feed_forward: inner width of the feed-forward part.
        attention: width of a head of the attention across facts.
        heads: of it.
        score_attention: width of a head of the second attention across facts, whose diagonal is s_f.
        score_heads: of it.
    """

    rank: int = 1024
    blocks: int = 2
    aggregation: Any = "mend"
    step_size: float = 1e-4
    normaliser: Any = "lifetime"
    warm_up: bool = False
    prior: float = 0.0
    normaliser_scope: Any = "shape in turn"
    drop_zero_rows: bool = True
    loss: Any = "sum"
    step_size_parameter: Any = "direct"
    feed_forward: int = 1536
    attention: int = 1024
    heads: int = 2
    score_attention: int = 256
    score_heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation != "mend":
            raise ValueError(f"aggregation is {self.aggregation!r}; DAFNet's is 'mend', the sum of rank-1 updates")
        if self.output_units != "normalised":
            raise ValueError(f"output_units is {self.output_units!r}; DAFNet's factors are 'normalised'")


@dataclass(frozen=True)
class DAFNetConfig(RLEditConfig):
    """DAFNet's defaults: Adam at 1e-6 on the network, the gradient clipped at the norm 100. The step sizes η_l start at
    1e-4 and are learned directly, at the rate 1e-4."""

    network: HypernetworkConfig = field(default_factory=DAFNetNetworkConfig)
    learning_rate: float = 1e-6
    step_size_learning_rate: float = 1e-4
    max_gradient_norm: float = 100.0


@dataclass(frozen=True)
class FusionRecord(StepRecord):
    """What the second pass needs of a step.

    Attributes:
        lengths: rows of each fact, in the batch's order.
        earlier: group of modules → layer by layer, the representations (M, P, width) of the stream's P earlier facts.
        weights: module → s_f Π_{j>f} (1 − s_j) of the batch's n facts, (n,), a constant.
        share: module → Π_j (1 − s_j) over the batch's facts, (): what it leaves of earlier updates; empty where there
            are none.
    """

    lengths: tuple[int, ...] = ()
    earlier: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    share: dict[str, Tensor] = field(default_factory=dict)

    @property
    def retained(self) -> dict[str, Tensor] | None:
        return self.share or None


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
        self.score_heads, scored = config.score_heads, config.score_heads * config.score_attention
        self.score_query, self.score_key = (nn.Linear(width, scored).requires_grad_(False) for _ in range(2))

    def forward(
        self, z: Tensor, lengths: Sequence[int], earlier: Tensor, used: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transformed tokens (M, N, width) and the facts' representations (M, n, width), given those of earlier facts
        (M, P, width); ``lengths`` are the tokens of each of the n facts, ``used`` (M, N) which of them are not dropped.
        """
        owner = torch.arange(len(lengths), device=z.device).repeat_interleave(torch.tensor(lengths, device=z.device))
        transformed = self.token(self.norms[0](z))
        weighted = transformed * softmax_by_fact(self.token_score(transformed), lengths, used)  # (M, N, width)
        facts = z.new_zeros(len(z), len(lengths), z.shape[2]).index_add(1, owner, weighted)  # (M, n, width)
        z = z + weighted
        z = z + self._attend(self.norms[1](facts), self.norms[1](torch.cat([earlier, facts], 1)))[:, owner]
        return z + self.scale[:, None] * self.feed_forward(self.norms[2](z)) + self.shift[:, None], facts

    @torch.no_grad()
    def own_attention(self, facts: Tensor, earlier: Tensor) -> Tensor:
        """s_f (M, n): how much of its attention each of n facts' representations (M, n, width) gives to itself, among
        the P earlier ones (M, P, width) and those up to itself; the mean over the heads."""
        n, past = facts.shape[1], earlier.shape[1]
        query = self.score_query(facts).unflatten(2, (self.score_heads, -1)).transpose(1, 2)
        key = self.score_key(torch.cat([earlier, facts], 1)).unflatten(2, (self.score_heads, -1)).transpose(1, 2)
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # (M, heads, n, P + n)
        later = torch.ones(n, past + n, dtype=torch.bool, device=facts.device).triu(past + 1)
        return scores.masked_fill(later, -math.inf).softmax(3).diagonal(past, 2, 3).mean(1)

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


def softmax_by_fact(scores: Tensor, lengths: Sequence[int], used: Tensor | None = None) -> Tensor:
    """Softmax of token scores (M, N, 1) over the tokens of each fact, or those ``used`` (M, N), and zero at others."""
    if used is not None:
        scores = scores.masked_fill(~used[:, :, None], torch.finfo(scores.dtype).min)
    weights = torch.cat([piece.softmax(1) for piece in scores.split(list(lengths), 1)], 1)
    return weights if used is None else weights * used[:, :, None]


class DAFNetwork(Hypernetwork):
    """The hypernetwork with fusion layers in place of residual blocks, and the stream's facts as its memory."""

    shrinks: ClassVar[bool] = True
    config: DAFNetNetworkConfig

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: DAFNetNetworkConfig, seed: int = 0) -> None:
        if config.blocks < 1:
            raise ValueError(f"blocks is {config.blocks}; DAFNet has 1 layer or more")
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
            + (2 * w * wide + wide + w) + 2 * (w + 1) * config.score_heads * config.score_attention
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
        record = FusionRecord(
            plain.keys, plain.inputs, plain.update_keys, used=plain.used, lengths=tuple(lengths), earlier=earlier
        )  # fmt: skip
        weights: dict[str, Tensor] = {}
        share: dict[str, Tensor] = {}
        for group, members in self.groups.items() if lengths else ():
            facts = self._fused(group, record)[1]
            of_facts, of_past = self._fact_weights(group, facts, earlier[group])
            weights |= zip(members, of_facts, strict=True)
            if earlier[group][0].shape[1]:
                share |= zip(members, of_past, strict=True)
            self.earlier[group] = [torch.cat(pair, 1) for pair in zip(earlier[group], facts, strict=True)]
        return replace(record, weights=weights, share=share)

    def _fact_weights(
        self, group: str, facts: Sequence[Tensor], earlier: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """s_f Π_{j>f} (1 − s_j) of a batch's n facts (M, n) and Π_j (1 − s_j) over them (M,), averaged over the layers,
        whose representations of the facts and of the earlier ones these are."""
        of_facts, of_past = [], []
        layers: Any = self.networks[group]
        for layer, now, before in zip(layers, facts, earlier, strict=True):
            own = layer.own_attention(now, before)  # s_f, (M, n)
            later = (1 - own).flip(1).cumprod(1).flip(1)  # Π_{j≥f} (1 − s_j)
            of_facts.append(own * torch.cat([later[:, 1:], torch.ones_like(own[:, :1])], 1))
            of_past.append(later[:, 0])
        return torch.stack(of_facts).mean(0), torch.stack(of_past).mean(0)

    def _earlier(self, group: str) -> list[Tensor]:
        names = self.groups[group]
        nothing = torch.zeros(len(names), 0, sum(self.shapes[names[0]]), device=self.device)
        return self.earlier.get(group) or [nothing] * self.config.blocks

    def _fused(self, group: str, record: FusionRecord) -> tuple[Tensor, list[Tensor]]:
        z, facts = record.inputs[group], []
        layers: Any = self.networks[group]
        for layer, earlier in zip(layers, record.earlier[group], strict=True):
            z, representations = layer(z, record.lengths, earlier, record.used.get(group))
            facts.append(representations)
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
        owner = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)  # (N,)
        for group, members in self.groups.items():
            z = self._fused(group, record)[0] if record.lengths else record.inputs[group]
            key_part, gradient_part = z.split(self.shapes[members[0]], dim=2)
            step_size = self.step_sizes(members)[:, None, None]
            update_keys |= zip(members, key_part, strict=True)
            if record.lengths:
                used = record.used.get(group, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))
                tokens = z.new_zeros(len(z), len(lengths)).index_add(1, owner, used.to(z.dtype))  # N_f, (M, n)
                weights = torch.stack([record.weights[m] for m in members]) / tokens.clamp(min=1)
                gradient_part = gradient_part * (weights[:, owner] * used)[:, :, None]
            values |= zip(members, -step_size * gradient_part, strict=True)
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

    Split into (û, δ̂), they give ΔW = −η_l Σ_f w_f/N_f Σ_{i in f} δ̂ᵢ ûᵢᵀ, with N_f the tokens of fact f. A second
    attention across facts gives s_f, the attention that fact f pays to itself among the facts of the stream up to
    itself, and w_f = s_f Π_{j>f} (1 − s_j), j over the later facts of the batch. What was added before is shrunk by
    p = Π_j (1 − s_j) over the batch's facts: W becomes W₀ + p (W − W₀) + ΔW. Since the first fact has only itself to
    attend to, s_1 = 1, and the weights of all facts of a stream sum to 1 at any time. (s differs by module and layer;
    both products are averaged over the layers.) From the second batch on the action is therefore dense.

    Tokens with δ = 0 are dropped before the normaliser sees them, δ is of the sum over the answer tokens, and modules
    of one shape share a normaliser, each taken in and normalised in turn, as published.

    The network is trained on sequences of facts by the gradient of whole trajectories: update t is in the weights of a
    later step τ with the share Π_{t<j≤τ} p_j, and that is what a later reward's gradient is multiplied by. The
    representations of earlier batches, s and p are constants of that gradient, as in the published code, whose second
    attention is therefore not trained: its maps keep the random values that they begin with.

    What is simplified: layers are normalised before each part, not after, and each part's last map starts at zero, so
    that the untrained network is the identity (MEND's start) and all facts weigh the same; the keys and gradients are
    those of the LLM as it is, where the published code takes them from the original LLM; a sequence comes in batches,
    with a reward after each, where the published code trains on one batch of up to 1,000 facts; the step sizes are
    clipped with the network. The published code adds +η_l δ̂ ûᵀ, and leaves it to training to find η_l's sign.

    A fact's rows are not marked in the observation, so that the agent asks the environment which facts are presented,
    and reads W − W₀ of its LLM: name the one it edits in with :meth:`set_env`, unless that is ``env``.

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

    def observe(self, observation: Any, adapt: bool) -> StepRecord:
        keys, gradients = used_rows(observation, self.network.device)
        facts = self.presented.facts(len(next(iter(keys.values()))))
        return self.network.observe_facts(keys, self.of_loss(gradients), [fact.rows for fact in facts], adapt)

    def action(
        self, observation: Any, record: StepRecord, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        if record.retained is None:
            return super().action(observation, record, keys, values)
        assert self.presented.env is not None  # it has said which facts are presented
        inner: Any = self.presented.env.unwrapped
        updates = {}
        for m, share in record.retained.items():
            added = (inner.lm.weight(m) - inner.lm.original_weight(m)).to(keys[m])  # (d_out, d_in)
            updates[m] = values[m].T @ keys[m] - (1 - share) * added
        if isinstance(observation["mask"], np.ndarray):
            return {"updates": {m: update.cpu().numpy() for m, update in updates.items()}}
        return {"updates": updates}

    @classmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> RLEditAgent:
        """As :meth:`RLEditAgent.load`.

        Raises:
            ValueError: it is of the first format, whose facts all weighed 1.
        """
        network = (read_description(path).get("config") or {}).get("network") or {}
        if "score_heads" not in network:
            raise ValueError(f"the DAFNet agent in {path} was trained by an earlier version, in which every fact "
                             "weighed 1; train it again (DAFNetAgent(env).learn), or edit with that version")
        return super().load(path, env)
