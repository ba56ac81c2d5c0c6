"""RunReport: one page with all results in a run's folder, for `rledit report`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rledit_env.answers import MEANING, answer_of
from rledit_env.evaluation.retention import Retention
from rledit_env.files import FIGURES, check_page, check_part, mark, write_bytes
from rledit_env.reporting import charts, run_tables
from rledit_env.reporting.cells import Table
from rledit_env.reporting.drawing import Form
from rledit_env.reporting.logs import read_curves
from rledit_env.reporting.page import Report
from rledit_env.type_aliases import JsonObject

Picture = Callable[[Form], bytes | None]
NO_EDIT = "no edit"
PAGE = "report.html"


class RunReport:
    """The page of a run's folder, and its pictures for a paper.

    Args:
        folder: the folder that `rledit train --out` or `rledit edit --out` wrote. The page shows the results that
            `rledit evaluate --json` wrote into it, and the learning curve, if training logged one there.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains no result, or results of different metrics or different versions of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; give the one that 'rledit train' or 'rledit edit' wrote")
        self.results = _read_results(self.folder)
        if not self.results:
            raise ValueError(
                f"{folder} holds no result to show; write one with: rledit evaluate --agent {folder} --retention "
                f"--general self --json {self.folder / 'result.json'}"
            )
        _check_comparable(self.folder, self.results)
        self.curves = read_curves(self.folder) if list(self.folder.glob("events.out.tfevents.*")) else {}
        self.pictures: dict[str, Picture] = {}  # by file name, in the page's order

    def page(self) -> Report:
        """The whole page."""
        self.pictures = {}
        results = self.results
        page = Report("Lifelong editing of a language model", _lead(results))
        scores = score_rows(results)
        page.table(*run_tables.score_table(scores))
        self._picture(page, "scores", lambda form: charts.score_bars(scores, form),
                      "Scores on the edited facts after the last of them.")
        first = next(iter(results.values()))
        page.paragraph(_legend(str(first["settings"].get("kind", "")), *_scored_as(first)))
        if any(run_tables.PORTABILITY in row for row in scores.values()):
            page.paragraph("Portability: answer tokens of what the edits imply that the model gives, teacher-forced.")
        self._points(page)
        for name, result in results.items():
            of = f" ({name})" if len(results) > 1 else ""
            tag = f"-{name}" if len(results) > 1 else ""
            self._facts(page, result, of)
            self._chat(page, result, of)
            self._retention(page, result, of, tag)
            self._weights(page, result, of, tag)
            self._general(page, result, of)
            self._divergences(page, result, of)
        if self.curves and charts.learning_curves(self.curves) is not None:
            page.heading("Learning")
            self._picture(page, "learning", lambda form: charts.learning_curves(self.curves, form),
                          "Losses on the training streams, and scores on facts kept back to choose the checkpoint.")
        self._settings(page)
        return page

    def write(self, path: str | Path | None = None, figures: Sequence[Form] = ()) -> list[Path]:
        """Write the page and its pictures.

        Args:
            path: the page's path; None takes ``report.html`` in the run's folder.
            figures: file formats in which each picture is also written, into ``figures`` beside the page.

        Returns:
            The paths of the written files, the page first.

        Raises:
            FileExistsError: one of these files exists and rledit did not write it; nothing was written.
        """
        page, place = self.page(), Path(path or self.folder / PAGE).resolve()
        folder = place.parent / FIGURES
        pictures = {folder / f"{name}.{form}": draw(form) or b"" for name, draw in self.pictures.items()
                    for form in figures}  # fmt: skip
        check_page(place)
        for file in pictures:
            check_part(file)
        page.write(place)
        if pictures:
            folder.mkdir(exist_ok=True)
            mark(folder, FIGURES, whole=True, files=[file.name for file in pictures])
        for file, content in pictures.items():
            write_bytes(file, content)
        return [place, *pictures]

    def _picture(self, page: Report, name: str, draw: Picture, caption: str) -> None:
        self.pictures[name] = draw
        page.picture(draw("png") or b"", caption)

    def _points(self, page: Report) -> None:
        streams = {name: result["points"] for name, result in self.results.items() if result.get("points")}
        if not streams:
            return
        page.heading("Along the stream")
        page.paragraph("While the stream was edited, the model was scored on facts edited by then, chosen at random "
                       "and the same for all; the last point has all facts.")
        self._picture(page, "stream", lambda form: charts.stream_curves(streams, form), charts.STREAM_CAPTION)
        for name, points in streams.items():
            if len(streams) > 1:
                page.paragraph(name)
            page.table(*run_tables.point_table(points))

    def _facts(self, page: Report, result: JsonObject, of: str) -> None:
        if not result.get("answers"):
            return
        page.heading(f"Facts of the stream{of}")
        page.paragraph("Spread evenly over the stream, whether they took or not. The model's answers are written "
                       f"freely: {MEANING}.")
        page.table(*answer_rows(result["answers"]))

    def _chat(self, page: Report, result: JsonObject, of: str) -> None:
        chat = result.get("chat")
        if not chat:
            return
        page.heading(f"Asked in a chat{of}")
        page.table(["", "%"], [["Efficacy", chat["chat_efficacy"]], ["Generalization", chat["chat_generalization"]]])
        page.paragraph(f"The edit prompts, and their paraphrases: {chat['taken_means']}.")
        rows = [[fact["prompt"], fact["target"], fact["answer"] or "(nothing)", fact["took"]]
                for fact in chat["answers"]]  # fmt: skip
        page.table(["Prompt", "New fact", "Answer in a chat", "Took"], rows)

    def _retention(self, page: Report, result: JsonObject, of: str, tag: str) -> None:
        if not result.get("retention"):
            return
        retention = Retention.from_dict(result["retention"])
        page.heading(f"Retention{of}")
        lost = "" if retention.forgetting != retention.forgetting else (
            f" On average a batch ends {retention.forgetting:.1f} points below its best."
        )
        page.paragraph(f"Every batch's Efficacy after each later one was edited.{lost}")
        self._picture(page, f"retention{tag}", lambda form: charts.retention_map(retention, form),
                      charts.RETENTION_CAPTION)
        self._picture(page, f"memory{tag}", lambda form: charts.memory_curve(retention, form),
                      charts.MEMORY_CAPTION)

    def _weights(self, page: Report, result: JsonObject, of: str, tag: str) -> None:
        drift, norms = result.get("module_drift"), result.get("update_norms")
        if not drift or not norms or not all(drift.values()):
            return
        page.heading(f"Updates{of}")
        self._picture(page, f"layers{tag}", lambda form: charts.layer_drift(drift, form),
                      charts.LAYERS_CAPTION)
        self._picture(page, f"norms{tag}", lambda form: charts.norm_curve(norms, form),
                      "The size of each batch's update.")

    def _general(self, page: Report, result: JsonObject, of: str) -> None:
        general = result.get("general")
        if not general or not general["scores"]:
            return
        page.heading(f"General ability{of}")
        page.table(*run_tables.general_table({int(step): scores for step, scores in general["scores"].items()}))
        sources = ", ".join(f"{task}: {source}" for task, source in general["sources"].items())
        page.paragraph(
            "Own text: what the model wrote before any editing; chat answers: what it answered then, in its chat "
            "template. F1 by comparing the answers' likelihoods, in percent, "
            f"with {general['shots']} solved examples; calibrated: each answer's likelihood centred on its mean, which "
            f"undoes a preference for one answer. Columns are batches edited. Sources: {sources}."
        )

    def _divergences(self, page: Report, result: JsonObject, of: str) -> None:
        if not result.get("divergences"):
            return
        page.heading(f"The rest of the model{of}")
        page.table(*run_tables.divergence_table(result["divergences"]))
        human = (result.get("divergences_of") or {}).get("human", "what people wrote")
        page.paragraph("How far the edited model is from the unedited one, in nats a token, and how well it predicts "
                       f"the text. Own text: what the model wrote before editing; human text: {human}; chat answers: "
                       "what it answered before editing to everyday questions, in its chat template.")

    def _settings(self, page: Report) -> None:
        page.heading("Data, settings and versions")
        page.table(["", "Data"], [[name, result["data_source"]] for name, result in self.results.items()])
        commands = [result["command"] for result in self.results.values() if result.get("command")]
        if commands:
            page.paragraph("Made with:")
            page.code("\n".join(commands))
        for name, result in self.results.items():
            rows = [[key, _shown(value)] for key, value in result["settings"].items()]
            page.table([name if len(self.results) > 1 else "Setting", "Value"], rows)
        versions = next(iter(self.results.values()))["versions"]
        page.table(["Package", "Version"], list(versions.items()))


