"""v*: the loss is the paper's, its gradient autograd's, and the facts of a batch do not touch each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.base import NotApplicable
from agents.locate_then_edit.value_optimisation import (
    Request,
    ValueConfig,
    _Pass,
    encode_request,
    optimise_values,
    up_to_subject,
)
from rledit_env.knowledge import EditRecord, UnrelatedFact
from rledit_env.lm.continued import subject_states
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.loading.tiny import TINY_NAMES


def output_projection(name: str) -> str:
    return "transformer.h.1.mlp.c_proj" if "gpt2" in name else "model.layers.1.mlp.down_proj"


def fact(prompt: str, target: str, subject: str | None) -> EditRecord:
    return EditRecord(prompt, target, ("x",), (UnrelatedFact("Bananas are", "yellow"),), None, subject, "list, item 1")


FACTS = (
    fact("The home of Ann is", "Peru", "Ann"), fact("Bob, an old man, lives in", "Oslo town", "Bob"),
    fact("X is in", "Rome", "X"),
)  # fmt: skip
CONTEXTS = ("I went there", "You know")


def requests(lm: EditableLM) -> list[Request]:
    return [encode_request(lm, record, CONTEXTS) for record in FACTS]


def direct_loss(lm: EditableLM, module: str, request: Request, delta: Tensor, config: ValueConfig) -> Tensor:
    """The loss without weight decay, from the whole model run on each passage alone."""

    def log_p(passage: Passage, vector: Tensor | None) -> Tensor:
        def add(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            place = torch.zeros(output.shape[1], 1, dtype=output.dtype)
            place[passage.subject_position] = 1
            return output if vector is None else output + place * vector

        handle = lm.model.get_submodule(module).register_forward_hook(add)
        logits = lm.model(input_ids=torch.tensor([passage.input_ids])).logits[0, list(passage.positions)]
        handle.remove()
        return logits.double().log_softmax(-1)

    nll = [-log_p(p, delta).gather(1, torch.tensor(p.targets)[:, None]).mean() for p in request.rewrites]
    essence = request.essence
    if config.kl == "subject":  # what the LLM gives right after the subject
        essence = Passage(essence.input_ids[: (essence.subject_position or 0) + 1], (0,), essence.subject_position)
    old, new = log_p(essence, None).detach(), log_p(essence, delta)
    kl = (new.exp() * (new - old)).sum() if config.kl == "subject" else (old.exp() * (old - new)).sum()
    return torch.stack(nll).mean() + config.kl_weight * kl


@pytest.mark.parametrize("kl", ["subject", "essence"])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_loss_and_gradient_are_those_of_the_whole_model(
    name: str, kl: Any, tiny_lm: Callable[..., EditableLM]
) -> None:
    config = ValueConfig(kl=kl, kl_weight=0.3)
    module = output_projection(name)
    lm = tiny_lm(name, module, torch.float64)
    every = requests(lm)
    if kl == "subject":
        running = _Pass(lm, module, [replace(r, essence=up_to_subject(r.essence)) for r in every])
    else:
        running = _Pass(lm, module, every)
    *_, reference = running.at_rest()
    width = lm.module_shapes[module][1]
    delta = torch.randn(len(every), width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses, gradient = running.losses(delta, reference, config)
    for i, request in enumerate(every):
        leaf = delta[i].clone().requires_grad_()
        expected = direct_loss(lm, module, request, leaf, config)
        (slope,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(losses[i], expected.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient[i], slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 7.1])
def test_a_batch_is_optimised_as_each_of_its_facts_alone(
    threshold: float, tiny_lm: Callable[..., EditableLM]
) -> None:
    module = output_projection("tiny-llama")
    lm = tiny_lm("tiny-llama", module, torch.float64)
    every = requests(lm)
    config = ValueConfig(steps=12, loss_threshold=threshold, clamp=40)
    together = optimise_values(lm, module, every, config)
    for i, request in enumerate(every):
        alone = optimise_values(lm, module, [request], config)
        torch.testing.assert_close(together.delta[i], alone.delta[0], atol=1e-5, rtol=1e-5)
        assert together.steps[i] == alone.steps[0]
    assert threshold == 0.0 or len(set(together.steps.tolist())) > 1  # some facts did end earlier than others


def test_one_fact_is_optimised_by_torchs_adam(tiny_lm: Callable[..., EditableLM]) -> None:
    module = output_projection("tiny-llama")
    lm = tiny_lm("tiny-llama", module, torch.float64)
    (request, *_) = requests(lm)
    config = ValueConfig(steps=7, loss_threshold=0.0, clamp=1e9, weight_decay=0.7, kl_weight=0.3)
    found = optimise_values(lm, module, [request], config)
    delta = torch.zeros(lm.module_shapes[module][1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.learning_rate)
    for _ in range(config.steps - 1):
        adam.zero_grad()
        decay = config.weight_decay * delta.norm() / found.initial[0].norm() ** 2
        (direct_loss(lm, module, request, delta, config) + decay).backward()
        adam.step()
    torch.testing.assert_close(found.delta[0], delta.detach(), atol=1e-4, rtol=1e-4)


def test_no_value_moves_further_than_the_clamp(tiny_lm: Callable[..., EditableLM]) -> None:
    module = output_projection("tiny-llama")
    lm = tiny_lm("tiny-llama", module)
    values = optimise_values(lm, module, requests(lm), ValueConfig(steps=2, clamp=0.3))
    ratio = values.delta.norm(dim=1) / values.initial.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3))  # at this learning rate all reach it


def test_the_clamp_may_be_relative_to_the_layers_state(tiny_lm: Callable[..., EditableLM]) -> None:
    module = output_projection("tiny-llama")
    lm = tiny_lm("tiny-llama", module)
    every = requests(lm)
    values = optimise_values(lm, module, every, ValueConfig(steps=5, clamp=0.1, relative_to="state"))
    states = subject_states(lm, [module], [request.rewrites[0] for request in every]).hidden
    torch.testing.assert_close(values.delta.norm(dim=1), 0.1 * states.norm(dim=1))
    with pytest.raises(ValueError, match="'output' or 'state'"):
        ValueConfig(relative_to="both")  # type: ignore[arg-type]


def test_optimisation_lowers_the_loss_and_leaves_the_model_alone(tiny_lm: Callable[..., EditableLM]) -> None:
    module = output_projection("tiny-llama")
    lm = tiny_lm("tiny-llama", module)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    # Without the divergence: what δ can do for an answer in a random model is little beside it.
    start = optimise_values(lm, module, requests(lm), ValueConfig(steps=1, kl_weight=0.0))
    end = optimise_values(lm, module, requests(lm), ValueConfig(steps=31, clamp=100, kl_weight=0.0))
    assert (end.loss < start.loss - 0.03).all()
    assert (start.delta == 0).all() and torch.equal(start.initial, end.initial)
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_a_context_that_names_the_subject_is_left_out(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm("tiny-llama", output_projection("tiny-llama"))
    request = encode_request(lm, FACTS[0], ("Ann went there", "You know"))
    assert len(request.rewrites) == 2
    assert lm.tokenizer.decode(request.rewrites[1].input_ids).startswith("You know. The home of Ann is")
    assert lm.tokenizer.decode(request.essence.input_ids) == "Ann is a"


@pytest.mark.parametrize("subject", [None, "Zoe"])
def test_a_fact_without_a_subject_in_its_prompt_is_not_applicable(
    subject: str | None, tiny_lm: Callable[..., EditableLM]
) -> None:
    lm = tiny_lm("tiny-llama", output_projection("tiny-llama"))
    with pytest.raises(NotApplicable, match="list, item 1.*subject"):
        encode_request(lm, fact("The home of Ann is", "Peru", subject))


def test_a_context_comes_between_a_chat_template_and_the_prompt(tiny_lm: Callable[..., EditableLM]) -> None:
    lm, plain = tiny_lm(), fact("Anna met Ann in", "Peru", "Ann")
    lead, tail = "<bos>user\n", "<eos>\n<bos>assistant\n"
    chat = replace(plain, prompt=lead + plain.prompt + tail, subject_start=len(lead) + 9, lead=len(lead))
    alone, after = encode_request(lm, chat, ("You know",)).rewrites
    text = lm.tokenizer.decode(after.input_ids + after.targets[-1:])
    assert text == f"{lead}You know. Anna met Ann in{tail}Peru"
    for passage in (alone, after):
        assert lm.tokenizer.decode(passage.input_ids[: (passage.subject_position or 0) + 1]).endswith("Anna met Ann")


def test_a_chat_that_was_written_out_is_seen_without_contexts(tiny_lm: Callable[..., EditableLM]) -> None:
    chat = fact("<bos>user\nAnn?<eos>\n<bos>assistant\n", "Peru", "Ann")
    assert len(encode_request(tiny_lm(), chat, ("You know",)).rewrites) == 1
