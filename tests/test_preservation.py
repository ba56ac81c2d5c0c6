"""Tests of rledit_env.preservation: what becomes of the LLM's own text, in the reward and under a bound."""

from __future__ import annotations

import copy
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from rledit_env.encoding import encode
from rledit_env.preservation import Constraint, Continuation, Multiplier, OwnText
from rledit_env.reward import RewardConfig
from rledit_env.scoring import ScoredBatch, score, with_texts
from rledit_env.self_text import OPENINGS, REWARD_OPENINGS, self_text

SMALL = {"own_text": (2.0, OwnText(passages=3, tokens=6, pool=8)), "continuation": (0.5, Continuation(2, 5))}


def only(name: str, weight: float = 1.0, **settings) -> RewardConfig:
    return RewardConfig(components={name: (weight, SMALL[name][1])}, regularisation=0.0, **settings)


def plain(passages):
    return [(p.input_ids, p.targets) for p in passages]


def moved(lm, scale: float = 0.1) -> None:
    """Edit an LLM at random, from its pre-trained weights."""
    lm.restore()
    generator = torch.Generator().manual_seed(0)
    lm.apply(*({m: scale * torch.randn(2, s[side], generator=generator, dtype=lm.edit_dtype)
                for m, s in lm.module_shapes.items()} for side in (0, 1)))


def plain_kl(lm, full_logits, passages) -> float:
    """KL(p_θ₀ ‖ p_W) a token, from whole models."""
    with torch.no_grad():
        after = torch.cat([full_logits(lm, p) for p in passages]).log_softmax(-1)
        with lm.original_weights():
            before = torch.cat([full_logits(lm, p) for p in passages]).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


# -- the texts


def test_what_the_reward_looks_at_is_never_what_is_scored(tiny_lm):
    assert len(set(REWARD_OPENINGS)) == len(REWARD_OPENINGS) >= OwnText().pool
    for mine in REWARD_OPENINGS:
        assert not any(mine.startswith(theirs) or theirs.startswith(mine) for theirs in OPENINGS)
    lm = tiny_lm()
    mine = OwnText(tokens=6, pool=len(REWARD_OPENINGS)).texts(lm)
    theirs = [p for seed in (0, 1) for p in self_text(lm, tokens=6, seed=seed)]
    begun = {p.input_ids[: len(p.input_ids) + 1 - len(p.targets)] for p in theirs}
    for p in mine:
        assert not any(p.input_ids[: len(b)] == b or b[: len(p.input_ids)] == p.input_ids for b in begun)


def test_own_texts_are_those_of_the_unedited_llm_written_once(tiny_lm, monkeypatch):
    lm = tiny_lm("tiny-gpt2")
    component = SMALL["own_text"][1]
    lm.text_cache.clear()
    expected = plain(self_text(lm, REWARD_OPENINGS[:8], 6, 0))
    moved(lm)
    assert plain(component.texts(lm)) == expected
    monkeypatch.setattr(lm, "decode", None)
    assert plain(component.texts(lm)) == expected
    draws = [plain(component.draw(lm, [], [], False, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(drawn)) == 3 and set(drawn) <= set(expected) for drawn in draws)
    assert component.draw(lm, [], [], True, np.random.default_rng(0)) == []


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_continuations_are_what_the_unedited_llm_writes_after_prompt_and_target(tiny_lm, uneven_facts, name):
    lm = tiny_lm(name)
    lm.text_cache.clear()
    records = [encode(lm, r) for r in uneven_facts]
    expected = []
    for r in records:
        ids = [*r.edit.input_ids, r.edit.targets[-1]]
        written = lm.model.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=lm.pad_token_id
        )[0, len(ids) :].tolist()
        assert written
        expected.append(((*ids, *written[:-1]), tuple(written)))
    moved(lm)
    texts = plain(Continuation(tokens=5).texts(lm, records))
    assert texts == expected == plain(Continuation(tokens=5).texts(lm, records))
    rng, choices = np.random.default_rng(0), [0.7, 0.1, 0.9, 0.2]
    for earlier in (True, False):
        assert plain(SMALL["continuation"][1].draw(lm, records, choices, earlier, rng)) == [texts[1], texts[3]]
    assert sorted(plain(Continuation(9, 5).draw(lm, records, choices, False, rng))) == sorted(texts)


