"""MALMEN: a hypernetwork whose updates are aggregated by least squares (Tan et al., ICLR 2024), MALMEN* and
MALMEN+RLEdit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from agents.hypernetworks.retraining import BatchwiseAgent, BatchwiseConfig
from agents.rledit.config import HypernetworkConfig, RLEditConfig, rledit_paper_network


def malmen_network(rank: int = 1920, step_size: float = 1e-6, **settings: Any) -> HypernetworkConfig:
    """MALMEN's network as in its published code; the sizes are for models of several billion parameters."""
    return rledit_paper_network(rank, step_size, **{"blocks": 2} | settings)  # RLEdit's is the same with 4 blocks


@dataclass(frozen=True)
class MALMENConfig(BatchwiseConfig):
    """MALMEN's defaults: Adam with the rate 1e-5 for every parameter, including η_l itself (1e-6) and log λ_l, and the
    gradient clipped to the norm 1.

    Attributes:
        recursion: whether the least squares contain the second moment of all earlier keys of a stream (see
            `UltraEditConfig.recursion`).
        text_prior: c of a prior of text in the least squares (see `HypernetworkConfig.prior`); the paper has none.
    """

    network: HypernetworkConfig = field(default_factory=malmen_network)
    learning_rate: float = 1e-5
    step_size_learning_rate: float = 1e-5
    max_gradient_norm: float = 1.0
    recursion: bool = False
    text_prior: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_prior:
            text = replace(self.network, prior=self.text_prior, prior_source="text")
            object.__setattr__(self, "network", text)
        if self.recursion:
            object.__setattr__(self, "network", replace(self.network, aggregation="recursive"))


def malmen_rledit(network: HypernetworkConfig | None = None, **settings: Any) -> RLEditConfig:
    """MALMEN+RLEdit (RLEdit, section 4.6): MALMEN's network, to be trained by `RLEditAgent` on whole trajectories with
    the stream's reward, at RLEdit's rate of 1e-5 for every parameter, including η_l itself.

    This is RLEdit by the paper's formulas, with as many updates as needed; :func:`agents.rledit_paper` is exactly the
    published training.
    """
    rates = {"learning_rate": 1e-5, "step_size_learning_rate": 1e-5}
    return RLEditConfig(network=network or malmen_network(), **rates | settings)


class MALMENAgent(BatchwiseAgent):
    """MALMEN (Tan, Zhang, Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024).

    [u; δ] of every token that predicts an answer token is normalised with the moments of all tokens of training and of
    the stream so far, which modules of one shape share. It passes through two blocks
    z ← z + s_l ⊙ ReLU(z A B + b) + o_l. With (û, δ̂) = z and vᵢ = −η_l (uᵢ·ûᵢ) δ̂ᵢ, the tokens' values are combined by
    ridge least squares with a learned λ_l (as log λ_l), the normal equations ΔW (uᵀu + λ_l I) = vᵀu. η_l is learned
    directly, and may turn negative. As published, the running variance adds N times a batch's unbiased variance (see
    `HypernetworkConfig.normaliser_variance`).

    It is trained on batches from θ₀, of the ``batch_size`` that it will edit, with the loss L_gen + L_loc.
    MALMEN* is ``retrain_every=3``.

    Args:
        env: the environment to learn in; None for an agent that only predicts, given ``shapes``.
        config: the network, its training and its retraining.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training facts.
    """

    name: ClassVar[str] = "malmen"
    config_type: ClassVar[type[RLEditConfig]] = MALMENConfig
