"""Tests of the editable LM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import load_model
from rledit_env.lm.loading.placement import resolve_dtype
from rledit_env.lm.loading.tiny import TINY_NAMES
from rledit_env.lm.names import expand_globs

TEXTS = [
    ("Rome is in", "Peru", "Rome"),
    (
        "The mother tongue of Danielle Darrieux, who was born in Bordeaux, is",
        "Old Church Slavonic",
        "Danielle Darrieux",
    ),
    ("2 + 2 =", "5", None),
]
NAMES = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(30) for kind in ("gate", "up", "down")]


def passages_of(lm: EditableLM):
    return [lm.tokenize(prompt, answer, subject) for prompt, answer, subject in TEXTS]


def random_factors(lm: EditableLM, rows: int = 3, scale: float = 0.05, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {m: scale * torch.randn(rows, shape[side], generator=generator) for m, shape in lm.module_shapes.items()}
        for side in (0, 1)
    )


# -- which modules


def test_globs_know_stars_braces_and_numeric_ranges_and_keep_the_models_order():
    found = expand_globs(["model.layers.[9-11].mlp.{up,gate}_proj", "*.2.mlp.down_proj"], NAMES)
    assert found == [
        "model.layers.2.mlp.down_proj",
        *(f"model.layers.{i}.mlp.{kind}_proj" for i in (9, 10, 11) for kind in ("gate", "up")),
    ]


def test_a_pattern_that_matches_nothing_is_named_with_names_that_exist():
    with pytest.raises(ValueError, match=r"pattern 'model\.layers\.99\.mlp\.up_proj' matches no.*layers\.0"):
        expand_globs(["*.1.*", "model.layers.99.mlp.up_proj"], NAMES)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_module_shapes_are_inputs_by_outputs_for_linear_and_conv1d_alike(tiny_lm, name):
    lm = tiny_lm(name)
    hidden, inner = 32, 64 if name == "tiny-gpt2" else 48
    wide = [shape for m, shape in lm.module_shapes.items() if m.endswith(("mlp.c_fc", "gate_proj", "up_proj"))]
    narrow = [shape for m, shape in lm.module_shapes.items() if m.endswith(("mlp.c_proj", "down_proj"))]
    assert set(wide) == {(hidden, inner)}
    assert set(narrow) == {(inner, hidden)}


def test_neither_embeddings_nor_the_output_head_can_be_edited():
    with pytest.raises(ValueError, match="lm_head"):
        EditableLM.load("tiny-llama", "lm_head", dtype="float32", device="cpu")


def test_a_slow_tokenizer_is_refused():
    model, tokenizer = load_model("tiny-llama")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        EditableLM(model, Slow(), ["*.3.*"])


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="dtype is 'float31'"):
        resolve_dtype("float31", torch.device("cpu"))


# -- text


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_passage_scores_exactly_the_answer_and_knows_where_the_subject_ends(tiny_lm, name):
    lm = tiny_lm(name)
    for (prompt, answer, subject), passage in zip(TEXTS, passages_of(lm), strict=True):
        ids = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
        assert list(passage.input_ids) == ids[:-1]
        assert lm.tokenizer.decode(passage.targets) == f" {answer}"
        assert [ids[p + 1] for p in passage.positions] == list(passage.targets)
        if subject is None:
            assert passage.subject_position is None
        else:
            upto = lm.tokenizer.decode(ids[: passage.subject_position + 1], skip_special_tokens=True)
            assert upto == prompt[: prompt.find(subject) + len(subject)]


@pytest.mark.parametrize("subject", ["Paris", ""])
def test_a_subject_that_the_prompt_does_not_name_has_no_position(tiny_lm, subject):
    assert tiny_lm().tokenize("Rome is in", "Peru", subject).subject_position is None


def test_a_passage_beyond_the_context_names_its_place(tiny_lm):
    with pytest.raises(ValueError, match="facts.jsonl, line 3: .*600 tokens.*holds 512"):
        tiny_lm().tokenize("x" * 595, "Peru", origin="facts.jsonl, line 3")


# -- the gradient


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_trace_gives_the_mean_answer_token_loss_and_rows_in_the_passages_order(tiny_lm, full_logits, name):
    lm = tiny_lm(name)
    passages = passages_of(lm)
    trace = lm.trace(passages)
    with torch.no_grad():
        losses = [F.cross_entropy(full_logits(lm, p), torch.tensor(p.targets), reduction="none") for p in passages]
    assert trace.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert trace.owner.tolist() == [i for i, p in enumerate(passages) for _ in p.targets]


@pytest.mark.parametrize("token", ["answer", "subject", "subject+answer"])
@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-gpt2"])
def test_every_choice_of_tokens_takes_its_rows_from_the_whole_gradient(tiny_lm, name, token):
    lm = tiny_lm(name)
    passages = passages_of(lm)
    whole, part = lm.trace(passages, "all"), lm.trace(passages, token)
    starts = torch.tensor([0, *(len(p) for p in passages)]).cumsum(0)
    rows = [int(starts[i]) + c for i, p in enumerate(passages) for c in p.chosen_positions(token)]
    assert part.loss == pytest.approx(whole.loss, rel=1e-6)
    for m in lm.module_shapes:
        torch.testing.assert_close(part.keys[m], whole.keys[m][rows], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.value_gradients[m], whole.value_gradients[m][rows], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("token", ["answer", "all"])
def test_a_trace_in_many_small_passes_is_one_large_pass(tiny_lm, monkeypatch, token):
    lm = tiny_lm("tiny-mistral")
    whole = lm.trace(passages_of(lm), token)
    monkeypatch.setattr(lm, "max_tokens_per_pass", 1)
    pieces = lm.trace(passages_of(lm), token)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
    assert torch.equal(pieces.owner, whole.owner)
    for m in lm.module_shapes:
        torch.testing.assert_close(pieces.keys[m], whole.keys[m], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pieces.value_gradients[m], whole.value_gradients[m], atol=1e-6, rtol=1e-4)


def test_a_trace_leaves_weights_and_gradients_alone(tiny_lm):
    lm = tiny_lm()
    before = {n: p.clone() for n, p in lm.model.state_dict().items()}
    lm.trace(passages_of(lm))
    assert all(torch.equal(before[n], p) for n, p in lm.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not any(module._forward_hooks for module in lm.model.modules())


# -- the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_the_model_runs_with_the_master_weights_rounded_to_its_precision(tiny_lm, name, dtype):
    lm = tiny_lm(name, dtype=dtype)
    lm.apply(*random_factors(lm))
    modules = dict(lm.model.named_modules())
    for m in lm.module_shapes:
        run = modules[m].weight.t() if name == "tiny-gpt2" else modules[m].weight
        assert lm.weight(m).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(run, lm.weight(m).to(dtype))
        assert not torch.equal(lm.weight(m), lm.original_weight(m))


def test_small_updates_add_up_where_the_model_itself_runs_in_bfloat16(tiny_lm):
    lm = tiny_lm(dtype=torch.bfloat16)
    m = next(iter(lm.module_shapes))
    keys, values = random_factors(lm, scale=0.003)
    for _ in range(300):
        lm.apply(keys, values)
    expected = 300 * values[m].T @ keys[m]
    assert (expected / 300).abs().max() < 2**-10 * lm.original_weight(m).abs().mean()  # each step is lost in bfloat16
    torch.testing.assert_close(lm.weight(m) - lm.original_weight(m), expected, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_a_snapshot_comes_back_bit_for_bit_and_is_no_view(tiny_lm, name, dtype):
    lm = tiny_lm(name, dtype=dtype)
    lm.apply(*random_factors(lm))
    snapshot, state = lm.snapshot(), {n: p.clone() for n, p in lm.model.state_dict().items()}
    lm.apply(*random_factors(lm, seed=1))
    assert not any(torch.equal(snapshot[m], lm.weight(m)) for m in lm.module_shapes)
    lm.restore(snapshot)
    assert all(torch.equal(snapshot[m], lm.weight(m)) for m in lm.module_shapes)
    assert all(torch.equal(state[n], p) for n, p in lm.model.state_dict().items())


def bits(tensor):
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


# A small update, a large one, and one whose product has no finite numbers.
@pytest.mark.parametrize("dense, scale", [(d, s) for d in (0, 1) for s in (1e-3, 1.0, 1e12)] + [(0, 1e30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_an_update_is_taken_back_bit_for_bit(tiny_lm, name, dtype, dense, scale):
    lm = tiny_lm(name, dtype=dtype)
    lm.apply(*random_factors(lm, seed=1))
    for m in lm.module_shapes:  # minus zero, which is zero and yet is not, and what is lost in any sum
        lm.weight(m)[0, :2] = torch.tensor([-0.0, 1e-42])
    lm.restore(lm.snapshot())  # the model's own copies, too
    before, state = lm.snapshot(), {n: p.clone() for n, p in lm.model.state_dict().items()}
    keys, values = random_factors(lm, scale=scale)
    dense_update = {m: values[m].T @ keys[m] for m in keys} if dense else {}
    undo = lm.add(dense_update) if dense else lm.apply(keys, values)
    assert not any(torch.equal(before[m], lm.weight(m)) for m in lm.module_shapes)
    undo()
    assert all(torch.equal(bits(before[m]), bits(lm.weight(m))) for m in lm.module_shapes)
    assert all(torch.equal(state[n], p) for n, p in lm.model.state_dict().items())


@pytest.mark.parametrize("what", ["a factor that does not fit", "_refresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_fails_at_a_later_module_leaves_all_as_they_were(tiny_lm, monkeypatch, dtype, what):
    lm = tiny_lm(dtype=dtype)
    before, state = lm.snapshot(), {n: p.clone() for n, p in lm.model.state_dict().items()}
    keys, values = random_factors(lm, scale=0.01)
    last = list(keys)[-1]
    if what == "_refresh":
        real = lm.weights._refresh

        def fails(name):
            if name == last:
                monkeypatch.undo()
                raise RuntimeError("out of memory")
            real(name)

        monkeypatch.setattr(lm.weights, "_refresh", fails)
    else:
        keys[last] = keys[last][:, 1:]
    with pytest.raises(RuntimeError):
        lm.apply(keys, values)
    assert all(torch.equal(before[m], lm.weight(m)) for m in lm.module_shapes)
    assert all(torch.equal(state[n], p) for n, p in lm.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_within_original_weights_the_model_is_the_pre_trained_one_and_afterwards_the_edited_one(
    tiny_lm, full_logits, name, dtype
):
    lm = tiny_lm(name, dtype=dtype)
    passage = passages_of(lm)[1]
    with torch.no_grad():
        original = full_logits(lm, passage)
        lm.apply(*random_factors(lm))
        edited = full_logits(lm, passage)
        with pytest.raises(KeyboardInterrupt), lm.original_weights():
            assert torch.equal(full_logits(lm, passage), original)
            raise KeyboardInterrupt
        assert torch.equal(full_logits(lm, passage), edited)
        assert not torch.equal(original, edited)
        lm.apply(*random_factors(lm, seed=1))  # the model still runs with the master weights
        assert not torch.equal(full_logits(lm, passage), edited)


def test_reference_states_are_the_original_models_whenever_they_are_asked_for(tiny_lm):
    lm = tiny_lm()
    passages = passages_of(lm)
    before = lm.reference_states(passages)
    lm.apply(*random_factors(lm))
    lm.reference_cache.clear()
    for old, new, later in zip(before, lm.reference_states(passages), lm.reference_states(passages), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-4)
        assert torch.equal(new, later)


def test_drift_is_the_relative_distance_from_the_pre_trained_weights(tiny_lm):
    lm = tiny_lm()
    assert set(lm.drift().values()) == {0.0}
    keys, values = random_factors(lm)
    lm.apply(keys, values)
    for m, drift in lm.drift().items():
        expected = (values[m].T @ keys[m]).norm() / lm.original_weight(m).norm()
        assert drift == pytest.approx(float(expected), rel=1e-4)


# -- decoding


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_output_head_never_gets_a_slice_while_the_model_generates(tiny_lm, name, monkeypatch):
    # torch copies a frozen weight once for each row of such a slice, which takes seconds.
    lm, contiguous = tiny_lm(name), []
    head = lm.forward.output.module

    def forward(states):
        contiguous.append(states.is_contiguous())
        return type(head).forward(head, states)

    monkeypatch.setattr(head, "forward", forward)
    lm.generate([prompt for prompt, _, _ in TEXTS], extra=3)
    assert contiguous and all(contiguous)


@pytest.mark.parametrize("name", TINY_NAMES)
@torch.no_grad()
def test_batched_decoding_is_greedy_decoding_of_each_prompt_alone(tiny_lm, name):
    lm = tiny_lm(name)
    lm.apply(*random_factors(lm))
    prompts = [prompt for prompt, _, _ in TEXTS]
    longest = len(lm.tokenizer(" perhaps")["input_ids"])
    texts = lm.generate(prompts, longest=["yes", "no", "perhaps"], extra=2)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) - start < longest + 2 and ids[-1] != lm.tokenizer.eos_token_id:
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected = lm.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert text == expected != ""
