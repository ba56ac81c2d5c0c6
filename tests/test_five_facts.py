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
    kl = re.search(r"KL (\d\.\d+)", shown[0])
    assert kl is not None
    # Other processors round otherwise.
    assert run.kl == pytest.approx(float(kl[1]), rel=0.5)
