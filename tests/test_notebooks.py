"""Environments as objects in a notebook: copied, pickled, made over a model object, shown."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, pipeline

from agents import FTLAgent, FTLConfig, RandomSearchAgent, RLEditAgent, StandardAgent, StandardConfig
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.tiny import TINY_NAMES, tiny_model, tiny_tokenizer
from rledit_env.lm.whole import WholeForward
from rledit_env.vector import VectorGradientFeatures, VectorScaledUpdate
from rledit_env.wrappers import GradientFeatures, RelativeReward, ScaledUpdate

FACTS = [
    {
        "prompt": f"The capital of {country} is", "target_new": target, "subject": country, "ground_truth": "Rome",
        "rephrase_prompt": [f"{country}'s capital is"], "locality_prompt": ["Two and two make"],
        "locality_ground_truth": ["four"],
    }
    for country, target in zip(
        ("France", "Spain", "Peru", "Chad", "Oman", "Laos"), ("Lima", "Oslo", "Bern", "Riga", "Kyiv", "Doha"),
        strict=True,
    )
]  # fmt: skip
SETTINGS: dict[str, Any] = {"model": "tiny-llama", "data": FACTS, "num_batches": 3, "batch_size": 2}
FLOAT32 = torch.float32


def make(**arguments: Any) -> Any:
    return gym.make("RLEdit-CounterFact-v0", **{**SETTINGS, **arguments})


def make_vec(num_envs: int = 2, **arguments: Any) -> Any:
    return gym.make_vec("RLEdit-CounterFact-v0", num_envs, **{**SETTINGS, **arguments})


def fine_tuning(observation: Any) -> Any:
    values = {m: -0.1 * g for m, g in observation["value_gradients"].items()}
    return {"keys": observation["keys"], "values": values}


def weights_of(env: Any) -> dict[str, np.ndarray]:
    return {m: w.numpy() for m, w in env.unwrapped.lm.snapshot().items()}


def rounded_alike(one: Any, other: Any) -> bool:
    """Whether both are equal to float32 rounding: states that a copy computes anew are computed together with others,
    which decides their last bits on some processors."""

    def arrays(data: Any) -> Any:
        if isinstance(data, dict):
            return {name: arrays(part) for name, part in data.items()}
        if isinstance(data, (tuple, list)):
            return [arrays(part) for part in data]
        return np.asarray(data, np.float64) if isinstance(data, float) else data

    return data_equivalence(arrays(one), arrays(other))


def places(model: nn.Module) -> dict[str, int]:
    """Where each of a model's parameters lies in memory."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def shared_names(env: Any, other: Any) -> set[str]:
    one, two = (places(e.unwrapped.lm.model) for e in (env, other))
    return {name for name in one if one[name] == two[name]}


def edited_names(env: Any) -> set[str]:
    return {f"{m}.weight" for m in env.unwrapped.lm.module_shapes}


@pytest.fixture
def own_model() -> tuple[PreTrainedModel, Any]:
    return tiny_model("tiny-llama", FLOAT32), tiny_tokenizer("tiny-llama")


