"""The six tasks of the paper's section 4.5: SST-2, MRPC, CoLA, RTE, NLI and MMLU.

An example is a question and its possible answers. The prediction is the answer whose tokens have the highest mean
log-probability; nothing is generated. The wordings of the questions are this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.losses import negative_log_likelihood

Row = Mapping[str, Any]
CHUNK = 256  # passages whose final states are in memory at once
ROOM = 16  # tokens of the context reserved for an answer


@dataclass(frozen=True)
class Example:
    """A question, its possible answers, and the index of the right one."""

    prompt: str
    answers: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class TaskData:
    """A task's examples, and a description of their source."""

    name: str
    examples: tuple[Example, ...]
    source: str


@dataclass(frozen=True)
class TaskScore:
    """Scores of a task, in percent.

    Attributes:
        f1: the mean of the classes' F1, weighted by the classes' frequencies (as published code reports it).
        mcc: Matthews's correlation coefficient, −100 to 100; 0 for a constant prediction.
        accuracy: share of right predictions.
        f1_calibrated: F1 after each answer's log-likelihood was centred on its mean over the examples (batch
            calibration, Zhou et al., 2024; it uses no labels). Small LLMs often prefer one answer to every question;
            this score corrects for that.
        one_answer: share of the most frequent prediction: 100 for an LLM that always answers the same.
        examples: number of scored examples.
        left_out: number of examples that do not fit the LLM's context.
    """

    f1: float
    mcc: float
    accuracy: float
    f1_calibrated: float
    one_answer: float
    examples: int
    left_out: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class _Task:
    """The conversion of a task's rows to examples, and their place on the hub: (repository, configuration, split)."""

    hub: tuple[str, str, str]
    prompt: Callable[[Row], str]
    answers: tuple[str, ...]
    label: Callable[[Row], int]


def _integer(row: Row) -> int:
    return int(row["label"])


def _entailment(row: Row) -> int:
    """0 if the premise entails the hypothesis, else 1; some files have words for the labels."""
    label = row["label"]
    return ("entailment", "not_entailment").index(label) if isinstance(label, str) else int(label)


def _two_sentences(first: str, second: str, question: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{first}: {row['sentence1'].strip()}\n{second}: {row['sentence2'].strip()}\nQuestion: {question}\nAnswer:"
    )


def _choices(row: Row) -> str:
    lines = [f"{letter}. {str(text).strip()}" for letter, text in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([f"Question: {row['question'].strip()}", *lines, "Answer:"])


_ENTAILS = _two_sentences("Premise", "Hypothesis", "Does the premise entail the hypothesis?")
TASKS: dict[str, _Task] = {
    "sst2": _Task(
        ("nyu-mll/glue", "sst2", "validation"),
        lambda row: f"Review: {row['sentence'].strip()}\nSentiment:", ("negative", "positive"), _integer,
    ),
    "mrpc": _Task(
        ("nyu-mll/glue", "mrpc", "validation"),
        _two_sentences("First sentence", "Second sentence", "Do they mean the same?"), ("no", "yes"), _integer,
    ),
    "cola": _Task(
        ("nyu-mll/glue", "cola", "validation"),
        lambda row: f"Sentence: {row['sentence'].strip()}\nQuestion: Is this sentence good English?\nAnswer:",
        ("no", "yes"), _integer,
    ),
    "rte": _Task(("nyu-mll/glue", "rte", "validation"), _ENTAILS, ("yes", "no"), _entailment),
    # The published NLI subset is RTE's training split, with its labels in words.
    "nli": _Task(("nyu-mll/glue", "rte", "train"), _ENTAILS, ("yes", "no"), _entailment),
    "mmlu": _Task(("cais/mmlu", "all", "validation"), _choices, ("A", "B", "C", "D"), lambda row: int(row["answer"])),
}  # fmt: skip


def load_tasks(source: str | Path, names: Sequence[str] | None = None) -> list[TaskData]:
    """The tasks' examples.

    Args:
        source: a folder with ``sst2.jsonl`` and so on, one such file, or "hub" for the public ones through `datasets`.
        names: tasks of :data:`TASKS`; None means all of them (in a folder: those that it has).

    Raises:
        ValueError: a task is unknown, no task was found, or a row is unusable (the message names its file and line).
        FileNotFoundError: the source does not exist.
    """
    unknown = [name for name in names or () if name not in TASKS]
    if unknown:
        raise ValueError(f"no task {unknown[0]!r}; tasks are {', '.join(TASKS)}")
    if str(source) == "hub":
        return [_from_hub(name) for name in names or TASKS]
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"general ability: {path} does not exist; give a folder with {next(iter(TASKS))}.jsonl and so on, 'hub' or "
            "'self'"
        )
    if path.is_file():
        return [_from_file(path.stem, path)]
    files = {name: path / f"{name}.jsonl" for name in names or TASKS}
    tasks = [_from_file(name, file) for name, file in files.items() if file.exists() or names]
    if not tasks:
        raise ValueError(f"{path} holds none of {', '.join(f'{name}.jsonl' for name in TASKS)}")
    return tasks


