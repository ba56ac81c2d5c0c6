"""DAFNet's network: attention within a fact and across the facts of a stream, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.rledit.config import Aggregation, HypernetworkConfig, Loss, Normaliser, NormaliserScope, StepSizeParameter
from agents.rledit.hypernetwork import Hypernetwork, StepRecord


@dataclass(frozen=True)
class DAFNetNetworkConfig(HypernetworkConfig):
    """The settings of DAFNet's network; the defaults are the published ones for a model of 7B parameters. Tokens with
    δ = 0 are dropped, δ is of the sum over a fact's answer tokens, modules of one shape share a normaliser and are
    normalised in turn, and η_l is learned directly.

    Attributes:
        rank: inner width of the attention within a fact.
        blocks: number of layers.
        step_size: initial η_l.
        feed_forward: inner width of the feed-forward part.
        attention: width of a head of the attention across facts.
        heads: number of these heads.
        score_attention: width of a head of the second attention across facts, whose diagonal is s_f.
        score_heads: number of these heads.
    """

    rank: int = 1024
    blocks: int = 2
    aggregation: Aggregation = "mend"
    step_size: float = 1e-4
    normaliser: Normaliser = "lifetime"
    warm_up: bool = False
    prior: float = 0.0
    normaliser_scope: NormaliserScope = "shape in turn"
    drop_zero_rows: bool = True
    loss: Loss = "sum"
    step_size_parameter: StepSizeParameter = "direct"
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
class FusionRecord(StepRecord):
    """A step's inputs to DAFNet's network.

    Attributes:
        lengths: number of rows of each fact, in the batch's order.
        earlier: group of modules → for each layer, the representations (M, P, width) of the stream's P earlier facts.
        weights: module → s_f Π_{j>f} (1 − s_j) of the batch's n facts, (n,), a constant.
        share: module → Π_j (1 − s_j) over the batch's facts, (), the share of earlier updates that the step leaves;
            empty if there are no earlier updates.
    """

    lengths: tuple[int, ...] = ()
    earlier: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    share: dict[str, Tensor] = field(default_factory=dict)

    @property
    def retained(self) -> dict[str, Tensor] | None:
        return self.share or None


class FusionLayer(nn.Module):
    """One layer of dynamic auxiliary fusion for all M modules of one shape. They share its weights, but each module has
    its own scale and shift.

    Every part starts at zero, so the untrained layer is the identity.
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
        self.score_heads, score_width = config.score_heads, config.score_heads * config.score_attention
        self.score_query, self.score_key = (nn.Linear(width, score_width).requires_grad_(False) for _ in range(2))

    def forward(
        self, z: Tensor, lengths: Sequence[int], earlier: Tensor, used: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform the tokens of n facts.

        Args:
            z: the tokens, (M, N, width).
            lengths: number of tokens of each of the n facts.
            earlier: representations of earlier facts, (M, P, width).
            used: which tokens are not dropped, (M, N).

        Returns:
            The transformed tokens (M, N, width) and the facts' representations (M, n, width).
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
        """s_f (M, n), the mean over the heads of each fact's attention weight on itself.

        Args:
            facts: the n facts' representations, (M, n, width); each attends to the earlier facts, the facts before it
                and itself.
            earlier: the P earlier facts' representations, (M, P, width).
        """
        n, past = facts.shape[1], earlier.shape[1]
        query = self.score_query(facts).unflatten(2, (self.score_heads, -1)).transpose(1, 2)
        key = self.score_key(torch.cat([earlier, facts], 1)).unflatten(2, (self.score_heads, -1)).transpose(1, 2)
        scores: Tensor = query @ key.mT / math.sqrt(query.shape[-1])  # (M, heads, n, P + n)
        later = torch.ones(n, past + n, dtype=torch.bool, device=facts.device).triu(past + 1)
        return scores.masked_fill(later, -math.inf).softmax(3).diagonal(past, 2, 3).mean(1)

    def _attend(self, facts: Tensor, all_facts: Tensor) -> Tensor:
        """Attention (M, n, width) of each of the last n of P + n facts to itself and the facts before it."""
        n, past = facts.shape[1], all_facts.shape[1] - facts.shape[1]
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(facts), self.key(all_facts), self.value(all_facts))
        )  # (M, heads, n or P + n, width of a head)
        allowed = torch.ones(n, past + n, dtype=torch.bool, device=facts.device).tril(past)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        across: Tensor = self.across(attended.transpose(1, 2).flatten(2))
        return across


