"""A model is changed by the package's faster modules only where that was asked for, and given back by `close`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.kernels import switch
from rledit_env.lm.kernels.packing import NAME
from rledit_env.lm.kernels.products import FastConv1D, FastLinear
from rledit_env.lm.kernels.warning import warn_once
from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_model, tiny_tokenizer
from rledit_env.lm.losses import negative_log_likelihood

TEXTS = [("Rome is in", "Peru"), ("The mother tongue of Danielle Darrieux is", "Old Church Slavonic"), ("2 + 2 =", "5")]
MODULES = ["{model.layers,transformer.h}.[1-2].mlp.*"]
IDS = torch.arange(3, 20)[None]


def described(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is but for its weights."""
    return {
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "own attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def parts_left_alone(model: PreTrainedModel) -> dict[str, Any]:
    """As :func:`described`, but for the modes, which change while a model is edited."""
    return {name: part for name, part in described(model).items() if name not in ("modes", "trained")}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def used(lm: EditableLM) -> None:
    """Trace, edit, score and decode."""
    passages = [lm.tokenize(*text) for text in TEXTS]
    trace = lm.trace(passages)
    lm.apply(trace.keys, {m: -0.5 * g for m, g in trace.value_gradients.items()})
    lm.reference_states(passages)
    lm.generate([prompt for prompt, _ in TEXTS])


@pytest.fixture
def no_warning_yet() -> Iterator[None]:
    """Lets what is said once be said again."""
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_model_that_somebody_made_is_not_changed_and_is_given_back_whole(name: str) -> None:
    model = tiny_model(name)
    model.train().requires_grad_(True)
    before, weights = described(model), weights_of(model)
    lm = EditableLM(model, tiny_tokenizer(name), MODULES)
    assert parts_left_alone(model) == {part: before[part] for part in parts_left_alone(model)}
    assert same(weights_of(model), weights)
    used(lm)
    assert parts_left_alone(model) == {part: before[part] for part in parts_left_alone(model)}
    assert not same(weights_of(model), weights)  # it is edited in place
    lm.close()
    assert described(model) == before and same(weights_of(model), weights)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_with_optimize_its_modules_are_faster_ones_until_it_is_closed(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype)
    before, weights = described(model), weights_of(model)
    lm = EditableLM(model, tiny_tokenizer(name), MODULES, optimize=True)
    assert described(model)["classes"] != before["classes"] or model.config._attn_implementation == NAME
    if dtype == torch.float32:
        assert any(isinstance(module, FastLinear | FastConv1D) for module in model.modules())
    if before["attention"] == "sdpa":
        assert model.config._attn_implementation == NAME
    used(lm)
    lm.close()
    assert described(model) == before and same(weights_of(model), weights)
    lm.close()  # a second time changes nothing
    assert described(model) == before and same(weights_of(model), weights)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_numbers_are_the_same_with_and_without_to_rounding(name: str) -> None:
    results = []
    for optimize in (False, True):
        lm = EditableLM(tiny_model(name), tiny_tokenizer(name), MODULES, optimize=optimize)
        passages = [lm.tokenize(*text) for text in TEXTS]
        trace = lm.trace(passages, "all")
        lm.apply(trace.keys, {m: -0.1 * g for m, g in trace.value_gradients.items()})
        with lm.collecting() as (sums,):
            for _, states in lm.answer_chunks(passages):
                negative_log_likelihood(lm.forward, states.hidden, states.targets).sum().backward()
        numbers = {**{f"u {m}": u for m, u in trace.keys.items()}, **{f"ΔW {m}": g for m, g in sums.items()}}
        numbers |= {f"δ {m}": g for m, g in trace.value_gradients.items()}
        numbers |= {"θ₀": torch.cat(lm.reference_states(passages)), "θ": lm.answer_states(passages).hidden}
        results.append((trace.loss, numbers, lm.generate([prompt for prompt, _ in TEXTS])))
    (plain_loss, plain, plain_texts), (loss, numbers, texts) = results
    assert loss == pytest.approx(plain_loss, rel=1e-5) and texts == plain_texts
    for what, tensor in numbers.items():
        assert (tensor - plain[what]).norm() <= 1e-4 * plain[what].norm() + 1e-7, what


def test_a_model_that_is_loaded_by_name_is_optimised_unless_told_otherwise() -> None:
    def fast(**options: Any) -> bool:
        lm = EditableLM.load("tiny-llama", MODULES, dtype="float32", device="cpu", **options)
        return lm.model.config._attn_implementation == NAME

    assert fast() and fast(optimize=None) and fast(optimize=True) and not fast(optimize=False)


def test_a_model_that_cannot_be_edited_is_left_as_it_was() -> None:
    model = tiny_model("tiny-llama").train().requires_grad_(True)
    before = described(model)
    with pytest.raises(ValueError, match="matches no"):
        EditableLM(model, tiny_tokenizer("tiny-llama"), ["model.layers.99.*"], optimize=True)
    assert described(model) == before


@pytest.mark.parametrize("has_run", [False, True])
@torch.no_grad()
def test_a_model_that_divides_its_weights_as_it_runs_is_given_back_with_them_as_they_were(has_run: bool) -> None:
    """RWKV, from its seventh layer on."""
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 7}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)).eval()
    logits = copy.deepcopy(model)(input_ids=IDS).logits
    if has_run:
        model(input_ids=IDS)
    before, weights = described(model), weights_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own forward is used
        lm = EditableLM(model, tiny_tokenizer(), ["*.6.feed_forward.*"])
    used(lm)
    lm.close()
    assert described(model) == before and same(weights_of(model), weights)
    torch.testing.assert_close(model(input_ids=IDS).logits, logits)