def test_a_text_ends_where_the_llm_ends_it(tiny_lm, uneven_facts, monkeypatch):
    lm = tiny_lm()
    lm.text_cache.clear()
    records = [encode(lm, r) for r in uneven_facts]
    end = lm.tokenizer.eos_token_id
    written = [[5, 6, end, end], [end, 0, 0, 0], [7, 8, 9, 10], [11, end, 3, 3]]
    monkeypatch.setattr(lm, "decode", lambda rows, most: torch.tensor(written)[: len(rows)])
    texts = Continuation(facts=4, tokens=4).texts(lm, records)
    assert [t and t.targets for t in texts] == [(5, 6), None, (7, 8, 9, 10), (11,)]
    assert len(Continuation(4, 4).draw(lm, records, [0.0] * 4, False, np.random.default_rng(0))) == 3
    lm.text_cache.clear()


def test_a_stream_of_several_writes_as_the_unedited_llm(both_streams):
    lm, stream = both_streams
    expected = plain(SMALL["own_text"][1].texts(lm))
    lm.text_cache.clear()
    moved(lm)  # whose weights are not the stream's
    moved(stream, 0.2)
    assert plain(SMALL["own_text"][1].texts(stream)) == expected


@pytest.fixture
def both_streams(tiny_lm):
    from rledit_env.lm.weight_sets import WeightSetLM

    lm = tiny_lm()
    lm.text_cache.clear()
    return lm, WeightSetLM(lm)


# -- the components


