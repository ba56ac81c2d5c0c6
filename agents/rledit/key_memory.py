"""The keys in the least squares' system beside a batch's own: a prior's, and those of the stream so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.rledit.normaliser import check_shape


class KeyMemory:
    """The system S = λI + c·C + w Σ_{j<t} u_jᵀ u_j + Σ_{j=t} u_jᵀ u_j of each module, with the prior C, the keys u_j of
    the stream's batches j, and those of the current batch t at all its presentations.

    Args:
        shapes: module → (d_in, d_out).
        log_damping: log λ by module, (modules,): the network's parameter; the memory has its device and dtype.
        prior: c, the number of keys that C counts as.
        weight: w, the number of keys that a key of an earlier batch counts as. With more than 1, say the end of
            each batch by :meth:`end_batch`.

    Attributes:
        second_moments: C by module, (d_in, d_in); empty until it is gathered or given.
        inverses: S⁻¹ by module after the stream's latest batch, (d_in, d_in); empty at the stream's start, and if
            batches are not kept.
        recent: the current batch's keys in S by module, a tensor (N, d_in) for each presentation; empty if w = 1.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], log_damping: Tensor, prior: float, weight: float = 1.0
    ) -> None:
        self.widths = {m: d_in for m, (d_in, _) in shapes.items()}
        self.log_damping, self.prior, self.weight = log_damping, prior, weight
        self.second_moments: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self.recent: dict[str, list[Tensor]] = {}
        self._gathered = 0  # number of keys in the second moments
        self._starts: dict[str, Tensor] = {}  # S_0⁻¹ by module, computed when first needed

    def reset(self) -> None:
        """Forget the stream's keys."""
        self.inverses, self.recent = {}, {}

    def end_batch(self) -> None:
        """The next keys are of another batch: those of the current one count w times from now on."""
        for module, presentations in self.recent.items():
            self._add(module, torch.cat(presentations), self.weight - 1)
        self.recent = {}

    def _add(self, module: str, u: Tensor, weight: float) -> None:
        """Add ``weight`` · uᵀ u to S, by Woodbury's identity."""
        u, inverse = u.double(), self.inverses[module]
        projected = u @ inverse.double()  # (N, d_in)
        gram = weight * projected @ u.T + torch.eye(len(u), dtype=u.dtype, device=u.device)  # (N, N)
        solved = torch.cholesky_solve(projected, torch.linalg.cholesky(gram))
        self.inverses[module] = inverse - (weight * projected.T @ solved).to(inverse.dtype)

    def solved_keys(self, module: str, u: Tensor, keep: bool) -> Tensor:
        """ũ = u S⁻¹ (N, d_in) with these keys u (N, d_in) in S, by Woodbury's identity.

        Args:
            module: whose keys they are.
            u: the keys.
            keep: whether they stay in S.
        """
        inverse = self.inverses.get(module)
        if inverse is None:
            inverse = self._start(module).to(u.dtype)
        projected = u @ inverse  # (N, d_in)
        gram = projected @ u.T + torch.eye(len(u), dtype=u.dtype, device=u.device)  # (N, N)
        solved = torch.cholesky_solve(projected, torch.linalg.cholesky(gram))  # equals u S⁻¹ of the updated S
        if keep:
            self.inverses[module] = inverse - projected.T @ solved
            if self.weight != 1:
                self.recent.setdefault(module, []).append(u)
        return solved

    def _start(self, module: str) -> Tensor:
        """S_0⁻¹, (d_in, d_in)."""
        if module not in self._starts:
            damping = float(self.log_damping[list(self.widths).index(module)].exp())
            system = damping * torch.eye(self.widths[module], device=self.log_damping.device, dtype=torch.float64)
            if module in self.second_moments:
                system += self.prior * self.second_moments[module]
            self._starts[module] = torch.cholesky_inverse(torch.linalg.cholesky(system)).to(self.log_damping.dtype)
        return self._starts[module]

    @torch.no_grad()
    def gather(self, keys: Mapping[str, Tensor]) -> None:
        """Add keys (N, d_in) by module to C, which streams start from after the next reset.

        A C from :meth:`load_prior_state` is replaced, since its number of keys is not known.
        """
        for module, u in keys.items():
            earlier = self.second_moments.get(module, u.new_zeros(u.shape[1], u.shape[1]))
            rows = self._gathered + len(u)
            gram = u.T @ u
            gram = (gram + gram.T) / 2  # exactly symmetric, since only the upper triangle is saved
            self.second_moments[module] = earlier * (self._gathered / rows) + gram / rows
        self._gathered = rows
        self._starts = {}

    def start_from(self, second_moments: Mapping[str, Tensor]) -> None:
        """Start streams from these second moments of keys, from the next reset on.

        Args:
            second_moments: module → C (d_in, d_in), from `agents.key_statistics.key_statistics`.

        Raises:
            ValueError: a module's C is missing or has another shape.
        """
        for module, d_in in self.widths.items():
            check_shape(f"the second moment of {module}", second_moments.get(module), (d_in, d_in))
        device, dtype = self.log_damping.device, self.log_damping.dtype
        self.second_moments = {m: second_moments[m].to(device, dtype) for m in self.widths}
        self._starts, self._gathered = {}, 0

    def prior_state(self) -> dict[str, Tensor]:
        """The upper triangles of C, (d_in (d_in + 1) / 2,) each, named by all modules that share one, joined by "+"
        (modules that read the same input have the same keys)."""
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
        """Load the tensors of :meth:`prior_state`.

        Raises:
            ValueError: a tensor is named by a module that the network does not have.
        """
        self.second_moments, self._starts, self._gathered = {}, {}, 0
        device = self.log_damping.device
        for names, triangle in state.items():
            modules = names.split("+")
            if unknown := set(modules) - set(self.widths):
                raise ValueError(f"second moments are of {min(unknown)!r}, which is no module of this network")
            d_in = self.widths[modules[0]]
            c = torch.zeros(d_in, d_in, device=device)
            c[tuple(torch.triu_indices(d_in, d_in))] = triangle.to(device)
            self.second_moments |= dict.fromkeys(modules, c + c.triu(1).T)

    def state(self) -> dict[str, Tensor]:
        """S⁻¹ after the stream's keys, and the current batch's keys if they will count for more, as named tensors."""
        state = {f"memory.{m}": inverse for m, inverse in self.inverses.items()}
        return state | {f"recent_keys.{m}": torch.cat(presentations) for m, presentations in self.recent.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`state`; tensors of other names are ignored.

        Raises:
            ValueError: a tensor has another shape.
        """
        inverses = {m: state[f"memory.{m}"] for m in self.widths if f"memory.{m}" in state}
        for module, inverse in inverses.items():
            check_shape(f"memory.{module}", inverse, (self.widths[module], self.widths[module]))
        device = self.log_damping.device
        self.inverses = {m: inverse.to(device) for m, inverse in inverses.items()}
        recent = {m: state[f"recent_keys.{m}"] for m in self.widths if f"recent_keys.{m}" in state}
        for m, keys in recent.items():
            check_shape(f"recent_keys.{m}", keys, (len(keys), self.widths[m]))
        self.recent = {m: [keys.to(device)] for m, keys in recent.items()}
