"""An editor as it can be compared: what it is, how it is built and trained, and what makes it edit more strongly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agents.base import Agent
from agents.running.editors.overrides import changed, check_known, merged
from rledit_env.preservation import Constraint, Continuation, OwnText
from rledit_env.reward import Component, Efficacy, Generalization, Locality, RewardConfig, TextComponent

COMPONENTS: dict[str, type[Component] | type[TextComponent]] = {
    "efficacy": Efficacy, "generalization": Generalization, "locality": Locality, "own_text": OwnText,
    "continuation": Continuation,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How long and on what an editor with something to learn is trained.

    Attributes:
        num_batches: batches of a training stream; None is as many as are edited.
        batch_size: facts of a training batch; None is as many as are edited at once.
        steps_per_batch: presentations of a batch; None is as many as when it edits.
        trajectories: training streams.
        reward: the reward's components by name and weight, and any other of `RewardConfig`'s numbers; "constraint"
            holds a `Constraint`'s.
        select_batches: batches of the held-out streams that choose the best checkpoint; 0 takes the last.
        eval_every: updates between two such evaluations.
        patience: evaluations without a better score before training ends.
        calibrate_batches: afterwards the step sizes are suited to held-out streams of so many batches; 0 leaves them.
    """

    num_batches: int | None = 5
    batch_size: int | None = None
    steps_per_batch: int | None = None
    trajectories: int = 20
    reward: Mapping[str, Any] = field(default_factory=dict)
    select_batches: int = 0
    eval_every: int = 10
    patience: int = 4
    calibrate_batches: int = 0


@dataclass(frozen=True)
class Strength:
    """What makes an editor edit more or less, as one factor: 2 is twice as strongly.

    Where no number is named, it is the step sizes that training gave that are multiplied
    (`RLEditAgent.scale_step_sizes`), so that nothing is trained again.

    Attributes:
        multiplied: the numbers of the configuration that are multiplied by the factor, such as a step size; those of a
            nested configuration with a dot, "value.clamp".
        divided: those that are divided by it: weights of what is to stay as it is, such as λ.
        factors: what `rledit compare --curve` tries.
    """

    multiplied: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def of_training(self) -> bool:
        """Whether it is the step sizes that training gave."""
        return not self.multiplied and not self.divided

    def scaled(self, config: Any, factor: float) -> dict[str, Any]:
        """The numbers of a configuration with this factor, nested as :func:`changed` takes them."""
        powers = [(name, factor) for name in self.multiplied] + [(name, 1 / factor) for name in self.divided]
        numbers: dict[str, Any] = {}
        for name, power in powers:
            *parents, last = name.split(".")
            inner, place = config, numbers
            for parent in parents:
                inner, place = getattr(inner, parent), place.setdefault(parent, {})
            place[last] = getattr(inner, last) * power
        return numbers


@dataclass(frozen=True)
class Editor:
    """An editor that can be compared.

    Attributes:
        name: what the command line calls it.
        title: what a table calls it.
        group: which editors it belongs with.
        agent: its class, built as ``agent(env, config, seed=seed)``.
        config: its configuration's class, or a function that gives the default configuration.
        env: settings of the environment; without edit_modules the model's default ones are edited, and a saved agent
            keeps those that it was trained with.
        settings: what of the default configuration is otherwise, by (nested) name.
        training: how it is trained; None if there is nothing to train, only perhaps statistics to gather, which is
            then ``learn(0)``'s work.
        trained_as: it goes on from what this editor's training gave, and has its settings beside its own.
        trainer: that editor, as it is configured.
        variant_of: what a file says of this editor's settings holds for it too, beside what it says of its own.
        saved: a trained agent to take instead, as `agents.find_agent` knows it.
        step_size: which numbers of its configuration scale its updates; the first is called its step size, the others
            keep their ratio to it. Empty where there is no such number.
        presentations: how often a batch may be presented: what a search of the step size tries, in this order.
        strength: what makes it edit more or less strongly; None where nothing does.
        factor: how strongly it edits, as a factor of its strength as it is configured, or trained.
    """

    name: str
    title: str
    group: str
    agent: type[Agent]
    config: Callable[[], Any] | None = None
    env: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
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
        """Its name, with the factor of its strength where that is not 1: what a folder of its results is called."""
        return self.name if self.factor == 1 else f"{self.name}@{self.factor:g}"

    @property
    def scales_trained(self) -> bool:
        """Whether its factor is one of the step sizes that training gave, not of numbers of its configuration."""
        return self.saved is not None or (self.strength is not None and self.strength.of_training)

    @property
    def training_free(self) -> bool:
        """Whether it edits without having been trained."""
        return self.training is None and self.trained_as is None

    def agent_class(self) -> Any:
        """The agent's class as a callable that builds one: `Agent` does not say how its classes are built."""
        return self.agent

    def configuration(self) -> Any:
        """The configuration that the agent is built with; None for an agent that has none.

        Raises:
            ValueError: a setting is unknown or out of its range.
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
        """What it is trained with; see :attr:`Training.reward`.

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

    def description(self) -> dict[str, Any]:
        """All that its results depend on, as JSON holds it; classes and functions by their names."""
        left_out = ["title", "group", "trainer", "step_size", "presentations", "strength"]
        if self.factor == 1:  # as the results of earlier versions say nothing of it
            left_out.append("factor")
        described = {k: v for k, v in asdict(self).items() if k not in left_out}
        described |= {"agent": self.agent.__name__, "config": getattr(self.config, "__name__", None)}
        trainer = self.trainer.description() if self.trainer else None
        written: dict[str, Any] = json.loads(json.dumps({**described, "trainer": trainer}))
        return written


def configured_step_size(editor: Editor) -> float:
    """The step size that the editor is configured with."""
    return float(getattr(editor.configuration(), editor.step_size[0]))


def with_step_size(editor: Editor, step_size: float, steps_per_batch: int) -> Editor:
    """The editor with this step size and so many presentations of a batch.

    Raises:
        ValueError: it has no step size, or refuses this one.
    """
    if not editor.step_size:
        raise ValueError(f"editor {editor.name!r} has no step size; its strength is its configuration's")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step size is {step_size}; give a positive number")
    config, factor = editor.configuration(), step_size / configured_step_size(editor)
    numbers = {name: getattr(config, name) * factor for name in editor.step_size[1:]} | {editor.step_size[0]: step_size}
    made = replace(
        editor, settings=merged(editor.settings, numbers), env={**editor.env, "steps_per_batch": steps_per_batch},
        factor=1.0,
    )  # fmt: skip
    made.configuration()
    return made


def with_strength(editor: Editor, factor: float) -> Editor:
    """The editor with so many times the strength that it is configured, or was trained, with.

    Raises:
        ValueError: it has no strength, or refuses this one.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"strength is {factor}; give a positive number")
    if factor == 1:
        return editor
    if editor.strength is None:
        raise ValueError(f"editor {editor.name!r} has no strength; nothing makes it edit more or less")
    made = replace(editor, factor=factor, title=f"{editor.title} ×{factor:g}")
    made.configuration()
    return made
