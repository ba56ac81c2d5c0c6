"""The hypernetwork: normaliser, residual blocks, aggregation (MEND, MALMEN, RLEdit)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from agents.rledit.aggregation import inverse_curvature, least_squares_keys, least_squares_values, mend, turned
from agents.rledit.blocks import ResidualBlocks
from agents.rledit.config import HypernetworkConfig
from agents.rledit.key_memory import KeyMemory
from agents.rledit.normaliser import RunningNormaliser, check_shape, moments_from, moments_state, shared_moments
from agents.rledit.whitening import empty_normaliser, normaliser_size


@dataclass(frozen=True)
class StepRecord:
    """A step's inputs to the network, which are constants in the trajectory's gradient.

    Attributes:
        keys: module → u (N, d_in).
        inputs: group of modules of one shape → normalised [u; δ] of its M members, (M, N, d_in + d_out).
        update_keys: module → ũ (N, d_in); empty if ũ depends on the parameters.
        factors: the result of :meth:`Hypernetwork.factors` with its graph, if the graph was kept.
        used: group → which rows were not dropped, (M, N) bool; empty if none are dropped.
        units: group → the mean and the standard deviation that convert the network's output to the units of u and δ,
            (M, d_in + d_out) each; empty if the output stays normalised.
    """

    keys: dict[str, Tensor]
    inputs: dict[str, Tensor]
    update_keys: dict[str, Tensor]
    factors: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    used: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def retained(self) -> dict[str, Tensor] | None:
        """Module → the share () of the stream's earlier updates that this step leaves in the weights; None: all."""
        return None