def _from_file(name: str, path: Path) -> TaskData:
    if name not in TASKS:
        raise ValueError(f"{path} is named after no task; tasks are {', '.join(TASKS)}")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = ((f"{path.name}, line {i}", line) for i, line in enumerate(lines, start=1))
    return TaskData(name, tuple(_examples(name, rows)), f"file {path.name}")


def _from_hub(name: str) -> TaskData:
    from datasets import load_dataset

    repository, configuration, split = TASKS[name].hub
    rows = ((f"{repository} {configuration}, row {i}", row)
            for i, row in enumerate(load_dataset(repository, configuration, split=split)))
    return TaskData(name, tuple(_examples(name, rows)), f"hub {repository}, {configuration}, {split}")


def _examples(name: str, rows: Iterable[tuple[str, str | Row]]) -> Iterator[Example]:
    task = TASKS[name]
    for place, row in rows:
        try:
            example: Row = json.loads(row) if isinstance(row, str) else row
            label = task.label(example)
            if not 0 <= label < len(task.answers):
                raise ValueError(f"label {label}; give 0 to {len(task.answers) - 1}")
            yield Example(task.prompt(example), task.answers, label)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place}: no example of {name} ({what}); mend or remove it") from error


# ---------------------------------------------------------------------------------------------------------- scoring


def score_task(lm: EditableLM, data: TaskData, shots: int = 0, limit: int | None = 200, seed: int = 0) -> TaskScore:
    """Score the LLM, at its current weights, on a task.

    Args:
        lm: the LLM.
        data: the task.
        shots: number of solved examples before each question, the same ones for all questions, with the classes in
            turn; they are not scored.
        limit: number of examples to score, drawn with ``seed``; None means all.
        seed: of the draw; the same seed gives the same examples for every model.

    Raises:
        ValueError: no example is left to score.
    """
    solved, examples = _draw(data, shots, limit, seed)
    prompts = [_with_solved(lm, solved, example) for example in examples]
    fitting = [(prompt, example) for prompt, example in zip(prompts, examples, strict=True) if prompt is not None]
    if not fitting:
        raise ValueError(f"{data.name}: no example of {data.source} is left to score: of {len(data.examples)}, "
                         f"{len(solved)} are shown solved, and the others exceed {lm.context_length} tokens")
    pairs = [(prompt, answer) for prompt, example in fitting for answer in example.answers]
    passages = lm.tokenize_all(
        [p for p, _ in pairs], [a for _, a in pairs], [None] * len(pairs), [data.name] * len(pairs)
    )
    answers = len(fitting[0][1].answers)
    likelihoods = mean_log_likelihoods(lm, passages).view(-1, answers).cpu().numpy()
    labels = np.array([example.label for _, example in fitting])
    confusion = confusion_matrix(labels, likelihoods.argmax(1), answers)
    calibrated = confusion_matrix(labels, (likelihoods - likelihoods.mean(0)).argmax(1), answers)
    return TaskScore(
        f1=100 * weighted_f1(confusion),
        mcc=100 * matthews_correlation(confusion),
        accuracy=100 * float(np.trace(confusion) / confusion.sum()),
        f1_calibrated=100 * weighted_f1(calibrated),
        one_answer=100 * float(confusion.sum(0).max() / confusion.sum()),
        examples=len(fitting),
        left_out=len(examples) - len(fitting),
    )


