"""The README's table of five facts is what `rledit edit` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.real
def test_the_five_facts_of_the_readme_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import five_facts

    shown = five_facts.PLACE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown is not None
    run = five_facts.run()
    for prompt, before, after in run.rows:
        assert f"| {prompt} | {before} | **{after}** |" in shown[0]
    # The sentences are the same but for the numbers, which other processors round otherwise.
    number = re.compile(r"\d+(?:\.\d+)?")
    (sentences,) = re.findall(r"^Exact match, .*", shown[0], re.MULTILINE)
    assert number.sub("#", sentences) == number.sub("#", run.numbers())
    given = [float(n) for n in number.findall(sentences)]
    exact, count, kl, before, after, specificity, generalization = given
    assert (run.exact, len(run.rows)) == (exact, count)
    assert run.kl == pytest.approx(kl, rel=0.5)
    assert run.perplexities == pytest.approx((before, after), rel=0.02)
    assert (run.specificity, run.generalization) == pytest.approx((specificity, generalization), abs=10)
