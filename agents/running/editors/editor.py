"""The description of an editor: its agent, its configuration, its training and its strength."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agents.base import Agent
from agents.running.editors.overrides import changed, check_known, merged
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import Component, Efficacy, Generalization, Locality, RewardConfig, TextComponent
from rledit_env.type_aliases import JsonObject, Options, Settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

COMPONENTS: dict[str, type[Component] | type[TextComponent]] = {
    "efficacy": Efficacy, "generalization": Generalization, "locality": Locality, "own_text": OwnText,
    "continuation": Continuation,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How an editor is trained.

    Attributes:
        num_batches: batches of a training episode; None takes as many as in editing.
        batch_size: facts of a training batch; None takes as many as in editing.
        steps_per_batch: presentations of a batch; None takes as many as in editing.
        trajectories: number of training episodes.
        reward: the reward's components by name and weight, and other fields of `RewardConfig`; "constraint" maps to the
            fields of `Constraint`.
        select_batches: batches of the held-out episode that chooses the best checkpoint; 0 takes the last checkpoint.
        eval_every: updates between two such evaluations.
        patience: evaluations without a better score before training ends.
        calibrate_batches: batches of the held-out episode on which the step sizes are calibrated after training; 0
            leaves them.
    """

    num_batches: int | None = 5
    batch_size: int | None = None
    steps_per_batch: int | None = None
    trajectories: int = 20
    reward: Settings = field(default_factory=dict)
    select_batches: int = 0
    eval_every: int = 10
    patience: int = 4
    calibrate_batches: int = 0


@dataclass(frozen=True)
class Strength:
    """How a factor makes an editor edit more or less strongly; 2 is twice as strongly.

    Without any names, the factor multiplies the trained step sizes (`RLEditAgent.scale_step_sizes`), and the editor is
    not trained again.

    Attributes:
        multiplied: names of the numbers of the configuration that are multiplied by the factor, such as a step size; a
            dot leads into a nested configuration, "value.clamp".
        divided: names of the numbers that are divided by the factor: weights that protect the model, such as λ.
        factors: the factors that `rledit compare --curve` tries.
    """

    multiplied: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def of_training(self) -> bool:
        """Whether the factor multiplies the trained step sizes."""
        return not self.multiplied and not self.divided

    def scaled(self, config: object, factor: float) -> Settings:
        """The numbers of a configuration at this factor, nested as for :func:`changed`."""
        powers = [(name, factor) for name in self.multiplied] + [(name, 1 / factor) for name in self.divided]
        numbers: Options = {}
        for name, power in powers:
            *parents, last = name.split(".")
            inner, place = config, numbers
            for parent in parents:
                inner, place = getattr(inner, parent), place.setdefault(parent, {})
            place[last] = getattr(inner, last) * power
        return numbers