# -- copies


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_copy_shares_all_weights_but_the_edited_ones(name: str, dtype: torch.dtype) -> None:
    env = make(model=name, dtype=dtype)
    other = copy.deepcopy(env)
    assert shared_names(env, other) == set(places(env.unwrapped.lm.model)) - edited_names(env)
    mine, theirs = env.unwrapped.lm, other.unwrapped.lm
    for m in mine.module_shapes:
        assert mine.original_weight(m).data_ptr() == theirs.original_weight(m).data_ptr()
        assert mine.weight(m).data_ptr() != theirs.weight(m).data_ptr()
    env.reset(seed=0)
    other = copy.deepcopy(env)
    other.close()  # which forgets its own cached states only
    assert len(mine.prefix_cache) > len(other.unwrapped.lm.prefix_cache) == 0
    assert mine.tokenizer is theirs.tokenizer and env.unwrapped.dataset is other.unwrapped.dataset


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_a_deep_copy_goes_on_as_the_original_does_and_neither_changes_the_other(name: str) -> None:
    env = make(model=name, action_noise_std=1e-3, reward="efficacy", dtype=torch.bfloat16)
    observation, _ = env.reset(seed=3)
    observation, *_ = env.step(fine_tuning(observation))
    other, before = copy.deepcopy(env), weights_of(env)
    theirs = other.step(fine_tuning(observation))
    assert data_equivalence(weights_of(env), before, exact=True)  # the copy's step is not the original's
    mine = env.step(fine_tuning(observation))
    assert data_equivalence(mine, theirs, exact=True)
    assert data_equivalence(weights_of(env), weights_of(other), exact=True)
    for e in (env, other):  # the models run with what was written
        modules = dict(e.unwrapped.lm.model.named_modules())
        for m in e.unwrapped.lm.module_shapes:
            run = modules[m].weight.t() if name == "tiny-gpt2" else modules[m].weight
            assert torch.equal(run, e.unwrapped.lm.weight(m).to(torch.bfloat16))
    before = weights_of(env)
    other.reset(seed=4)
    assert data_equivalence(weights_of(env), before, exact=True)
    assert len(env.unwrapped.evaluate().taken) == 4


def test_a_deep_copy_over_a_model_that_runs_through_its_own_forward_is_whole() -> None:
    tokenizer = tiny_tokenizer("tiny-llama")
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=3, n_head=2))
    env = make(model=model, tokenizer=tokenizer)
    assert isinstance(env.unwrapped.lm.forward, WholeForward)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(fine_tuning(observation))
    other = copy.deepcopy(env)
    assert shared_names(env, other) == set(places(env.unwrapped.lm.model)) - edited_names(env)
    mine, theirs = (e.step(fine_tuning(observation)) for e in (env, other))
    assert data_equivalence(mine, theirs, exact=True)


def test_a_deep_copy_of_a_wrapped_environment_is_whole() -> None:
    env = RelativeReward(GradientFeatures(ScaledUpdate(RecordEpisodeStatistics(TimeLimit(make(), 2)))), streams=2)
    env.reset(seed=0)
    other = copy.deepcopy(env)
    assert shared_names(env, other) == set(places(env.unwrapped.lm.model)) - edited_names(env)
    action = np.full(env.action_space.shape, 0.3, np.float32)
    mine, theirs = ([e.step(action)[:4] for _ in range(2)] for e in (env, other))
    assert data_equivalence(mine, theirs, exact=True)
    assert other.unwrapped is not env.unwrapped and other.env.lm is other.unwrapped.lm
    assert other.spec is not None and env.spec is not None


def test_a_deep_copy_of_many_environments_is_whole() -> None:
    envs = make_vec()
    observations, _ = envs.reset(seed=0)
    observations, *_ = envs.step(fine_tuning(observations))
    other = copy.deepcopy(envs)
    assert other.envs[0].lm.model is envs.envs[0].lm.model
    mine, theirs = (e.step(fine_tuning(observations)) for e in (envs, other))
    assert data_equivalence(mine, theirs, exact=True)
    other.reset(seed=5)
    for one, copied in zip(envs.envs, other.envs, strict=True):
        assert all(float(drift) > 0 for drift in one.lm.drift().values())
        assert not any(copied.lm.drift().values())


def test_no_copy_that_gymnasium_makes_of_a_spec_copies_the_model(own_model: Any) -> None:
    lm = EditableLM.load("tiny-llama", device="cpu", dtype=torch.float32)
    for given in ({"model": lm}, {"model": own_model[0], "tokenizer": own_model[1]}):
        env: Any = TimeLimit(RecordEpisodeStatistics(make(**given)), 2)
        specs = [env.spec, env.env.spec, env.unwrapped.spec, copy.deepcopy(env.spec), make_vec(**given).spec]
        assert all(spec.kwargs["model"] is given["model"] for spec in specs)
        assert all(spec.kwargs["data"] is FACTS for spec in specs)
        assert shared_names(env, gym.make(env.spec)) >= set(places(own_model[0])) - edited_names(env)


