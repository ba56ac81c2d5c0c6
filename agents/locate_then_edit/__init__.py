"""Editors that find a value for each fact at its subject and solve for the weights: ROME, MEMIT, PRUNE, RECT and
AlphaEdit."""

from agents.locate_then_edit.alphaedit import AlphaEditAgent, AlphaEditConfig
from agents.locate_then_edit.memit import MEMITAgent, MEMITConfig
from agents.locate_then_edit.prune import PRUNEAgent, PRUNEConfig
from agents.locate_then_edit.rect import RECTAgent, RECTConfig
from agents.locate_then_edit.rome import ROMEAgent, ROMEConfig
from agents.locate_then_edit.value_optimisation import ValueConfig

__all__ = [
    "AlphaEditAgent",
    "AlphaEditConfig",
    "MEMITAgent",
    "MEMITConfig",
    "PRUNEAgent",
    "PRUNEConfig",
    "RECTAgent",
    "RECTConfig",
    "ROMEAgent",
    "ROMEConfig",
    "ValueConfig",
]