@dataclass(frozen=True)
class Editor:
    """An editor of the registry.

    Attributes:
        name: its name on the command line.
        title: its name in tables.
        group: its group on the command line.
        agent: the agent's class, built as ``agent(env, config, seed=seed)``.
        config: the configuration's class, or a function that returns the default configuration.
        env: settings of the environment; without edit_modules the model's default modules are edited, and a saved agent
            keeps those that it was trained with.
        settings: overrides of the default configuration, by (nested) name.
        training: how it is trained; None if there is nothing to train. ``learn(0)`` then gathers the statistics that
            some agents need.
        trained_as: name of another editor whose trained agent this one starts from, and whose settings it has too.
        trainer: that editor, configured.
        variant_of: name of another editor; a file's settings for that one apply to this one too.
        saved: a trained agent to load instead, as for `agents.find_agent`. It keeps its own configuration, but for
            ``network.crisp_energy``, if ``settings`` name it.
        step_size: names of the numbers of its configuration that scale its updates; the first is its step size, the
            others keep their ratio to it. Empty if there is no such number.
        presentations: numbers of presentations of a batch that a search of the step size tries, in this order.
        strength: how a factor makes it edit more or less strongly; None if nothing does.
        factor: the factor of its strength, 1 as configured or trained.
    """

    name: str
    title: str
    group: str
    agent: type[Agent]
    config: Callable[[], DataclassInstance] | None = None
    env: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    training: Training | None = None
    trained_as: str | None = None
    trainer: Editor | None = None
    variant_of: str | None = None
    saved: str | None = None
    step_size: tuple[str, ...] = ()
    presentations: tuple[int, ...] = (1,)
    strength: Strength | None = None
    factor: float = 1.0

    @property
    def label(self) -> str:
        """Its name, with the factor of its strength unless that is 1; the name of its results' folder."""
        return self.name if self.factor == 1 else f"{self.name}@{self.factor:g}"

    @property
    def scales_trained(self) -> bool:
        """Whether its factor multiplies the trained step sizes, not numbers of its configuration."""
        return self.saved is not None or (self.strength is not None and self.strength.of_training)

    @property
    def training_free(self) -> bool:
        """Whether it edits without training."""
        return self.training is None and self.trained_as is None

    def agent_class(self) -> Any:
        """The agent's class, typed as `Any` since `Agent` does not define a constructor."""
        return self.agent

    def configuration(self) -> Any:
        """The agent's configuration; None for an agent that has none.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        if self.config is None:
            check_known(self.settings, (), f"editor {self.name!r}, config")
            return None
        config = changed(self.config(), self.settings, f"editor {self.name!r}, config")
        if self.factor == 1 or self.strength is None or self.scales_trained:
            return config
        place = f"editor {self.name!r} at {self.factor:g} times its strength"
        return changed(config, self.strength.scaled(config, self.factor), place)

    def reward(self) -> RewardConfig:
        """The reward that it is trained with; see :attr:`Training.reward`.

        Raises:
            ValueError: a component or a number is unknown.
        """
        numbers = dict(self.training.reward if self.training else {})
        weights = numbers.pop("components", None)
        if weights is not None:
            check_known(weights, COMPONENTS, f"editor {self.name!r}, train.reward.components")
            numbers["components"] = {name: (weight, COMPONENTS[name]()) for name, weight in weights.items()}
        place = f"editor {self.name!r}, train.reward"
        if isinstance(constraint := numbers.get("constraint"), Mapping):
            numbers["constraint"] = changed(Constraint(), constraint, f"{place}.constraint")
        config: RewardConfig = changed(RewardConfig(), numbers, place)
        return config

    def description(self) -> JsonObject:
        """Everything that its results depend on, as JSON types; classes and functions by their names."""
        left_out = ["title", "group", "trainer", "step_size", "presentations", "strength"]
        if self.factor == 1:  # results of earlier versions have no factor
            left_out.append("factor")
        fields = {k: v for k, v in asdict(self).items() if k not in left_out}
        fields |= {"agent": self.agent.__name__, "config": getattr(self.config, "__name__", None)}
        trainer = self.trainer.description() if self.trainer else None
        description: JsonObject = json.loads(json.dumps({**fields, "trainer": trainer}))
        return description


def configured_step_size(editor: Editor) -> float:
    """The step size that the editor is configured with."""
    return float(getattr(editor.configuration(), editor.step_size[0]))


def with_step_size(editor: Editor, step_size: float, steps_per_batch: int) -> Editor:
    """The editor with this step size and this number of presentations of a batch.

    Raises:
        ValueError: the editor has no step size, or refuses this one.
    """
    if not editor.step_size:
        raise ValueError(f"editor {editor.name!r} has no step size; its strength is its configuration's")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step size is {step_size}; give a positive number")
    config, factor = editor.configuration(), step_size / configured_step_size(editor)
    numbers = {name: getattr(config, name) * factor for name in editor.step_size[1:]} | {editor.step_size[0]: step_size}
    scaled_editor = replace(
        editor, settings=merged(editor.settings, numbers), env={**editor.env, "steps_per_batch": steps_per_batch},
        factor=1.0,
    )  # fmt: skip
    scaled_editor.configuration()  # raises ValueError if it refuses the step size
    return scaled_editor


def with_strength(editor: Editor, factor: float) -> Editor:
    """The editor at ``factor`` times its configured or trained strength.

    Raises:
        ValueError: the editor has no strength, or refuses this one.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"strength is {factor}; give a positive number")
    if factor == 1:
        return editor
    if editor.strength is None:
        raise ValueError(f"editor {editor.name!r} has no strength; nothing makes it edit more or less")
    scaled_editor = replace(editor, factor=factor, title=f"{editor.title} ×{factor:g}")
    scaled_editor.configuration()  # raises ValueError if it refuses the factor
    return scaled_editor