def test_what_is_changed_in_a_copied_spec_stays_out_of_the_original() -> None:
    env = make(edit_modules=["model.layers.1.mlp.up_proj"])
    spec = copy.deepcopy(env.spec)
    spec.kwargs["num_batches"] = 1
    spec.kwargs["edit_modules"].append("model.layers.2.mlp.up_proj")
    assert env.spec.kwargs["num_batches"] == 3 and len(env.spec.kwargs["edit_modules"]) == 1
    assert len(gym.make(spec).unwrapped.lm.module_shapes) == 2


def test_a_deep_copy_of_an_lm_has_edited_weights_of_its_own(own_model: Any) -> None:
    lm = EditableLM(*own_model, ["model.layers.1.mlp.*"])
    lm.add({m: torch.ones(d_out, d_in) for m, (d_in, d_out) in lm.module_shapes.items()})
    other, before = copy.deepcopy(lm), lm.snapshot()
    assert all(torch.equal(other.weight(m), w) for m, w in before.items())
    other.restore()
    assert all(torch.equal(lm.weight(m), w) for m, w in before.items())
    assert lm.generate(["The capital of France is"]) != other.generate(["The capital of France is"])


def test_a_copy_of_a_recording_environment_does_not_write_to_its_ledger() -> None:
    env = make()
    env.reset(seed=0)
    env.unwrapped.recorder = recorder = object()
    assert copy.deepcopy(env).unwrapped.recorder is None
    assert env.unwrapped.recorder is recorder


# -- environments that share edited weights


def test_a_step_in_an_episode_whose_weights_another_environment_has_taken_is_refused() -> None:
    lm = EditableLM.load("tiny-llama", device="cpu")
    env, other = make(model=lm), make(model=lm)
    observation, _ = env.reset(seed=0)
    following, *_ = env.step(fine_tuning(observation))
    theirs, _ = other.reset(seed=1)
    for stale in (lambda: env.step(fine_tuning(following)), lambda: env.unwrapped.evaluate(generate=False)):
        with pytest.raises(gym.error.ResetNeeded, match="another environment has begun .*copy.deepcopy"):
            stale()
    other.step(fine_tuning(theirs))
    before = weights_of(other)
    env.close()  # which leaves the weights to the other
    assert data_equivalence(weights_of(other), before, exact=True)
    env.reset(seed=0)
    with pytest.raises(gym.error.ResetNeeded):
        other.step(fine_tuning(theirs))


def test_many_environments_over_one_lm_in_gymnasium_s_own_vector_environment_name_the_mend() -> None:
    envs = make_vec(model=EditableLM.load("tiny-llama"), vectorization_mode="sync")
    envs.reset(seed=0)
    with pytest.raises(gym.error.ResetNeeded, match="gymnasium.make_vec without vectorization_mode does so"):
        envs.step(envs.action_space.sample())


def test_a_shallow_copy_takes_turns_with_its_original() -> None:
    env = make()
    observation, _ = env.reset(seed=0)
    other = copy.copy(env.unwrapped)
    assert other.lm is env.unwrapped.lm
    with pytest.raises(gym.error.ResetNeeded, match="another environment"):
        other.step(fine_tuning(observation))


def test_weights_that_are_preserved_are_the_same_environments_afterwards() -> None:
    lm = EditableLM.load("tiny-llama", device="cpu")
    env, other = make(model=lm), make(model=lm)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(fine_tuning(observation))
    before = weights_of(env)
    with lm.preserved():
        other.step(fine_tuning(other.reset(seed=1)[0]))
    assert data_equivalence(weights_of(env), before, exact=True)
    env.step(fine_tuning(observation))


