"""Models of architectures that nobody named: they edit as transformers runs them, or say in one line why not."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agents.corpus import sample_continuations
from agents.locate_then_edit.value_optimisation import ValueConfig, encode_request, optimise_values
from rledit_env.knowledge import EditRecord, UnrelatedFact
from rledit_env.lm.continued import ContinuedForward, continued_forward, subject_states
from rledit_env.lm.delta import load_delta, save_delta
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.kernels import switch as kernels
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer
from rledit_env.lm.losses import kl_divergence, negative_log_likelihood
from rledit_env.lm.suffix import SuffixForward
from rledit_env.lm.weight_sets import WeightSetLM, together
from rledit_env.lm.whole import WholeForward

pytestmark = pytest.mark.filterwarnings("ignore:.*its own forward is used")

_SIZES: dict[str, Any] = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 3}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
_LLAMA: dict[str, Any] = {**_SIZES, **_HEADS, "intermediate_size": 24}
_OLDER: dict[str, Any] = {"vocab_size": 259, "n_embd": 16, "n_layer": 3, "n_head": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SPLIT, WHOLE = SuffixForward, WholeForward
# Architecture → its sizes, and the pass that follows it.
KINDS: dict[str, tuple[dict[str, Any], type]] = {
    "cohere": (_LLAMA, SPLIT),
    "granite": ({**_LLAMA, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}, SPLIT),
    "olmo": (_LLAMA, SPLIT),
    "stablelm": (_LLAMA, SPLIT),
    "phi": ({**_LLAMA, "num_key_value_heads": 4}, SPLIT),
    "mixtral": ({**_LLAMA, **_EXPERTS}, SPLIT),
    "qwen3_moe": ({**_LLAMA, **_EXPERTS, "head_dim": 4, "moe_intermediate_size": 8}, SPLIT),
    "qwen2_moe": ({**_LLAMA, **_EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24}, SPLIT),
    "gptj": ({**_OLDER, "n_positions": 96, "rotary_dim": 4}, SPLIT),
    "gpt_neo": (
        {"vocab_size": 259, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 96,
         "attention_types": [[["global", "local"], 1]], "window_size": 12},
        WHOLE,
    ),
    "falcon": ({**_SIZES, "num_attention_heads": 4}, WHOLE),
    "bloom": (_OLDER, WHOLE),
    "opt": (
        {**_SIZES, "num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False,
         "max_position_embeddings": 96},
        WHOLE,
    ),
    "mpt": ({"vocab_size": 259, "d_model": 16, "n_layers": 3, "n_heads": 4, "max_seq_len": 96}, WHOLE),
    "mamba": ({**_SIZES, "state_size": 4}, SPLIT),
    "rwkv": (_SIZES, WHOLE),
    "recurrent_gemma": (
        {**_LLAMA, "lru_width": 16, "attention_window_size": 8, "head_dim": 4, "num_key_value_heads": 1}, WHOLE
    ),
    "xglm": ({"vocab_size": 259, "d_model": 16, "num_layers": 3, "attention_heads": 4, "ffn_dim": 24}, SPLIT),
    "ctrl": ({"vocab_size": 259, "n_embd": 16, "n_layer": 3, "n_head": 4, "dff": 24, "n_positions": 96}, WHOLE),
}  # fmt: skip
TEXTS = [("Rome is in", "Peru"), ("2 + 2 =", "5"), ("The mother tongue of Ann is", "Czech")]


def own_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of small random weights, none of them zero, so that what an architecture adds is seen in the logits."""
    sizes = {**KINDS[kind][0], "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, **changes}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


def own_lm(kind: str, modules: list[str] | None = None) -> tuple[EditableLM, PreTrainedModel]:
    """An editable LM, and the model by itself, that takes gradients."""
    model = own_model(kind)
    plain = copy.deepcopy(model)
    patterns = list(default_edit_modules("mine", model)) if modules is None else modules
    return EditableLM(model, tiny_tokenizer(), patterns, "mine", optimize=True), plain.requires_grad_(True)


def logits_of(plain: PreTrainedModel, passage: Passage) -> Tensor:
    output: Any = plain(input_ids=torch.tensor([passage.input_ids]), use_cache=False)
    return output.logits[0, list(passage.positions)].float()


def passages_of(lm: EditableLM) -> list[Passage]:
    return [lm.tokenize(prompt, answer) for prompt, answer in TEXTS]


def loss_of(plain: PreTrainedModel, passages: list[Passage]) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    targets = torch.tensor([t for p in passages for t in p.targets])
    return F.cross_entropy(torch.cat([logits_of(plain, p) for p in passages]), targets)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_models_own(kind: str) -> None:
    lm, plain = own_lm(kind, ["*"])
    assert type(lm.forward) is KINDS[kind][1]
    passages = passages_of(lm)
    loss = loss_of(plain, passages)
    loss.backward()
    trace = lm.trace(passages, "all")
    assert trace.loss == pytest.approx(loss.item(), rel=1e-5)
    with lm.collecting() as (sums,):
        for _, states in lm.answer_chunks(passages):
            losses = negative_log_likelihood(lm.forward, states.hidden, states.targets)
            (losses.sum() / sum(len(p.targets) for p in passages)).backward()
    for name in lm.module_shapes:
        expected = plain.get_submodule(name).get_parameter("weight").grad
        assert expected is not None and expected.norm() > 0
        for found in (trace.value_gradients[name].T @ trace.keys[name], sums[name]):
            assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_the_same_if_earlier_tokens_run_ahead(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = own_lm(kind, ["*"])  # attention's projections, too
    traces = []
    for worth_ahead in (1, 10**6):
        monkeypatch.setattr("rledit_env.lm.passes.WORTH_AHEAD", worth_ahead)
        traces.append(lm.trace(passages_of(lm), "answer"))
    ahead, whole = traces
    assert ahead.loss == pytest.approx(whole.loss, rel=1e-5)
    for name in lm.module_shapes:
        for part in ("keys", "value_gradients"):
            found, expected = (getattr(trace, part)[name] for trace in (ahead, whole))
            assert (found - expected).norm() <= 1e-4 * expected.norm(), name


def test_an_output_that_the_model_adds_to_in_place_can_be_the_only_one_edited() -> None:
    lm, plain = own_lm("falcon", ["transformer.h.1.mlp.dense_4h_to_h"])
    passages = passages_of(lm)
    loss_of(plain, passages).backward()
    trace = lm.trace(passages, "all")
    with lm.collecting() as (sums,):
        for _, states in lm.answer_chunks(passages):
            losses = negative_log_likelihood(lm.forward, states.hidden, states.targets)
            (losses.sum() / sum(len(p.targets) for p in passages)).backward()
    for name, found in sums.items():
        expected = plain.get_submodule(name).get_parameter("weight").grad
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(trace.value_gradients[name].T @ trace.keys[name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["cohere", "bloom", "mamba", "recurrent_gemma"])
def test_an_edit_its_kl_and_its_undoing_are_the_models_own(kind: str) -> None:
    lm, plain = own_lm(kind)
    passages = passages_of(lm)
    before = torch.cat([logits_of(plain, p) for p in passages]).detach()
    trace = lm.trace(passages)
    undo = lm.apply(trace.keys, {n: -5.0 * v for n, v in trace.value_gradients.items()})
    with torch.no_grad():
        for name in lm.module_shapes:
            plain.get_submodule(name).weight += lm.weight(name) - lm.original_weight(name)
    after = torch.cat([logits_of(plain, p) for p in passages]).detach()
    states = lm.answer_states(passages)
    torch.testing.assert_close(lm.forward.logits(states.hidden), after, atol=1e-4, rtol=1e-4)
    kl = kl_divergence(lm.forward, states.hidden, torch.cat(lm.reference_states(passages)))
    expected = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert expected.max() > 1e-4
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-3)
    undo()
    torch.testing.assert_close(lm.forward.logits(lm.answer_states(passages).hidden), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["falcon", "rwkv"])
def test_several_streams_meet_their_own_weights_in_one_pass(kind: str) -> None:
    lm, _ = own_lm(kind)
    streams = [WeightSetLM(lm), WeightSetLM(lm)]
    passages = passages_of(lm)
    trace = lm.trace(passages)
    streams[1].apply(trace.keys, {n: -5.0 * v for n, v in trace.value_gradients.items()})
    both = together(streams).trace_batches([passages, passages])
    for stream, found in zip(streams, both, strict=True):
        alone = stream.trace(passages)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        for name in lm.module_shapes:
            torch.testing.assert_close(found.value_gradients[name], alone.value_gradients[name], atol=1e-6, rtol=1e-3)
    assert both[0].loss == pytest.approx(trace.loss, rel=1e-5)
    assert both[1].loss < both[0].loss - 1e-3


@pytest.mark.parametrize("kind", ["cohere", "rwkv", "gpt_neo", "mamba"])
@torch.no_grad()
def test_texts_go_on_as_the_model_alone_continues_them(kind: str) -> None:
    """RWKV takes padding for text: its prompts of different lengths are continued apart."""
    lm, plain = own_lm(kind)
    prompts = [prompt for prompt, _ in TEXTS]
    expected = []
    for prompt in prompts:
        ids = lm.tokenizer(prompt)["input_ids"]
        for _ in range(4):
            output: Any = plain(input_ids=torch.tensor([ids]), use_cache=False)
            ids = [*ids, int(output.logits[0, -1].argmax())]
            if ids[-1] == 1:  # the end
                break
        expected.append(lm.tokenizer.decode(ids[len(lm.tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True))
    assert lm.generate(prompts) == expected


@pytest.mark.parametrize("kind", ["cohere", "rwkv", "mamba"])
def test_sampled_texts_follow_the_models_own_distribution(kind: str) -> None:
    """Of the one likeliest token: the texts are the greedy ones."""
    lm, plain = own_lm(kind)
    starts = torch.tensor([list(b"Rome is"), list(b"2 + 2 =")]) + 3
    found = sample_continuations(lm, starts, 3, torch.Generator().manual_seed(0), top_k=1)
    for row in found.tolist():
        for place in range(starts.shape[1], len(row)):
            with torch.no_grad():
                output: Any = plain(input_ids=torch.tensor([row[:place]]), use_cache=False)
            logits = output.logits[0, -1]
            logits[lm.tokenizer.all_special_ids] = -torch.inf
            assert row[place] == int(logits.argmax())


def request_of(lm: EditableLM) -> list[Any]:
    fact = UnrelatedFact("Bananas are", "yellow")
    records = [
        EditRecord("The home of Ann is", "Peru", ("Ann lives in",), (fact,), "Italy", "Ann", "1"),
        EditRecord("Rome is in", "Chile", ("One finds Rome in",), (fact,), "Italy", "Rome", "2"),
    ]
    return [encode_request(lm, record, ["I know"]) for record in records]


@pytest.mark.parametrize(
    ("kind", "module"),
    [("cohere", "model.layers.1.mlp.down_proj"), ("bloom", "transformer.h.1.mlp.dense_4h_to_h"),
     ("mamba", "backbone.layers.1.mixer.out_proj"), ("gpt_neo", "transformer.h.0.mlp.c_proj")],
)  # fmt: skip
def test_a_value_that_is_found_gives_the_model_its_new_answer(kind: str, module: str) -> None:
    """The vector that is found, added by a hook to the model alone, gives the loss that was found."""
    lm, plain = own_lm(kind, [module])
    requests = request_of(lm)
    config = ValueConfig(steps=5, weight_decay=0.0, kl_weight=0.0, clamp=100.0)
    values = optimise_values(lm, module, requests, config)
    states = subject_states(lm, [module], [r.rewrites[0] for r in requests])
    weight = plain.get_submodule(module).get_parameter("weight")
    bias = getattr(plain.get_submodule(module), "bias", None)
    initial = F.linear(states.keys[module], weight, bias).detach()
    torch.testing.assert_close(values.initial, initial, atol=1e-5, rtol=1e-4)
    for i, request in enumerate(requests):
        losses = []
        for passage in request.rewrites:
            def add(_module: nn.Module, _args: Any, output: Tensor, i: int = i, passage: Passage = passage) -> Tensor:
                moved = output.clone().view(1, -1, output.shape[-1])
                moved[0, passage.subject_position] += values.delta[i]
                return moved.view_as(output)

            handle = plain.get_submodule(module).register_forward_hook(add)
            losses.append(float(loss_of(plain, [passage])))
            handle.remove()
        assert sum(losses) / len(losses) == pytest.approx(float(values.loss[i]), rel=1e-3)
        assert float(values.loss[i]) < float(loss_of(plain, list(request.rewrites))) - 1e-3


def test_passages_run_whole_where_their_tails_give_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = own_lm("cohere", ["model.layers.1.mlp.down_proj"])
    given = [lm.tokenize("The home of Ann is", "Peru", "Ann")]
    assert isinstance(continued_forward(lm, given, 1), ContinuedForward)
    states = ContinuedForward.states
    monkeypatch.setattr(ContinuedForward, "states", lambda self, places: 1.5 * states(self, places))
    lm.forward.continues = None
    assert not isinstance(continued_forward(lm, given, 1), ContinuedForward)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_what_was_edited_is_what_is_saved(kind: str, tmp_path: Any) -> None:
    lm, _ = own_lm(kind)
    trace = lm.trace(passages_of(lm))
    lm.apply(trace.keys, {n: -5.0 * v for n, v in trace.value_gradients.items()})
    lm.save_pretrained(tmp_path / "model")
    save_delta(lm, tmp_path / "delta")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    patched = load_delta(own_model(kind), tmp_path / "delta")
    for name in lm.module_shapes:
        for model in (loaded, patched):
            torch.testing.assert_close(model.get_submodule(name).weight, lm.weight(name), atol=1e-6, rtol=1e-5)
    again = EditableLM.load(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert again.trace(passages_of(lm)).loss == pytest.approx(lm.trace(passages_of(lm)).loss, rel=1e-4)


@torch.no_grad()
def test_a_model_that_divides_its_weights_as_it_runs_is_saved_with_whole_ones(tmp_path: Any) -> None:
    """RWKV, from its seventh layer on, whether or not it has run before."""
    ids = torch.arange(5, 13)[None]
    for has_run in (False, True):
        model = own_model("rwkv", num_hidden_layers=7)
        whole = {name: weight.clone() for name, weight in model.state_dict().items()}
        logits = copy.deepcopy(model)(input_ids=ids).logits
        if has_run:
            model(input_ids=ids)
        lm = EditableLM(model, tiny_tokenizer(), ["*.6.feed_forward.*"])
        lm.save_pretrained(tmp_path / str(has_run))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(has_run))
        assert all(torch.equal(weight, whole[name]) for name, weight in loaded.state_dict().items())
        for each in (lm.model, loaded):
            torch.testing.assert_close(each(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)


# -- which pass, and what it says


def test_a_model_whose_layers_cannot_be_run_alone_is_said_so_in_one_line_once() -> None:
    model = own_model("bloom")
    with pytest.warns(UserWarning, match="^mine: the layers of BloomForCausalLM cannot be run one by one") as said:
        EditableLM(model, tiny_tokenizer(), ["*.0.mlp.*"], "mine")
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditableLM(model, tiny_tokenizer(), ["*.1.mlp.*"], "mine")
        EditableLM(own_model("cohere"), tiny_tokenizer(), ["*.1.mlp.*"], "mine", optimize=True)


def test_a_model_is_checked_once_even_if_it_was_edited_since(monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_model("cohere")
    lm = EditableLM(model, tiny_tokenizer(), ["*.0.mlp.*"])
    lm.add({name: torch.ones(d_out, d_in) for name, (d_in, d_out) in lm.module_shapes.items()})
    monkeypatch.setattr(type(model), "forward", None)  # it is not run again
    assert isinstance(EditableLM(model, tiny_tokenizer(), ["*.1.mlp.*"]).forward, SuffixForward)


def test_our_faster_modules_are_taken_out_where_they_do_not_give_the_models_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("tiny-llama")
    norm = type(model.model.norm)
    wrong = type("Wrong", (norm,), {"forward": lambda self, x: 1.0 + norm.forward(self, x)})
    monkeypatch.setattr(kernels, "prefer_fast_norms", lambda model: setattr(model.model.norm, "__class__", wrong))
    classes = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="our faster modules do not give the logits of LlamaForCausalLM"):
        lm = EditableLM(model, tiny_tokenizer(), ["*.1.mlp.*"], optimize=True)
    assert isinstance(lm.forward, SuffixForward)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_a_half_precision_is_no_other_result(dtype: torch.dtype) -> None:
    for kind in ("cohere", "mixtral"):
        lm = EditableLM(own_model(kind).to(dtype), tiny_tokenizer(), ["*.1.self_attn.o_proj"], optimize=True)
        assert isinstance(lm.forward, SuffixForward)


# -- context, padding


@pytest.mark.parametrize(
    ("kind", "length"), [("gptj", 96), ("mpt", 96), ("bloom", 512), ("mamba", 512), ("cohere", 96)]
)
def test_the_context_is_what_the_configuration_or_else_the_tokenizer_says(kind: str, length: int) -> None:
    lm, _ = own_lm(kind)
    assert lm.context_length == length


def test_nothing_bounds_a_state_space_models_text_where_the_tokenizer_does_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    lm = EditableLM(own_model("mamba"), tokenizer, ["*.in_proj"])
    assert lm.context_length == sys.maxsize
    assert len(lm.tokenize("x" * 600, "y")) == 601


def test_a_tokenizer_without_a_pad_token_is_left_so() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    lm = EditableLM(own_model("cohere"), tokenizer, ["*.1.mlp.*"])
    assert len(lm.generate(["Rome is in", "2"])) == 2
    assert tokenizer.pad_token is None


# -- which modules


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen2_moe", ("model.layers.[0-1].mlp.shared_expert.{gate,up}_proj",)),
        ("mixtral", ("model.layers.[0-1].self_attn.o_proj",)),
        ("rwkv", ("rwkv.blocks.[0-1].feed_forward.key",)),
        ("mamba", ("backbone.layers.[0-1].mixer.in_proj",)),
        ("falcon", ("transformer.h.[0-1].mlp.dense_h_to_4h",)),
        ("opt", ("model.decoder.layers.[0-1].fc1",)),
    ],
)
def test_every_architecture_has_modules_that_are_edited_by_default(kind: str, expected: tuple[str, ...]) -> None:
    assert default_edit_modules("mine", own_model(kind)) == expected


@pytest.mark.parametrize("pattern", ["model.layers.*.mlp.experts.*", "model.layers.0.mlp.experts.1.gate_proj"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_in_one_parameter_are_refused_by_name_with_what_can_be_edited(kind: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"experts of \w+ cannot be edited.* What can be edited: .*o_proj") as caught:
        EditableLM(own_model(kind), tiny_tokenizer(), [pattern])
    assert "\n" not in str(caught.value)


def test_a_module_that_the_forward_does_not_call_is_refused_and_left_out_of_globs() -> None:
    model = own_model("mamba")
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.dt_proj cannot be edited: .* does not call it"):
        EditableLM(model, tiny_tokenizer(), ["backbone.layers.0.mixer.dt_proj"])
    lm = EditableLM(model, tiny_tokenizer(), ["backbone.layers.0.mixer.*"])
    assert {name.rpartition(".")[2] for name in lm.module_shapes} == {"in_proj", "x_proj", "out_proj"}


def test_a_model_without_linear_modules_is_refused() -> None:
    model = tiny_model("tiny-llama")
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear modules inside its decoder layers"):
        EditableLM(model, tiny_tokenizer(), ["*"])


def test_a_model_that_reads_on_both_sides_is_refused() -> None:
    sizes = {**_SIZES, "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 96}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes)).eval()
    with pytest.raises(ValueError, match=r"BertLMHeadModel\) cannot be edited: .* depends on later tokens"):
        EditableLM(model, tiny_tokenizer(), ["*"])


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("tiny-llama")
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised, and a quantised weight cannot be edited"):
        EditableLM(model, tiny_tokenizer(), ["*"])
