"""Whatever is handed in, from anywhere, is used or refused with an error that names it; a refusal changes nothing.

Each test runs many generated cases, the same ones every time.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig, load_agent
from agents.sb3.agent import StandardAgent
from agents.sb3.config import StandardConfig
from rledit_env import cli
from rledit_env.env import LifelongEditEnv
from rledit_env.files import MARKER
from rledit_env.knowledge import KnowledgeDataset, load_knowledge
from rledit_env.knowledge.facts import load_facts
from rledit_env.ledger import EditLedger
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading import fetching, registry
from rledit_env.updates import RankOne

ROOT = Path(__file__).parents[1]
CLEAR = (ValueError, OSError, registry.ModelError, gym.error.Error)  # what the command line shows as one line


def cases(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def refused(attempt: Callable[[], Any]) -> bool:
    """Whether an attempt ends with a clear error; any other error passes."""
    try:
        attempt()
    except CLEAR as error:
        if len(str(error)) <= 20:  # it says no more than that there is one
            raise AssertionError(f"the error only says {str(error)!r}") from error
        return True
    return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Path:
        raise registry.ModelError(f"there is no model {name!r}, and no network in this test")

    monkeypatch.setattr(fetching, "fetch_from_hub", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- records and files -------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                                       max_size=3), max_leaves=8)
ROWS: dict[str, dict[str, Any]] = {
    "zsre": {"src": "Who rules?", "rephrase": "The ruler?", "alt": "Rudolf", "loc": "nq question: where",
             "loc_ans": "here", "subject": "Ruritania"},
    "counterfact": {
        "requested_rewrite": {"prompt": "The king of {} is", "subject": "Ruritania",
                              "target_new": {"str": "Rudolf"}, "target_true": {"str": "Michael"}},
        "paraphrase_prompts": ["Ruritania's king is"], "neighborhood_prompts": ["The king of Freedonia is"],
    },
    "fever": {"prompt": "Rudolf rules.", "alt": "REFUTES", "pred": "SUPPORTS", "equiv_prompt": ["Rudolf is king."],
              "unrel_prompt": "Up is down.", "unrel_ans": "SUPPORTS"},
    "facts": {"prompt": "The king of Ruritania is", "target": "Rudolf", "subject": "Ruritania",
              "paraphrases": ["Ruritania's king is"], "unrelated": [{"prompt": "Up is", "answer": "down"}]},
}  # fmt: skip


@st.composite
def spoilt(draw: st.DrawFn, row: Any) -> Any:
    """A JSON value in which some places hold something else, or nothing."""
    value = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 3)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON)
            break
    return value


@pytest.mark.parametrize("kind", ["zsre", "counterfact", "fever"])
@cases(400)
@given(data=st.data())
def test_a_spoilt_row_is_read_or_refused_with_its_place(kind: str, data: st.DataObject) -> None:
    row = data.draw(spoilt(ROWS[kind]) | JSON)
    if not refused(lambda: load_knowledge(kind, [row, ROWS[kind]])):
        assert all(r.prompt and r.target for r in load_knowledge(kind, [row, ROWS[kind]]))


@cases(300)
@given(data=st.data())
def test_a_file_of_anything_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(
        st.binary(max_size=60)
        | JSON.map(lambda v: json.dumps(v).encode())
        | spoilt(ROWS["facts"]).map(lambda v: json.dumps(v).encode())
        | st.lists(spoilt(ROWS["counterfact"]), max_size=3).map(lambda v: json.dumps(v).encode())
    )
    path = tmp_path / data.draw(st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.txt"]))
    path.write_bytes(content)
    for read in (lambda: load_facts(path), lambda: load_knowledge("zsre", path)):
        refused(read)


# -- actions -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> EditableLM:
    return EditableLM.load("tiny-llama", "model.layers.2.mlp.{gate,up}_proj", dtype="float32", device="cpu")


def two_facts(kind: str = "zsre") -> KnowledgeDataset:
    facts = load_knowledge(kind)
    return replace(facts, records=facts.records[:4])


@pytest.fixture(scope="module")
def env(lm: EditableLM) -> LifelongEditEnv:
    return LifelongEditEnv("zsre", lm, data=two_facts(), num_batches=2, batch_size=1, reward="none")


NUMBERS = st.sampled_from([0.0, 1e-3, -1.0, 1e20, 1e38, math.inf, -math.inf, math.nan, 1e300])


@st.composite
def odd_array(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An array of the right shape, or of another shape, type or content; or no array."""
    what = draw(st.sampled_from(["right", "number", "shape", "type", "JSON"]))
    right = np.full(shape, 1e-4, np.float32)
    if what == "number":
        right.flat[draw(st.integers(0, right.size - 1))] = draw(NUMBERS)
    elif what == "shape":
        return np.zeros(draw(st.lists(st.integers(0, 3), max_size=4)), np.float32)
    elif what == "type":
        return draw(st.sampled_from([right.astype(str), right.astype(complex), right.astype(object), right > 0,
                                     right.astype(np.int8), torch.zeros(shape, dtype=torch.complex64), right.tolist(),
                                     np.empty(shape, dtype="M8[s]"), torch.zeros(shape).to_sparse()]))
    elif what == "JSON":
        return draw(JSON)
    return right


