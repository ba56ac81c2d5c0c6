"""Low-dimensional views of the environment, for libraries that take flat Box spaces.

Raw observations and actions have millions of numbers. With these wrappers an agent sees a few features of each edited
module, and chooses how strongly a base rule edits it:

    env = gym.make("rledit_env:RLEdit-CounterFact-v0", array_backend="torch")
    env = GradientFeatures(ScaledUpdate(env))
"""

from rledit_env.wrappers.flatten_factors import FlattenFactors
from rledit_env.wrappers.relative_reward import RelativeReward
from rledit_env.wrappers.views import (
    GradientFeatures,
    Rule,
    ScaledUpdate,
    Share,
    module_features,
    module_groups,
    ridge_keys,
    state_features,
)

__all__ = [
    "FlattenFactors",
    "GradientFeatures",
    "RelativeReward",
    "Rule",
    "ScaledUpdate",
    "Share",
    "module_features",
    "module_groups",
    "ridge_keys",
    "state_features",
]
