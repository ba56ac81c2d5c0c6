"""K-FAC's curvature of an LLM's loss, and the projection of weight updates onto its directions of low curvature.

The curvature of a loss with respect to a weight W (d_out, d_in) is approximated by A ⊗ G: A = E[u uᵀ] is the second
moment of the module's inputs, and G = E[g gᵀ] that of the loss's gradient with respect to its outputs (Martens and
Grosse, ICML 2015). A change ΔW raises the loss by about ½ tr(G ΔW A ΔWᵀ). With the eigenvectors a_j of A and g_i of G,
each direction g_i a_jᵀ has the curvature λ_i(G) λ_j(A). `LowCurvature` removes the directions of highest curvature
(CrispEdit, Ikram et al., ICML 2026), for the editor `agents.fine_tuning.CrispEditAgent` and for every hypernetwork
(``crisp_energy`` in `HypernetworkConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.corpus import GENERATED
from agents.key_statistics import key_statistics, output_statistics
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.spaces import Action


@dataclass(frozen=True)
class Curvature:
    """K-FAC's curvature A ⊗ G of one module.

    Attributes:
        inputs: A = E[u uᵀ], (d_in, d_in).
        outputs: G = E[g gᵀ], (d_out, d_out).
    """

    inputs: Tensor
    outputs: Tensor

    def rise(self, change: Tensor) -> float:
        """½ tr(G ΔW A ΔWᵀ), the approximate rise of the loss by a change ΔW (d_out, d_in), in nats a token."""
        change = change.to(self.outputs)
        return 0.5 * float(((self.outputs @ change) * (change @ self.inputs)).sum())

    def mixed(self, other: Curvature, share: float) -> Curvature:
        """The curvature with the mean of both factors, in which the other's have the weight ``share``."""
        return Curvature(
            torch.lerp(self.inputs, other.inputs.to(self.inputs), share),
            torch.lerp(self.outputs, other.outputs.to(self.outputs), share),
        )


@dataclass(frozen=True)
class TextCurvature:
    """The curvature of the loss on text.

    Attributes:
        by_module: module → its curvature.
        tokens: number of the text's tokens from which A is; G is from a quarter of as many.
        seconds: time of the computation, the text included, even if an earlier run did it.
    """

    by_module: dict[str, Curvature]
    tokens: int
    seconds: float


