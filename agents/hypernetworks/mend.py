"""MEND: a hypernetwork trained on single edits (Mitchell et al., ICLR 2022), MEND* and MEND+RLEdit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from agents.hypernetworks.retraining import BatchwiseAgent, BatchwiseConfig
from agents.rledit.config import HypernetworkConfig, RLEditConfig
from rledit_env.type_aliases import Options, Settings


def mend_network(rank: int = 1920, step_size: float = 1e-4, **settings: Any) -> HypernetworkConfig:
    """MEND's network as in its published code; the sizes are for models of several billion parameters."""
    defaults: Options = {
        "blocks": 2, "aggregation": "mend", "block": "mend", "normaliser": "lifetime", "warm_up": False,
        "normaliser_scope": "shape in turn", "normaliser_epsilon": 1e-7, "drop_zero_rows": True, "loss": "fact",
        "initial_weights": "unit", "step_size_parameter": "direct",
    }  # fmt: skip
    return HypernetworkConfig(rank=rank, step_size=step_size, **defaults | settings)


@dataclass(frozen=True)
class MENDConfig(BatchwiseConfig):
    """MEND's defaults: Adam with the rate 1e-6 on the mean gradient of 10 edits, clipped to the norm 100. The step
    sizes η_l start at 1e-4 and are learned directly, with the rate 1e-4."""

    network: HypernetworkConfig = field(default_factory=mend_network)
    learning_rate: float = 1e-6
    step_size_learning_rate: float = 1e-4
    max_gradient_norm: float = 100.0
    trajectories_per_update: int = 10


def mend_rledit(network: HypernetworkConfig | None = None, **settings: Any) -> RLEditConfig:
    """MEND+RLEdit (RLEdit, section 4.6): MEND's network, to be trained by `RLEditAgent` on whole trajectories with the
    stream's reward (and with ``token="all"``), at RLEdit's rate of 1e-5 for every parameter, including η_l itself.

    The code of this combination is not published.
    """
    rates = {"learning_rate": 1e-5, "step_size_learning_rate": 1e-5}
    return RLEditConfig(network=network or mend_network(), **rates | settings)


class MENDAgent(BatchwiseAgent):
    """MEND (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022).

    For every token of a fact and each module l, [u; δ] is normalised with the moments of all tokens of training and
    passes through two low-rank blocks that modules of one shape share,
    z ← z + ReLU(s_l ⊙ (z A B + b) + o_l), with each module's scale and shift. A starts as N(0, 1), B, b and o at zero
    and s at one, so the untrained network is the identity. The result (û, δ̂) is the rank-1 update −η_l δ̂ ûᵀ with a
    learned step size η_l, and ΔW is the sum over all tokens of all facts of the batch (``token="all"``).

    Tokens with δ = 0 are dropped before the normaliser. Modules of one shape share its moments and are normalised in
    turn.

    It is trained on single edits from θ₀ with the loss c_e L_e + L_loc: L_e = −log p(y*|x̃) on a paraphrase,
    L_loc = KL(p_θ₀ ‖ p_W) on an unrelated prompt, c_e = 0.1. MEND* is ``retrain_every=3``.

    The environment's loss is a mean over the answer tokens of all facts in a batch; MEND's is each fact's own. δ is
    therefore multiplied by A/A_i, the answer tokens of the batch over those of the fact. A batch's update is then the
    sum of its facts' single updates, and a single fact's update is as published. The agent asks its environment for the
    facts; if it edits in another environment than ``env``, name that one with :meth:`set_env`.

    The published code differs in two points: it adds +η_l δ̂ ûᵀ, and training has to find η_l's sign (the paper
    subtracts, as here); and its step sizes get a second step of Adam, at the network's rate.

    Args:
        env: the environment to learn in; None for an agent that only predicts, given ``shapes``.
        config: the network, its training and its retraining.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training facts.
    """

    name: ClassVar[str] = "mend"
    config_type: ClassVar[type[RLEditConfig]] = MENDConfig
    first_format: ClassVar[Settings] = {"warm_up": False, "loss": "rows"}
