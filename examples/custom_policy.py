"""Your own policy in under 60 lines: the fine-tuning gradient with a learned step size for each module.

    python examples/custom_policy.py
    python examples/custom_policy.py --model tiny-llama --num-batches 2 --batch-size 4 --updates 2

With reward_gradient=True the environment gives ∂r_t/∂W_t, so a policy can be trained through the LLM without access to
it: for W ← W − η δᵀu, the derivative of the return with respect to log η is the sum over t of ⟨∂r_t/∂W_t, W_t − W_0⟩.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro

import rledit_env  # noqa: F401 - registers the environments
from rledit_env.evaluation.metrics import score_text


@dataclass(frozen=True)
class Args:
    """Learns a step size for every edited module."""

    env: str = "RLEdit-CounterFact-v0"
    """The environment: RLEdit-ZsRE-v0, RLEdit-CounterFact-v0 or RLEdit-FEVER-v0."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    data: str = "bundled"
    """A file, a folder, a hub id, or "bundled", the sample that ships with the package."""
    num_batches: int = 4
    """Batches in a stream."""
    batch_size: int = 10
    """Facts in a batch."""
    step_size: float = 0.1
    """Initial step size."""
    learning_rate: float = 0.3
    """Learning rate of Adam, for the logarithms of the step sizes."""
    updates: int = 8
    """Training streams; each gives one update of the step sizes."""
    seed: int = 0
    """Seed of the first stream."""


class LearnedStepSize:
    """The policy: ũ = u, ṽ = −η_l δ, with η_l learned by Adam."""

    def __init__(self, modules: list[str], args: Args) -> None:
        self.modules = modules
        self.log_step = torch.full((len(modules),), args.step_size).log().requires_grad_()
        self.optimizer = torch.optim.Adam([self.log_step], lr=args.learning_rate)

    def predict(self, observation: Any) -> dict[str, Any]:
        steps = dict(zip(self.modules, self.log_step.detach().exp().tolist(), strict=True))
        values = {m: -steps[m] * delta for m, delta in observation["value_gradients"].items()}  # (N, d_out)
        return {"keys": observation["keys"], "values": values}

    def learn(self, env: gym.Env[Any, Any], seed: int) -> float:
        """Edit one stream, take one step of Adam, and return the stream's return."""
        observation, _ = env.reset(seed=seed)
        total, done = 0.0, False
        slope = torch.zeros(len(self.modules))  # ∂return/∂log η_l
        change = dict.fromkeys(self.modules, 0.0)  # W_t − W_0, the sum of all ΔW up to t
        while not done:
            action = self.predict(observation)
            observation, reward, terminated, truncated, info = env.step(action)
            total, done = total + float(reward), terminated or truncated
            if "reward_gradient" not in info:  # the update broke the LLM: only make the steps smaller
                slope -= 1
                break
            for i, m in enumerate(self.modules):
                change[m] = change[m] + action["values"][m].T @ action["keys"][m]  # (d_out, d_in)
                slope[i] += (info["reward_gradient"][m] * change[m]).sum().cpu()
        self.log_step.grad = -slope
        self.optimizer.step()
        return total


def main(args: Args) -> None:
    env = gym.make(
        args.env, model=args.model, data=args.data, num_batches=args.num_batches, batch_size=args.batch_size,
        array_backend="torch", reward_gradient=True, disable_env_checker=True,
    )  # fmt: skip
    policy = LearnedStepSize(list(env.unwrapped.lm.module_shapes), args)
    for update in range(args.updates):
        total = policy.learn(env, args.seed + update)
        scores = env.unwrapped.evaluate(generate=False)
        print(f"stream {update + 1}: return {total:8.1f}, efficacy {scores.efficacy:5.1f}, generalization "
              f"{score_text(scores.generalization)}, specificity {scores.specificity:5.1f}", flush=True)
    for module, step in zip(policy.modules, policy.log_step.detach().exp().tolist(), strict=True):
        print(f"  {module}: step size {step:.3g}")


if __name__ == "__main__":
    main(tyro.cli(Args))