def score_rows(results: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
    """Rows of the main table: for each result, the unedited model on its facts, then the result.

    Results on the same facts share the unedited model's row.
    """
    rows: dict[str, JsonObject] = {}
    unedited: list[object] = []  # scores that have a row already
    for name, result in results.items():
        before = result.get("before")
        if before and before not in unedited:
            rows[NO_EDIT if not unedited else f"{NO_EDIT} ({name})"] = dict(before)
            unedited.append(before)
        rows[name] = {**result["metrics"], "seconds": result.get("seconds_per_fact")}
    return rows


def answer_rows(answers: Sequence[JsonObject]) -> Table:
    """Header and rows of facts with the model's answers before (if the result has them) and after editing.

    Results of earlier versions lack "took"; their rows show whether the answer is exactly the target.
    """
    with_before = all("before" in fact for fact in answers)
    with_took = all("took" in fact for fact in answers)
    with_counts = all("presentations" in fact for fact in answers)
    header = ["Prompt", "New fact", *(["Answer before"] if with_before else []), "Answer after",
              "Took" if with_took else "Exactly", *(["Presentations"] if with_counts else [])]
    rows: list[list[object]] = []
    for fact in answers:
        after = fact["after"] if "after" in fact else fact["answer"]
        before = [fact["before"] or "(nothing)"] if with_before else []
        mark = fact["took"] if with_took else after == answer_of(fact["target"])
        count = [fact["presentations"]] if with_counts else []
        rows.append([fact["prompt"], fact["target"], *before, after or "(nothing)", mark, *count])
    return header, rows


def _read_results(folder: Path) -> dict[str, JsonObject]:
    """The results in a folder by file name, oldest first."""
    results: dict[str, JsonObject] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it or write it again") from error
        if isinstance(content, dict) and {"metrics", "settings", "versions", "data_source"} <= set(content):
            if path.name == "edit_report.json":
                content["answers"] = content["answers"][:20]
            results[path.stem] = content
    return results


def _lead(results: Mapping[str, JsonObject]) -> str:
    result = next(iter(results.values()))
    settings = result["settings"]
    facts = len(result["taken"])
    sentence = f"{facts} new facts edited into {settings['model']}, {settings['batch_size']} at a time"
    if "num_batches" in settings and facts < settings["num_batches"] * settings["batch_size"]:
        sentence += " (the model broke before the stream's end)"
    return f"{sentence}; every score is taken after the last of them. Data: {result['data_source']}."


def _scored_as(result: JsonObject) -> tuple[int, str]:
    """How a result was scored: the version of the metrics, and the name in `METRICS`."""
    return result.get("metrics_version", 1), result["settings"].get("metrics", "paper")


def _check_comparable(folder: Path, results: Mapping[str, JsonObject]) -> None:
    """Check that all results were scored in the same way, so that one table can show them.

    Raises:
        ValueError: they were not.
    """
    (first_name, first), *others = results.items()
    for name, result in others:
        if _scored_as(result) != _scored_as(first):
            scored = [f"{folder / f'{stem}.json'} of version {version} ('{metrics}')"
                      for stem, (version, metrics) in ((first_name, _scored_as(first)), (name, _scored_as(result)))]
            raise ValueError(f"the scores of {folder} do not compare, since they are of different metrics: "
                             f"{' and '.join(scored)}; write the older one again with its command, or move one away")


def _legend(kind: str, version: int, metrics: str) -> str:
    exact = "Exact match: the answer written freely begins with the new one and ends there."
    if metrics == "rledit-code":
        text = "Efficacy, Generalization and Specificity are what the paper's released code computes (docs/metrics.md)."
    elif kind == "counterfact":
        text = (
            "Efficacy: edited prompts where the new answer is more probable than the old one. Generalization: the same "
            "on paraphrases. Specificity: neighbouring facts that still prefer their own answer."
        )
    else:
        text = (
            "Efficacy: answer tokens of the edited prompts that the model gives, teacher-forced. Generalization: the "
            "same on paraphrases. Specificity: answer tokens of unrelated prompts that are as before editing."
        )
    means = (
        "Every score is the mean over facts." if version >= 2 else
        "Scored by an earlier version, over the answer tokens and prompts of all facts together: not to be compared "
        "with scores of today's version, which are means over facts."
    )  # fmt: skip
    return f"In percent. {text} {exact} {means}"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