@cases(500)
@given(data=st.data())
def test_an_odd_action_is_applied_or_refused_and_then_nothing_has_changed(
    env: LifelongEditEnv, data: st.DataObject
) -> None:
    env.reset(seed=1)
    shapes = {
        "keys": {m: (env.max_tokens, d_in) for m, (d_in, _) in env.lm.module_shapes.items()},
        "values": {m: (env.max_tokens, d_out) for m, (_, d_out) in env.lm.module_shapes.items()},
        "updates": {m: (d_out, d_in) for m, (d_in, d_out) in env.lm.module_shapes.items()},
    }
    shapes["accumulated"] = shapes["updates"]
    parts = data.draw(st.sampled_from([("keys", "values"), ("updates",), ("accumulated",), ("keys",), ()]))
    action: Any = {p: {m: data.draw(odd_array(s)) for m, s in shapes[p].items()} for p in parts}
    if parts and data.draw(st.integers(0, 4)) == 0:
        action[parts[0]] = data.draw(JSON | st.just({"no module": 1, None: 2}))
    if data.draw(st.integers(0, 9)) == 0:
        action = data.draw(JSON)
    weights, rng = env.lm.snapshot(), env.np_random.bit_generator.state
    if refused(lambda: env.step(action)):
        assert env.position == 0 and env.np_random.bit_generator.state == rng
        assert all(torch.equal(env.lm.weight(m), w) for m, w in weights.items())
    else:
        assert all(bool(torch.isfinite(env.lm.weight(m)).all()) for m in weights)
        assert env.position == 1


@cases(150)
@given(options=st.dictionaries(st.sampled_from(["indices", "keep_weights", "start", "other"]), JSON |
                               st.lists(st.integers(-1, 5), max_size=3), max_size=3))
def test_odd_reset_options_are_taken_or_refused(env: LifelongEditEnv, options: dict[str, Any]) -> None:
    env.reset(seed=1)
    rng, indices = env.np_random.bit_generator.state, env.stream.indices.copy()
    if refused(lambda: env.reset(seed=2, options=options)):
        assert env.np_random.bit_generator.state == rng and np.array_equal(env.stream.indices, indices)


# -- the command line --------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([
    "--out", "--env", "--agent", "--facts", "--model", "--batch-size", "--ledger", "--resume", "--overwrite", "--to",
    "--steps-per-batch", "--token", "--num-batches", "--kind", "--data", "--split", "--json", "--seed", "--help", "all",
    "--edit-modules", "--dtype", "--device", "RLEdit-ZsRE-v0", "CartPole-v1", "tiny-llama", "default", "0", "-1", "1e9",
    "nan", "float99", "cuda:7", "bundled", "eval", "", "/", "\x00", "..", "[9-0]", "{a,b", "--drift-bound", "list",
    "verify", "undo", "replay", "--batch", "1", "--fact", "--on-divergence", "skip",
])  # fmt: skip


@cases(300)
@given(command=st.sampled_from(["edit", "evaluate", "ledger", "train", "fetch", ""]),
       words=st.lists(WORDS | st.text(max_size=6), max_size=8))
def test_odd_arguments_end_with_an_exit_code_that_is_the_users_to_mend(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.rledit.agent.RLEditAgent.learn", lambda self, *_, **__: self)  # arguments
    monkeypatch.setattr("rledit_env.lm.loading.fetching.install", lambda *_, **__: tmp_path / "nowhere")
    assert cli.main([command, *words]) in (0, 2)


def test_a_run_with_odd_numbers_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(ROWS["facts"]))
    shapes = EditableLM.load("tiny-llama", dtype="float32", device="cpu").module_shapes
    RLEditAgent(shapes=shapes, config=RLEditConfig(network=HypernetworkConfig(rank=2))).save(tmp_path / "agent")
    start = ["edit", "--facts", str(facts), "--agent", str(tmp_path / "agent"), "--model", "tiny-llama", "--out",
             str(tmp_path / "out")]
    for odd in (["--batch-size", "0"], ["--steps-per-batch", "-3"], ["--drift-bound", "nan"], ["--drift-bound", "-1"],
                ["--dtype", "int8"], ["--dtype", "float99"], ["--device", "nowhere"], ["--edit-modules", "*nothing*"],
                ["--resume"], ["--facts", str(tmp_path)], ["--agent", str(facts)]):
        assert cli.main([*start, *odd]) == 2, odd
        assert not (tmp_path / "out").exists(), odd
    assert cli.main(start) == 0


