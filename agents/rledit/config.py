"""What an RLEdit agent is made from: the settings of its network and of its training, and the published presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agents.key_statistics import GENERATED

# The environment's settings that the agent is best trained and used with.
RECOMMENDED: Mapping[str, Any] = {"token": "subject", "steps_per_batch": 5}
FLOAT32_EPSILON = 2.0**-23  # what the published code of MALMEN, RLEdit and UltraEdit adds to a standard deviation
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
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = " or ".join(map(repr, choices)) if len(choices) == 2 else f"one of {', '.join(choices)}"
                raise ValueError(f"{name} is {value!r}; give {known}")

    def _check_numbers(self) -> None:
        if type(self.rank) is not int or type(self.blocks) is not int or self.blocks < 0:
            raise ValueError(f"rank is {self.rank!r} and blocks are {self.blocks!r}; give whole numbers, blocks from 0")
        for name in ("step_size", "damping", "rank", "normaliser_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.prior >= 0:
            raise ValueError(f"prior is {self.prior}; give 0 (none) or more")
        if not self.output_curvature >= 0:
            raise ValueError(f"output_curvature is {self.output_curvature}; give 0 (none) or more, such as 0.1")
        if type(self.text_tokens) is not int or self.text_tokens < 64:
            raise ValueError(f"text_tokens is {self.text_tokens!r}; give a whole number from 64")
        if not self.warm_up_rows >= 2:
            raise ValueError(f"warm_up_rows is {self.warm_up_rows}; give 2 or more, or warm_up=False for none")

    def _check_combinations(self) -> None:
        if self.output_curvature and self.aggregation == "mend":
            raise ValueError(f"output_curvature is {self.output_curvature} and aggregation is 'mend', which solves no "
                             "least squares; give 'least_squares' or 'recursive', or output_curvature=0")
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


@dataclass(frozen=True)
class RLEditConfig:
    """How the agent is trained.

    Attributes:
        network: the hypernetwork.
        credit: "trajectory", the gradient of the whole return, or "step", each step's own reward only.
        learning_rate: Adam's, for the residual blocks.
        step_size_learning_rate: Adam's, for log η_l, or η_l itself, and log λ_l.
        max_gradient_norm: the policy gradient is clipped to this norm.
        clipping: of what: "update", the mean gradient of an update, divided by the trajectory's steps; or "running
            sum", the sum over the trajectory's steps, again after each of them (see :func:`rledit_paper`).
        trajectories_per_update: trajectories whose gradients are averaged for one policy update.
        batches_per_update: the policy learns along a stream, from the return of so many batches at a time, and goes on
            with the stream: long streams then cost an update no more than short ones do, and the policy meets what
            an LLM of many edits is like. What a batch does to the return of later ones is not seen beyond that many.
            None: one update for whole trajectories, as in the paper.
        discount: γ, what a reward counts for a step earlier; 1 for all alike.
        prior_batches: batches of training facts that the recursion's prior C, unless it is of text, and the moments
            that streams start from are gathered from before the first update (see `HypernetworkConfig.prior` and
            ``warm_up`` there).
        drift_limit: a training trajectory is cut once the mean ‖W_t − W₀‖ / ‖W₀‖ exceeds this, before the LLM breaks:
            gradients through a broken LLM spoil the policy. None cuts none.
        kl_bound: the best checkpoint, and the best step sizes of :meth:`RLEditAgent.calibrate`, are those with the
            highest score among those whose divergence from the unedited LLM, in nats a token on text of its own, is at
            most this (see `agents.selection`); where none is within it, the one that comes nearest. None: the highest
            score of all.
        policy_average: decay of a running mean of the parameters over the updates, such as 0.9, which is the policy
            that is evaluated, kept as the best and held at the end; streams to learn from are edited with the
            parameters themselves. A policy's score swings by points from one update to the next, its mean's does not.
            0: no mean.
        graph_bytes: graphs of the network's passes are kept for the gradient up to this many bytes a trajectory; for
            the steps beyond them the network runs a second time. It changes nothing but the time.
    """

    network: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    credit: Literal["trajectory", "step"] = "trajectory"
    learning_rate: float = 2e-3
    step_size_learning_rate: float = 4e-2
    max_gradient_norm: float = 1.0
    trajectories_per_update: int = 1
    batches_per_update: int | None = None
    discount: float = 1.0
    prior_batches: int = 40
    drift_limit: float | None = 0.6
    graph_bytes: int = 2**28
    kl_bound: float | None = None
    policy_average: float = 0.0
    clipping: Literal["update", "running sum"] = "update"

    def __post_init__(self) -> None:
        if self.credit not in ("trajectory", "step"):
            raise ValueError(f"credit is {self.credit!r}; give 'trajectory' or 'step'")
        if self.clipping not in ("update", "running sum"):
            raise ValueError(f"clipping is {self.clipping!r}; give 'update' or 'running sum'")
        if self.kl_bound is not None and not self.kl_bound > 0:
            raise ValueError(f"kl_bound is {self.kl_bound}; give a positive number of nats, or None for no bound")
        if not 0 <= self.policy_average < 1:
            raise ValueError(f"policy_average is {self.policy_average}; give a decay from 0 to below 1")
        along = self.batches_per_update
        if along is not None and (type(along) is not int or along < 1):
            raise ValueError(f"batches_per_update is {along!r}; give a whole number from 1, or None for whole "
                             "trajectories")
        if along is not None and self.trajectories_per_update != 1:
            raise ValueError(f"batches_per_update is {along} and trajectories_per_update {self.trajectories_per_update}"
                             ", but a policy that learns along a stream learns from one at a time; give "
                             "trajectories_per_update=1")


def rledit_paper_network(rank: int = 1024, step_size: float = 1e-6, **settings: Any) -> HypernetworkConfig:
    """RLEdit's network as published, for models of several billion parameters: 4 blocks, A ~ N(0, 1), η_l learned
    directly, least squares, and one normaliser for all modules of a shape, which goes on from training while editing.
    """
    defaults: dict[str, Any] = {
        "blocks": 4, "aggregation": "least_squares", "damping": 1.0, "prior": 0.0, "normaliser": "continued",
        "warm_up": False, "normaliser_scope": "shape", "normaliser_variance": "published",
        "normaliser_epsilon": FLOAT32_EPSILON, "initial_weights": "unit", "step_size_parameter": "direct",
    }  # fmt: skip
    return HypernetworkConfig(rank=rank, step_size=step_size, **defaults | settings)


def rledit_paper(network: HypernetworkConfig | None = None, **settings: Any) -> RLEditConfig:
    """RLEdit's training as its published code does it, to the letter; best with `RewardConfig.published()`, which holds
    what of it is the reward's.

    The code does what the paper does not say:

    - Credit is per step: the gradient of a step's own loss with respect to its own update ("step"), not of the return.
    - Each step's gradient is added to those before it, and the running sum is clipped to the norm 1 each time.
    - Adam takes one step for a whole trajectory, at 1e-5 on every parameter, η_l itself (1e-6) and log λ_l among them.
      The published configuration trains on one trajectory (``n_epochs: 1``), as long as the stream that is then edited.
      Adam's first step moves each parameter by the rate, whatever its gradient: η_l becomes 1.1e-5 or −9e-6, B and b
      ±1e-5, so that most of what is learned is the sign of η_l.
    - The normaliser multiplies the batch's unbiased variance by N, and takes the stream that is edited in, too.
    - Locality is measured from the weights of before the step, and the regularisation has no gradient (the reward's).

    One thing stays the paper's: k is 10 earlier batches, where the code's ``back_depth: 10`` counts the current one
    (``backtracking_depth=9`` in `RewardConfig`).

    What learns more is the same network with the gradient of the whole return, and as many updates as it takes:
    `agents.malmen_rledit` (with the same rates, 2 blocks and MALMEN's rank); and what we recommend is `RLEditConfig()`.
    """
    defaults: dict[str, Any] = {
        "credit": "step", "learning_rate": 1e-5, "step_size_learning_rate": 1e-5, "max_gradient_norm": 1.0,
        "clipping": "running sum", "drift_limit": None,
    }  # fmt: skip
    return RLEditConfig(network=network or rledit_paper_network(), **defaults | settings)


def rledit_ridge(step_size: float = 1.0, damping: float = 1.0, **settings: Any) -> RLEditConfig:
    """RLEdit that begins as ridge regression on the gradient itself: the zero action of
    `rledit_env.wrappers.ScaledUpdate` with this step size and damping, for streams of few facts.

    Where a standard algorithm scales that rule by a number or two, what is learned here is each module's step size and
    damping and what the residual blocks add, by the gradient of the whole return.
    """
    rule = HypernetworkConfig(
        aggregation="least_squares", output_units="input", prior=0.0, step_size=step_size, damping=damping
    )
    return RLEditConfig(network=rule, **{"learning_rate": 1e-3, "step_size_learning_rate": 0.02} | settings)


def rledit_untrained(step_size: float = 1.4e-3, prior: float = 1000.0, **network: Any) -> RLEditConfig:
    """The rule that RLEdit's training starts from, without the residual blocks: recursive least squares on normalised
    rows, with a prior on the keys of ordinary text, so that an update stays out of the directions that text lives in.

    Args:
        step_size: η of every module.
        prior: c, how many keys of text the least squares start with.
        network: other settings of the network.
    """
    rule = HypernetworkConfig(blocks=0, step_size=step_size, prior=prior, prior_source="text", **network)
    return RLEditConfig(network=rule)
