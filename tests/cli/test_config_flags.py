"""The flags of `rledit` that are generated from configuration dataclasses."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from agents import HypernetworkConfig, RLEditConfig
from agents.running.probe import ProbeConfig
from rledit_env import cli
from rledit_env.cli.training_reward import reward_of
from rledit_env.reward import RewardConfig

REQUIRED = {"train": ["--env", "RLEdit-ZsRE-v0", "--out", "run"], "probe": ["--out", "probed"]}
BY_HAND = {"components", "penalty", "constraint", "network"}  # other flags say what these are
CONFIGS: dict[type, str] = {
    HypernetworkConfig: "train", RLEditConfig: "train", RewardConfig: "train", ProbeConfig: "probe",
}  # fmt: skip
FIELDS = [(config, f.name) for config in CONFIGS for f in fields(config) if f.name not in BY_HAND]
# A value of every field that is not its default, as it is typed.
TYPED = {
    "rank": "3", "blocks": "1", "aggregation": "mend", "step_size": "0.5", "damping": "2.0", "block": "mend",
    "coefficient": "normalised", "output_units": "input", "prior": "7.0", "prior_source": "text",
    "memory_weight": "2.0", "crisp_energy": "0.9",
    "output_curvature": "0.1", "text": "book.txt", "text_tokens": "128", "normaliser": "continued",
    "warm_up_rows": "9.0", "precision": "bfloat16", "normaliser_scope": "shape in turn",
    "normaliser_variance": "published", "normaliser_epsilon": "1e-06", "eigenvalue_floor": "0.001",
    "loss": "rows", "initial_weights": "unit",
    "step_size_parameter": "direct",
    "credit": "step", "learning_rate": "0.25", "step_size_learning_rate": "0.125", "max_gradient_norm": "3.0",
    "trajectories_per_update": "2", "batches_per_update": "4", "discount": "0.5", "prior_batches": "5",
    "drift_limit": "None", "graph_bytes": "1000", "kl_bound": "0.2", "policy_average": "0.9",
    "clipping": "running sum",
    "backtracking_depth": "3", "backtracking_decay": "0.5", "backtracking_samples": "None", "batch_stride": "2",
    "regularisation": "0.5", "floor": "-5.0", "locality_reference": "previous",
    "num_batches": "3", "batch_size": "5", "steps_per_batch": "7", "token": "all", "layer_stride": "2",
    "finalists": "4", "seed": "11", "run_kinds": "2", "final_batches": "6", "final_batch_size": "8",
    "step_sizes": "0.1 0.2", "run_lengths": "2 4 6",
}  # fmt: skip


def parse(command: str, *arguments: str) -> argparse.Namespace:
    return cli.build_parser(command).parse_args([command, *REQUIRED[command], *arguments])


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=[f"{config.__name__}.{name}" for config, name in FIELDS])
def test_every_field_of_a_configuration_is_a_flag_of_its_name_with_its_default(config: type, name: str) -> None:
    command, flag = CONFIGS[config], f"--{name.replace('_', '-')}"
    default = getattr(parse(command), name)
    if config is not RewardConfig:
        assert default == getattr(config(), name)
    if isinstance(default, bool):
        assert getattr(parse(command, f"--no-{flag[2:]}" if default else flag), name) is not default
        return
    typed = TYPED[name].split() if isinstance(default, tuple) else [TYPED[name]]
    value = getattr(parse(command, flag, *typed), name)
    assert value != default
    assert ([str(part) for part in value] if isinstance(value, tuple) else [str(value)]) == typed


@pytest.mark.parametrize("command", REQUIRED)
def test_the_help_shows_every_generated_flag_with_what_the_docstring_says(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name.replace('_', '-')} " in shown.replace(",", " ")
               for config, name in FIELDS if CONFIGS[config] == command)  # fmt: skip
    said = {"train": "inner width of a residual block. (default: 256)", "probe": "layers in a run. (default: 7)"}
    assert said[command] in shown and ":meth:" not in shown and "``" not in shown
    assert shown.index("--help") < shown.index(said[command]) < shown.index("examples:")


def test_no_two_flags_of_a_command_have_one_name() -> None:
    for command in REQUIRED:
        (commands,) = (a for a in cli.build_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[command]
        names = [a.dest for a in parser._actions] + [name for c in parser.configs.values() for name in c.hints]
        assert len(names) == len(set(names))


def test_a_flag_may_be_abbreviated_where_one_flag_alone_begins_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse("train", "--agg=mend", "--num-b", "3", "--no-warm", "--kl-r", "2")
    assert (options.aggregation, options.num_batches, options.warm_up, options.kl_rate) == ("mend", 3, False, 2.0)
    assert cli.main(["train", *REQUIRED["train"], "--kl", "0.1"]) == 2
    assert "ambiguous option: --kl could match --kl-bound, --kl-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--rank", "four"], ["--block", "memit"], ["--rank"], ["--rank", "1", "2"], ["--rank", "--out", "x", "4"],
     ["--bogus", "1"], ["--steps-per-batch", "few", "--rank", "4"]],
)  # fmt: skip
def test_wrong_usage_of_either_kind_of_flag_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *REQUIRED["train"], *arguments]) == 2
    said = capsys.readouterr().err
    assert said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--step-size", "0"], "--step-size is 0.0; give a positive number"),
     (["--output-curvature", "-1"], "--output-curvature is -1.0; give 0 (none) or more"),
     (["--policy-average", "2"], "--policy-average is 2.0; give a decay from 0 to below 1"),
     (["--batch-stride", "0"], "--batch-stride is 0; give 1 (every batch is scored) or more")],
)  # fmt: skip
def test_what_a_configuration_refuses_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--env", "RLEdit-ZsRE-v0", "--out", str(tmp_path / "run"), *arguments]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rledit train: error: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "reward"),
    [("efficacy", RewardConfig.with_efficacy()), ("paper", RewardConfig.paper()),
     ("keeping", RewardConfig.keeping("zsre"))],
)  # fmt: skip
def test_a_reward_s_own_settings_stay_unless_flags_say_otherwise(name: str, reward: RewardConfig) -> None:
    settings = [f.name for f in fields(RewardConfig) if f.name not in BY_HAND | {"every_step"}]
    made = reward_of(parse("train", "--reward", name))
    assert [getattr(made, f) for f in settings] == [getattr(reward, f) for f in settings]
    assert not made.every_step and made.components.keys() == reward.components.keys()
    other = reward_of(parse("train", "--reward", name, "--backtracking-depth", "2", "--every-step"))
    assert (other.backtracking_depth, other.every_step) == (2, True)
    assert other.backtracking_samples == reward.backtracking_samples