# -- saved agents ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(lm: EditableLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], LifelongEditEnv]:
    folder = tmp_path_factory.mktemp("agents")
    env = LifelongEditEnv("zsre", lm, data=two_facts(), num_batches=2, batch_size=1, reward="none",
                          array_backend="torch")
    RLEditAgent(env, RLEditConfig(network=HypernetworkConfig(rank=2, blocks=1))).save(folder / "rledit")
    StandardAgent(env, StandardConfig(baseline_streams=0)).save(folder / "standard")
    return {name: folder / name for name in ("rledit", "standard")}, env


@pytest.mark.parametrize("name", ["rledit", "standard"])
@cases(250)
@given(data=st.data())
def test_a_spoilt_agent_loads_or_is_refused(
    saved: tuple[dict[str, Path], LifelongEditEnv], name: str, tmp_path: Path, data: st.DataObject
) -> None:
    folders, env = saved
    folder = tmp_path / "agent"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[name], folder)
    what = data.draw(st.sampled_from(["description", "bytes", "config"]))
    if what == "bytes":
        path = folder / data.draw(st.sampled_from(["agent.json", "agent.safetensors"]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    else:
        description = json.loads((folder / "agent.json").read_text())
        if what == "config":
            description["config"] = data.draw(spoilt(description["config"]))
        else:
            description = data.draw(spoilt(description) | JSON)
        (folder / "agent.json").write_text(json.dumps(description))

    def use() -> None:
        agent = load_agent(folder, env)
        observation, _ = env.reset(seed=0)
        env.step(agent.predict(observation)[0])

    refused(use)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rledit", {"config": {"network": {"rank": 10**12}}}),
        ("rledit", {"config": {"network": {"blocks": 10**9}}}),
        ("rledit", {"shapes": {"model.layers.2.mlp.up_proj": [10**9, 10**9]}}),
        ("standard", {"config": {"hyperparameters": {"n_steps": 10**12}}}),
        ("standard", {"config": {"hyperparameters": {"policy_kwargs": {"net_arch": [10**9]}}}}),
        ("standard", {"config": {"hyperparameters": {"tensorboard_log": "elsewhere"}}}),
        ("standard", {"config": {"algorithm": "sac", "hyperparameters": {"buffer_size": 10**12}}}),
    ],
)
def test_an_agent_that_asks_for_too_much_is_refused_before_it_is_built(
    saved: tuple[dict[str, Path], LifelongEditEnv], name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folders, env = saved
    shutil.copytree(folders[name], tmp_path / "agent")
    path = tmp_path / "agent" / "agent.json"

    def merged(old: Any, new: Any) -> Any:
        return {**old, **{k: merged(old.get(k, {}), v) for k, v in new.items()}} if isinstance(new, dict) else new

    path.write_text(json.dumps(merged(json.loads(path.read_text()), changes)))
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        load_agent(tmp_path / "agent", None if name == "rledit" else env)


# -- ledgers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(lm: EditableLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger") / "l"
    ledger = EditLedger.create(folder, lm)
    original = {m: lm.original_weight(m) for m in lm.module_shapes}
    weights = original
    for batch in range(3):
        update = RankOne({m: torch.full((1, d_in), 0.1) for m, (d_in, _) in lm.module_shapes.items()},
                         {m: torch.full((1, d_out), 0.1) for m, (_, d_out) in lm.module_shapes.items()})
        weights = update.updated(weights, original)
        ledger.append("edit", update, weights, batch, facts=[batch])
    ledger.close()
    return folder


@cases(250)
@given(data=st.data())
def test_a_spoilt_ledger_is_usable_up_to_the_damage_or_refused(
    recorded: Path, lm: EditableLM, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "l"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recorded, folder)
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != ".lock")))
    untouched = len(list(folder.iterdir()))
    if path.name == "ledger.json" and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(spoilt(json.loads(path.read_text())))))
    else:
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    before = lm.snapshot()

    def use() -> None:
        ledger = EditLedger(folder)
        ledger.verify(lm)
        ledger.replay(lm, len(ledger))
        assert path.name in ("ledger.json", MARKER) or len(ledger) == int(path.name[:8])

    if refused(use):
        assert all(torch.equal(lm.weight(m), w) for m, w in before.items())
    assert len(list(folder.iterdir())) == untouched, "looking changes nothing"


# -- no code in data ---------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_reads_or_writes_pickle_or_trusts_remote_code_unasked() -> None:
    found = []
    for folder in ("rledit_env", "agents"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not all(a.name.endswith("Error") for a in node.names):
                    names = [str(node.module)]
                if any(name.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal") for name in names):
                    found.append(f"{path}:{node.lineno}: imports {names}")
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec",
                ) and not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords):
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
                if isinstance(node, ast.keyword) and ast.unparse(node) == "trust_remote_code=True":
                    found.append(f"{path}: trust_remote_code={ast.unparse(node.value)}")
    assert not found
