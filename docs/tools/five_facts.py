"""The README's table of five facts, from a run of `rledit edit` with the agent that ships on the default model.

    python docs/tools/five_facts.py            # print the table (about a minute on two free cores)
    python docs/tools/five_facts.py --write    # and put it into the README

`tests/test_five_facts.py` (`make test-real`) runs it again and compares it with the README.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rledit_env import cli
from rledit_env.answers import answer_of
from rledit_env.lm.editable import EditableLM

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "docs" / "assets" / "five_facts.jsonl"
PLACE = re.compile(r"(<!-- five facts -->\n).*?(<!-- end of five facts -->)", re.DOTALL)


@dataclass(frozen=True)
class FiveFacts:
    """A run's answers and numbers.

    Attributes:
        rows: prompt, answer before, answer after of each fact.
        exact: number of free answers that are the target and end there.
        kl: divergence from the unedited model on its own text, in nats a token.
        perplexities: of that text, before and after.
        specificity, generalization: in percent.
    """

    rows: list[tuple[str, str, str]]
    exact: int
    kl: float
    perplexities: tuple[float, float]
    specificity: float
    generalization: float

    def markdown(self) -> str:
        """The table and the sentences below it."""
        lines = ["| prompt | before | after |", "|---|---|---|"]
        lines += [f"| {prompt} | {before} | **{after}** |" for prompt, before, after in self.rows]
        return "\n".join([*lines, "", self.numbers()])

    def numbers(self) -> str:
        """The sentences below the table."""
        before, after = self.perplexities
        return (
            f"Exact match, where the free answer is the target and ends there: {self.exact} of {len(self.rows)}. Its "
            f"cost: KL {self.kl:.4f} nats a token from the unedited model on its own text (perplexity {before:.1f} "
            f"before, {after:.1f} after). Unrelated questions that keep their answers: {self.specificity:.0f} %. "
            f"Tokens of the new answers that are right when asked in other words: {self.generalization:.0f} % "
            "([why, and what helps](docs/faq.md#the-edit-works-for-my-prompt-but-not-in-other-words))."
        )


def run() -> FiveFacts:
    """Edit the facts and read the report."""
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["edit", "--facts", str(FACTS), "--agent", "default", "--out", str(Path(folder) / "edited")]
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main([*arguments, "--save", "delta"])
        if code:
            raise SystemExit(code)
        report = json.loads(next(Path(folder).rglob("edit_report.json")).read_text(encoding="utf-8"))
    unedited = EditableLM.load("smollm2-135m", dtype="stored")
    before = unedited.generate([fact["prompt"] for fact in facts], longest=[fact["target"] for fact in facts])
    rows = [
        (fact["prompt"], answer_of(old), answer_of(edited["answer"]))
        for fact, old, edited in zip(facts, before, report["answers"], strict=True)
    ]
    metrics, own = report["metrics"], report["divergences"]["self"]
    return FiveFacts(
        rows, exact=round(metrics["exact_match"] * len(rows) / 100), kl=own["kl"],
        perplexities=(own["original_perplexity"], own["perplexity"]), specificity=metrics["specificity"],
        generalization=metrics["generalization"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    table = run().markdown()
    print(table)
    if options.write:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        if not PLACE.search(text):
            raise SystemExit("README.md has no place for the table: <!-- five facts --> ... <!-- end of five facts -->")
        readme.write_text(PLACE.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
