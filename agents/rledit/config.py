"""The configuration of an RLEdit agent: the settings of its network and of its training, and presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agents.corpus import GENERATED
from agents.curvature import check_energy
from rledit_env.type_aliases import Options, Settings

# The environment settings that suit the agent best, in training and in use.
RECOMMENDED: Settings = {"token": "subject", "steps_per_batch": 5}
FLOAT32_EPSILON = 2.0**-23  # what the published code of MALMEN, RLEdit and UltraEdit adds to a standard deviation
Aggregation = Literal["mend", "least_squares", "recursive"]
Normaliser = Literal["stream", "lifetime", "continued", "whitened"]
NormaliserScope = Literal["module", "shape", "shape in turn"]
Loss = Literal["batch", "fact", "sum", "rows"]
StepSizeParameter = Literal["log", "direct"]
AGGREGATIONS = ("mend", "least_squares", "recursive")
CHOICES: Mapping[str, tuple[str, ...]] = {  # the values that settings of `HypernetworkConfig` accept
    "aggregation": AGGREGATIONS,
    "normaliser": ("stream", "lifetime", "continued", "whitened"),
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
    """The settings of a hypernetwork.

    Attributes:
        rank: inner width of a residual block.
        blocks: number of residual blocks; 0 gives a rule without training (see `agents.hypernetworks.ultraedit`).
        aggregation: "mend" (ũ = û, ṽ = −η δ̂), "least_squares" (MALMEN's, RLEdit's default) or "recursive" (least
            squares with the second moment of all earlier keys in the system).
        step_size: initial η_l.
        step_size_parameter: the learned form of η_l: "log", log η_l, which keeps η_l positive and makes a learning rate
            relative; or "direct", η_l itself, as in the published code of MEND, MALMEN, DAFNet and RLEdit: a learning
            rate is then an absolute change of η_l, which may turn negative.
        damping: initial λ_l.
        learn_damping: whether log λ_l is learned ("least_squares" only; "recursive" starts its memory from it).
        initial_weights: of A: "unit", N(0, 1), as in the published code; or "scaled", N(0, 1/width), which gives z A
            the size of z at any width.
        block: "malmen", z + s ⊙ ReLU(z A B + b) + o, or "mend", z + ReLU(s ⊙ (z A B + b) + o), with each module's scale
            s and shift o.
        coefficient: of vᵢ in the least squares: "key" (uᵢ·ûᵢ, MALMEN's) or "normalised" (‖ûᵢ‖², UltraEdit's).
        output_units: units of the residual blocks' output (û, δ̂): "normalised", as they are (MEND, MALMEN, RLEdit); or
            "input", converted to the units of u and δ by the same moments. With "input" the untrained network is the
            rule on the gradient itself, without a normaliser: with "least_squares" vᵢ = −η ‖uᵢ‖² δᵢ, the base rule of
            `rledit_env.wrappers.ScaledUpdate`.
        prior: c, the number of keys that the least squares start with: S_0 = λI + c·C, with C a second moment E[k kᵀ]
            of keys k (zero until it has been gathered, see :attr:`Hypernetwork.wants_prior`).
        prior_source: the keys of C. "facts": those of training facts, for "recursive" only. It keeps the first updates
            of a stream out of the directions that all keys share, and makes the steps of long and short streams alike.
            "text": those of all tokens of ordinary text, for "recursive" and "least_squares" (λ is then not learned).
            Updates avoid the directions of text's keys, which protects the rest of the LLM.
        memory_weight: w, the number of keys that each key of an earlier batch counts as in S ("recursive" only). More
            than 1 protects earlier edits from later ones, and leaves the presentations of one batch as they are.
        output_curvature: γ, which protects a module's outputs. With G = E[g gᵀ], g the gradient of −log p of text with
            respect to the module's outputs, each vᵢ is replaced by (G + γ·mean(diag G)·I)⁻¹ vᵢ at the same norm, so
            that it avoids the outputs that text's next tokens depend on. Together with the text prior on the keys this
            is K-FAC's natural gradient. 0 leaves vᵢ as it is. G is not saved with an agent; it is computed with the
            LLM, or read from the cache, when it is first needed.
        crisp_energy: share of the K-FAC curvature A ⊗ G of text whose directions are removed from every update, as
            CrispEdit removes them from gradients (see `agents.curvature`), in training and in use. The action is then
            dense, ΔW = P(ṽᵀũ), and the gradient of the return passes through P. 0: no direction. A and G are not saved
            with an agent; they are computed with the LLM, or read from the cache, when they are first needed.
        text: the text of the prior and the curvature: "generated", text that the LLM itself writes before it is
            edited, or a text file.
        text_tokens: number of the text's tokens (G uses a quarter of them).
        precision: of the matrix products of the residual blocks and of ``crisp_energy``; parameters, sums and
            everything else stay in float32. "bfloat16" takes half the time on machines that multiply it natively.
        normaliser: "stream": running moments start anew at each reset. "lifetime": they run over all tokens of
            training and are constant while editing (MEND, DAFNet). "continued": they run over all tokens of training,
            and each edited stream continues from there (the published code of MALMEN and RLEdit). "whitened": running
            moments start at each reset from all rows of training facts, and value gradients are whitened with their
            covariance instead of standardised (StableEdit; see `agents.rledit.whitening`). A module, or with
            ``normaliser_scope="shape"`` all modules of a shape together, needs more than d_out + 1 rows for it, and an
            eigendecomposition of size d_out a batch.
        normaliser_scope: which modules share moments. "module": each module has its own. "shape": all modules of one
            shape share them, and the rows of all are added before any is normalised (MALMEN, RLEdit, UltraEdit).
            "shape in turn": they share them, and each module is normalised by its own rows and those of the modules
            before it (MEND, DAFNet).
        normaliser_variance: "exact", the variance of all rows; or "published": a batch adds N times its unbiased
            variance, N/(N−1) too much, as in the published code of MALMEN, RLEdit and UltraEdit (a single row adds
            nothing; in the published code it makes everything NaN).
        normaliser_epsilon: added to the standard deviation.
        eigenvalue_floor: smaller eigenvalues of the value gradients' covariance are raised to this number ("whitened"
            only).
        drop_zero_rows: whether rows whose δ or u is zero are dropped before the normaliser and get no update, as in
            MEND and DAFNet. In the last decoder layer, these are all tokens that predict no answer token.
        loss: the loss whose gradient δ is. "batch": the mean over the batch's answer tokens, as observed. "fact": each
            fact's own mean, δ A/A_i, with A answer tokens in the batch and A_i in the fact, so that a batch's update
            is the sum of its facts' single updates (MEND). "sum": the sum over answer tokens, δ A (DAFNet). "rows": δ
            times the number of rows in the batch. The agent rescales δ, and asks the environment for the facts (see
            `PresentedFacts`).
        warm_up: whether the moments start from those of training facts (see :meth:`Hypernetwork.start_from`), so that a
            single fact is edited as well as a batch, and a stream's first batch as well as its tenth. Moments that
            start empty, as published, add the batch and subtract its mean, which leaves nothing of a single row.
        warm_up_rows: until a stream has this many rows, the training facts' moments stand in for the missing ones.
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
    memory_weight: float = 1.0
    output_curvature: float = 0.0
    crisp_energy: float = 0.0
    text: str = GENERATED
    text_tokens: int = 65_536
    normaliser: Normaliser = "stream"
    warm_up: bool = True
    warm_up_rows: float = 40.0
    precision: Literal["float32", "bfloat16"] = "float32"
    normaliser_scope: NormaliserScope = "module"
    normaliser_variance: Literal["exact", "published"] = "exact"
    normaliser_epsilon: float = 1e-8
    eigenvalue_floor: float = 1e-6
    drop_zero_rows: bool = False
    loss: Loss = "batch"
    initial_weights: Literal["scaled", "unit"] = "scaled"
    step_size_parameter: StepSizeParameter = "log"

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
        for name in ("step_size", "damping", "rank", "normaliser_epsilon", "eigenvalue_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.prior >= 0:
            raise ValueError(f"prior is {self.prior}; give 0 (none) or more")
        if not 1 <= self.memory_weight < math.inf:
            raise ValueError(f"memory_weight is {self.memory_weight}; give 1 (plain recursive least squares) or more")
        if not self.output_curvature >= 0:
            raise ValueError(f"output_curvature is {self.output_curvature}; give 0 (none) or more, such as 0.1")
        check_energy("crisp_energy", self.crisp_energy, or_none=True)
        if type(self.text_tokens) is not int or self.text_tokens < 64:
            raise ValueError(f"text_tokens is {self.text_tokens!r}; give a whole number from 64")
        if not self.warm_up_rows >= 2:
            raise ValueError(f"warm_up_rows is {self.warm_up_rows}; give 2 or more, or warm_up=False for none")

    def _check_combinations(self) -> None:
        if self.output_curvature and self.aggregation == "mend":
            raise ValueError(f"output_curvature is {self.output_curvature} and aggregation is 'mend', which solves no "
                             "least squares; give 'least_squares' or 'recursive', or output_curvature=0")
        if self.memory_weight != 1 and self.aggregation != "recursive":
            raise ValueError(f"memory_weight is {self.memory_weight} and aggregation is {self.aggregation!r}, which "
                             "keeps no earlier keys; give 'recursive', or memory_weight=1")
        if self.normaliser == "whitened" and self.output_units == "input":
            raise ValueError("normaliser is 'whitened' and output_units is 'input', which undoes standardising only; "
                             "give normaliser='stream', or output_units='normalised'")
        if self.has_text_prior and self.aggregation == "mend":
            raise ValueError("prior_source is 'text' and aggregation is 'mend', which solves no least squares that a "
                             "prior could enter; give 'least_squares' or 'recursive', or prior=0")
        if self.warm_up and self.loss in ("fact", "sum"):
            raise ValueError(f"warm_up is True and loss is {self.loss!r}, but the moments of training facts are of the "
                             "batch's loss; give warm_up=False, or loss='batch'")

    @property
    def by_stream(self) -> bool:
        """Whether the moments are those of one stream, and of training facts that it starts from."""
        return self.normaliser in ("stream", "whitened")

    @property
    def has_text_prior(self) -> bool:
        """Whether the least squares start from the second moment of text's keys."""
        return self.prior > 0 and self.prior_source == "text"


@dataclass(frozen=True)
class RLEditConfig:
    """The settings of RLEdit's training.

    Attributes:
        network: the hypernetwork.
        credit: "trajectory", the gradient of the whole return, or "step", each step's own reward only.
        learning_rate: Adam's, for the residual blocks.
        step_size_learning_rate: Adam's, for log η_l, or η_l itself, and log λ_l.
        max_gradient_norm: the norm to which the gradient named in ``clipping`` is clipped.
        clipping: "update", the mean gradient of an update, divided by the trajectory's steps; or "running sum", the sum
            over the trajectory's steps so far, after each step (see :func:`rledit_paper`).
        trajectories_per_update: trajectories whose gradients are averaged for one policy update.
        batches_per_update: the number of batches after which the policy is updated within an episode, from the return
            of these batches. An update then costs no more in long episodes than in short ones, and the policy meets
            LLMs with many edits. The effect of a batch on the return of later updates is not credited. None: one
            update for whole trajectories, as in the paper.
        discount: γ, the weight of a reward one step later; 1 weighs all alike.
        prior_batches: batches of training facts from which, before the first update, the moments that streams start
            from are gathered, and the prior C unless it is of text (see `HypernetworkConfig.prior` and ``warm_up``
            there).
        drift_limit: a training trajectory is cut once the mean ‖W_t − W₀‖ / ‖W₀‖ exceeds this, before the LLM breaks:
            gradients through a broken LLM spoil the policy. None: no limit.
        kl_bound: a bound on the divergence from the unedited LLM, in nats a token on its own text. The best checkpoint,
            and the best step sizes of :meth:`RLEditAgent.calibrate`, are those with the highest score within the bound;
            if none is within it, those nearest to it (see `agents.selection`). None: the highest score of all.
        policy_average: decay of a running mean of the parameters over the updates, such as 0.9. The mean is the policy
            that is evaluated, kept as the best and used at the end; training episodes are edited with the parameters
            themselves. A policy's score swings by points from one update to the next; the mean's does not. 0: no mean.
        graph_bytes: graphs of the network's forward passes are kept for the gradient up to this many bytes a
            trajectory; for later steps the network runs a second time. This changes only the time.
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
        batches = self.batches_per_update
        if batches is not None and (type(batches) is not int or batches < 1):
            raise ValueError(f"batches_per_update is {batches!r}; give a whole number from 1, or None for whole "
                             "trajectories")
        if batches is not None and self.trajectories_per_update != 1:
            raise ValueError(f"batches_per_update is {batches} and trajectories_per_update "
                             f"{self.trajectories_per_update}, but a policy that learns along a stream learns from one "
                             "at a time; give trajectories_per_update=1")


def rledit_paper_network(rank: int = 1024, step_size: float = 1e-6, **settings: Any) -> HypernetworkConfig:
    """RLEdit's network as published, for models of several billion parameters: 4 blocks, A ~ N(0, 1), η_l learned
    directly, least squares, and one normaliser for all modules of a shape, which continues from training while editing.
    """
    defaults: Options = {
        "blocks": 4, "aggregation": "least_squares", "damping": 1.0, "prior": 0.0, "normaliser": "continued",
        "warm_up": False, "normaliser_scope": "shape", "normaliser_variance": "published",
        "normaliser_epsilon": FLOAT32_EPSILON, "initial_weights": "unit", "step_size_parameter": "direct",
    }  # fmt: skip
    return HypernetworkConfig(rank=rank, step_size=step_size, **defaults | settings)


def rledit_paper(network: HypernetworkConfig | None = None, **settings: Any) -> RLEditConfig:
    """RLEdit's training exactly as in its published code; use it with `RewardConfig.published()`, which has the
    published reward.

    The code differs from the paper, or adds to it:

    - Credit is per step: the gradient of a step's own loss with respect to its own update ("step"), not of the return.
    - Each step's gradient is added to those before it, and the running sum is clipped to the norm 1 each time.
    - Adam takes one step for a whole trajectory, with the rate 1e-5 for every parameter, including η_l itself (1e-6)
      and log λ_l. The published configuration trains on one trajectory (``n_epochs: 1``), as long as the stream that is
      then edited. Adam's first step moves each parameter by the rate, whatever its gradient: η_l becomes 1.1e-5 or
      −9e-6, B and b ±1e-5, so the training learns mostly the sign of η_l.
    - The normaliser multiplies the batch's unbiased variance by N, and keeps updating on the edited stream.
    - Locality is measured from the weights before the step, and the regularisation has no gradient (both in the
      reward).

    One setting is the paper's: k is 10 earlier batches, where the code's ``back_depth: 10`` counts the current one
    (``backtracking_depth=9`` in `RewardConfig`).

    `agents.malmen_rledit` learns more: the same network and rates with 2 blocks and MALMEN's rank, trained by the
    gradient of the whole return for as many updates as needed. We recommend `RLEditConfig()`.
    """
    defaults: Options = {
        "credit": "step", "learning_rate": 1e-5, "step_size_learning_rate": 1e-5, "max_gradient_norm": 1.0,
        "clipping": "running sum", "drift_limit": None,
    }  # fmt: skip
    return RLEditConfig(network=network or rledit_paper_network(), **defaults | settings)


def rledit_ridge(step_size: float = 1.0, damping: float = 1.0, **settings: Any) -> RLEditConfig:
    """RLEdit that starts as ridge regression on the gradient itself: the zero action of
    `rledit_env.wrappers.ScaledUpdate` with this step size and damping, for streams of few facts.

    A standard algorithm scales that rule by a number or two. This agent learns each module's step size and damping, and
    the residual blocks, by the gradient of the whole return.
    """
    rule = HypernetworkConfig(
        aggregation="least_squares", output_units="input", prior=0.0, step_size=step_size, damping=damping
    )
    return RLEditConfig(network=rule, **{"learning_rate": 1e-3, "step_size_learning_rate": 0.02} | settings)


def rledit_untrained(step_size: float = 1.4e-3, prior: float = 1000.0, **network: Any) -> RLEditConfig:
    """The rule that RLEdit's training starts from, without the residual blocks: recursive least squares on normalised
    rows, with a prior on the keys of ordinary text, so that an update avoids the directions of text's keys.

    Args:
        step_size: η of every module.
        prior: c, the number of text keys that the least squares start with.
        network: other settings of the network.
    """
    rule = HypernetworkConfig(blocks=0, step_size=step_size, prior=prior, prior_source="text", **network)
    return RLEditConfig(network=rule)
