"""Draw an episode of each environment, with the default model and the agent that ships: docs/assets/KIND.gif.

    python docs/tools/episode_gif.py                # all three; minutes each on two cores
    python docs/tools/episode_gif.py --kinds zsre

Above, the step's facts with the answers before and after the update (`render_mode="ansi"`); below, the reward and its
parts so far (`render_mode="rgb_array"`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from agents import agent_settings, find_agent, load_agent
from agents.base import act
from rledit_env import render
from rledit_env.reward import RewardConfig

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = {"zsre": "ZsRE", "counterfact": "CounterFact", "fever": "FEVER"}
WIDTH, TEXT_HEIGHT, DPI = 960, 250, 100
SMALL = (720, 596)  # of the GIF's frames
COLOURS, MILLISECONDS, LAST = 48, 900, 4000


def text_picture(text: str) -> np.ndarray:
    """The text in a fixed-width font, (TEXT_HEIGHT, WIDTH, 3) uint8."""
    figure = Figure(figsize=(WIDTH / DPI, TEXT_HEIGHT / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.03, 0.93, text, family="monospace", fontsize=8.4, va="top", color=render.INK, linespacing=1.35)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def frame(env: Any) -> Image.Image:
    """The present step of an environment."""
    curves = render.curves(env.history, env.episode_steps)
    text = render.text(env.episode.scene, env.dataset.source)
    picture = Image.fromarray(np.concatenate([text_picture(text), curves]))
    return picture.resize(SMALL, Image.Resampling.LANCZOS).quantize(COLOURS, dither=Image.Dither.NONE)


def episode(kind: str, batches: int, size: int, presentations: int, seed: int) -> tuple[list[Image.Image], Any]:
    """The frames of an episode, and its environment."""
    folder = find_agent("default", kind)
    settings = agent_settings(folder)["environment"]
    chosen = {k: settings[k] for k in ("model", "edit_modules", "token", "steps_per_batch", "present_until", "contexts")
              if settings.get(k) is not None}  # fmt: skip
    chosen["steps_per_batch"] = min(chosen["steps_per_batch"], presentations)
    reward = replace(RewardConfig.with_efficacy(), backtracking_depth=1)
    env: Any = gym.make(
        f"rledit_env:RLEdit-{NAMES[kind]}-v0", split="eval", num_batches=batches, batch_size=size, reward=reward,
        array_backend="torch", render_mode="ansi", disable_env_checker=True, **chosen,
    )  # fmt: skip
    agent = load_agent(folder, env)
    agent.reset()
    observation, _ = env.reset(seed=seed)
    frames, done = [], False
    while not done:
        observation, _, terminated, truncated, _ = env.step(act(agent, observation))
        done = terminated or truncated
        frames.append(frame(env.unwrapped))
        print(f"{kind}: step {len(frames)}", flush=True)
    return frames, env.unwrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--batches", type=int, default=3, help="batches of the episode")
    parser.add_argument("--size", type=int, default=4, help="facts of a batch")
    parser.add_argument("--presentations", type=int, default=5, help="most presentations of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    for kind in options.kinds:
        frames, env = episode(kind, options.batches, options.size, options.presentations, options.seed)
        path = options.out / f"{kind}.gif"
        durations = [MILLISECONDS] * (len(frames) - 1) + [LAST]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
        scores = env.evaluate(generate=False).as_dict()
        print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB; {json.dumps(scores)}")


if __name__ == "__main__":
    main()