# -- several LMs over one model


def test_an_lm_over_a_model_that_another_one_has_given_back_goes_on_rightly() -> None:
    """Passages lie end to end only while the attention keeps them apart."""
    model, tokenizer = tiny_model("tiny-llama"), tiny_tokenizer("tiny-llama")
    first, second = (EditableLM(model, tokenizer, MODULES, optimize=True) for _ in range(2))
    passages = [second.tokenize(*text) for text in TEXTS]
    wanted = second.answer_states(passages).hidden
    assert second.forward.longest_packed > 0
    first.close()
    second.clear_caches()
    assert second.forward.longest_packed == 0 and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(second.answer_states(passages).hidden, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_model_is_tried_with_and_without_even_if_it_was_edited_since(order: tuple[bool, bool]) -> None:
    model, tokenizer = tiny_model("tiny-llama"), tiny_tokenizer("tiny-llama")
    for optimize in order:
        lm = EditableLM(model, tokenizer, MODULES, optimize=optimize)
        assert (model.config._attn_implementation == NAME) == optimize
        used(lm)
        edited = lm.snapshot()
        lm.close()
        lm.restore(edited)  # as if somebody had trained the model


def test_the_copy_of_an_lm_is_closed_by_itself() -> None:
    lm = EditableLM(tiny_model("tiny-llama"), tiny_tokenizer("tiny-llama"), MODULES, optimize=True)
    other = copy.deepcopy(lm)
    classes = described(lm.model)["classes"]
    other.close()
    assert other.model.config._attn_implementation == "sdpa" and described(other.model)["classes"] != classes
    assert lm.model.config._attn_implementation == NAME and described(lm.model)["classes"] == classes
    lm.close()
    assert described(lm.model)["classes"] == described(other.model)["classes"]


def test_an_environment_closes_the_llm_that_it_made_and_no_other(facts: Callable[..., KnowledgeDataset]) -> None:
    settings: dict[str, Any] = {"data": facts("zsre", 4), "num_batches": 2, "batch_size": 2}
    given = EditableLM.load("tiny-llama", MODULES, dtype="float32", device="cpu")
    for model, is_fast in ((given, True), ("tiny-llama", False)):
        env: Any = gym.make("RLEdit-ZsRE-v0", model=model, **settings).unwrapped
        env.reset(seed=0)
        assert env.lm.model.config._attn_implementation == NAME
        env.close()
        assert (env.lm.model.config._attn_implementation == NAME) == is_fast
        assert not any(env.lm.drift().values()) and len(env.lm.prefix_cache) == 0


# -- kernels that do not fit


@pytest.mark.usefixtures("no_warning_yet")
@pytest.mark.parametrize("kernel", ["prefer_fast_norms", "_prefer_fast_attention"])
def test_a_kernel_that_does_not_fit_is_left_out_which_is_said_once(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: PreTrainedModel) -> None:
        model.model.norm.__class__ = FastLinear  # half done
        raise ImportError("cannot import name 'sdpa_mask'\nfrom 'transformers'")

    monkeypatch.setattr(switch, kernel, broken)
    model, plain = tiny_model("tiny-llama"), tiny_model("tiny-llama")
    with pytest.warns(UserWarning, match="does not fit the installed torch or transformers .ImportError") as said:
        lm = EditableLM(model, tiny_tokenizer("tiny-llama"), MODULES, optimize=True)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert type(model.model.norm) is type(plain.model.norm) or kernel != "prefer_fast_norms"
    assert any(isinstance(module, FastLinear) for module in model.modules())  # the others are in
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    used(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditableLM(tiny_model("tiny-llama"), tiny_tokenizer("tiny-llama"), MODULES, optimize=True)
