"""Other hypernetworks, MEND, MALMEN and DAFNet; and UltraEdit and StableEdit, the same rule without a network."""

from agents.hypernetworks.dafnet import DAFNetAgent, DAFNetConfig
from agents.hypernetworks.dafnet_network import DAFNetNetworkConfig
from agents.hypernetworks.malmen import MALMENAgent, MALMENConfig, malmen_network, malmen_rledit
from agents.hypernetworks.mend import MENDAgent, MENDConfig, mend_network, mend_rledit
from agents.hypernetworks.stableedit import StableEditAgent, StableEditConfig
from agents.hypernetworks.ultraedit import UltraEditAgent, UltraEditConfig

__all__ = [
    "DAFNetAgent",
    "DAFNetConfig",
    "DAFNetNetworkConfig",
    "MALMENAgent",
    "MALMENConfig",
    "MENDAgent",
    "MENDConfig",
    "StableEditAgent",
    "StableEditConfig",
    "UltraEditAgent",
    "UltraEditConfig",
    "malmen_network",
    "malmen_rledit",
    "mend_network",
    "mend_rledit",
]
