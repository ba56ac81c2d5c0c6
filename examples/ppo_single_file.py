"""PPO in one file, in the style of CleanRL: the arguments, the networks, and the whole algorithm from top to bottom.

    python examples/ppo_single_file.py
    python examples/ppo_single_file.py --model tiny-llama --total-timesteps 2000
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter

from rledit_env.outputs import added, try_or_exit
from rledit_env.wrappers import GradientFeatures, RelativeReward, ScaledUpdate


@dataclass(frozen=True)
class Args:
    """Proximal policy optimisation (Schulman et al. 2017): the policy chooses step size and damping in every state."""

    env_id: str = "RLEdit-CounterFact-v0"
    """The environment."""
    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model to edit."""
    step_size: float = 1.0
    """Step size of the base rule, which is the zero action."""
    num_batches: int = 5
    """Batches in a stream; a stream is an episode."""
    batch_size: int = 1
    """Facts in a batch; a batch is a step."""
    streams: int = 32
    """Training streams; rewards are relative to those of the zero action on the same stream."""
    total_timesteps: int = 960
    """Environment steps."""
    num_steps: int = 80
    """Environment steps between two updates of the policy."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam; it falls linearly to 0."""
    gamma: float = 1.0
    """Discount factor."""
    gae_lambda: float = 0.95
    """λ of the generalised advantage estimate (Schulman et al. 2016)."""
    update_epochs: int = 10
    """Passes over the steps of an update."""
    minibatch_size: int = 40
    """Steps in a minibatch."""
    clip_coef: float = 0.2
    """The ratio of new to old probabilities is clipped to 1 ± this."""
    vf_coef: float = 0.5
    """Weight of the value's squared error."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""
    log_std_init: float = -1.0
    """Initial logarithm of the standard deviation of the exploration."""
    log_dir: str = "runs/ppo_single_file"
    """Folder for TensorBoard."""
    seed: int = 0
    """Seed of the networks, the exploration and the streams."""


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    last = nn.Linear(32, outputs)
    nn.init.orthogonal_(last.weight, gain)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), last)


class Policy(nn.Module):
    """A Gaussian policy whose mean is initially the zero action, and a value function."""

    def __init__(self, observations: np.ndarray, actions: int, log_std: float) -> None:
        super().__init__()
        self.offset = torch.as_tensor(observations.mean(0))  # (F,)
        self.scale = torch.as_tensor(observations.std(0)).clamp(min=1e-3)
        self.mean, self.critic = network(len(self.offset), actions, 0.01), network(len(self.offset), 1, 1.0)
        self.log_std = nn.Parameter(torch.full((actions,), log_std))

    def forward(self, observation: torch.Tensor) -> tuple[Normal, torch.Tensor]:
        features = ((observation - self.offset) / self.scale).clamp(-5, 5)  # (B, F)
        return Normal(self.mean(features), self.log_std.exp()), self.critic(features).squeeze(-1)


def main(args: Args) -> None:
    try_or_exit([added("--log-dir", args.log_dir)])  # check the folder before training
    torch.manual_seed(args.seed)
    raw = gym.make(f"rledit_env:{args.env_id}", model=args.model, num_batches=args.num_batches,
                   batch_size=args.batch_size, token="subject", reward="efficacy", array_backend="torch",
                   disable_env_checker=True)  # fmt: skip
    low_dimensional = GradientFeatures(ScaledUpdate(raw, step_size=args.step_size, share="all"), share="all")
    env = RelativeReward(low_dimensional, args.streams)
    writer, started = SummaryWriter(args.log_dir), time.time()
    policy = Policy(env.measure(args.seed), env.action_space.shape[0], args.log_std_init)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, eps=1e-5)
    updates = (args.total_timesteps - env.baseline_steps) // args.num_steps
    low, high = env.action_space.low, env.action_space.high
    next_observation, done, episode_return, returns = torch.as_tensor(env.reset()[0]), 0.0, 0.0, []
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)
        rows = []
        for _ in range(args.num_steps):  # ------------------------------------------------------------ collect
            with torch.no_grad():
                distribution, value = policy(next_observation[None])
                action = distribution.sample()[0]
            log_prob = distribution.log_prob(action).sum()
            old_observation, starts_episode = next_observation, done
            observation, reward, terminated, truncated, _ = env.step(np.clip(action.numpy(), low, high))
            rows.append((old_observation, action, log_prob, value[0], *map(torch.tensor, (reward, starts_episode))))
            done, episode_return = float(terminated or truncated), episode_return + reward
            if done:
                returns.append(episode_return)
                observation, episode_return = env.reset()[0], 0.0
            next_observation = torch.as_tensor(observation)
        observations, actions, log_probs, values, rewards, starts = map(torch.stack, zip(*rows, strict=True))
        advantages, last = torch.zeros(args.num_steps), torch.tensor(0.0)  # ---------------------------- advantages
        next_value, continues = policy(next_observation[None])[1][0].detach(), 1 - done
        for t in reversed(range(args.num_steps)):
            delta = rewards[t] + args.gamma * next_value * continues - values[t]
            advantages[t] = last = delta + args.gamma * args.gae_lambda * continues * last
            next_value, continues = values[t], 1 - float(starts[t])
        targets = advantages + values
        for _ in range(args.update_epochs):  # ---------------------------------------------------------- learn
            for part in torch.randperm(args.num_steps).split(args.minibatch_size):
                distribution, value = policy(observations[part])
                ratio = (distribution.log_prob(actions[part]).sum(-1) - log_probs[part]).exp()
                advantage = (advantages[part] - advantages[part].mean()) / (advantages[part].std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss = (-torch.min(ratio * advantage, clipped * advantage).mean()
                        + args.vf_coef * (value - targets[part]).square().mean())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                optimizer.step()
        step = env.baseline_steps + (update + 1) * args.num_steps
        recent = float(np.mean(returns[-20:]))
        writer.add_scalar("train/return_above_zero_action", recent, step)
        writer.add_scalar("train/std", float(policy.log_std.exp().mean()), step)
        print(f"step {step}: return {recent:+.2f} beside the zero action, {step / (time.time() - started):.1f} steps/s")
    writer.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