@pytest.mark.parametrize("name", SMALL)
def test_a_component_is_the_plain_kl_and_its_gradient_that_of_finite_differences(
    tiny_lm, uneven_facts, full_logits, name
):
    lm = tiny_lm("tiny-gpt2", "transformer.h.[2-3].{attn.c_proj,mlp.c_fc}", torch.float64)
    records = [encode(lm, r) for r in uneven_facts]
    config = only(name, 0.7)
    batch = with_texts(lm, ScoredBatch(records, [0.0] * 4, 1.5), config, False, np.random.default_rng(3))
    unedited = score(lm, [batch], config, True)
    assert abs(unedited.basic[0][name]) < 1e-12
    assert max(float(g.abs().max()) for g in unedited.gradient.values()) < 1e-9
    moved(lm)
    scores = score(lm, [batch], config, True)
    assert scores.basic[0][name] == pytest.approx(plain_kl(lm, full_logits, batch.texts[name]), rel=1e-9)
    assert scores.basic[0][name] > 1e-3
    assert scores.total == pytest.approx(1.5 * 0.7 * scores.basic[0][name], rel=1e-12)
    generator, epsilon = torch.Generator().manual_seed(1), 1e-6
    for m, (d_in, d_out) in lm.module_shapes.items():
        direction = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
        before, sides = lm.snapshot(), []
        for sign in (1, -1):
            lm.restore({**before, m: before[m] + sign * epsilon * direction})
            sides.append(score(lm, [batch], config, False).total)
        lm.restore(before)
        numeric = (sides[0] - sides[1]) / (2 * epsilon)
        assert float((scores.gradient[m] * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def test_chunks_do_not_change_the_components(tiny_lm, uneven_facts, monkeypatch):
    lm = tiny_lm()
    records = [encode(lm, r) for r in uneven_facts]
    config = RewardConfig(components=SMALL)
    batch = with_texts(lm, ScoredBatch(records, [0.0] * 4, 1.0), config, False, np.random.default_rng(0))
    moved(lm)
    whole = score(lm, [batch], config, True)
    monkeypatch.setattr(lm, "max_tokens_per_pass", 1)
    pieces = score(lm, [batch], config, True)
    assert pieces.basic[0] == pytest.approx(whole.basic[0], rel=1e-4)
    for m, g in whole.gradient.items():
        torch.testing.assert_close(pieces.gradient[m], g, atol=1e-6, rtol=1e-3)


def test_an_unedited_model_costs_nothing_and_an_edited_one_something(make_env, uneven_facts, random_action):
    config = RewardConfig(components=SMALL, regularisation=0.0)
    env = make_env("counterfact", data=uneven_facts, num_batches=2, reward=config, reward_gradient=True)
    env.reset(seed=0)
    _, reward, _, _, info = env.step({"updates": {}})
    assert reward == pytest.approx(0.0, abs=1e-5)
    assert info["own_text"] == pytest.approx(0.0, abs=1e-5) and info["continuation"] == pytest.approx(0.0, abs=1e-5)
    _, reward, _, _, info = env.step(random_action(env, scale=0.1))
    assert info["own_text"] > 1e-3 and info["continuation"] > 1e-3 and info["backtracking"] > 1e-4
    total = 2.0 * info["own_text"] + 0.5 * info["continuation"] + info["backtracking"]
    assert reward == pytest.approx(-total, rel=1e-5)
    assert any(np.abs(g).max() > 1e-4 for g in info["reward_gradient"].values())


def test_own_text_is_counted_once_a_step_however_many_batches_are_scored(make_env, facts, random_action):
    config = RewardConfig(components={"own_text": SMALL["own_text"]}, regularisation=0.0)
    env = make_env("counterfact", data=facts("counterfact"), reward=config)
    env.reset(seed=0)
    for step in range(3):
        _, reward, _, _, info = env.step(random_action(env, seed=step))
        assert info["backtracking"] == 0.0
        assert reward == pytest.approx(-2.0 * info["own_text"], rel=1e-6)


def test_texts_are_drawn_by_the_episodes_random_numbers(make_env, facts, random_action):
    config = RewardConfig(components={"own_text": SMALL["own_text"]})

    def rewards(seed: int) -> list[float]:
        env = make_env("counterfact", data=facts("counterfact"), reward=config)
        env.reset(seed=seed, options={"indices": range(6)})
        return [env.step(random_action(env, seed=step))[1] for step in range(3)]

    assert rewards(0) == rewards(0) != rewards(1)


def test_without_such_components_no_random_number_is_drawn(make_env):
    states = []
    for name in ("efficacy", "paper"):
        env = make_env(reward=name)
        env.reset(seed=0)
        env.step({"updates": {}})
        states.append(env.np_random.bit_generator.state)
    rng = np.random.default_rng()
    rng.bit_generator.state = states[0]
    assert with_texts(env.lm, env.episode.scored(0, 1.0), RewardConfig(), False, rng).texts == {}
    assert states[0] == states[1] == rng.bit_generator.state


def test_a_batch_without_drawn_texts_is_refused(tiny_lm, uneven_facts):
    lm = tiny_lm()
    batch = ScoredBatch([encode(lm, uneven_facts[0])], [0.0], 1.0)
    with pytest.raises(ValueError, match="no texts for the component 'own_text'"):
        score(lm, [batch], only("own_text"), False)


# -- the bound


def test_the_multiplier_rises_above_the_bound_and_falls_to_zero_below_it():
    multiplier = Multiplier(Constraint(bound=0.25, rate=2.0, start=0.5))
    assert multiplier.value == 0.5
    assert [multiplier.update(kl) for kl in (1.25, 0.75, 0.25, 0.0, 0.0, 0.0)] == [2.5, 3.5, 3.5, 3.0, 2.5, 2.0]
    for _ in range(9):
        multiplier.update(0.1)
    assert multiplier.value == 0.0
    assert multiplier.update(0.3) == pytest.approx(0.1)
    for measured in (math.nan, math.inf):
        with pytest.raises(ValueError, match="was measured as"):
            multiplier.update(measured)
    assert multiplier.value == pytest.approx(0.1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bound_adds_its_lagrangian_to_the_reward_and_the_gradient(make_env, facts, random_action, stride):
    def steps(constraint, weight):
        config = RewardConfig(
            components={**RewardConfig().components, "own_text": (weight, SMALL["own_text"][1])}, constraint=constraint,
            batch_stride=stride,
        )
        env = make_env("counterfact", data=facts("counterfact"), reward=config, reward_gradient=True)
        env.reset(seed=1)
        return [env.step(random_action(env, seed=s, scale=0.1)) for s in range(3)]

    bounded = steps(Constraint(bound=0.125, start=3.0), 0.5)
    weighted = steps(None, 3.5)
    for one, other in zip(bounded, weighted, strict=True):
        assert one[4]["multiplier"] == 3.0 and "multiplier" not in other[4]
        if "own_text" not in one[4]:
            assert one[1] == other[1]
            continue
        assert one[1] == pytest.approx(other[1] + 3.0 * 0.125 * stride, rel=1e-6)
        assert one[4]["own_text"] == other[4]["own_text"] > 1e-3
        for m, g in one[4]["reward_gradient"].items():
            np.testing.assert_allclose(g, other[4]["reward_gradient"][m], rtol=1e-4, atol=1e-6)


def test_a_bound_on_what_earlier_batches_have_too_holds_for_the_steps_own(make_env, facts, random_action):
    def last(constraint, weight=0.0):
        config = RewardConfig(
            components={"continuation": (weight, SMALL["continuation"][1])}, constraint=constraint, regularisation=0.0
        )
        env = make_env("counterfact", data=facts("counterfact"), reward=config)
        env.reset(seed=1)
        return [env.step(random_action(env, seed=s, scale=0.1)) for s in range(2)][-1]

    _, reward, _, _, info = last(Constraint("continuation", bound=0.5, start=2.0))
    assert info["backtracking"] == 0.0
    assert reward == pytest.approx(-2.0 * (info["continuation"] - 0.5), rel=1e-5)
    assert last(None, 1.0)[4]["backtracking"] > 1e-4


def test_a_component_that_a_bound_is_on_need_not_be_named():
    assert RewardConfig(constraint=Constraint(bound=0.2)).components["own_text"] == (0.0, OwnText())
    assert RewardConfig(constraint=Constraint("continuation")).components["continuation"] == (0.0, Continuation())
    own = RewardConfig(constraint=Constraint()).replace("own_text", 0.3, OwnText(passages=1))
    assert own.components["own_text"] == (0.3, OwnText(passages=1))
    assert set(RewardConfig(constraint=Constraint("locality")).components) == {"generalization", "locality"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardConfig(constraint=Constraint("truth")), "constraint is on 'truth', which is no component; give "
         "one of generalization, locality, own_text, continuation"),
        (lambda: Constraint(bound=0.0), "bound on 'own_text' is 0.0; give a positive"),
        (lambda: Constraint(bound=math.nan), "bound on 'own_text' is nan"),
        (lambda: Constraint(rate=0.0), "rate of the bound on 'own_text' is 0.0"),
        (lambda: Constraint(start=-1.0), "starts with -1.0; give 0 or more"),
        (lambda: OwnText(passages=0), "passages of OwnText is 0; give 1 or more"),
        (lambda: OwnText(tokens=2.5), "tokens of OwnText is 2.5"),
        (lambda: OwnText(passages=9, pool=8), "9 passages of a pool of 8"),
        (lambda: OwnText(pool=10**6), "at most 128"),
        (lambda: Continuation(facts=0), "facts of Continuation is 0"),
        (lambda: Continuation(tokens=True), "tokens of Continuation is True"),
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- copies


def test_copies_have_multipliers_of_their_own_and_streams_share_theirs(make_env):
    config = RewardConfig(constraint=Constraint(bound=0.5))
    env = make_env(reward=config)
    assert make_env().multiplier is make_env(reward="none").multiplier is None
    env.multiplier.update(1.0)
    other = copy.deepcopy(env)
    assert other.multiplier.value == 0.5
    other.multiplier.update(1.0)
    assert env.multiplier.value == 0.5
    vector = gym.make_vec("RLEdit-ZsRE-v0", 2, model="tiny-llama", num_batches=2, batch_size=2, reward=config)
    assert vector.envs[0].multiplier is vector.envs[1].multiplier is not None
    named = gym.make("RLEdit-ZsRE-v0", model="tiny-llama", num_batches=2, batch_size=2, reward=config).unwrapped
    named.multiplier.update(2.0)
    assert pickle.loads(pickle.dumps(named)).multiplier.value == 1.5