# -- a model object


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_model_object_gives_what_its_name_gives_and_is_never_written(name: str) -> None:
    model, tokenizer = tiny_model(name, FLOAT32), tiny_tokenizer(name)
    model.requires_grad_(True).train()
    before, kinds = {n: p.clone() for n, p in model.state_dict().items()}, [type(m) for m in model.modules()]
    attention = model.config._attn_implementation
    env, named = make(model=model, tokenizer=tokenizer, num_batches=1), make(model=name, dtype=FLOAT32, num_batches=1)
    assert list(env.unwrapped.lm.module_shapes) == list(named.unwrapped.lm.module_shapes)
    steps = []
    for e in (env, named):
        observation, _ = e.reset(seed=0)
        steps.append((observation, *e.step(fine_tuning(observation))[:2]))
        assert len(e.unwrapped.evaluate().taken) == 2
    assert data_equivalence(steps[0], steps[1], exact=True)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    env.close()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert [type(m) for m in model.modules()] == kinds and model.config._attn_implementation == attention
    frozen = {n: p for n, p in places(model).items() if n not in edited_names(env)}
    assert frozen.items() <= places(env.unwrapped.lm.model).items()


def test_any_number_of_environments_are_made_over_one_model_object(own_model: Any) -> None:
    given = {"model": own_model[0], "tokenizer": own_model[1]}
    env = make(**given)
    observation, _ = env.reset(seed=0)
    first = env.step(fine_tuning(observation))
    others = [make(**given), make(**given, edit_modules="model.layers.0.mlp.*"), make_vec(**given)]
    for other in others:
        other.step(fine_tuning(other.reset(seed=1)[0]))
    env.reset(seed=0)
    again = env.step(fine_tuning(observation))
    assert data_equivalence(first, again, exact=True)
    fresh = make(dtype=FLOAT32)
    fresh.reset(seed=0)
    assert data_equivalence(fresh.step(fine_tuning(observation)), first, exact=True)


def test_a_tokenizer_without_a_pad_token_serves_and_stays_without(own_model: Any) -> None:
    model, tokenizer = own_model
    tokenizer.pad_token = None
    env = make(model=model, tokenizer=tokenizer, render_mode="ansi")
    env.step(fine_tuning(env.reset(seed=0)[0]))
    assert "Batch 1" in env.render() and tokenizer.pad_token is None


LEFT_OUT = "give None, since model is an EditableLM already"


@pytest.mark.parametrize("maker", [make, make_vec])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m, t: {"model": m}, "model is a LlamaForCausalLM, but there is no tokenizer; give its own: tokenizer="),
        (lambda m, t: {"model": m, "tokenizer": "gpt2"}, "tokenizer is 'gpt2'; give a tokenizer of transformers"),
        (lambda m, t: {"tokenizer": t}, "model is the name 'tiny-llama', which brings its own; leave tokenizer out"),
        (lambda m, t: {"model": Path("tiny-llama"), "tokenizer": t}, "model is the name 'tiny-llama'"),
        (lambda m, t: {"model": m.model, "tokenizer": t}, "LlamaModel, which is no causal language model"),
        (lambda m, t: {"model": 3, "tokenizer": t}, "model is a int; give a name, a folder, a causal LM"),
        (lambda m, t: {"model": pipeline("text-generation", m, tokenizer=t)}, "Pipeline; give its model=….model and"),
        (lambda m, t: {"model": m, "tokenizer": t, "dtype": "bfloat16"}, "dtype is 'bfloat16', but model is an object"),
        (lambda m, t: {"model": m, "tokenizer": t, "device": "cpu"}, "device is 'cpu', but model is an object"),
        (lambda m, t: {"model": m, "tokenizer": t, "edit_modules": "x.*"}, "pattern 'x.*' matches no linear module"),
        (lambda m, t: {"model": EditableLM(m, t, ["model.layers.1.mlp.*"]), "tokenizer": t}, LEFT_OUT),
        (lambda m, t: {"model": EditableLM(m, t, ["model.layers.1.mlp.*"]), "edit_modules": "a"}, LEFT_OUT),
    ],
)
def test_a_model_that_cannot_be_taken_is_named_with_the_mend(
    own_model: Any, maker: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")) as raised:
        maker(**arguments(*own_model))
    assert "\n" not in str(raised.value)


def test_the_tokenizer_of_another_model_is_refused(own_model: Any) -> None:
    model, tokenizer = own_model
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"tokenizer has .* tokens, the LlamaForCausalLM embeddings for 100; give the"):
        make(model=model, tokenizer=tokenizer)


