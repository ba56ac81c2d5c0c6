"""The environment settings that an agent was trained with, for its file and for comparing two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass

from rledit_env.interface import Environment, editing_env
from rledit_env.reward import RewardConfig
from rledit_env.type_aliases import JsonObject


def environment_settings(env: Environment | None) -> JsonObject | None:
    """The settings of the environment that a policy depends on."""
    if env is None:
        return None
    inner = editing_env(env)
    return {
        # The unwrapped environment's spec; a wrapper's is a deep copy, including the LLM.
        "id": inner.spec.id if inner.spec is not None else None,
        "kind": inner.dataset.kind,
        "model": inner.lm.name,
        "revision": inner.lm.revision,
        "edit_modules": list(inner.lm.module_shapes),
        "dtype": str(inner.lm.dtype).removeprefix("torch."),
        "source": inner.dataset.source,
        "split": inner.dataset.split,
        "token": inner.token,
        **presentation_settings(env),
        "num_batches": inner.stream.num_batches,
        "batch_size": inner.stream.batch_size,
        "reward": _reward_settings(inner.reward_config),
    }


def presentation_settings(env: Environment) -> JsonObject:
    """How the environment presents a batch."""
    inner = editing_env(env)
    return {"steps_per_batch": inner.steps_per_batch, "present_until": inner.present_until, "contexts": inner.contexts}


def _reward_settings(config: RewardConfig | None) -> JsonObject | None:
    """The reward's numbers, and its components by weight and class."""
    if config is None:
        return None
    numbers = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("components", "penalty")}
    components = {
        name: [weight, repr(part) if is_dataclass(part) else type(part).__name__]
        for name, (weight, part) in config.components.items()
    }
    numbers["constraint"] = asdict(config.constraint) if config.constraint is not None else None
    return {**numbers, "components": components, "penalty": getattr(config.penalty, "__name__", "custom")}


def setting_differences(theirs: JsonObject, mine: JsonObject) -> list[str]:
    """The settings (not counters) in which a saved run's description ``theirs`` differs from this agent's ``mine``, in
    words."""
    mine = json.loads(json.dumps(mine))  # with the types that a file has
    environment = theirs.get("environment") or {}
    if environment:  # runs of earlier versions lack later settings
        environment = {"contexts": 0, **environment}
        theirs = {**theirs, "environment": environment}
    if environment.get("reward"):
        reward = (_reward_settings(RewardConfig()) or {}) | environment["reward"]
        theirs = {**theirs, "environment": {**environment, "reward": reward}}
    different = []
    for name in ("seed", "config", "shapes", "environment"):
        there, here = _flatten(name, theirs.get(name)), _flatten(name, mine.get(name))
        for key in there | here:
            if there.get(key) != here.get(key):
                different.append(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here")
    return different


def _flatten(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for inner, v in value.items() for key, leaf in _flatten(f"{name}.{inner}", v).items()}
