"""ROME (Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agents.locate_then_edit.keys import subject_keys
from agents.locate_then_edit.locate import LocateAgent, LocateConfig
from agents.locate_then_edit.value_optimisation import Request, Values
from rledit_env.interface import Environment
from rledit_env.lm.editable import EditableLM


@dataclass(frozen=True)
class ROMEConfig(LocateConfig):
    """ROME's settings; see `LocateConfig`. The defaults are those published for GPT-J.

    Attributes:
        key: "mixed", as in the published code: the mean over contexts gives the update's direction, the plain prompt
            its size. "mean", as in ROME's paper and the correction of Gupta et al. ("Rebuilding ROME", 2024): the mean
            gives both. "prompt": the plain prompt gives both.
        second_moment: whether the update's direction is u = C⁻¹k (``mom2_adjustment: true``, as published for GPT-2 and
            GPT-J). False: u = k / ‖k‖, as in the files of AlphaEdit (Llama-3) and EasyEdit (every model); C is then not
            computed.
    """

    contexts: int = 20
    context_lengths: tuple[int, ...] = (5, 10)
    key: Literal["balanced", "mean", "prompt", "mixed"] = "mixed"
    anchor_outlier: float | None = 5.0
    second_moment: bool = True

    KEYS: ClassVar[tuple[str, ...]] = ("mixed", "mean", "prompt")

    @property
    def needs_statistics(self) -> bool:
        return self.second_moment


class ROMEAgent(LocateAgent):
    """ROME: ΔW = (v* − W k*) uᵀ / (uᵀk*), u = C⁻¹k* (Eq. 2). Of all updates with W k* = v*, it changes the outputs for
    ordinary keys least. k* is the mean of the module's inputs at the subject's last token over contexts (Eq. 3).

    As published: 20 contexts beside the plain prompt, 10 of 5 tokens and 10 of 10 tokens, all with equal weight in k*.
    The published code takes u from that mean, but k* in uᵀk* and W k* from the plain prompt. Then uᵀk* may be small and
    the edit huge, which sometimes breaks the model (Gupta et al., 2024); ``key="mean"`` is the paper's formula.
    ``second_moment=False`` is the published variant with u = k* / ‖k*‖.

    Ours: ROME edits one fact at a time. Here a batch is a sequence of single edits, solved at once: each v* − W k*
    includes the edits before it, but each v* is optimised with the weights at the batch's start, where the published
    code optimises it after the previous edit. (Keys of one layer do not depend on its own weight.) With batches of one
    fact there is no difference.

    Args:
        env, config, seed: see `LocateAgent`; the environment edits a single module.
    """

    name = "rome"
    config_class = ROMEConfig
    config: ROMEConfig

    def __init__(self, env: Environment, config: ROMEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        if len(self.modules) > 1:
            raise ValueError(
                f"ROME edits one module, the environment {len(self.modules)} ({', '.join(self.modules)}); make it with "
                f"edit_modules={self.modules[0]!r}"
            )

    @classmethod
    def default_modules(cls, lm: EditableLM) -> list[str]:
        """The middle module of those that the other methods edit by default."""
        modules = super().default_modules(lm)
        return [modules[len(modules) // 2]]

    def solve(self, requests: Sequence[Request], values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        (module,) = self.modules

        def keys_of(kind: str) -> Tensor:
            return subject_keys(self.lm, self.modules, requests, kind)[0][module].double()

        mixed = self.config.key == "mixed"
        directed = keys_of("mean" if mixed else self.config.key)
        keys = keys_of("prompt") if mixed else directed
        # v* includes the module's bias, W k* does not.
        bias = getattr(self.lm.model.get_submodule(module), "bias", None)
        targets = values.solved.double() - (0 if bias is None else bias.double())
        edited = values.delta.any(1)  # NAS leaves facts out
        update_keys, residuals = torch.zeros_like(keys), torch.zeros_like(targets)
        update_keys[edited], residuals[edited] = sequential_rank_one(
            self.lm.weight(module).double(), keys[edited], targets[edited],
            self.second_moment(module) if self.config.second_moment else None, directed[edited],
        )  # fmt: skip
        dtype = self.lm.edit_dtype
        return {module: update_keys.to(dtype)}, {module: residuals.to(dtype)}


def sequential_rank_one(
    weight: Tensor, keys: Tensor, targets: Tensor, second_moment: Tensor | None, directed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors ũ (N, d_in) and ṽ (N, d_out) of N rank-one edits, each made after those before it.

    With ũⱼ = C⁻¹kⱼ / (kⱼᵀC⁻¹kⱼ), edit i adds rᵢũᵢᵀ with rᵢ = vᵢ − W kᵢ − Σ_{j<i} rⱼ (ũⱼᵀkᵢ): a triangular system for
    all residuals.

    Args:
        weight: W before the first edit, (d_out, d_in).
        keys: (N, d_in).
        targets: v* without the module's bias, (N, d_out).
        second_moment: C, (d_in, d_in), positive semidefinite; None: the identity, so u = k (its length cancels).
        directed: k in C⁻¹k, (N, d_in), if it differs from the keys; None: the keys.
    """
    directions = keys if directed is None else directed
    if second_moment is not None:
        size = len(second_moment)
        # A small ridge makes C invertible in directions that do not occur in the corpus.
        ridge = 1e-8 * second_moment.trace() / size
        system = second_moment + ridge * torch.eye(size, dtype=keys.dtype, device=keys.device)
        directions = torch.cholesky_solve(directions.T, torch.linalg.cholesky(system)).T  # rows C⁻¹k
    update_keys = directions / (directions * keys).sum(1, keepdim=True)
    effects = (keys @ update_keys.T).tril(-1)  # (i, j): ũⱼᵀkᵢ, the effect of edit j on key i
    residuals = torch.linalg.solve_triangular(effects, targets - keys @ weight.T, upper=False, unitriangular=True)
    return update_keys, residuals