# -- pickles


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_a_pickled_environment_goes_on_where_it_was(dumps: Any) -> None:
    env = make(action_noise_std=1e-3, reward="efficacy")
    observation, _ = env.reset(seed=3)
    observation, *_ = env.step(fine_tuning(observation))
    other = pickle.loads(dumps(env))
    assert other.spec == env.spec and other.unwrapped.history == env.unwrapped.history
    assert (other.action_space, other.observation_space) == (env.action_space, env.observation_space)
    mine, theirs = (e.step(fine_tuning(observation)) for e in (env, other))
    assert rounded_alike(mine, theirs)
    scores = (e.unwrapped.evaluate(generate=False).as_dict() for e in (env, other))
    assert rounded_alike(*scores)
    assert rounded_alike(env.reset(), other.reset())  # the random states, too


def test_an_environment_pickled_before_its_first_reset_holds_no_weights() -> None:
    env = make(model=Path("tiny-llama"))
    pickled = pickle.dumps(env)
    assert len(pickled) < 10_000
    other = pickle.loads(pickled)
    assert rounded_alike(env.reset(seed=1), other.reset(seed=1))
    with pytest.raises(gym.error.ResetNeeded):
        pickle.loads(pickled).step(None)


def test_pickled_wrappers_and_vector_environments_go_on_where_they_were() -> None:
    env = RelativeReward(GradientFeatures(ScaledUpdate(TimeLimit(make(), 2))), streams=2)
    env.reset(seed=0)
    action = np.full(env.action_space.shape, 0.3, np.float32)
    pickled = pickle.dumps(env)
    assert len(pickled) < 200_000  # no model is in it
    mine, theirs = (e.step(action) for e in (env, pickle.loads(pickled)))
    assert rounded_alike(mine, theirs)
    envs = make_vec()
    observations, _ = envs.reset(seed=0)
    observations, *_ = envs.step(fine_tuning(observations))
    other = pickle.loads(pickle.dumps(envs))
    assert other.spec == envs.spec
    assert rounded_alike(other.step(fine_tuning(observations)), envs.step(fine_tuning(observations)))


def test_an_environment_over_a_model_object_says_why_it_is_not_pickled(own_model: Any) -> None:
    given = {"model": own_model[0], "tokenizer": own_model[1]}
    for env in (make(**given), make_vec(**given), make(model=EditableLM.load("tiny-llama"))):
        with pytest.raises(pickle.PicklingError, match="model object .* make it with the model's name or folder") as e:
            pickle.dumps(env)
        assert "\n" not in str(e.value)


def test_an_episode_whose_facts_have_changed_since_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    env = make(data=str(path))
    env.reset(seed=0)
    pickled = pickle.dumps(env)
    path.write_text(json.dumps([{**fact, "target_new": "Cairo"} for fact in FACTS]))
    with pytest.raises(pickle.UnpicklingError, match="no longer those of .*facts.json"):
        pickle.loads(pickled)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copied_views_of_many_environments_look_at_the_copies(again: Any) -> None:
    envs = VectorGradientFeatures(VectorScaledUpdate(make_vec(), share="all"), share="all")
    envs.reset(seed=0)
    actions = np.full(envs.action_space.shape, 0.3, np.float32)
    envs.step(actions)
    other = again(envs)
    assert [view.unwrapped for view in other.views] == other.unwrapped.envs != envs.unwrapped.envs
    assert rounded_alike(envs.step(actions), other.step(actions))


# -- agents


def copied_agents() -> dict[str, Any]:
    env = make(array_backend="torch", reward_gradient=True, reward="efficacy")
    tiny = {"n_steps": 6, "batch_size": 6, "n_epochs": 1}
    return {
        "RLEdit": RLEditAgent(env),
        "PPO": StandardAgent(env, StandardConfig(baseline_streams=0, hyperparameters=tiny)),
        "SAC": StandardAgent(env, StandardConfig("sac", hyperparameters={"learning_starts": 2, "buffer_size": 20})),
        "random search": RandomSearchAgent(env),
        "FT-L": FTLAgent(env, FTLConfig(steps=2)),
    }


