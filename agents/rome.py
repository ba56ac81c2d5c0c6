"""ROME (Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import gymnasium as gym
import torch
from torch import Tensor

from agents.locate import LocateAgent, LocateConfig, mean_keys
from agents.value_optimisation import Request, Values
from rledit_env.lm.editable import EditableLM

# The environment's settings that the agent is best used with.
RECOMMENDED: Mapping[str, Any] = {
    "edit_modules": "model.layers.8.mlp.down_proj", "token": "subject", "steps_per_batch": 1
}  # fmt: skip


@dataclass(frozen=True)
class ROMEConfig(LocateConfig):
    """ROME's settings; see `LocateConfig`. ``value`` has the values published for GPT-J. With ``key="mixed"`` the
    formula is that of the published code (see `ROMEAgent`)."""

    KEYS: ClassVar[tuple[str, ...]] = ("mean", "prompt", "mixed")


class ROMEAgent(LocateAgent):
    """ROME: ΔW = (v* − W k*) (C⁻¹k*)ᵀ / (k*ᵀ C⁻¹ k*) (Eq. 2), which makes W k* = v* and moves what W gives for ordinary
    keys least. k* is the mean of the module's inputs at the subject's last token over contexts (Eq. 3).

    The method edits one fact at a time. A batch is edited as that sequence of single edits, all solved at once: each
    v* is optimised under the weights at the batch's beginning, and its v* − W k* counts the edits before it. (Keys of
    one layer do not depend on the layer's own weight.)

    The published code takes k* from the contexts' mean in the direction C⁻¹k* and from the plain prompt elsewhere, so
    that k*ᵀC⁻¹k* may be small and the edit huge, which breaks the model now and then (Gupta et al., "Rebuilding ROME",
    2024). Here k* is the same everywhere, unless ``config.key`` is "mixed".

    Args:
        env, config, seed: see `LocateAgent`; the environment edits a single module.
    """

    name = "rome"
    config_class = ROMEConfig

    def __init__(self, env: gym.Env[Any, Any], config: ROMEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        if len(self.modules) > 1:
            raise ValueError(
                f"ROME edits one module, the environment {len(self.modules)} ({', '.join(self.modules)}); make it with "
                f"edit_modules={self.modules[0]!r}"
            )

    @classmethod
    def default_modules(cls, lm: EditableLM) -> list[str]:
        """The middle one of those that the other methods edit by default."""
        modules = super().default_modules(lm)
        return [modules[len(modules) // 2]]

    def solve(self, requests: Sequence[Request], values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        (module,) = self.modules
        keys = directed = mean_keys(self.lm, self.modules, requests)[0][module].double()
        if self.config.key == "mixed":
            alone = [replace(request, rewrites=request.rewrites[:1]) for request in requests]
            keys = mean_keys(self.lm, self.modules, alone)[0][module].double()
        # v* is the module's whole output, a bias included, which W k* is not.
        bias = getattr(self.lm.model.get_submodule(module), "bias", None)
        targets = values.solved.double() - (0 if bias is None else bias.double())
        update_keys, residuals = sequential_rank_one(
            self.lm.weight(module).double(), keys, targets, self.second_moment(module), directed
        )
        dtype = self.lm.edit_dtype
        return {module: update_keys.to(dtype)}, {module: residuals.to(dtype)}


def sequential_rank_one(
    weight: Tensor, keys: Tensor, targets: Tensor, second_moment: Tensor, directed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors ũ (N, d_in) and ṽ (N, d_out) of N rank-one edits, each made after those before it.

    With ũⱼ = C⁻¹kⱼ / (kⱼᵀC⁻¹kⱼ), edit i adds rᵢũᵢᵀ with rᵢ = vᵢ − W kᵢ − Σ_{j<i} rⱼ (ũⱼᵀkᵢ): a triangular system for
    all residuals.

    Args:
        weight: W before the first edit, (d_out, d_in).
        keys: (N, d_in).
        targets: v* without the module's bias, (N, d_out).
        second_moment: C, (d_in, d_in), positive semidefinite.
        directed: what takes the place of k in C⁻¹k, (N, d_in); None means the keys.
    """
    size = len(second_moment)
    # A trace of ridge, for a corpus that leaves directions out.
    ridge = 1e-8 * second_moment.trace() / size
    system = second_moment + ridge * torch.eye(size, dtype=keys.dtype, device=keys.device)
    directed = keys if directed is None else directed
    directions = torch.cholesky_solve(directed.T, torch.linalg.cholesky(system)).T  # rows C⁻¹k
    update_keys = directions / (directions * keys).sum(1, keepdim=True)
    before = (keys @ update_keys.T).tril(-1)  # (i, j): how much of edit j reaches key i
    residuals = torch.linalg.solve_triangular(before, targets - keys @ weight.T, upper=False, unitriangular=True)
    return update_keys, residuals
