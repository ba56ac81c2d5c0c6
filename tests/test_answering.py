"""Tests of rledit_env.answering: components of the reward that ask what scores ask."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rledit_env.answering import PAIR, Ending, OtherQuestions, Preference, ending_tokens
from rledit_env.answers import is_exact
from rledit_env.encoding import encode
from rledit_env.evaluation.metrics import evaluate
from rledit_env.reward import RewardConfig
from rledit_env.scoring import ScoredBatch, score, with_texts

COMPONENTS = {
    "edit": Preference("edit"), "paraphrases": Preference(), "unrelated": Preference("unrelated", margin=0.3),
    "ending": Ending(), "others": OtherQuestions(),
}  # fmt: skip


def moved(lm, scale: float = 0.1) -> None:
    """Edit an LLM at random, from its pre-trained weights."""
    lm.restore()
    generator = torch.Generator().manual_seed(0)
    lm.apply(*({m: scale * torch.randn(2, s[side], generator=generator, dtype=lm.edit_dtype)
                for m, s in lm.module_shapes.items()} for side in (0, 1)))


def drawn(lm, facts, component, choices=None):
    records = [encode(lm, r) for r in facts]
    return component.draw(lm, records, choices or [0.0] * len(records), False, np.random.default_rng(0))


def plainly(lm, full_logits, name: str, passages) -> torch.Tensor:
    """The component on these passages, from the whole model."""
    losses = []
    for passage in passages:
        log_p = full_logits(lm, passage).log_softmax(-1)
        if name == "ending":
            losses.append(-log_p[0, ending_tokens(lm.tokenizer)].logsumexp(0))
        elif name == "others":
            with lm.original_weights(), torch.no_grad():
                before = full_logits(lm, passage).log_softmax(-1)
            losses += list((before.exp() * (before - log_p)).sum(-1))
        else:
            likelier, other = passage.targets[0] % PAIR, passage.targets[0] // PAIR
            losses.append(F.softplus(COMPONENTS[name].margin - log_p[0, likelier] + log_p[0, other]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_its_formula_and_its_gradient_that_of_finite_differences(
    tiny_lm, uneven_facts, full_logits, name
):
    lm = tiny_lm("tiny-gpt2", "transformer.h.[2-3].{attn.c_proj,mlp.c_fc}", torch.float64)
    config = RewardConfig(components={name: (0.7, COMPONENTS[name])}, regularisation=0.0)
    records = [encode(lm, r) for r in uneven_facts]
    batch = with_texts(lm, ScoredBatch(records, [0.6] * 4, 1.5), config, False, np.random.default_rng(3))
    assert batch.texts[name]
    moved(lm)
    scores = score(lm, [batch], config, True)
    with torch.no_grad():
        expected = plainly(lm, full_logits, name, batch.texts[name])
    assert scores.basic[0][name] == pytest.approx(float(expected), rel=1e-9)
    assert scores.basic[0][name] > 1e-3
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


def test_a_preference_is_met_where_counterfacts_scores_say_so(tiny_lm, uneven_facts):
    """Of answers that differ in their last token, the loss with no margin is below log 2 where the new one wins."""
    lm = tiny_lm()
    moved(lm, 0.3)
    pairs = [(a, b) for a in "abcd" for b in "abcd" if a != b]
    one = [replace(uneven_facts.records[0], target=a, original=b) for a, b in pairs]
    for on in ("edit", "paraphrases"):
        component = Preference(on, margin=0.0)
        won = []
        for record in one:
            metrics = evaluate(lm, [record], "counterfact", generate=False)
            config = RewardConfig(components={"it": (1.0, component)}, regularisation=0.0)
            batch = with_texts(lm, ScoredBatch([encode(lm, record)], [0.0], 1.0), config, False, None)
            met = score(lm, [batch], config, False).basic[0]["it"] < np.log(2)
            won.append(met)
            assert met == ((metrics.efficacy if on == "edit" else metrics.generalization) == 100)
        assert 0 < sum(won) < len(won)


def test_answers_are_compared_where_they_part(tiny_lm, uneven_facts):
    lm = tiny_lm()
    start, longer = "New York", "New York City"
    facts = [
        replace(uneven_facts.records[0], target=start, original="New Delhi"),
        replace(uneven_facts.records[0], target=start, original=longer),  # one begins with the other
        replace(uneven_facts.records[0], original=None),
    ]
    passages = drawn(lm, facts, Preference("edit"))
    ours, theirs = (lm.tokenize(facts[0].prompt, answer) for answer in (start, "New Delhi"))
    [passage] = passages
    ids, others = ((*p.input_ids, p.targets[-1]) for p in (ours, theirs))
    place = next(i for i in range(len(ids)) if ids[i] != others[i])
    assert place > len(ours.input_ids) + 1 - len(ours.targets)  # after the word that they share
    assert passage.input_ids == ids[:place] and passage.positions == range(place - 1, place)
    assert passage.targets == (ids[place] + PAIR * others[place],)


def test_the_tokens_that_end_an_answer_are_those_after_which_it_is_an_exact_match(tiny_lm):
    tokenizer = tiny_lm().tokenizer
    ends = set(ending_tokens(tokenizer).tolist())
    assert tokenizer.eos_token_id in ends
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        if i in tokenizer.all_special_ids or "\ufffd" in text or text.isspace() or not text:
            continue
        assert (i in ends) == is_exact("Rome" + text, "Rome"), text


def test_other_questions_are_the_batchs_own_asked_of_the_facts_subject(tiny_lm, uneven_facts):
    lm = tiny_lm()
    first, second, third, fourth = uneven_facts.records
    passages = drawn(lm, [first, fourth], OtherQuestions())  # choices of 0: questions, no properties
    shown = [lm.tokenizer.decode([*p.input_ids, p.targets[-1]]) for p in passages]
    assert [text.replace(" ", "") for text in shown] == ["RomecomesfromSweden", "ÅngströmisinItaly"]
    assert drawn(lm, [first, third], OtherQuestions()) == []  # the third has no subject
    assert drawn(lm, [first], OtherQuestions()) == []
    assert len(drawn(lm, [first, second, third, fourth], OtherQuestions(), [0.99] * 4)) == 3
    for choice, shape in ((0.00105, r"The [a-z ]+ of Rome is"), (0.00115, r"Rome [a-z ]+")):
        [asked] = drawn(lm, [first, third], OtherQuestions(), [choice, choice])
        assert re.fullmatch(shape, lm.tokenizer.decode(asked.input_ids).strip())
        assert len(asked.targets) == 1 and drawn(lm, [first], OtherQuestions(statements=False), [choice]) == []


def test_nothing_is_unlike_before_in_an_unedited_model(tiny_lm, uneven_facts):
    lm = tiny_lm()
    config = RewardConfig(components={"others": (1.0, OtherQuestions())})
    batch = ScoredBatch([encode(lm, r) for r in uneven_facts], [0.5] * 4, 1.0)
    scores = score(lm, [with_texts(lm, batch, config, False, None)], config, True)
    assert abs(scores.basic[0]["others"]) < 1e-5


def test_a_step_with_these_components_says_what_they_are(make_env, uneven_facts, random_action):
    weighed = {name: (1.0, component) for name, component in COMPONENTS.items()}
    env = make_env(data=uneven_facts, num_batches=2, batch_size=2, reward=RewardConfig(components=weighed))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(random_action(env))
    assert np.isfinite(reward) and all(info[name] >= 0 for name in COMPONENTS)


@pytest.mark.parametrize("kind", ["zsre", "counterfact", "fever"])
def test_the_shipped_agents_reward_scores_every_kind_of_facts(make_env, facts, random_action, kind):
    env = make_env(kind=kind, data=facts(kind, 4), num_batches=1, batch_size=4, reward=RewardConfig.keeping(kind),
                   reward_gradient=True)  # fmt: skip
    env.reset(seed=0)
    _, reward, _, _, info = env.step(random_action(env))
    for name in RewardConfig.keeping(kind).components:
        assert info[name] > 0, name
    weights = {name: weight for name, (weight, _) in RewardConfig.keeping(kind).components.items()}
    assert -reward == pytest.approx(sum(w * info[n] for n, w in weights.items()) + info["regularisation"], rel=1e-4)


def test_what_does_not_fit_the_models_context_adds_nothing(tiny_lm, uneven_facts):
    lm = tiny_lm()
    first, _, _, fourth = uneven_facts.records
    endless = replace(first, original="x " * lm.context_length)
    assert len(drawn(lm, [endless, fourth], Preference("edit"))) == 1
    assert len(drawn(lm, [endless, fourth], OtherQuestions())) == 1  # the fourth's subject with the endless answer


def test_another_place_to_compare_is_named():
    with pytest.raises(ValueError, match="on is 'prompt'; give 'edit', 'paraphrases' or 'unrelated'"):
        Preference("prompt")