@pytest.mark.parametrize("name", copied_agents())
def test_copied_and_pickled_agents_go_on_and_share_the_model_where_they_can(name: str) -> None:
    agent = copied_agents()[name]
    if name in ("RLEdit", "PPO"):
        agent.learn(6, progress_bar=False)
    for other in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        actions = []
        for one in (agent, other):
            one.reset()
            actions.append(one.predict(one.env.reset(seed=0)[0])[0])
        assert data_equivalence(*[{p: {m: t.numpy() for m, t in by.items()} for p, by in a.items()} for a in actions])
        assert other.env.unwrapped.lm is not agent.env.unwrapped.lm
    shared = set(places(agent.env.unwrapped.lm.model)) - edited_names(agent.env)
    assert shared_names(agent.env, copy.deepcopy(agent).env) == shared


def test_an_agent_or_lm_that_holds_a_model_object_says_why_it_is_not_pickled() -> None:
    lm = EditableLM.load("tiny-llama")
    agent = FTLAgent(make(model=lm))
    with pytest.raises(pickle.PicklingError, match="An agent in it is written by its save"):
        pickle.dumps(agent)
    with pytest.raises(pickle.PicklingError, match="an EditableLM is not pickled.* write it by save_pretrained"):
        pickle.dumps(lm)


# -- environments in other processes


def flat_features() -> Any:
    return GradientFeatures(ScaledUpdate(make(num_batches=2)))


def test_environments_run_in_processes_of_their_own() -> None:
    zero = np.zeros((1, 8), np.float32)
    results = []
    for envs in (AsyncVectorEnv([flat_features]), SubprocVecEnv([flat_features])):
        try:
            if isinstance(envs, SubprocVecEnv):
                envs.seed(0)
                results.append((envs.reset(), envs.step(zero)[:2]))
            else:
                results.append((envs.reset(seed=0)[0], envs.step(zero)[:2]))
        finally:
            envs.close()
    assert data_equivalence(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1][1], results[1][1][1], rtol=1e-5)


# -- rendering


def test_human_mode_prints_and_returns_nothing(capsys: Any) -> None:
    env = make(render_mode="human")
    observation, _ = env.reset(seed=0)
    assert env.render() is None and "No step taken yet" in capsys.readouterr().out
    env.step(fine_tuning(observation))
    assert "Batch 1" in capsys.readouterr().out  # a step shows itself
    assert env.render() is None and "Batch 1" in capsys.readouterr().out
    envs = make_vec(render_mode="human")
    observations, _ = envs.reset(seed=0)
    envs.step(fine_tuning(observations))
    assert capsys.readouterr().out.count("Batch 1") == 2
    assert envs.render() is None and capsys.readouterr().out.count("Batch 1") == 2


def test_every_other_mode_returns_what_gymnasium_says() -> None:
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    kinds = {None: type(None), "ansi": str, "rgb_array": np.ndarray, "rgb_array_list": list, "ansi_list": list}
    for mode, kind in kinds.items():
        env = make(render_mode=mode)
        observation, _ = env.reset(seed=0)
        env.step(fine_tuning(observation))
        shown = env.render()
        assert isinstance(shown, kind)
        if isinstance(shown, list):
            assert len(shown) == 2
    assert make_vec().render() is None
    assert [frame.shape for frame in make_vec(render_mode="rgb_array").render()] == [(544, 960, 3)] * 2
    assert all("No step taken" in text for text in make_vec(render_mode="ansi").render())


@pytest.mark.filterwarnings("ignore:.*render_mode='pygame'")
@pytest.mark.parametrize("maker", [make, make_vec])
def test_an_unknown_render_mode_names_the_known_ones(maker: Any) -> None:
    with pytest.raises(ValueError, match=r"render_mode is 'pygame'; give None or one of \['ansi', 'human'"):
        maker(render_mode="pygame")
