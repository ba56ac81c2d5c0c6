"""StableEdit: UltraEdit's rule with whitened value gradients, and moments that start from other facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from agents.hypernetworks.ultraedit import UltraEditAgent, UltraEditConfig
from agents.rledit.config import HypernetworkConfig
from agents.rledit.moments import WHITENING_FACTS, Moments, training_moments
from rledit_env.interface import Environment
from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import Settings


@dataclass(frozen=True)
class StableEditConfig(UltraEditConfig):
    """StableEdit's settings; the other attributes are `UltraEditConfig`'s. The defaults are those of the published
    commands for Llama-3-8B and Mistral-7B, except for the number of facts.

    Attributes:
        step_size: η; published: 1e-6, for GPT-J and Qwen2.5 2e-6.
        damping: the ridge α; published: 10, and 1 in the configuration file, which the commands replace.
        warm_up: start the running moments from all rows of bundled training facts, as the published warm-up does.
            Without it the moments start empty, and value gradients are standardised until there are more rows than the
            value has components, plus one (``preheat_mode: none``).
        warm_up_facts: number of these facts; published: 2,000, in 20 batches.
        eigenvalue_floor: smaller eigenvalues of the value gradients' covariance are raised to this number. Published:
            1e-6, for gradients of a mean over the answer tokens of ten facts, while ours are those of a sum over the
            batch's rows. In SmolLM2-135M (layers 4 to 8, subject tokens of CounterFact) eigenvalues of ours are from
            2e-6 to 3e-3. Of the mean over 30 tokens, 99 % would be below 1e-6 (1e-3 in our units), and
            hardly anything would be whitened.
        normaliser_variance: "exact", as published: StableEdit's code corrects UltraEdit's.
    """

    damping: float = 10.0
    warm_up: bool = True
    warm_up_facts: int = WHITENING_FACTS
    eigenvalue_floor: float = 1e-6
    normaliser_variance: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        if type(self.warm_up_facts) is not int or self.warm_up_facts < 2:
            raise ValueError(f"warm_up_facts is {self.warm_up_facts!r}; give a whole number from 2, or warm_up=False "
                             "for none")

    def network(self) -> HypernetworkConfig:
        """The rule as a hypernetwork without blocks."""
        return replace(super().network(), normaliser="whitened", eigenvalue_floor=self.eigenvalue_floor)


class StableEditAgent(UltraEditAgent):
    """StableEdit (Ma et al., "More Edits, More Stable: Understanding the Lifelong Normalization in Sequential Model
    Editing", ICML 2026, arXiv 2605.11836), compared with the code of MINE-USTC/StableEdit.

    For each module and token, û = (u − mean) / std, and δ̂ = (δ − mean) Σ^(−1/2) with Σ the running sum of
    (δ − mean)(δ − mean)ᵀ divided by n − d_out − 1, its eigenvalues at least ``eigenvalue_floor``; as long as
    n ≤ d_out + 1, δ̂ = (δ − mean) / std. Then vᵢ = −η ‖ûᵢ‖² δ̂ᵢ, and
    ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + α ‖ΔW‖² = vᵀ u (uᵀu + αI)⁻¹. The n rows of the moments are those of the training facts
    and of the stream. All modules of one shape share them, and the rows of all are added before any is normalised.

    What the published code does beyond these formulas (its paper's text was not at hand):

    - Only value gradients are whitened; keys are standardised.
    - The warm-up is itself a stream of edits: 20 batches of 100 training facts are written into the LLM, with
      standardised gradients, and stay there while the stream is edited and scored.
    - The moments are of gradients of the mean loss of ten facts at a time, whatever the size of the edited batch.

    Ours: a warm-up only gathers moments, under the unedited weights, and writes nothing into the LLM, since the
    stream's facts are the only ones that a user asked for. As everywhere in this package, δ with a warm-up is
    multiplied by the number of rows, so that batches of all sizes are normalised alike. Whitening is computed in
    float64.

    Args:
        env, config, seed, shapes: as in `UltraEditAgent`.
    """

    name: ClassVar[str] = "stableedit"
    config_class: ClassVar[type[UltraEditConfig]] = StableEditConfig
    first_format: ClassVar[Settings] = {}
    config: StableEditConfig

    def __init__(
        self,
        env: Environment | None,
        config: StableEditConfig | None = None,
        seed: int = 0,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(env, config, seed, shapes)

    def warm_moments(self, lm: EditableLM, token: str) -> Moments:
        return training_moments(lm, token, self.config.warm_up_facts, names=self.network.whitened_names)
