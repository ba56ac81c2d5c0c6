"""The hypernetwork: normaliser, residual blocks, aggregation (MEND, MALMEN, RLEdit)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from agents.key_statistics import GENERATED
from rledit_env.lm.kernels.products import linear, outer

Aggregation = Literal["mend", "least_squares", "recursive"]
AGGREGATIONS = ("mend", "least_squares", "recursive")
CHOICES: Mapping[str, tuple[str, ...]] = {  # what the settings of `HypernetworkConfig` may be
    "aggregation": AGGREGATIONS,
    "normaliser": ("stream", "lifetime", "continued"),
    "normaliser_scope": ("module", "shape", "shape in turn"),
    "normaliser_variance": ("exact", "published"),
    "block": ("malmen", "mend"),
    "coefficient": ("key", "normalised"),
    "precision": ("float32", "bfloat16"),
    "initial_weights": ("scaled", "unit"),
    "step_size_parameter": ("log", "direct"),
    "output_units": ("normalised", "input"),
    "prior_source": ("facts", "text"),
    "loss": ("batch", "fact", "sum", "rows"),
}


@dataclass(frozen=True)
class HypernetworkConfig:
    """What a hypernetwork is built from.

    Attributes:
        rank: inner width of a residual block.
        blocks: residual blocks; 0 leaves a rule without training (see `agents.hypernetworks.ultraedit`).
        aggregation: "mend" (ũ = û, ṽ = −η δ̂), "least_squares" (MALMEN's, RLEdit's default) or "recursive" (the same
            with the second moment of all earlier keys in the system).
        step_size: initial η_l.
        step_size_parameter: what of η_l is learned: "log", log η_l, so that it stays positive and a learning rate is
            relative; or "direct", η_l itself, as in the published code of MEND, MALMEN, DAFNet and RLEdit: a learning
            rate is then a change of η_l, which may turn negative.
        damping: initial λ_l.
        learn_damping: whether log λ_l is learned ("least_squares" only; in the recursion it is the memory's start).
        initial_weights: of A: "unit", N(0, 1), as in the published code; or "scaled", N(0, 1/width), so that z A is of
            z's size whatever the width.
        block: "malmen", z + s ⊙ ReLU(z A B + b) + o, or "mend", z + ReLU(s ⊙ (z A B + b) + o), with each module's scale
            s and shift o.
        coefficient: of vᵢ in the least squares: "key" (uᵢ·ûᵢ, MALMEN's) or "normalised" (‖ûᵢ‖², UltraEdit's).
        output_units: of what (û, δ̂) the residual blocks give: "normalised", as they are (MEND, MALMEN, RLEdit); or
            "input", taken back to the units of u and δ by the same moments. With "input" the untrained network is the
            rule on the gradient itself, without a normaliser: with "least_squares" vᵢ = −η ‖uᵢ‖² δᵢ, the base rule of
            `rledit_env.wrappers.ScaledUpdate`.
        prior: c, how many keys the least squares start with: S_0 = λI + c·C, with C a second moment E[k kᵀ] of keys k
            (nothing until it has been gathered, see :attr:`Hypernetwork.wants_prior`).
        prior_source: whose keys C is of. "facts": those of training facts, for the recursion only: it keeps the first
            updates of a stream out of the directions that all keys share, and makes a long stream's steps like a short
            one's. "text": those of all tokens of ordinary text, for the recursion and the plain least squares alike
            (where λ is then not learned): updates avoid the directions that text lives in, and the rest of the LLM
            stays as it was.
        output_curvature: γ of the outputs' side: with G = E[g gᵀ], g the gradient of −log p of text with respect to a
            module's outputs, each vᵢ is turned to (G + γ·mean(diag G)·I)⁻¹ vᵢ and keeps its norm, so that it avoids
            the outputs that text's next tokens depend on. With the text prior on the keys' side that is K-FAC's
            natural gradient. 0: vᵢ as it is. G is not saved with an agent: it is computed with the LLM, or read from
            the cache, when it is first needed.
        text: for these two: "generated", text that the LLM itself writes before it is edited, or a text file.
        text_tokens: how much of it (of the outputs' side a quarter).
        precision: of the residual blocks' matrix products; parameters, sums and everything else stay in float32.
            "bfloat16" takes half the time where the machine multiplies it natively.
        normaliser: "stream": running moments start anew at each reset; "lifetime": they run over all tokens of
            training and stay as they are while editing (MEND, DAFNet); "continued": they run over all tokens of
            training, and each stream that is edited goes on from there (the published code of MALMEN and RLEdit).
        normaliser_scope: who shares moments. "module": each module has its own. "shape": all modules of one shape share
            them, and are taken in before any of them is normalised (MALMEN, RLEdit, UltraEdit). "shape in turn": they
            share them, and each is normalised by the rows before it and its own (MEND, DAFNet).
        normaliser_variance: "exact", that of all rows; or "published": a batch adds N times its unbiased variance,
            N/(N−1) too much, as in the published code of MALMEN, RLEdit and UltraEdit (a single row adds nothing; there
            it makes everything NaN).
        normaliser_epsilon: added to the standard deviation.
        drop_zero_rows: whether rows whose δ, or u, is zero are dropped before the normaliser sees them, as in MEND and
            DAFNet: they get no update. In the last decoder layer, those are all tokens that predict no answer token.
        loss: whose gradient the network's δ is. "batch": of the mean over the batch's answer tokens, as observed.
            "fact": of each fact's own mean, δ A/A_i, with A answer tokens in the batch and A_i in the fact, so that
            a batch's update is the sum of the updates that its facts get alone (MEND). "sum": of the sum over answer
            tokens, δ A (DAFNet). "rows": δ times the rows of the batch. The agent applies it, since it asks the
            environment for the facts (see `PresentedFacts`).
        warm_up: whether the moments begin as those of training facts (see :meth:`Hypernetwork.start_from`), so that a
            fact is edited alone as well as in a batch, and in a stream's first batch as well as in its tenth. Moments
            that begin with nothing, as published, take the batch in and subtract its mean: of one row nothing is left.
        warm_up_rows: the training facts' moments stand in for the rows that a stream has fewer than these: they weigh
            as so many rows less its own, and as nothing from then on.
    """

    rank: int = 256
    blocks: int = 2
    aggregation: Aggregation = "recursive"
    step_size: float = 1e-3
    damping: float = 1.0
    learn_damping: bool = True
    block: Literal["malmen", "mend"] = "malmen"
    coefficient: Literal["key", "normalised"] = "key"
    output_units: Literal["normalised", "input"] = "normalised"
    prior: float = 100.0
    prior_source: Literal["facts", "text"] = "facts"
    output_curvature: float = 0.0
    text: str = GENERATED
    text_tokens: int = 65_536
    normaliser: Literal["stream", "lifetime", "continued"] = "stream"
    warm_up: bool = True
    warm_up_rows: float = 40.0
    precision: Literal["float32", "bfloat16"] = "float32"
    normaliser_scope: Literal["module", "shape", "shape in turn"] = "module"
    normaliser_variance: Literal["exact", "published"] = "exact"
    normaliser_epsilon: float = 1e-8
    drop_zero_rows: bool = False
    loss: Literal["batch", "fact", "sum", "rows"] = "batch"
    initial_weights: Literal["scaled", "unit"] = "scaled"
    step_size_parameter: Literal["log", "direct"] = "log"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = " or ".join(map(repr, choices)) if len(choices) == 2 else f"one of {', '.join(choices)}"
                raise ValueError(f"{name} is {value!r}; give {known}")
        if type(self.rank) is not int or type(self.blocks) is not int or self.blocks < 0:
            raise ValueError(f"rank is {self.rank!r} and blocks are {self.blocks!r}; give whole numbers, blocks from 0")
        for name in ("step_size", "damping", "rank", "normaliser_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.prior >= 0:
            raise ValueError(f"prior is {self.prior}; give 0 (none) or more")
        if not self.output_curvature >= 0:
            raise ValueError(f"output_curvature is {self.output_curvature}; give 0 (none) or more, such as 0.1")
        if self.output_curvature and self.aggregation == "mend":
            raise ValueError(f"output_curvature is {self.output_curvature} and aggregation is 'mend', which solves no "
                             "least squares; give 'least_squares' or 'recursive', or output_curvature=0")
        if type(self.text_tokens) is not int or self.text_tokens < 64:
            raise ValueError(f"text_tokens is {self.text_tokens!r}; give a whole number from 64")
        if not self.warm_up_rows >= 2:
            raise ValueError(f"warm_up_rows is {self.warm_up_rows}; give 2 or more, or warm_up=False for none")
        if self.has_text_prior and self.aggregation == "mend":
            raise ValueError("prior_source is 'text' and aggregation is 'mend', which solves no least squares that a "
                             "prior could enter; give 'least_squares' or 'recursive', or prior=0")
        if self.warm_up and self.loss in ("fact", "sum"):
            raise ValueError(f"warm_up is True and loss is {self.loss!r}, but the moments of training facts are of the "
                             "batch's loss; give warm_up=False, or loss='batch'")


    @property
    def has_text_prior(self) -> bool:
        """Whether the least squares start from the second moment of text's keys."""
        return self.prior > 0 and self.prior_source == "text"


class RunningNormaliser:
    """Running mean and variance of rows (Welford's update in batches).

    Args:
        width: of a row.
        device: of the tensors.
        start: moments that stand in for the rows that are missing from ``start_rows``.
        start_rows: from so many rows on, the start counts no more.
        variance, epsilon: see `HypernetworkConfig.normaliser_variance` and ``normaliser_epsilon`` there.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", start: RunningNormaliser | None = None,
        start_rows: float = 0.0, variance: Literal["exact", "published"] = "exact", epsilon: float = 1e-8,
    ) -> None:  # fmt: skip
        self.start, self.start_rows, self.variance, self.epsilon = start, start_rows, variance, epsilon
        self.count = torch.zeros((), device=device)
        self.mean = torch.zeros(width, device=device)
        self.squares = torch.zeros(width, device=device)

    def update(self, rows: Tensor) -> None:
        """Take in rows (N, width)."""
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.variance == "published":
            squares = squares * (len(rows) / max(len(rows) - 1, 1))
        self.count, self.mean, self.squares = self._with(len(rows), mean, squares)

    def merge(self, other: RunningNormaliser) -> None:
        """Take in the rows that other moments are of."""
        if float(other.count):
            self.count, self.mean, self.squares = self._with(other.count, other.mean, other.squares)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation, (width,) each: of the rows taken in and of the start's."""
        count, mean, squares = self.count, self.mean, self.squares
        if self.start is not None:
            rows = (self.start_rows - count).clamp(min=0)
            weight = (rows - 1).clamp(min=0) / (self.start.count - 1)  # of its squares: the same variance in these rows
            count, mean, squares = self._with(rows, self.start.mean, self.start.squares * weight)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        return mean, 1 / (std + self.epsilon)

    def _with(self, count: Tensor | int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squares of these rows and others."""
        total = self.count + count
        shift = mean - self.mean
        both = self.squares + squares + shift.square() * self.count * count / total
        return total, self.mean + shift * count / total, both

    def to(self, device: torch.device) -> RunningNormaliser:
        """The same moments on this device."""
        other = RunningNormaliser(len(self.mean), device)
        other.load(self.state())
        return other

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of :meth:`state`."""
        self.count, self.mean, self.squares = (state[k].to(self.mean.device) for k in ("count", "mean", "squares"))


class ResidualBlocks(nn.Module):
    """z ← z + scale_l ⊙ ReLU(z A B + b) + shift_l, B times; A, B, b shared by modules of one shape.

    With ``inside`` they are inside of the ReLU, as in MEND: z ← z + ReLU(scale_l ⊙ (z A B + b) + shift_l).

    A starts as N(0, 1/width), or with ``unit`` as N(0, 1). B starts at zero, so that the untrained network is the
    identity. The ReLU is written as a clamp, whose gradient at zero is 1: torch.relu's is 0 there, and B and b, which
    start at just that point, would never learn.
    """

    def __init__(
        self, width: int, rank: int, blocks: int, modules: int, precision: Literal["float32", "bfloat16"] = "float32",
        inside: bool = False, unit: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_half, self.inside = precision == "bfloat16", inside
        self._halves: dict[str, tuple[int, Tensor]] = {}  # parameters in bfloat16, with the version they are of
        divisor = 1.0 if unit else math.sqrt(width)
        self.down = nn.ParameterList([nn.Parameter(torch.randn(width, rank) / divisor) for _ in range(blocks)])
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(rank, width)) for _ in range(blocks)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(blocks)])
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(modules, width)) for _ in range(blocks)])
        self.shift = nn.ParameterList([nn.Parameter(torch.zeros(modules, width)) for _ in range(blocks)])

    def forward(self, z: Tensor, members: Sequence[int]) -> Tensor:
        """Transformed rows (M, N, width) of modules of the shape at once: a product a block, not one a module.

        Args:
            z: the modules' rows.
            members: which of the shape's modules they are, M in number.
        """
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            scale, shift = self.scale[i][members], self.shift[i][members]
            if self.inside:
                kind = torch.bfloat16 if self.in_half else z.dtype
                inner = linear(linear(z.to(kind), down.to(kind).T), up.to(kind).T).to(z.dtype) + self.bias[i]
                z = z + (scale[:, None] * inner + shift[:, None]).clamp(min=0)
                continue
            run = (self._halved(f"down.{i}", down), self._halved(f"up.{i}", up)) if self.in_half else (down, up)
            z = _ResidualBlock.apply(z, down, up, self.bias[i], scale, shift, *run)
        return z

    def _halved(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter in bfloat16, made again when it has changed."""
        version, halved = self._halves.get(name, (-1, parameter))
        if version != parameter._version or halved.device != parameter.device:
            self._halves[name] = version, halved = parameter._version, parameter.detach().bfloat16()
        return halved


class _ResidualBlock(torch.autograd.Function):
    """z + scale ⊙ clamp(z A B + b) + shift with its gradient written out: half the memory and passes over it of the
    same in single operations.

    z is (M, N, width), scale and shift (M, width), one row a module. The products are in the precision of ``run_down``
    and ``run_up``, which are A and B, or what they are in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, down: Tensor, up: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, run_down: Tensor,
        run_up: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = z.flatten(0, 1).to(run_down.dtype)  # (M · N, width)
        narrow = linear(rows, run_down.T)  # (M · N, rank)
        inner = linear(narrow, run_up.T).to(z.dtype).add_(bias).view(z.shape)
        passes = inner >= 0
        inner.clamp_(min=0)
        ctx.save_for_backward(rows, run_down, run_up, scale, narrow, inner, passes)
        return torch.addcmul(z, scale[:, None], inner).add_(shift[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        rows, run_down, run_up, scale, narrow, inner, passes = ctx.saved_tensors
        for_scale = torch.stack([(c * i).sum(0) for c, i in zip(cotangent, inner, strict=True)])
        for_inner = (cotangent * scale[:, None]).mul_(passes).flatten(0, 1)
        for_bias = for_inner.sum(0)
        for_inner = for_inner.to(rows.dtype)
        for_narrow = linear(for_inner, run_up)
        for_z = linear(for_narrow, run_down).to(cotangent.dtype).view(cotangent.shape).add_(cotangent)
        for_down, for_up = (outer(a, b).to(cotangent.dtype) for a, b in ((rows, for_narrow), (narrow, for_inner)))
        return for_z, for_down, for_up, for_bias, for_scale, cotangent.sum(1), None, None


@dataclass(frozen=True)
class StepRecord:
    """What the second pass needs of a step: the network's inputs, constants of the trajectory's gradient.

    Attributes:
        keys: module → u (N, d_in).
        inputs: group of modules of one shape → normalised [u; δ] of its M members, (M, N, d_in + d_out).
        update_keys: module → ũ where it does not depend on the parameters, else absent.
        factors: what :meth:`Hypernetwork.factors` made of it, with the graph to differentiate, where that was kept.
        used: group → which rows were not dropped, (M, N) bool; absent where none are dropped.
        units: group → the mean and the standard deviation that take the network's output to the units of u and δ,
            (M, d_in + d_out) each; absent where it stays normalised.
    """

    keys: dict[str, Tensor]
    inputs: dict[str, Tensor]
    update_keys: dict[str, Tensor]
    factors: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    used: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def retained(self) -> dict[str, Tensor] | None:
        """Module → the share () of the stream's earlier updates that stays in the weights at this step; None: all."""
        return None


class Hypernetwork(nn.Module):
    """Maps a batch's keys and value gradients to rank-1 update factors (RLEdit, section 3.2; MEND; MALMEN).

    z = normalise([u; δ]) passes through residual blocks and is split into (û, δ̂). MEND's aggregation is ũ = û,
    ṽ = −η δ̂. The others take vᵢ = −η (uᵢ·ûᵢ) δ̂ᵢ (or −η ‖ûᵢ‖² δ̂ᵢ) and solve ridge least squares
    ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + λ‖ΔW‖², whose dual form has the factors ũ = (u uᵀ + λI)⁻¹ u and ṽ = v. With "recursive"
    the system holds all keys since the reset: ũ = u S⁻¹, S = λI + cC + Σ_{j≤t} u_jᵀ u_j, and S⁻¹ is the network's
    memory, updated by N rows a step (Woodbury).

    Args:
        shapes: module → (d_in, d_out).
        config: sizes and rules.
        seed: of the initial parameters.
    """

    shrinks: ClassVar[bool] = False  # whether a step also shrinks what the stream's earlier steps added

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: HypernetworkConfig, seed: int = 0) -> None:
        super().__init__()
        self.shapes, self.config = dict(shapes), config
        members: dict[tuple[int, int], list[str]] = {}
        for module, shape in shapes.items():
            members.setdefault(shape, []).append(module)
        self.groups = {str(i): names for i, names in enumerate(members.values())}  # modules of one shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleDict(
                {
                    str(i): ResidualBlocks(
                        sum(shape), config.rank, config.blocks, len(names), config.precision, config.block == "mend",
                        config.initial_weights == "unit",
                    )
                    for i, (shape, names) in enumerate(members.items())
                }
            )
        self.index = {m: i for i, m in enumerate(shapes)}
        if config.step_size_parameter == "log":
            self.log_step_size = nn.Parameter(torch.full((len(shapes),), math.log(config.step_size)))
        else:
            self.step_size = nn.Parameter(torch.full((len(shapes),), config.step_size))
        learned = config.learn_damping and config.aggregation == "least_squares" and not config.has_text_prior
        self.log_damping = nn.Parameter(torch.full((len(shapes),), math.log(config.damping)), requires_grad=learned)
        own = config.normaliser_scope == "module"
        self.normaliser_names = {m: m if own else f"{d_in}x{d_out}" for m, (d_in, d_out) in shapes.items()}
        self.training_moments: dict[str, RunningNormaliser] = {}  # what warm moments begin as; empty until gathered
        self.lifetime: dict[str, Tensor] = {}  # with "continued", the moments of training, which streams go on from
        self.normalisers = self.first_normalisers()  # by the names above
        if config.normaliser == "continued":
            self.lifetime = moments_state(self.normalisers)
        self.memory: dict[str, Tensor] = {}
        self.second_moments: dict[str, Tensor] = {}  # C by module, (d_in, d_in); empty until gather
        self._gathered = 0
        self._starts: dict[str, Tensor] = {}  # S_0⁻¹ by module, computed when first needed
        self._turns: dict[str, Tensor] = {}  # (G + γ·mean(diag G)·I)⁻¹ by module, (d_out, d_out)

    @staticmethod
    def parameter_count(shapes: Mapping[str, tuple[int, int]], config: HypernetworkConfig) -> int:
        """How many numbers a network of these sizes and its normalisers hold, without making one."""
        widths = [sum(shape) for shape in shapes.values()]
        by_shape = list({shape: sum(shape) for shape in shapes.values()}.values())
        blocks = config.blocks * (sum(by_shape) * (2 * config.rank + 1) + 2 * sum(widths))
        normalised = widths if config.normaliser_scope == "module" else by_shape
        return blocks + 2 * len(widths) + sum(2 * width + 1 for width in normalised)

    @property
    def device(self) -> torch.device:
        return self.log_damping.device

    @property
    def step_size_parameter(self) -> nn.Parameter:
        """What is learned of the step sizes, (modules,): log η_l, or η_l itself."""
        return self.log_step_size if self.config.step_size_parameter == "log" else self.step_size

    def step_sizes(self, modules: Sequence[str] | None = None) -> Tensor:
        """η_l of these modules (M,), or of all; differentiable."""
        chosen: Tensor = self.step_size_parameter
        if modules is not None:
            chosen = chosen[[self.index[m] for m in modules]]
        return chosen.exp() if self.config.step_size_parameter == "log" else chosen

    @torch.no_grad()
    def scale_step_sizes(self, factor: float, of: Tensor | None = None) -> None:
        """Multiply every module's η_l by a positive factor.

        Args:
            factor: by what.
            of: earlier values of :attr:`step_size_parameter` to multiply, instead of the present ones.
        """
        start = self.step_size_parameter.detach() if of is None else of
        log = self.config.step_size_parameter == "log"
        self.step_size_parameter.copy_(start + math.log(factor) if log else start * factor)

    def reset(self) -> None:
        """Forget the stream: the recursion's memory, and what a normaliser has seen of the stream."""
        self.memory = {}
        if self.config.normaliser != "lifetime":
            self.normalisers = self.first_normalisers()

    def first_normalisers(self) -> dict[str, RunningNormaliser]:
        """The moments that a stream begins with, by the names in :attr:`normaliser_names`: those of training
        ("continued"), of training facts (``warm_up``), or none."""
        config = self.config
        sharing: dict[str, list[str]] = {}
        for module, name in self.normaliser_names.items():
            sharing.setdefault(name, []).append(module)
        normalisers: dict[str, RunningNormaliser] = {}
        for name, modules in sharing.items():
            start = self.training_moments.get(name)
            normalisers[name] = RunningNormaliser(
                sum(self.shapes[modules[0]]), self.device, start and start.to(self.device),
                config.warm_up_rows * len(modules), config.normaliser_variance, config.normaliser_epsilon,
            )  # fmt: skip
            if self.lifetime:
                normalisers[name].load({k: self.lifetime[f"{name}.{k}"] for k in ("count", "mean", "squares")})
        return normalisers

    def normaliser_of(self, module: str) -> RunningNormaliser:
        """The moments that a module's rows are normalised with."""
        return self.normalisers[self.normaliser_names[module]]

    @property
    def normaliser_widths(self) -> dict[str, int]:
        """Name → width of the moments of that name."""
        return {name: sum(self.shapes[module]) for module, name in self.normaliser_names.items()}

    @property
    def wants_prior(self) -> bool:
        """Whether the least squares are to start from C, and none has been gathered (:meth:`gather`, of facts) or
        given (:meth:`start_from_text`, of text)."""
        config = self.config
        starts = config.has_text_prior or (config.aggregation == "recursive" and config.prior > 0)
        return starts and not self.second_moments

    @property
    def wants_curvature(self) -> bool:
        """Whether values are to be turned by the outputs' curvature, and it is not known yet."""
        return self.config.output_curvature > 0 and not self._turns

    def forget_curvature(self) -> None:
        """Ask for the outputs' curvature anew, as after a change of the LLM."""
        self._turns = {}

    def turn_by(self, output_moments: Mapping[str, Tensor]) -> None:
        """Turn values by this curvature of the outputs from now on (see `HypernetworkConfig.output_curvature`).

        Args:
            output_moments: module → G (d_out, d_out), as `agents.key_statistics.output_moments` gives them.

        Raises:
            ValueError: one is missing or of another shape.
        """
        turns = {}
        for module, (_, d_out) in self.shapes.items():
            _check_shape(f"the output moment of {module}", output_moments.get(module), (d_out, d_out))
            g = output_moments[module].to(self.device, torch.float64)
            ridge = self.config.output_curvature * float(g.diagonal().mean()) or 1.0
            system = (g + g.T) / 2 + ridge * torch.eye(d_out, device=self.device, dtype=torch.float64)
            turns[module] = torch.cholesky_inverse(torch.linalg.cholesky(system)).to(self.log_damping.dtype)
        self._turns = turns

    @property
    def learns_keys(self) -> bool:
        """Whether the update keys ũ depend on the parameters."""
        return self.config.aggregation != "recursive" and not self.config.has_text_prior

    @property
    def wants_moments(self) -> bool:
        """Whether moments are to begin as the training facts', and none have been gathered."""
        return self.config.warm_up and not self.training_moments

    def start_from(self, moments: Mapping[str, RunningNormaliser]) -> None:
        """Begin a stream, and after each reset, with these moments of training facts.

        They are of [u; N δ], N the rows of the batch that δ is observed in, and the rows of every batch are normalised
        likewise: δ is the gradient of a mean over the batch, and N δ does not shrink as the batch grows. Where modules
        of one shape share moments, theirs are merged.

        Args:
            moments: module → of its training facts' rows.

        Raises:
            ValueError: they are of other modules than the network's, or of fewer than two rows.
        """
        widths = {m: len(n.mean) for m, n in moments.items()}
        wanted = {m: sum(shape) for m, shape in self.shapes.items()}
        if widths != wanted:
            raise ValueError(
                f"the moments are of {len(widths)} modules such as {next(iter(widths.items()), None)}, the network "
                f"edits {len(wanted)} such as {next(iter(wanted.items()))} (d_in + d_out); gather them for those"
            )
        fewest = min(float(n.count) for n in moments.values())
        if fewest < 2:
            raise ValueError(f"the moments are of {fewest:g} rows; gather those of two facts or more")
        merged: dict[str, RunningNormaliser] = {}
        for module, rows in moments.items():
            name = self.normaliser_names[module]
            if name in merged:
                merged[name].merge(rows.to(self.device))
            else:
                merged[name] = rows.to(self.device)
        self.training_moments = merged
        self.reset()
        self.normalisers = self.first_normalisers()  # a "lifetime" normaliser, too

    @torch.no_grad()
    def gather(self, keys: Mapping[str, Tensor]) -> None:
        """Take keys (N, d_in) by module into C, which the recursion starts from at the next reset.

        What was loaded with :meth:`load_prior_state` is replaced, not added to: it does not say how many keys it holds.
        """
        for module, u in keys.items():
            earlier = self.second_moments.get(module, u.new_zeros(u.shape[1], u.shape[1]))
            rows = self._gathered + len(u)
            gram = u.T @ u
            gram = (gram + gram.T) / 2  # what rounding leaves unsymmetric would not survive being saved
            self.second_moments[module] = earlier * (self._gathered / rows) + gram / rows
        self._gathered = rows
        self._starts = {}

    def start_from_text(self, second_moments: Mapping[str, Tensor]) -> None:
        """Start the least squares from these second moments of text's keys, from the next reset on.

        Args:
            second_moments: module → C (d_in, d_in), as `agents.key_statistics.key_statistics` gives them.

        Raises:
            ValueError: one is missing or of another shape.
        """
        for module, (d_in, _) in self.shapes.items():
            _check_shape(f"the second moment of {module}", second_moments.get(module), (d_in, d_in))
        self.second_moments = {m: second_moments[m].to(self.device, self.log_damping.dtype) for m in self.shapes}
        self._starts, self._gathered = {}, 0

    def load_moments(self, state: Mapping[str, Tensor]) -> None:
        """Start from the moments of :func:`moments_state` at the next reset; from none where there are no tensors.

        Raises:
            ValueError: one is missing or of another shape.
        """
        self.training_moments = moments_from(state, "", self.normaliser_widths, self.device) if state else {}

    def load_lifetime(self, state: Mapping[str, Tensor]) -> None:
        """Let streams go on from the moments of training of :attr:`lifetime`, from the next reset on.

        Raises:
            ValueError: one is missing or of another shape.
        """
        self.lifetime = moments_state(moments_from(state, "", self.normaliser_widths, self.device))

    def prior_state(self) -> dict[str, Tensor]:
        """C as its upper triangle (d_in (d_in + 1) / 2,), under the names of all modules that share it, joined by "+"
        (those that read the same input have the same keys)."""
        state: dict[str, Tensor] = {}
        for module, c in self.second_moments.items():
            triangle = c[tuple(torch.triu_indices(*c.shape))]
            same = next((names for names, other in state.items() if torch.equal(other, triangle)), None)
            if same is None:
                state[module] = triangle
            else:
                state[f"{same}+{module}"] = state.pop(same)
        return state

    def load_prior_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of :meth:`prior_state`."""
        self.second_moments, self._starts, self._gathered = {}, {}, 0
        for names, triangle in state.items():
            modules = names.split("+")
            if unknown := set(modules) - set(self.shapes):
                raise ValueError(f"second moments are of {min(unknown)!r}, which is no module of this network")
            d_in = self.shapes[modules[0]][0]
            c = torch.zeros(d_in, d_in, device=self.device)
            c[tuple(torch.triu_indices(d_in, d_in))] = triangle.to(self.device)
            self.second_moments |= dict.fromkeys(modules, c + c.triu(1).T)

    @torch.no_grad()
    def observe(self, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor], adapt: bool = True) -> StepRecord:
        """Take a batch into the normalisers and the memory, and return what :meth:`factors` needs.

        Args:
            keys: module → u (N, d_in).
            gradients: module → δ (N, d_out), of the batch's mean loss.
            adapt: whether the batch is one of training, which a "lifetime" normaliser takes in and other streams go on
                from with a "continued" one; the others always take it in.
        """
        rows_in_loss = 1
        if self.training_moments:  # which are of gradients that do not shrink as the batch grows
            rows_in_loss = len(next(iter(gradients.values())))
            gradients = {m: rows_in_loss * g for m, g in gradients.items()}
        kept: dict[str, Tensor] = {}
        if self.config.drop_zero_rows:
            kept = {m: (u != 0).any(1) & (gradients[m] != 0).any(1) for m, u in keys.items()}  # (N,)
            keys = {m: u * kept[m][:, None] for m, u in keys.items()}
        rows = {m: torch.cat([keys[m], gradients[m]], dim=1) for m in self.shapes}  # (N, d_in + d_out)
        taken = {m: rows[m][kept[m]] for m in rows} if kept else rows
        takes = adapt or self.config.normaliser != "lifetime"
        together = self.config.normaliser_scope == "shape"
        inputs: dict[str, Tensor] = {}
        update_keys: dict[str, Tensor] = {}
        units: dict[str, tuple[Tensor, Tensor]] = {}
        for group, members in self.groups.items():
            normalised, means, deviations = [], [], []
            for module in members if takes and together else ():
                self.normaliser_of(module).update(taken[module])
            for module in members:
                if takes and not together:
                    self.normaliser_of(module).update(taken[module])
                mean, scale = self.normaliser_of(module).moments()
                z = (rows[module] - mean) * scale
                if self.config.output_units == "input":
                    share = torch.ones_like(mean)
                    share[self.shapes[module][0] :] /= rows_in_loss
                    means.append(mean * share)
                    deviations.append(share / scale)
                normalised.append(torch.where(kept[module][:, None], z, 0.0) if kept else z)
                if not self.learns_keys:
                    update_keys[module] = self._solved_keys(module, keys[module])
            inputs[group] = torch.stack(normalised)
            if means:
                units[group] = torch.stack(means), torch.stack(deviations)
        if adapt and self.config.normaliser == "continued":
            self.lifetime = moments_state(self.normalisers)
        used = {g: torch.stack([kept[m] for m in members]) for g, members in self.groups.items()} if kept else {}
        return StepRecord(dict(keys), inputs, update_keys, used=used, units=units)

    def _solved_keys(self, module: str, u: Tensor) -> Tensor:
        """ũ = u S⁻¹ (N, d_in) with these keys u (N, d_in) in S, by Woodbury's identity; the recursion keeps them."""
        inverse = self.memory.get(module)
        if inverse is None:
            inverse = self._start(module).to(u.dtype)
        projected = u @ inverse  # (N, d_in)
        gram = projected @ u.T + torch.eye(len(u), dtype=u.dtype, device=u.device)  # (N, N)
        solved = torch.cholesky_solve(projected, torch.linalg.cholesky(gram))  # equals u S⁻¹ of the updated S
        if self.config.aggregation == "recursive":
            self.memory[module] = inverse - projected.T @ solved
        return solved

    def _start(self, module: str) -> Tensor:
        """S_0⁻¹, (d_in, d_in)."""
        if module not in self._starts:
            damping = float(self.log_damping[self.index[module]].exp())
            system = damping * torch.eye(self.shapes[module][0], device=self.device, dtype=torch.float64)
            if module in self.second_moments:
                system += self.config.prior * self.second_moments[module]
            self._starts[module] = torch.cholesky_inverse(torch.linalg.cholesky(system)).to(self.log_damping.dtype)
        return self._starts[module]

    def factors(
        self, record: StepRecord, modules: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update factors ũ (N, d_in) and ṽ (N, d_out) by module, of all or only these; differentiable in the
        parameters."""
        update_keys: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for group, all_members in self.groups.items():
            places = [i for i, m in enumerate(all_members) if modules is None or m in modules]
            if not places:
                continue
            members = [all_members[i] for i in places]
            u = torch.stack([record.keys[m] for m in members])  # (M, N, d_in)
            index = [self.index[m] for m in members]
            rows = record.inputs[group]
            z = self.networks[group](rows if modules is None else rows[places], places)
            if record.units:
                mean, deviation = (part[places][:, None] for part in record.units[group])
                z = torch.addcmul(mean, z, deviation)
            key_part, gradient_part = z.split(self.shapes[members[0]], dim=2)  # û (M, N, d_in), δ̂ (M, N, d_out)
            step_size = self.step_sizes(members)[:, None, None]
            if self.config.aggregation == "mend":
                v = -step_size * gradient_part
            else:
                left = u if self.config.coefficient == "key" else key_part
                v = -step_size * (left * key_part).sum(2, keepdim=True) * gradient_part
            if self._turns:
                turned = v @ torch.stack([self._turns[m] for m in members])
                length = turned.norm(dim=2, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
                v = turned * (v.norm(dim=2, keepdim=True) / length)
            if record.used:
                v = v * record.used[group][places, :, None]
            values |= zip(members, v, strict=True)
            if self.config.aggregation == "mend":
                update_keys |= zip(members, key_part, strict=True)
            elif not self.learns_keys:
                update_keys |= {m: record.update_keys[m] for m in members}
            else:
                damping = self.log_damping[index].exp()[:, None, None]
                gram = u @ u.mT + damping * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)  # (M, N, N)
                update_keys |= zip(members, torch.cholesky_solve(u, torch.linalg.cholesky(gram)), strict=True)
        order = [m for m in record.keys if m in values]
        return {m: update_keys[m] for m in order}, {m: values[m] for m in order}

    def accumulate(
        self, record: StepRecord, for_keys: Mapping[str, Tensor], for_values: Mapping[str, Tensor], max_bytes: int
    ) -> None:
        """Add to the parameters' ``grad`` what gradients of the factors (N, d_in), (N, d_out) by module mean for them.

        Args:
            record: the step; where it has no graph, the factors are made again, as many modules at a time as
                ``max_bytes`` of graph allows.
            for_keys: gradients for ũ; empty if it does not depend on the parameters.
            for_values: gradients for ṽ.
            max_bytes: see ``record``.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        modules = list(for_values)
        size = len(modules)
        if record.factors is None:
            whole = self.graph_bytes(len(next(iter(record.keys.values()))))
            size = max(1, min(size, size * max_bytes // max(whole, 1)))
        for start in range(0, len(modules), size):
            part = modules[start : start + size]
            keys, values = record.factors or self.factors(record, part)
            outputs = [values[m] for m in part] + [keys[m] for m in part if m in for_keys]
            cotangents = [for_values[m] for m in part] + [for_keys[m] for m in part if m in for_keys]
            torch.autograd.backward(outputs, cotangents, inputs=parameters)

    def graph_bytes(self, rows: int) -> int:
        """About what keeping the graph of :meth:`factors` takes for N rows, in bytes."""
        c = self.config
        # A block keeps its input, its inner activations with the mask, and the narrow ones; the aggregation some more.
        return sum(
            len(members) * rows * ((9 * width + 4 * c.rank) * c.blocks + 12 * width)
            for members in self.groups.values()
            for width in [sum(self.shapes[members[0]])]
        )

    def memory_state(self) -> dict[str, Tensor]:
        """Normalisers and recursion memory as named tensors."""
        state = {f"normaliser.{k}": v for k, v in moments_state(self.normalisers).items()}
        return state | {f"memory.{m}": v for m, v in self.memory.items()}

    def load_memory_state(self, state: Mapping[str, Any]) -> None:
        """Take the tensors of :meth:`memory_state`.

        Raises:
            ValueError: one is missing or of another shape.
        """
        moments = moments_from(state, "normaliser.", self.normaliser_widths, self.device)
        memory = {m: state[f"memory.{m}"] for m in self.shapes if f"memory.{m}" in state}
        for module, inverse in memory.items():
            d_in = self.shapes[module][0]
            _check_shape(f"memory.{module}", inverse, (d_in, d_in))
        self.normalisers = self.first_normalisers()
        for name, normaliser in self.normalisers.items():
            normaliser.load(moments[name].state())
        self.memory = {m: inverse.to(self.device) for m, inverse in memory.items()}


def moments_state(normalisers: Mapping[str, RunningNormaliser]) -> dict[str, Tensor]:
    """Moments as tensors, by their names and their tensors' names, joined by a dot."""
    return {f"{m}.{k}": v for m, n in normalisers.items() for k, v in n.state().items()}


def moments_from(
    state: Mapping[str, Tensor], prefix: str, widths: Mapping[str, int], device: torch.device
) -> dict[str, RunningNormaliser]:
    """The moments of these names and widths from tensors of :func:`moments_state`, with a prefix to their names.

    Raises:
        ValueError: one is missing or of another shape.
    """
    normalisers = {m: RunningNormaliser(width, device) for m, width in widths.items()}
    for module, normaliser in normalisers.items():
        for name, empty in normaliser.state().items():
            _check_shape(f"{prefix}{module}.{name}", state.get(f"{prefix}{module}.{name}"), tuple(empty.shape))
        normaliser.load({name: state[f"{prefix}{module}.{name}"] for name in normaliser.state()})
    return normalisers


def _check_shape(name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
    shape = None if tensor is None else tuple(tensor.shape)
    if shape != wanted:
        raise ValueError(f"{name} has shape {shape}; it must be {wanted}")
