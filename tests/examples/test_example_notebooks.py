"""The notebooks in examples/ run on a tiny model, and their kept outputs belong to their code and the default model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import pytest
from matplotlib import pyplot
from notebooks import (
    DIGEST,
    NOTEBOOKS,
    ROOT,
    Notebook,
    cleaned,
    code_cells,
    code_digest,
    execute,
    printed,
    read,
    run,
    source,
)

from agents import HypernetworkConfig, RLEditAgent, RLEditConfig
from rledit_env.lm.loading.tiny import tiny_model, tiny_tokenizer

FIRST_STEPS, COMPARING = ROOT / "examples" / "first_steps.ipynb", ROOT / "examples" / "comparing_editors.ipynb"
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"
MOST_BYTES = 500_000
NUMBER = r"\d+\.\d+"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A folder with a tiny model that has a chat template."""
    folder, tokenizer = tmp_path / "model", tiny_tokenizer("tiny-llama")
    tokenizer.chat_template = CHAT
    tiny_model("tiny-llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_agent(chat_model: Path, tmp_path: Path) -> Path:
    """An untrained agent for that model, saved."""
    env = gym.make(
        "RLEdit-CounterFact-v0", model=str(chat_model), num_batches=1, batch_size=2, token="subject", steps_per_batch=2,
        present_until=0.8, array_backend="torch", reward_gradient=True,
    )  # fmt: skip
    config = RLEditConfig(network=HypernetworkConfig(blocks=0, step_size=0.01), prior_batches=2)
    RLEditAgent(env, config, seed=0).learn(0, progress_bar=False).save(tmp_path / "agent")
    return tmp_path / "agent"


def test_first_steps_runs_from_its_first_cell_to_its_last(chat_model: Path, saved_agent: Path, tmp_path: Path) -> None:
    ran = run(FIRST_STEPS, tmp_path, MODEL=str(chat_model), AGENT=str(saved_agent))
    for answers in (ran.variables["before"], ran.variables["after"]):
        assert {way: len(texts) for way, texts in answers.items()} == {
            "prompt": 5, "paraphrase": 5, "neighbour": 5, "chat": 5
        }  # fmt: skip
    assert ran.variables["log"].facts == 5
    assert_costs_are_printed(ran.output)


def test_comparing_editors_puts_every_editor_into_the_table_and_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib.use("agg")
    monkeypatch.delenv("DISPLAY", raising=False)
    ran = run(COMPARING, tmp_path, MODEL="tiny-llama", BATCHES=2, BATCH_SIZE=2)
    cells = ran.variables["cells"]
    assert list(cells) == titles_of(ran.output) and len(cells) == 5
    (axes,) = ran.variables["figure"].axes
    points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines[1:]}
    pyplot.close(ran.variables["figure"])
    edited = list(cells.values())[1:]
    assert points == {(cell["kl"], cell[score]) for cell in edited for score in ("mean", "exact_match")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_parameter_that_the_notebook_does_not_set_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{path.name} has no parameter LAYERS"):
        run(path, tmp_path, LAYERS=3)


# -- the outputs that are kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_kept_outputs_are_of_one_run_of_the_present_code_without_an_error(path: Path) -> None:
    notebook = read(path)
    assert notebook["metadata"][DIGEST] == code_digest(notebook), "the code has changed since; run `make notebooks`"
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for cell in cells for output in cell["outputs"]} <= {"stream", "display_data"}
    assert notebook == cleaned(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_its_parameters_name_the_default_model(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    parameters = [source(cell) for cell in code_cells(read(path)) if "parameters" in cell["metadata"].get("tags", ())]
    assert len(parameters) == 1 and 'MODEL = "smollm2-135m"' in parameters[0]
    assert all(len(source(cell).splitlines()) <= 45 for cell in code_cells(read(path)))


def test_the_kept_outputs_of_first_steps_show_answers_scores_and_costs() -> None:
    text = printed(read(FIRST_STEPS))
    for way in ("prompt", "paraphrase", "neighbour", "chat"):
        assert re.search(rf"^{way} +before +after\n─+\n(?:.+\n){{5}}", text, re.MULTILINE)
    assert_costs_are_printed(text)


def test_the_kept_outputs_of_the_comparison_show_all_numbers_and_a_picture() -> None:
    notebook = read(COMPARING)
    assert len(titles_of(printed(notebook))) == 5
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_number_in_the_text_is_one_of_the_outputs(path: Path) -> None:
    notebook = read(path)
    texts = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    numbers = set(re.findall(rf"(?<![\w.]){NUMBER}(?![\w.]*\w)", "\n".join(texts)))
    assert numbers
    assert numbers - set(re.findall(NUMBER, printed(notebook))) == set()


def assert_costs_are_printed(text: str) -> None:
    """The scores of both streams, with the exact match, and the KL of each."""
    assert len(re.findall(rf"Metrics\(efficacy={NUMBER}, .* exact_match={NUMBER}\)", text)) == 2
    assert re.search(rf"^KL {NUMBER} nats a token$", text, re.MULTILINE)
    texts = re.findall(rf"^KL on (\w+) text: {NUMBER} nats a token$", text, re.MULTILINE)
    assert texts == ["self", "human", "chat"]


def titles_of(text: str) -> list[str]:
    """The editors of the table's rows: five scores each, and three divergences."""
    rows = re.findall(rf"^(\S.*?)((?: +{NUMBER}){{5}})((?: +(?:{NUMBER}|–)){{3}})$", text, re.MULTILINE)
    assert all(re.match(rf" +{NUMBER}", costs) for _, _, costs in rows)
    return [title for title, _, _ in rows]


# -- running and cleaning


def notebook_of(*sources: str, outputs: list[dict[str, Any]] | None = None) -> Notebook:
    cells = [
        {"cell_type": "code", "execution_count": None, "id": f"cell-{i}", "metadata": {}, "outputs": outputs or [],
         "source": text.splitlines(keepends=True)}
        for i, text in enumerate(sources)
    ]  # fmt: skip
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_a_run_in_jupyters_kernel_keeps_what_is_printed_and_no_warnings() -> None:
    code = "import sys, os\nprint(sorted(os.listdir()))\nprint('noise', file=sys.stderr)"
    notebook = cleaned(execute(notebook_of(code, "print(1 + 1)")))
    assert printed(notebook) == "[]\n2\n"
    assert [cell["execution_count"] for cell in code_cells(notebook)] == [1, 2]


def test_cleaning_leaves_out_progress_bars_and_their_widgets_but_not_errors() -> None:
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "  0%|"}
    outputs = [
        {"output_type": "stream", "name": "stderr", "text": "50%|"},
        {"output_type": "display_data", "data": widget, "metadata": {}},
        {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []},
    ]
    (cell,) = cleaned(notebook_of("1 / 0", outputs=outputs))["cells"]
    assert [output["output_type"] for output in cell["outputs"]] == ["error"]


def test_cleaning_joins_what_is_printed_in_parts() -> None:
    outputs = [{"output_type": "stream", "name": "stdout", "text": [line]} for line in ("a\n", "b\n")]
    (cell,) = cleaned(notebook_of("print()", outputs=outputs))["cells"]
    assert cell["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}]


def test_the_digest_is_another_when_code_has_changed() -> None:
    assert code_digest(notebook_of("a = 1", "b")) != code_digest(notebook_of("a = 2", "b"))
    assert code_digest(notebook_of("a", "b")) != code_digest(notebook_of("ab"))