class Hypernetwork(nn.Module):
    """Maps a batch's keys and value gradients to rank-1 update factors (RLEdit, section 3.2; MEND; MALMEN).

    z = normalise([u; δ]) passes through residual blocks and is split into (û, δ̂). MEND's aggregation is ũ = û,
    ṽ = −η δ̂. The others take vᵢ = −η (uᵢ·ûᵢ) δ̂ᵢ (or −η ‖ûᵢ‖² δ̂ᵢ) and solve ridge least squares
    ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + λ‖ΔW‖², whose dual form has the factors ũ = (u uᵀ + λI)⁻¹ u and ṽ = v. With "recursive"
    the system contains all keys since the reset: ũ = u S⁻¹, S = λI + cC + Σ_{j≤t} u_jᵀ u_j, and S⁻¹ is the network's
    memory, updated by N rows a step (Woodbury).

    Args:
        shapes: module → (d_in, d_out).
        config: sizes and rules.
        seed: of the initial parameters.

    Attributes:
        key_memory: the system S, with the prior C and the stream's keys.
        normalisers: the running moments, by the names in ``normaliser_names``.
        training_moments: the moments of training facts that ``warm_up`` starts from; empty until gathered.
        lifetime: with "continued", the moments of training, which streams continue from.
    """

    shrinks: ClassVar[bool] = False  # whether a step also shrinks the stream's earlier updates

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
        by_module = config.normaliser_scope == "module"
        self.normaliser_names = {m: m if by_module else f"{d_in}x{d_out}" for m, (d_in, d_out) in shapes.items()}
        self.training_moments: dict[str, RunningNormaliser] = {}
        self.lifetime: dict[str, Tensor] = {}
        self.normalisers = self.first_normalisers()
        if config.normaliser == "continued":
            self.lifetime = moments_state(self.normalisers)
        self.key_memory = KeyMemory(shapes, self.log_damping, config.prior, config.memory_weight)
        self._turns: dict[str, Tensor] = {}  # (G + γ·mean(diag G)·I)⁻¹ by module, (d_out, d_out)

    @staticmethod
    def parameter_count(shapes: Mapping[str, tuple[int, int]], config: HypernetworkConfig) -> int:
        """The number of values in a network of these sizes and in its normalisers, without making one."""
        by_module, by_shape = list(shapes.values()), list(dict.fromkeys(shapes.values()))
        blocks = config.blocks * (sum(map(sum, by_shape)) * (2 * config.rank + 1) + 2 * sum(map(sum, by_module)))
        normalised = by_module if config.normaliser_scope == "module" else by_shape
        return blocks + 2 * len(by_module) + sum(normaliser_size(config, shape) for shape in normalised)

    @property
    def device(self) -> torch.device:
        return self.log_damping.device

    @property
    def step_size_parameter(self) -> nn.Parameter:
        """The learned parameter of the step sizes, (modules,): log η_l, or η_l itself."""
        return self.log_step_size if self.config.step_size_parameter == "log" else self.step_size

    def learned_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.parameters() if p.requires_grad]

    def step_sizes(self, modules: Sequence[str] | None = None) -> Tensor:
        """η_l of these modules (M,), or of all; differentiable."""
        parameter: Tensor = self.step_size_parameter
        if modules is not None:
            parameter = parameter[[self.index[m] for m in modules]]
        return parameter.exp() if self.config.step_size_parameter == "log" else parameter

    @torch.no_grad()
    def scale_step_sizes(self, factor: float, of: Tensor | None = None) -> None:
        """Multiply every module's η_l by a positive factor.

        Args:
            factor: the factor.
            of: values of :attr:`step_size_parameter` to multiply instead of the present ones.
        """
        start = self.step_size_parameter.detach() if of is None else of
        log = self.config.step_size_parameter == "log"
        self.step_size_parameter.copy_(start + math.log(factor) if log else start * factor)

    def reset(self) -> None:
        """Forget the stream: its keys, and its rows in the normalisers unless they are "lifetime" ones."""
        self.key_memory.reset()
        if self.config.normaliser != "lifetime":
            self.normalisers = self.first_normalisers()

    def empty_normalisers(self) -> dict[str, RunningNormaliser]:
        """Moments of no rows, by the names in :attr:`normaliser_names`."""
        shapes = {name: self.shapes[module] for module, name in self.normaliser_names.items()}
        return {name: empty_normaliser(self.config, shape, self.device) for name, shape in shapes.items()}

    def first_normalisers(self) -> dict[str, RunningNormaliser]:
        """The moments at the start of a stream, by the names in :attr:`normaliser_names`: those of training
        ("continued"), of training facts (``warm_up``), or empty ones."""
        modules = Counter(self.normaliser_names.values())
        normalisers = self.empty_normalisers()
        for name, normaliser in normalisers.items():
            if name in self.training_moments:
                start_rows = self.config.warm_up_rows * modules[name]
                normaliser.begin(self.training_moments[name].to(self.device), start_rows)
        return moments_from(self.lifetime, "", normalisers) if self.lifetime else normalisers

    def normaliser_of(self, module: str) -> RunningNormaliser:
        """The moments that a module's rows are normalised with."""
        return self.normalisers[self.normaliser_names[module]]

    @property
    def wants_prior(self) -> bool:
        """Whether the least squares need the prior C, and it has not been gathered (of facts) or given (of text)."""
        config = self.config
        has_prior = config.has_text_prior or (config.aggregation == "recursive" and config.prior > 0)
        return has_prior and not self.key_memory.second_moments

    @property
    def wants_curvature(self) -> bool:
        """Whether values are to be multiplied by the outputs' inverse curvature, and it is not known yet."""
        return self.config.output_curvature > 0 and not self._turns

    def forget_curvature(self) -> None:
        """Forget the outputs' curvature, which another LLM makes invalid."""
        self._turns = {}

    def turn_by(self, output_moments: Mapping[str, Tensor]) -> None:
        """Set the outputs' curvature (see `HypernetworkConfig.output_curvature`).

        Args:
            output_moments: module → G (d_out, d_out), from `agents.key_statistics.output_moments`.

        Raises:
            ValueError: a module's G is missing or has another shape.
        """
        turns = {}
        for module, (_, d_out) in self.shapes.items():
            check_shape(f"the output moment of {module}", output_moments.get(module), (d_out, d_out))
            g = output_moments[module].to(self.device, torch.float64)
            turns[module] = inverse_curvature(g, self.config.output_curvature).to(self.log_damping.dtype)
        self._turns = turns

    @property
    def learns_keys(self) -> bool:
        """Whether the update keys ũ depend on the parameters."""
        return self.config.aggregation != "recursive" and not self.config.has_text_prior

    @property
    def wants_moments(self) -> bool:
        """Whether moments are to start from those of training facts, and none have been gathered."""
        return self.config.warm_up and not self.training_moments

    @property
    def whitened_names(self) -> dict[str, str] | None:
        """Module → the name of the moments that its rows are gathered in, with covariances; None unless "whitened"."""
        return self.normaliser_names if self.config.normaliser == "whitened" else None

    def start_from(self, moments: Mapping[str, RunningNormaliser]) -> None:
        """Reset, and start every stream from these moments of training facts.

        They are moments of [u; N δ] with N the number of rows in δ's batch, and every batch is then normalised as
        [u; N δ]: δ is the gradient of a mean over the batch, and N δ does not shrink as the batch grows. Where modules
        of one shape share moments, these are merged.

        Args:
            moments: module → moments of its training facts' rows; with "whitened", by the names in
                :attr:`whitened_names`.

        Raises:
            ValueError: the moments are of other modules than the network's, or of fewer than two rows.
        """
        gathered = self.whitened_names or {m: m for m in self.shapes}
        widths = {gathered[m]: sum(shape) for m, shape in self.shapes.items()}
        names = {gathered[m]: name for m, name in self.normaliser_names.items()}
        self.training_moments = shared_moments(moments, widths, names, self.device)
        self.reset()
        self.normalisers = self.first_normalisers()  # reset() leaves "lifetime" normalisers as they are

    def load_moments(self, state: Mapping[str, Tensor]) -> None:
        """Start from the moments in a :func:`moments_state` at the next reset; from empty ones if there are no tensors.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self.training_moments = moments_from(state, "", self.empty_normalisers()) if state else {}

    def load_lifetime(self, state: Mapping[str, Tensor]) -> None:
        """Set :attr:`lifetime`, the moments that streams continue from, from the next reset on.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self.lifetime = moments_state(moments_from(state, "", self.empty_normalisers()))

    @torch.no_grad()
    def observe(self, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor], adapt: bool = True) -> StepRecord:
        """Add a batch to the normalisers and the memory, and return the record that :meth:`factors` needs.

        Args:
            keys: module → u (N, d_in).
            gradients: module → δ (N, d_out), of the batch's mean loss.
            adapt: whether this is a training batch. Only training batches are added to "lifetime" normalisers and to
                the moments that later streams continue from ("continued").
        """
        rows_in_loss = 1
        if self.training_moments:  # they are of N δ (see `start_from`)
            rows_in_loss = len(next(iter(gradients.values())))
            gradients = {m: rows_in_loss * g for m, g in gradients.items()}
        used_rows: dict[str, Tensor] = {}  # module → which rows are not dropped, (N,)
        if self.config.drop_zero_rows:
            used_rows = {m: (u != 0).any(1) & (gradients[m] != 0).any(1) for m, u in keys.items()}
            keys = {m: u * used_rows[m][:, None] for m, u in keys.items()}
        rows = {m: torch.cat([keys[m], gradients[m]], dim=1) for m in self.shapes}  # (N, d_in + d_out)
        moment_rows = {m: rows[m][used_rows[m]] for m in rows} if used_rows else rows
        adapts = adapt or self.config.normaliser != "lifetime"
        together = self.config.normaliser_scope == "shape"
        recursive = self.config.aggregation == "recursive"
        inputs: dict[str, Tensor] = {}
        update_keys: dict[str, Tensor] = {}
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        for group, members in self.groups.items():
            normalised = []
            for module in members if adapts and together else ():
                self.normaliser_of(module).update(moment_rows[module])
            for module in members:
                if adapts and not together:
                    self.normaliser_of(module).update(moment_rows[module])
                z = self.normaliser_of(module).normalised(rows[module])
                if self.config.output_units == "input":
                    moments[module] = self.normaliser_of(module).moments()
                normalised.append(torch.where(used_rows[module][:, None], z, 0.0) if used_rows else z)
                if not self.learns_keys:
                    update_keys[module] = self.key_memory.solved_keys(module, keys[module], keep=recursive)
            inputs[group] = torch.stack(normalised)
        if adapt and self.config.normaliser == "continued":
            self.lifetime = moments_state(self.normalisers)
        used = {g: torch.stack([used_rows[m] for m in ms]) for g, ms in self.groups.items()} if used_rows else {}
        units = self._units(moments, rows_in_loss) if moments else {}
        return StepRecord(dict(keys), inputs, update_keys, used=used, units=units)

    def _units(
        self, moments: Mapping[str, tuple[Tensor, Tensor]], rows_in_loss: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """`StepRecord.units`, given the mean and the scale that normalised each module's rows."""
        units = {}  # (M, d_in + d_out) each
        for group, members in self.groups.items():
            share = torch.ones_like(moments[members[0]][0])
            share[self.shapes[members[0]][0] :] /= rows_in_loss
            means, scales = (torch.stack(parts) for parts in zip(*(moments[m] for m in members), strict=True))
            units[group] = means * share, share / scales
        return units

    def factors(
        self, record: StepRecord, modules: Collection[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update factors ũ (N, d_in) and ṽ (N, d_out) by module, for all modules or only ``modules``; differentiable
        in the parameters."""
        update_keys: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for group, all_members in self.groups.items():
            places = [i for i, m in enumerate(all_members) if modules is None or m in modules]
            if not places:
                continue
            members = [all_members[i] for i in places]
            rows = record.inputs[group]
            z = self.networks[group](rows if modules is None else rows[places], places)
            if record.units:
                mean, deviation = (part[places][:, None] for part in record.units[group])
                z = torch.addcmul(mean, z, deviation)
            u = torch.stack([record.keys[m] for m in members])  # (M, N, d_in)
            key_part, gradient_part = z.split(self.shapes[members[0]], dim=2)  # û (M, N, d_in), δ̂ (M, N, d_out)
            step_sizes = self.step_sizes(members)
            if self.config.aggregation == "mend":
                solved, v = mend(key_part, gradient_part, step_sizes)
                update_keys |= zip(members, solved, strict=True)
            else:
                v = least_squares_values(u, key_part, gradient_part, step_sizes, self.config.coefficient)
                if self.learns_keys:
                    log_damping = self.log_damping[[self.index[m] for m in members]]
                    update_keys |= zip(members, least_squares_keys(u, log_damping), strict=True)
                else:
                    update_keys |= {m: record.update_keys[m] for m in members}
            if self._turns:
                v = turned(v, torch.stack([self._turns[m] for m in members]))
            if record.used:
                v = v * record.used[group][places, :, None]
            values |= zip(members, v, strict=True)
        order = [m for m in record.keys if m in values]
        return {m: update_keys[m] for m in order}, {m: values[m] for m in order}

    def accumulate(
        self, record: StepRecord, for_keys: Mapping[str, Tensor], for_values: Mapping[str, Tensor], max_bytes: int
    ) -> None:
        """Backpropagate gradients of the factors, and add the result to the parameters' ``grad``.

        Args:
            record: the step; if it has no graph, the factors are computed again.
            for_keys: module → gradient of ũ (N, d_in); empty if ũ does not depend on the parameters.
            for_values: module → gradient of ṽ (N, d_out).
            max_bytes: computing again takes as many modules at a time as this size of the graph allows, in bytes.
        """
        parameters = self.learned_parameters()
        modules = list(for_values)
        size = len(modules)
        if record.factors is None:
            all_bytes = self.graph_bytes(len(next(iter(record.keys.values()))))
            size = max(1, min(size, size * max_bytes // max(all_bytes, 1)))
        for start in range(0, len(modules), size):
            part = modules[start : start + size]
            keys, values = record.factors or self.factors(record, part)
            outputs = [values[m] for m in part] + [keys[m] for m in part if m in for_keys]
            cotangents = [for_values[m] for m in part] + [for_keys[m] for m in part if m in for_keys]
            torch.autograd.backward(outputs, cotangents, inputs=parameters)

    def graph_bytes(self, rows: int) -> int:
        """The approximate size in bytes of the graph of :meth:`factors` for N rows."""
        c = self.config
        # A block keeps its input, its inner activations with the mask, and the narrow ones; the rest is aggregation.
        return sum(
            len(members) * rows * ((9 * width + 4 * c.rank) * c.blocks + 12 * width)
            for members in self.groups.values()
            for width in [sum(self.shapes[members[0]])]
        )

    def memory_state(self) -> dict[str, Tensor]:
        """Normalisers and recursion memory as named tensors."""
        state = {f"normaliser.{k}": v for k, v in moments_state(self.normalisers).items()}
        return state | self.key_memory.state()

    def load_memory_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory_state`.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        normalisers = moments_from(state, "normaliser.", self.first_normalisers())
        self.key_memory.load_state(state)
        self.normalisers = normalisers
