"""Passages run from their subject's last token on give what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rledit_env.lm.continued import ContinuedForward, subject_states, with_updates
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.loading.tiny import TINY_NAMES
from rledit_env.lm.names import module_layer


def output_projection(name: str, layer: int = 1) -> str:
    return f"transformer.h.{layer}.mlp.c_proj" if "gpt2" in name else f"model.layers.{layer}.mlp.down_proj"


def passages(lm: EditableLM) -> list[Passage]:
    """With heads of several lengths, one of them as short as it can be, and tails of several lengths."""
    texts = [
        ("A is in", "Rome", "A"),
        ("The home of the painter Ann is in", "Oslo town", "Ann"),
        ("I know that Bob, who is a friend of mine, has always lived in", "Peru", "Bob"),
    ]
    return [lm.tokenize(prompt, answer, subject) for prompt, answer, subject in texts]


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_continued_pass_gives_the_whole_models_states_in_every_architecture(
    name: str, dtype: torch.dtype, tiny_lm: Callable[..., EditableLM], full_logits: Callable[..., Tensor]
) -> None:
    lm = tiny_lm(name, output_projection(name), dtype)
    given = passages(lm)
    with torch.no_grad():
        forward = ContinuedForward(lm, given, 1)
        final = forward.run_to(forward.hidden, forward.places(given), forward.layout)
        logits = forward.logits(forward.norm(final))
        whole = torch.cat([full_logits(lm, p) for p in given])
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits, whole.to(logits), atol=tolerance * float(whole.abs().max()), rtol=0)


def test_a_continued_pass_can_be_run_again_with_the_same_result(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm("tiny-llama", output_projection("tiny-llama"))
    with torch.no_grad():
        forward = ContinuedForward(lm, passages(lm), 1)
        once, twice = (forward.run(forward.hidden, forward.layout) for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_subject_states_are_the_modules_inputs_and_the_layers_outputs_at_the_subject(
    name: str, tiny_lm: Callable[..., EditableLM]
) -> None:
    modules = [output_projection(name, 1), output_projection(name, 2)]
    lm = tiny_lm(name, modules[0].replace(".1.", ".[1-2]."))
    given = passages(lm)
    states = subject_states(lm, modules, given)
    for row, passage in enumerate(given):
        seen: dict[str, Tensor] = {}

        def keep(place: str, seen: dict[str, Tensor] = seen) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                seen[place] = args[0]
                seen[f"{place} output"] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [lm.model.get_submodule(m).register_forward_hook(keep(m)) for m in modules]
        handles.append(lm.forward.layers[2].register_forward_hook(keep("layer")))
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([passage.input_ids]))
        for handle in handles:
            handle.remove()
        for m in modules:
            torch.testing.assert_close(states.keys[m][row], seen[m][0, passage.subject_position], atol=1e-5, rtol=1e-4)
        expected = seen["layer output"][0, passage.subject_position]
        torch.testing.assert_close(states.hidden[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_running_with_updates_is_running_with_changed_weights(
    name: str, tiny_lm: Callable[..., EditableLM], full_logits: Callable[..., Tensor]
) -> None:
    module = output_projection(name)
    lm = tiny_lm(name, module)
    passage = passages(lm)[1]
    d_in, d_out = lm.module_shapes[module]
    update = 0.3 * torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    before = lm.snapshot()
    with torch.no_grad(), with_updates(lm, {module: update}):
        assumed = full_logits(lm, passage)
    assert torch.equal(before[module], lm.weight(module))
    lm.add({module: update})
    with torch.no_grad():
        torch.testing.assert_close(assumed, full_logits(lm, passage), atol=1e-4, rtol=1e-4)


def test_a_passage_without_a_subject_is_refused(tiny_lm: Callable[..., EditableLM]) -> None:
    lm = tiny_lm("tiny-llama", output_projection("tiny-llama"))
    with pytest.raises(ValueError, match="no subject"):
        ContinuedForward(lm, [lm.tokenize("It is", "so")], 1)


def test_the_layer_is_read_from_a_modules_name() -> None:
    assert module_layer("model.layers.17.mlp.down_proj") == 17 and module_layer("transformer.h.3.mlp.c_proj") == 3