def text_curvature(
    lm: EditableLM, modules: Sequence[str], corpus: str | Path = GENERATED, tokens: int = 65_536,
    progress: bool = True,
) -> TextCurvature:  # fmt: skip
    """The curvature of text under the pre-trained weights: as it ships with the package, from the cache, or computed.

    Args:
        lm: the LLM, edited or not; it is not changed.
        modules: names of edited modules.
        corpus, tokens, progress: as for :func:`agents.key_statistics.key_statistics`. A is from so many tokens, and G,
            which needs a backward pass, from a quarter of them.

    Raises:
        FileNotFoundError: the text file does not exist.
        ValueError: the text has fewer than 64 tokens.
    """
    inputs = key_statistics(lm, modules, corpus, tokens, progress=progress)
    outputs = output_statistics(lm, modules, corpus, max(64, tokens // 4), progress=progress)
    by_module = {m: Curvature(inputs.second_moments[m], outputs.second_moments[m]) for m in modules}
    return TextCurvature(by_module, inputs.tokens, inputs.seconds + outputs.seconds)


def answer_curvature(lm: EditableLM, passages: Sequence[Passage], modules: Sequence[str]) -> dict[str, Curvature]:
    """The curvature of facts at the present weights: module → means over the positions that predict answer tokens,
    with g the gradient of a fact's −log p summed over its answer tokens."""
    trace = lm.trace(passages, "answer")
    answers = sum(len(p.targets) for p in passages)  # δ is the gradient of the mean over them
    curvature = {}
    for m in modules:
        u, g = trace.keys[m], answers * trace.value_gradients[m]  # (N, d_in), (N, d_out)
        curvature[m] = Curvature(u.T @ u / len(u), g.T @ g / len(g))
    return curvature


@dataclass(frozen=True)
class LowCurvature:
    """The projection of a module's updates onto its directions of low curvature, ΔW ↦ ΔW − U (UᵀΔW V ⊙ R) Vᵀ.

    It equals U (UᵀΔW V ⊙ (1 − R)) Vᵀ with all eigenvectors in U and V. Those without a removed direction are left out.

    Attributes:
        outputs: U, the eigenvectors of G that some removed direction has, (d_out, q).
        inputs: V, those of A, (d_in, p).
        removed: R, (q, p): 1 for each removed direction, else 0.
    """

    outputs: Tensor
    inputs: Tensor
    removed: Tensor

    @classmethod
    def of(cls, curvature: Curvature, energy: float) -> LowCurvature:
        """Remove the fewest directions of highest curvature that together have at least this share of tr(A ⊗ G), and
        all others of the same curvature as the last of them.

        Args:
            curvature: the curvature.
            energy: the share, above 0 and at most 1.
        """
        of_inputs: tuple[Tensor, Tensor] = torch.linalg.eigh(curvature.inputs.double())
        of_outputs: tuple[Tensor, Tensor] = torch.linalg.eigh(curvature.outputs.double())
        values = torch.outer(of_outputs[0].clamp(min=0), of_inputs[0].clamp(min=0))  # (d_out, d_in)
        descending = values.flatten().sort(descending=True).values
        share = descending.cumsum(0) / descending.sum()
        last = min(int(torch.searchsorted(share, energy)), len(share) - 1)
        removed = (values >= descending[last]) & (values > 0)
        rows, columns = removed.any(1), removed.any(0)
        dtype = curvature.inputs.dtype
        return cls(
            of_outputs[1][:, rows].to(dtype), of_inputs[1][:, columns].to(dtype), removed[rows][:, columns].to(dtype)
        )

    def project(self, change: Tensor) -> Tensor:
        """The projection of ΔW (d_out, d_in), on its device."""
        p = self.to(change.device)
        return p._without(change, p.outputs.T @ change.to(p.outputs) @ p.inputs)

    def project_product(self, values: Tensor, keys: Tensor) -> Tensor:
        """The projection of ΔW = ṽᵀũ, given ṽ (N, d_out) and ũ (N, d_in), in half the products if N is small."""
        p = self.to(keys.device)
        coordinates = (values.to(p.outputs) @ p.outputs).T @ (keys.to(p.inputs) @ p.inputs)
        return p._without(values.T @ keys, coordinates)

    def _without(self, change: Tensor, coordinates: Tensor) -> Tensor:
        """ΔW less its removed directions, given its coordinates UᵀΔW V (q, p)."""
        return change - (self.outputs @ (coordinates * self.removed) @ self.inputs.T).to(change)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LowCurvature:
        """The same projection on a device, with its products in another precision if ``dtype`` is given; the change
        itself is never rounded."""
        outputs, inputs, removed = (t.to(device, dtype) for t in (self.outputs, self.inputs, self.removed))
        return LowCurvature(outputs, inputs, removed)


Projections = Mapping[str, LowCurvature]


def low_curvature(curvature: Mapping[str, Curvature], energy: float) -> dict[str, LowCurvature]:
    """The projection of each module; see :meth:`LowCurvature.of`."""
    return {m: LowCurvature.of(c, energy) for m, c in curvature.items()}


def projected(changes: Mapping[str, Tensor], projections: Projections) -> dict[str, Tensor]:
    """The changes (d_out, d_in) by module, each projected."""
    return {m: projections[m].project(change) for m, change in changes.items()}


def restrained(action: Action, projections: Projections) -> Action:
    """The action of dense updates that results from projecting each update of an action, in its array backend.

    Args:
        action: factors, dense updates, or accumulated changes, which stay accumulated.
        projections: module → its projection.
    """
    part = "accumulated" if "accumulated" in action else "updates"
    if "keys" in action:
        numpy = any(isinstance(k, np.ndarray) for k in action["keys"].values())
        updates = {
            m: projections[m].project_product(torch.as_tensor(action["values"][m]), torch.as_tensor(k))
            for m, k in action["keys"].items()
        }
    else:
        numpy = any(isinstance(u, np.ndarray) for u in action[part].values())
        updates = projected({m: torch.as_tensor(u) for m, u in action[part].items()}, projections)
    return {part: {m: u.cpu().numpy() if numpy else u for m, u in updates.items()}}


def check_energy(name: str, energy: float, or_none: bool = False) -> None:
    """Raise ValueError unless the value is a share between 0 and 1, or 0 if that is allowed."""
    if not (0 < energy < 1 or (or_none and energy == 0)):
        least = "0 (none) or a share" if or_none else "a share above 0 and"
        raise ValueError(f"{name} is {energy}; give {least} below 1, such as 0.9")
