"""DAFNet: a hypernetwork with attention within a fact and across the facts of a sequence (Zhang et al., ACL 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from torch import Tensor

from agents.base import used_rows
from agents.files import read_description
from agents.hypernetworks.dafnet_network import DAFNetNetworkConfig, DAFNetwork
from agents.rledit.agent import RLEditAgent
from agents.rledit.config import HypernetworkConfig, RLEditConfig
from agents.rledit.hypernetwork import Hypernetwork, StepRecord
from rledit_env.interface import editing_env


@dataclass(frozen=True)
class DAFNetConfig(RLEditConfig):
    """DAFNet's defaults: Adam at 1e-6 on the network, the gradient clipped at the norm 100. The step sizes η_l start at
    1e-4 and are learned directly, at the rate 1e-4."""

    network: HypernetworkConfig = field(default_factory=DAFNetNetworkConfig)
    learning_rate: float = 1e-6
    step_size_learning_rate: float = 1e-4
    max_gradient_norm: float = 100.0


class DAFNetAgent(RLEditAgent):
    """DAFNet (Zhang et al., "DAFNet: Dynamic Auxiliary Fusion for Sequential Model Editing in Large Language Models",
    Findings of ACL 2024, arXiv 2405.20588).

    For each module the normalised z = [u; δ] of all tokens of a fact (``token="all"``) passes through layers of

    1. attention within the fact: a = MLP(z), weighed by a softmax over the fact's tokens; z ← z + a, and the fact's
       representation is r = Σ a over its tokens;
    2. attention across facts: r_f attends to r_1 … r_f, the facts of the whole stream up to itself and none after it,
       and what it takes is added to each of its tokens;
    3. a feed-forward part, with each module's scale and shift.

    Split into (û, δ̂), they give ΔW = −η_l Σ_f w_f/N_f Σ_{i in f} δ̂ᵢ ûᵢᵀ, with N_f the tokens of fact f. A second
    attention across facts gives s_f, the attention that fact f pays to itself among the facts of the stream up to
    itself, and w_f = s_f Π_{j>f} (1 − s_j), j over the later facts of the batch. What was added before is shrunk by
    p = Π_j (1 − s_j) over the batch's facts: W becomes W₀ + p (W − W₀) + ΔW. Since the first fact has only itself to
    attend to, s_1 = 1, and the weights of all facts of a stream sum to 1 at any time. (s differs by module and layer;
    both products are averaged over the layers.) From the second batch on the action is therefore dense.

    Tokens with δ = 0 are dropped before the normaliser sees them, δ is of the sum over the answer tokens, and modules
    of one shape share a normaliser, each taken in and normalised in turn, as published.

    The network is trained on sequences of facts by the gradient of whole trajectories: update t is in the weights of a
    later step τ with the share Π_{t<j≤τ} p_j, and that is what a later reward's gradient is multiplied by. The
    representations of earlier batches, s and p are constants of that gradient, as in the published code, whose second
    attention is therefore not trained: its maps keep the random values that they begin with.

    What is simplified: layers are normalised before each part, not after, and each part's last map starts at zero, so
    that the untrained network is the identity (MEND's start) and all facts weigh the same; the keys and gradients are
    those of the LLM as it is, where the published code takes them from the original LLM; a sequence comes in batches,
    with a reward after each, where the published code trains on one batch of up to 1,000 facts; the step sizes are
    clipped with the network. The published code adds +η_l δ̂ ûᵀ, and leaves it to training to find η_l's sign.

    A fact's rows are not marked in the observation, so that the agent asks the environment which facts are presented,
    and reads W − W₀ of its LLM: name the one it edits in with :meth:`set_env`, unless that is ``env``.

    Args:
        env: the environment to learn in.
        config: the network and its training.
        shapes: module → (d_in, d_out), if there is no ``env``.
        seed: of the initial parameters and of the training streams.
    """

    name: ClassVar[str] = "dafnet"
    config_type: ClassVar[type[RLEditConfig]] = DAFNetConfig
    network_type: ClassVar[type[Hypernetwork]] = DAFNetwork
    network: DAFNetwork

    def observe(self, observation: Any, adapt: bool) -> StepRecord:
        keys, gradients = used_rows(observation, self.network.device)
        facts = self.presented.facts(len(next(iter(keys.values()))))
        return self.network.observe_facts(keys, self.of_loss(gradients), [fact.rows for fact in facts], adapt)

    def action(
        self, observation: Any, record: StepRecord, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        if record.retained is None:
            return super().action(observation, record, keys, values)
        assert self.presented.env is not None  # it has said which facts are presented
        lm = editing_env(self.presented.env).lm
        updates = {}
        for m, share in record.retained.items():
            added = (lm.weight(m) - lm.original_weight(m)).to(keys[m])  # (d_out, d_in)
            updates[m] = values[m].T @ keys[m] - (1 - share) * added
        if isinstance(observation["mask"], np.ndarray):
            return {"updates": {m: update.cpu().numpy() for m, update in updates.items()}}
        return {"updates": updates}

    @classmethod
    def load(cls, path: str | Path, env: gym.Env | None = None) -> RLEditAgent:
        """As :meth:`RLEditAgent.load`.

        Raises:
            ValueError: it is of the first format, whose facts all weighed 1.
        """
        network = (read_description(path).get("config") or {}).get("network") or {}
        if "score_heads" not in network:
            raise ValueError(f"the DAFNet agent in {path} was trained by an earlier version, in which every fact "
                             "weighed 1; train it again (DAFNetAgent(env).learn), or edit with that version")
        return super().load(path, env)