def _zero(linear: nn.Linear) -> nn.Linear:
    """Set a linear map's parameters to zero, and return it."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def softmax_by_fact(scores: Tensor, lengths: Sequence[int], used: Tensor | None = None) -> Tensor:
    """Softmax of token scores (M, N, 1) over each fact's tokens, or those ``used`` (M, N); zero at the others."""
    if used is not None:
        scores = scores.masked_fill(~used[:, :, None], torch.finfo(scores.dtype).min)
    weights = torch.cat([piece.softmax(1) for piece in scores.split(list(lengths), 1)], 1)
    return weights if used is None else weights * used[:, :, None]


class DAFNetwork(Hypernetwork):
    """A hypernetwork with fusion layers in place of residual blocks; its memory is the stream's facts."""

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
        """The number of values in a network of these sizes and in its normalisers, without making one."""
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
        """:meth:`Hypernetwork.observe`, with ``lengths`` the number of rows of each fact; the facts are added to the
        stream's memory."""
        plain = self.observe(keys, gradients, adapt)
        earlier = {g: list(self._earlier(g)) for g in self.groups}
        record = FusionRecord(
            plain.keys, plain.inputs, plain.update_keys, used=plain.used, lengths=tuple(lengths), earlier=earlier
        )  # fmt: skip
        weights: dict[str, Tensor] = {}
        share: dict[str, Tensor] = {}
        for group, members in self.groups.items() if lengths else ():
            facts = self._fuse(group, record)[1]
            fact_weights, past_shares = self._fact_weights(group, facts, earlier[group])
            weights |= zip(members, fact_weights, strict=True)
            if earlier[group][0].shape[1]:
                share |= zip(members, past_shares, strict=True)
            self.earlier[group] = [torch.cat(pair, 1) for pair in zip(earlier[group], facts, strict=True)]
        return replace(record, weights=weights, share=share)

    def _fact_weights(
        self, group: str, facts: Sequence[Tensor], earlier: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The weights s_f Π_{j>f} (1 − s_j) (M, n) of a batch's n facts, and Π_j (1 − s_j) over them (M,), both
        averaged over the layers.

        Args:
            group: the modules' group.
            facts: for each layer, the representations of the batch's facts.
            earlier: for each layer, the representations of the stream's earlier facts.
        """
        fact_weights, past_shares = [], []
        layers = cast(Sequence[FusionLayer], self.networks[group])
        for layer, layer_facts, layer_earlier in zip(layers, facts, earlier, strict=True):
            s = layer.own_attention(layer_facts, layer_earlier)  # s_f, (M, n)
            products = (1 - s).flip(1).cumprod(1).flip(1)  # Π_{j≥f} (1 − s_j)
            fact_weights.append(s * torch.cat([products[:, 1:], torch.ones_like(s[:, :1])], 1))
            past_shares.append(products[:, 0])
        return torch.stack(fact_weights).mean(0), torch.stack(past_shares).mean(0)

    def _earlier(self, group: str) -> list[Tensor]:
        names = self.groups[group]
        nothing = torch.zeros(len(names), 0, sum(self.shapes[names[0]]), device=self.device)
        return self.earlier.get(group) or [nothing] * self.config.blocks

    def _fuse(self, group: str, record: FusionRecord) -> tuple[Tensor, list[Tensor]]:
        """The transformed rows of a group's modules, and for each layer the facts' representations."""
        z, facts = record.inputs[group], []
        layers = cast(Sequence[FusionLayer], self.networks[group])
        for layer, earlier in zip(layers, record.earlier[group], strict=True):
            z, representations = layer(z, record.lengths, earlier, record.used.get(group))
            facts.append(representations)
        return z, facts

    def factors(
        self, record: StepRecord, modules: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update factors ũ (N, d_in) and ṽ (N, d_out) by module, for all modules or only ``modules``; differentiable
        in the parameters. All modules of a shape are computed in any case."""
        assert isinstance(record, FusionRecord)
        update_keys: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        lengths = torch.tensor(record.lengths, device=self.device)
        owner = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)  # (N,)
        for group, members in self.groups.items():
            z = self._fuse(group, record)[0] if record.lengths else record.inputs[group]
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
        """The approximate size in bytes of the graph of :meth:`factors` for N rows."""
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

    def load_memory_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory_state`."""
        super().load_memory_state(state)
        self.earlier = {
            g: [state[f"facts.{g}.{i}"].to(self.device) for i in range(self.config.blocks)]
            for g in self.groups
            if f"facts.{g}.0" in state
        }
