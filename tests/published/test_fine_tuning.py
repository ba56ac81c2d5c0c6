"""FT-L and FT-M minimise what the published code minimises, computed by hand in float64 on a tiny model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents import FTLAgent, FTLConfig, FTMAgent, FTMConfig, agent_settings, edit_stream, load_agent
from agents.fine_tuning.ft_l import constrained_fine_tuning
from agents.fine_tuning.rounds import loss_and_gradients
from agents.running.editors import EDITORS, configured, find_configs, load_configs
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage

MODULE = "model.layers.2.mlp.down_proj"
OLD = Path(__file__).parent / "first_format" / "ft-l"


@pytest.fixture
def lm(tiny_lm: Callable[..., EditableLM]) -> EditableLM:
    return tiny_lm("tiny-llama", MODULE, torch.float64)


@pytest.fixture
def passages(lm: EditableLM) -> list[Passage]:
    """Three facts with targets of different lengths."""
    pairs = [("The home of Ann is", "Peru"), ("Bob, an old man, lives in", "Oslo town by the sea"), ("X is", "Y")]
    found = [lm.tokenize(*pair) for pair in pairs]
    assert len({len(p.targets) for p in found}) == 3
    return found


def fact_losses(lm: EditableLM, passages: Sequence[Passage], prompt_last: bool) -> list[Tensor]:
    """−log p of each fact's target tokens, by the model alone."""
    losses = []
    for p in passages:
        if prompt_last:  # only the prompt is read
            ids = p.input_ids[: len(p.input_ids) - len(p.targets) + 1]
            log_p = lm.model(input_ids=torch.tensor([ids])).logits[0, -1:].log_softmax(-1).expand(len(p.targets), -1)
        else:
            log_p = lm.model(input_ids=torch.tensor([p.input_ids])).logits[0, -len(p.targets) :].log_softmax(-1)
        losses.append(-log_p.gather(1, torch.tensor(p.targets)[:, None])[:, 0])
    return losses


EXPECTED: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "prompt_last": lambda losses: torch.stack([loss.mean() for loss in losses]).mean(),
    "target_new": lambda losses: torch.stack([loss.mean() for loss in losses]).mean(),
    "pooled": lambda losses: torch.cat(losses).mean(),
}


@pytest.mark.parametrize("objective", EXPECTED)
def test_the_loss_and_its_gradient_are_the_published_ones(
    objective: str, lm: EditableLM, passages: list[Passage]
) -> None:
    loss, gradients = loss_and_gradients(lm, passages, [MODULE], objective)
    weight = lm.model.get_submodule(MODULE).weight.requires_grad_()
    try:
        expected = EXPECTED[objective](fact_losses(lm, passages, objective == "prompt_last"))
        (slope,) = torch.autograd.grad(expected, weight)
    finally:
        weight.requires_grad_(False)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(gradients[MODULE], slope, atol=1e-9, rtol=1e-7)


def test_every_target_token_is_predicted_from_the_prompts_last_position() -> None:
    """p(y₁) = ½, p(y₂) = ¼ at the prompt's last position: (log 2 + log 4) / 2, whatever follows y₁."""
    expected = (math.log(2) + math.log(4)) / 2
    state = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    losses = [-state.expand(2, -1).gather(1, torch.tensor([[0], [1]]))[:, 0]]
    assert float(EXPECTED["prompt_last"](losses)) == pytest.approx(expected)


def test_editors_of_both_names_have_their_own_loss(lm: EditableLM) -> None:
    assert FTLConfig().objective == "prompt_last" and FTMConfig().objective == "target_new"
    shared = {f.name for f in dataclasses.fields(FTLConfig)} - {"objective"}
    assert all(getattr(FTLConfig(), name) == getattr(FTMConfig(), name) for name in shared)
    assert EDITORS["ft-l"].agent_class() is FTLAgent and EDITORS["ft-m"].agent_class() is FTMAgent
    assert (EDITORS["ft-l"].group, EDITORS["ft-l"].step_size) == (EDITORS["ft-m"].group, EDITORS["ft-m"].step_size)


