"""The environment in one loop: plain fine-tuning edits a stream of facts into a language model.

    python examples/quickstart.py
    python examples/quickstart.py --model tiny-llama      # takes seconds, on a tiny random model

The update is the fine-tuning gradient times a step size; nothing is learned. train_rledit.py trains an agent, and
custom_policy.py shows how to write your own policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import tyro

import rledit_env  # noqa: F401 - registers the environments


@dataclass(frozen=True)
class Args:
    """Edits facts by plain fine-tuning and shows the model's answers."""

    env: str = "RLEdit-CounterFact-v0"
    """The environment: RLEdit-ZsRE-v0, RLEdit-CounterFact-v0 or RLEdit-FEVER-v0."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    data: str = "bundled"
    """A file, a folder, a hub id, or "bundled", the sample that ships with the package."""
    num_batches: int = 4
    """Batches in the stream."""
    batch_size: int = 5
    """Facts in a batch."""
    step_size: float = 1.0
    """Step size of the fine-tuning update."""
    seed: int = 0
    """Seed of the choice and order of the facts."""


def main(args: Args) -> None:
    env = gym.make(
        args.env, model=args.model, data=args.data, num_batches=args.num_batches, batch_size=args.batch_size,
        render_mode="ansi", disable_env_checker=True,
    )  # fmt: skip
    print(f"{args.model}, editing {', '.join(env.unwrapped.lm.module_shapes)}")
    observation, _ = env.reset(seed=args.seed)
    done = False
    while not done:
        # The gradient ∂L/∂W is δᵀu, with keys u (N, d_in) and value gradients δ (N, d_out), one row per traced token.
        action = {
            "keys": observation["keys"],
            "values": {module: -args.step_size * delta for module, delta in observation["value_gradients"].items()},
        }
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        print(f"\n{env.render()}")

    print(f"\nall {len(env.unwrapped.edited_records())} facts, after the whole stream:")
    for name, score in env.unwrapped.evaluate().as_dict().items():
        print(f"  {name.replace('_', ' '):<20}{score:6.1f} %")
    env.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
