"""Many environments on one copy of the frozen language model."""

from rledit_env.vector.env import LifelongEditVectorEnv
from rledit_env.vector.views import VectorGradientFeatures, VectorScaledUpdate

__all__ = ["LifelongEditVectorEnv", "VectorGradientFeatures", "VectorScaledUpdate"]
