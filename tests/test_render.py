"""What the environment shows: the step's facts as text, the episode's curves as a picture, a video of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rledit_env.knowledge import EditRecord, UnrelatedFact
from rledit_env.render import KNOWN, MISSED, TOOK, Scene, curves, text

SOURCE = "bundled sample (open fact tables; not the published CounterFact)"
NAMES = ("generalization", "locality", "backtracking", "regularisation", "drift")
STEP = {"reward": -1.0, **dict.fromkeys(NAMES, 0.1)}


def record(prompt: str, target: str) -> EditRecord:
    return EditRecord(prompt, target, (prompt,), (UnrelatedFact("x", "y"),))


def scene(**changes: Any) -> Scene:
    values: dict[str, Any] = {
        "batch": 2,
        "records": [record("The capital of France is", "Rome"), record("Cats are", "mammals"), record("Up is", "down")],
        "before": [" Paris, a city", " mammals.", " high"],
        "after": [" Rome, a city", " mammals.\nDogs", " high"],
        "info": {"generalization": 1.25, "locality": 0.5, "drift": 0.031, "diverged": False, "batch": 2},
        "reward": -1.75,
    }
    return Scene(**{**values, **changes})


def test_before_any_step_one_line_says_so() -> None:
    line = text(None, SOURCE)
    assert "No step taken yet" in line
    assert SOURCE in line
    assert "\n" not in line


def test_each_fact_has_a_line_that_marks_whether_it_took() -> None:
    lines = text(scene(), SOURCE).splitlines()
    facts = [line for line in lines if line[:2] in (f"{TOOK} ", f"{KNOWN} ", f"{MISSED} ")][:3]
    assert [line[0] for line in facts] == [TOOK, KNOWN, MISSED]
    assert [part.strip() for part in facts[0].split("  ") if part.strip()] == [
        f"{TOOK} The capital of France is", "Rome", "Paris, a city", "Rome, a city"
    ]  # fmt: skip


def test_the_columns_are_aligned_for_narrow_and_wide_characters() -> None:
    records = [record("The capital of France is", "Rome"), record("法国的首都是", "罗马"), record("x" * 200, "Rome")]
    shown = text(scene(records=records, before=["a"] * 3, after=["b"] * 3), SOURCE).splitlines()[3:6]
    wide = [sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in shown]
    assert len(set(wide)) == 1


def test_a_long_prompt_keeps_its_end_which_says_what_is_asked() -> None:
    prompt = "According to the encyclopaedia that my grandmother kept in her kitchen, the capital of France is"
    line = text(scene(records=[record(prompt, "Rome")], before=["a"], after=["b"]), SOURCE).splitlines()[3]
    assert "capital of France is" in line
    assert prompt not in line


def test_line_ends_and_escape_sequences_of_an_answer_do_not_reach_the_terminal() -> None:
    shown = text(scene(records=[record("a", "b")], before=["x\ny\x1b[31m"], after=["\r\n"]), SOURCE)
    assert "\x1b" not in shown
    assert "x y" in shown


def test_the_reward_its_parts_the_drift_and_the_source_are_shown() -> None:
    shown = text(scene(), SOURCE)
    for part in ("reward -1.750", "generalization 1.250", "locality 0.500", "drift so far 0.031", SOURCE, "Batch 3"):
        assert part in shown


def test_a_broken_model_is_named() -> None:
    assert "broke the model" in text(scene(info={"diverged": True, "drift": float("nan")}), SOURCE)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [STEP],
        [STEP, {"reward": -1000.0, "drift": float("inf")}, {**STEP, "generalization": float("nan")}],
        [{"reward": 0.0, "drift": 0.0}] * 5,
        [{f"component_{i}": float(i) for i in range(9)} | STEP] * 2,
    ],
    ids=["none", "one", "gaps", "no reward", "many components"],
)
def test_the_picture_has_one_size_whatever_the_history(history: list[dict[str, float]]) -> None:
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    picture = curves(history, 6)
    assert picture.shape == (544, 960, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 0


def test_the_picture_changes_as_the_episode_goes_on() -> None:
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    assert not np.array_equal(curves([STEP], 6), curves([STEP, {**STEP, "drift": 0.2}], 6))


def test_neither_the_environment_nor_the_curves_touch_pyplot() -> None:
    code = (
        "import sys, rledit_env.env, rledit_env.render as r; assert 'matplotlib' not in sys.modules;"
        "r.curves([], 3); assert 'matplotlib.pyplot' not in sys.modules"
    )
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_ansi_mode_shows_the_answers_before_and_after_the_step(tiny_lm: Any, facts: Any) -> None:
    env = gym.make("RLEdit-ZsRE-v0", model=tiny_lm(), data=facts(), num_batches=2, batch_size=2, render_mode="ansi",
                   disable_env_checker=True)  # fmt: skip
    observation, _ = env.reset(seed=0)
    assert "No step taken yet" in env.render()
    env.step({"keys": observation["keys"], "values": observation["value_gradients"]})
    shown = env.render()
    assert all(column in shown for column in ("prompt", "target", "before", "after"))
    assert env.unwrapped.dataset.source in shown


def test_record_video_writes_a_film_of_the_curves(tmp_path: Path, tiny_lm: Any, facts: Any) -> None:
    pytest.importorskip("moviepy", reason="RecordVideo needs moviepy")
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    env = gym.make("RLEdit-ZsRE-v0", model=tiny_lm(), data=facts(), num_batches=3, batch_size=2,
                   render_mode="rgb_array", disable_env_checker=True)  # fmt: skip
    film = gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda episode: True, disable_logger=True)
    observation, _ = film.reset(seed=0)
    done = False
    while not done:
        values = {m: -0.01 * g for m, g in observation["value_gradients"].items()}
        observation, _, done, _, _ = film.step({"keys": observation["keys"], "values": values})
    film.close()
    files = list(tmp_path.glob("*.mp4"))
    assert len(files) == 1
    assert files[0].stat().st_size > 1000