def _draw(data: TaskData, shots: int, limit: int | None, seed: int) -> tuple[list[Example], list[Example]]:
    """The solved examples, with the classes in turn, and the examples to score."""
    order = [data.examples[i] for i in np.random.default_rng(seed).permutation(len(data.examples))]
    classes = sorted({example.label for example in order})
    by_class = {c: [i for i, example in enumerate(order) if example.label == c] for c in classes}
    turns = [by_class[c][turn] for turn in range(shots) for c in classes if turn < len(by_class[c])][:shots]
    others = [example for i, example in enumerate(order) if i not in set(turns)]
    return [order[i] for i in turns], others[:limit]


def _with_solved(lm: EditableLM, solved: Sequence[Example], example: Example) -> str | None:
    """The prompt after as many of the first solved examples as fit; None if the prompt alone does not fit."""
    for count in range(len(solved), -1, -1):
        shown = [lm.text.joined(other.prompt, other.answers[other.label]) for other in solved[:count]]
        prompt = "\n\n".join([*shown, example.prompt])
        if len(lm.encode(prompt)) + ROOM <= lm.context_length:
            return prompt
    return None


@torch.no_grad()
def mean_log_likelihoods(lm: EditableLM, passages: Sequence[Passage]) -> Tensor:
    """Mean log-probability of each passage's answer tokens at the current weights, (passages,).

    Passages with the same input, such as a question with several one-token answers, are run once.
    """
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, passage in enumerate(passages):
        groups.setdefault((passage.input_ids, len(passage.targets)), []).append(i)
    # Sorted by length, so that passages of similar length share forward passes.
    members = sorted(groups.values(), key=lambda indices: len(passages[indices[0]]))
    likelihoods = torch.zeros(len(passages), device=lm.device)
    for start in range(0, len(members), CHUNK):
        chunk = members[start : start + CHUNK]
        hidden = lm.answer_states([passages[indices[0]] for indices in chunk]).hidden
        pieces = hidden.split([len(passages[indices[0]].targets) for indices in chunk])
        flat = [(i, piece) for indices, piece in zip(chunk, pieces, strict=True) for i in indices]
        targets = torch.tensor([t for i, _ in flat for t in passages[i].targets], device=lm.device)
        losses = negative_log_likelihood(lm.forward, torch.cat([piece for _, piece in flat]), targets)
        for (i, _), loss in zip(flat, losses.split([len(piece) for _, piece in flat]), strict=True):
            likelihoods[i] = -loss.mean()
    return likelihoods


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) was predicted as each class (column), (classes, classes)."""
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def weighted_f1(confusion: np.ndarray) -> float:
    """Each class's F1 = 2·TP / (2·TP + FP + FN), weighted by the class's frequency among the labels."""
    actual, predicted = confusion.sum(1), confusion.sum(0)
    f1 = 2 * np.diag(confusion) / np.maximum(actual + predicted, 1)
    return float((f1 * actual).sum() / actual.sum())


def matthews_correlation(confusion: np.ndarray) -> float:
    """The correlation coefficient of labels and predictions, for any number of classes (Gorodkin, 2004); 0 if either
    is constant."""
    actual, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = np.trace(confusion) * total - actual @ predicted
    scale = np.sqrt((total**2 - predicted @ predicted) * (total**2 - actual @ actual))
    return float(covariance / scale) if scale else 0.0
