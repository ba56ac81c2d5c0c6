"""DAFNet: a hypernetwork with attention within a fact and across the facts of a sequence (Zhang et al., ACL 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from agents.base import used_rows
from agents.files import read_description
from agents.hypernetworks.dafnet_network import DAFNetNetworkConfig, DAFNetwork
from agents.rledit.agent import RLEditAgent
from agents.rledit.config import HypernetworkConfig, RLEditConfig
from agents.rledit.hypernetwork import Hypernetwork, StepRecord
from rledit_env.interface import Environment, editing_env
from rledit_env.spaces import Action, Observation


@dataclass(frozen=True)
class DAFNetConfig(RLEditConfig):
    """DAFNet's defaults: Adam with the rate 1e-6 for the network, and the gradient clipped to the norm 100. The step
    sizes η_l start at 1e-4 and are learned directly, with the rate 1e-4."""

    network: HypernetworkConfig = field(default_factory=DAFNetNetworkConfig)
    learning_rate: float = 1e-6
    step_size_learning_rate: float = 1e-4
    max_gradient_norm: float = 100.0


class DAFNetAgent(RLEditAgent):
    """DAFNet (Zhang et al., "DAFNet: Dynamic Auxiliary Fusion for Sequential Model Editing in Large Language Models",
    Findings of ACL 2024, arXiv 2405.20588).

    For each module, the normalised z = [u; δ] of all tokens of a fact (``token="all"``) passes through layers of

    1. attention within the fact: a = MLP(z), weighted by a softmax over the fact's tokens; z ← z + a, and the fact's
       representation is r = Σ a over its tokens;
    2. attention across facts: r_f attends to r_1 … r_f, the stream's facts up to f, and the result is added to each of
       the fact's tokens;
    3. a feed-forward part, with each module's scale and shift.

    The result (û, δ̂) gives ΔW = −η_l Σ_f w_f/N_f Σ_{i in f} δ̂ᵢ ûᵢᵀ, with N_f the number of tokens of fact f. A second
    attention across facts gives s_f, the attention weight of fact f on itself among the stream's facts up to f, and
    w_f = s_f Π_{j>f} (1 − s_j), j over the later facts of the batch. Earlier updates are shrunk by p = Π_j (1 − s_j)
    over the batch's facts: W becomes W₀ + p (W − W₀) + ΔW. The first fact attends only to itself, so s_1 = 1, and the
    weights of all facts of a stream sum to 1 at any time. (s differs by module and layer; both products are averaged
    over the layers.) From the second batch on, the action is therefore dense.

    As published, tokens with δ = 0 are dropped before the normaliser, δ is of the sum over the answer tokens, and
    modules of one shape share a normaliser and are normalised in turn.

    The network is trained on sequences of facts by the gradient of whole trajectories: at a later step τ, the share
    Π_{t<j≤τ} p_j of update t is left in the weights, and the later reward's gradient is multiplied by it. The
    representations of earlier batches, s and p are constants in that gradient, as in the published code. The second
    attention is therefore not trained: its maps keep their initial random values.

    Differences from the published code:

    - Layers are normalised before each part, not after, and each part's last map starts at zero, so the untrained
      network is the identity (as in MEND) and all facts have the same weight.
    - Keys and gradients are those of the edited LLM, where the published code uses the original LLM.
    - A sequence comes in batches, with a reward after each, where the published code trains on one batch of up to 1,000
      facts.
    - The step sizes' gradients are clipped together with the network's.
    - The published code adds +η_l δ̂ ûᵀ, and training has to find η_l's sign.

    The observation does not mark each fact's rows, so the agent asks its environment which facts are presented, and
    reads W − W₀ of its LLM. If it edits in another environment than ``env``, name that one with :meth:`set_env`.

    Args:
        env: the environment to learn in.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training episodes.
    """

    name: ClassVar[str] = "dafnet"
    config_type: ClassVar[type[RLEditConfig]] = DAFNetConfig
    network_type: ClassVar[type[Hypernetwork]] = DAFNetwork
    network: DAFNetwork

    def observe(self, observation: Observation, adapt: bool) -> StepRecord:
        keys, gradients = used_rows(observation, self.network.device)
        facts = self.presented.facts(len(next(iter(keys.values()))))
        return self.network.observe_facts(keys, self.of_loss(gradients), [fact.rows for fact in facts], adapt)

    def action(
        self, observation: Observation, record: StepRecord, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Action:
        if record.retained is None:
            return super().action(observation, record, keys, values)
        assert self.presented.env is not None  # `observe` has asked it for the facts
        lm = editing_env(self.presented.env).lm
        updates = {}
        for m, share in record.retained.items():
            earlier = (lm.weight(m) - lm.original_weight(m)).to(keys[m])  # W − W₀, (d_out, d_in)
            updates[m] = values[m].T @ keys[m] - (1 - share) * earlier
        if isinstance(observation["mask"], np.ndarray):
            return {"updates": {m: update.cpu().numpy() for m, update in updates.items()}}
        return {"updates": updates}

    @classmethod
    def load(cls, path: str | Path, env: Environment | None = None) -> RLEditAgent:
        """As :meth:`RLEditAgent.load`.

        Raises:
            ValueError: the agent was saved in the first format, in which all facts had the weight 1.
        """
        network = (read_description(path).get("config") or {}).get("network") or {}
        if "score_heads" not in network:
            raise ValueError(f"the DAFNet agent in {path} was trained by an earlier version, in which every fact "
                             "weighed 1; train it again (DAFNetAgent(env).learn), or edit with that version")
        return super().load(path, env)