def published_fine_tuning(
    lm: EditableLM, passages: Sequence[Passage], config: FTLConfig, prompt_last: bool
) -> Tensor:
    """ΔW by PyTorch's Adam and clamp on the model's own weight, as the published loop has it."""
    weight = lm.model.get_submodule(MODULE).weight.requires_grad_()
    start = weight.detach().clone()
    adam = torch.optim.Adam([weight], lr=config.learning_rate, weight_decay=0)
    size = config.batch_size or len(passages)
    try:
        for _ in range(config.steps):
            seen = 0.0
            for first in range(0, len(passages), size):
                part = passages[first : first + size]
                adam.zero_grad()
                loss = torch.stack([losses.mean() for losses in fact_losses(lm, part, prompt_last)]).mean()
                seen += float(loss.detach()) * len(part)
                if float(loss.detach()) >= config.loss_goal:
                    loss.backward()
                    adam.step()
                with torch.no_grad():
                    weight.copy_(weight.clamp(start - config.epsilon, start + config.epsilon))
            if seen / len(passages) < config.loss_goal:
                break
        return weight.detach() - start
    finally:
        weight.requires_grad_(False)
        with torch.no_grad():
            weight.copy_(start)


@pytest.mark.parametrize("batch_size", [64, 2, 1])
@pytest.mark.parametrize("config_class", [FTLConfig, FTMConfig])
def test_fine_tuning_is_adam_and_a_clamp_after_every_step(
    config_class: type[FTLConfig], batch_size: int, lm: EditableLM, passages: list[Passage]
) -> None:
    # The goal lies on the way: some parts of a round are left out, as their loss is below it.
    config = config_class(MODULE, steps=8, learning_rate=2e-2, epsilon=5e-2, loss_goal=3.0, batch_size=batch_size)
    expected = published_fine_tuning(lm, passages, config, config_class is FTLConfig)
    found = constrained_fine_tuning(lm, passages, [MODULE], config)[MODULE]
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert float((expected.abs() > 0.999 * config.epsilon).double().mean()) > 0.05  # the clamp was at work


# Published hyperparameter files: ROME's and MEMIT's for GPT, EasyEdit's for Llama-3 and Mistral.
FILES: dict[str, tuple[str, float, int]] = {
    "openai-community/gpt2-xl": ("transformer.h.0.mlp.c_proj", 5e-4, 64),
    "EleutherAI/gpt-j-6b": ("transformer.h.0.mlp.fc_out", 5e-5, 64),
    "mistralai/Mistral-7B-v0.1": ("model.layers.21.mlp.down_proj", 5e-5, 1),
    "meta-llama/Meta-Llama-3-8B": ("model.layers.21.mlp.down_proj", math.inf, 1),
}


@pytest.mark.parametrize("model", FILES)
def test_a_models_file_has_the_layer_and_epsilon_published_for_it(model: str) -> None:
    editor = configured(EDITORS["ft-l"], load_configs(find_configs(model), "counterfact"))
    module, epsilon, batch_size = FILES[model]
    assert editor.env["edit_modules"] == [module]
    config = editor.configuration()
    assert config == FTLConfig(None, 25, 5e-4, epsilon, "current", 1e-2, "prompt_last", batch_size)
    assert configured(EDITORS["ft-m"], load_configs(find_configs(model), "zsre")).configuration().steps == 25


def test_an_agent_of_the_first_format_fine_tunes_as_it_did(
    tiny_lm: Callable[..., EditableLM], make_env: Callable[..., Any]
) -> None:
    assert agent_settings(OLD)["format"] == 1
    env = make_env(
        "counterfact", model=tiny_lm("tiny-llama", "model.layers.1.mlp.down_proj"), num_batches=3, token="subject",
        array_backend="torch", reward="none",
    )  # fmt: skip
    agent: Any = load_agent(OLD, env)
    assert (agent.config.objective, agent.config.batch_size) == ("pooled", None)
    kept = load_file(OLD / "expected.safetensors")
    (module,) = env.lm.module_shapes
    env.reset(seed=0)
    observation, *_ = env.step({"updates": {}})
    env.lm.restore({module: kept[f"before/{module}"]})
    update = agent.predict(observation)[0]["updates"][module]
    change = kept[f"after/{module}"] - kept[f"before/{module}"]
    assert float((update - change).norm() / change.norm()) < 1e-2


def test_an_agent_of_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    FTLAgent(None).save(tmp_path)
    path = tmp_path / "agent.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(ValueError, match="later version.*format 9.*save the agent again"):
        load_agent(tmp_path)


@pytest.mark.parametrize("agent_class", [FTLAgent, FTMAgent])
def test_both_edit_a_stream(agent_class: Any, lm: EditableLM, make_env: Callable[..., Any]) -> None:
    env = make_env("counterfact", model=lm, num_batches=2, array_backend="torch", reward="none")
    log = edit_stream(env, agent_class(env, agent_class.config_class(steps=2)), seed=0)
    assert log.facts == 4 and min(log.update_norms) > 0
