"""A session's view as HTML: the facts with their answers, what the edits cost the model, and the list of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from rledit_env.evaluation.general.scored_text import NAMES
from rledit_env.knowledge.facts import Facts
from rledit_env.playground.answers import Answer, neighbours_of, paraphrases_of
from rledit_env.playground.view import Batch, FactView, View
from rledit_env.self_text import SelfDrift

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; padding: 0 14px !important; }
.gradio-container .main { padding: 16px 0 90px !important; }  /* room for the message */
#status .html-container, #waiting .html-container, #facts .html-container, #meter .html-container {
  padding: 0 !important; }
:root { --block-info-text-color: #52606d; --quiet: #52606d; }
.dark { --block-info-text-color: #b5bdc6; --quiet: #b5bdc6; }
.rl, .rl p, .rl td, .rl th { font-size: 15px; line-height: 1.45; }
.rl { overflow-wrap: anywhere; }
.rl p { margin: .2rem 0 .6rem; }
.rl .card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem .9rem;
            margin: 0 0 .8rem; }
.rl .fact { font-weight: 650; margin: 0 0 .15rem; }
.rl .about { color: var(--quiet); font-size: 13px; margin: 0 0 .4rem; }
.rl table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: 0; border: 0 !important; }
.rl .meter { table-layout: auto; }
.rl .meter td, .rl .meter th { overflow-wrap: normal; }
.rl tr { background: none !important; border: 0; }
.rl th, .rl td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border: 0;
                 border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color); }
.rl th { font-weight: 600; font-size: 13px; color: var(--quiet); }
.rl tr:last-child td { border-bottom: 0; }
.rl .asked { display: block; font-size: 13px; color: var(--quiet); }
.rl .yes { color: #00795a; font-weight: 650; } .rl .no { color: #b3402a; font-weight: 650; }
.dark .rl .yes { color: #4fd1a5; } .dark .rl .no { color: #ff9a85; }
.rl .number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.rl td.number { white-space: nowrap; }
#status { position: relative; z-index: 1000; overflow: visible; }
.rl .status { position: fixed; left: 0; right: 0; bottom: 0; z-index: 40; max-height: 40vh; overflow-y: auto;
              border-left: 6px solid var(--border-color-primary); padding: .7rem 1rem; color: var(--body-text-color);
              background: var(--background-fill-secondary); box-shadow: 0 -2px 10px rgba(0, 0, 0, .18); }
.rl .status.error { border-color: #b3402a; } .rl .status.done { border-color: #00795a; }
.rl .status.busy { border-color: #d08a00; }
#ledger .wrap { flex-direction: column; align-items: stretch; }
#ledger label { white-space: normal; overflow-wrap: anywhere; }
#ledger label span { white-space: normal; }
@media (max-width: 600px) {
  .rl .answers thead { display: none; }
  .rl .answers tr { display: block; border-bottom: 1px solid var(--border-color-primary); padding: .3rem 0; }
  .rl .answers tr:last-child { border-bottom: 0; }
  .rl .answers td { display: block; border: 0; padding: .1rem 0; }
  .rl .answers td[data-label]::before { content: attr(data-label) ": "; color: var(--quiet); }
}
"""


def status_html(text: str, kind: str = "done") -> str:
    """A message; the kind is "done", "busy" or "error"."""
    return _block(f'<div class="status {kind}" role="status">{escape(text)}</div>') if text else ""


def waiting_html(parts: Sequence[Facts]) -> str:
    """The facts that wait to be edited."""
    records = [record for part in parts for record in part.dataset.records]
    if not records:
        return _block("<p>No fact is waiting. Type one and press Edit, or load a file.</p>")
    shown = "".join(f"<p>{escape(r.prompt)} → <b>{escape(r.target)}</b></p>" for r in records[:5])
    more = f"<p>… and {len(records) - 5} more</p>" if len(records) > 5 else ""
    return _block(f"<p>{_count(len(records), 'fact')} waiting to be edited:</p>{shown}{more}")


def facts_html(view: View) -> str:
    """Every fact with its answers before and after, the newest first."""
    if not view.facts:
        return _block("<p>Nothing has been edited yet.</p>")
    return _block(_summary(view) + "".join(map(_card, reversed(view.facts))))


def meter_html(view: View) -> str:
    """How far the edits moved the rest of the model."""
    if not view.meter:
        return _block("<p>Not measured yet.</p>")
    rows = "".join(_meter_rows(view.meter))
    return _block(
        "<p>How far the edited model is from the unedited one on text that has nothing to do with the facts. "
        "KL is in nats a token, and 0 for the same predictions.</p>"
        '<table class="meter"><thead><tr><th>text</th><th class="number">KL</th>'
        '<th class="number">perplexity before</th><th class="number">now</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def batch_label(batch: Batch) -> str:
    """A batch in one line."""
    facts = "; ".join(batch.facts[:3]) + (f"; … ({len(batch.facts)} facts)" if len(batch.facts) > 3 else "")
    return (f"Batch {batch.number}, {batch.state}: {facts} (presented {_count(batch.presentations, 'time')}, "
            f"norm {batch.norm:.3g})")


def _summary(view: View) -> str:
    """How many facts took, and beside it what that cost."""
    edited = [fact for fact in view.facts if fact.is_edited]
    took, exact = (sum(getattr(f.after.prompt, name) for f in edited) for name in ("took", "exact"))
    own = view.meter.get("self")
    cost = "not measured yet" if own is None else f"{_kl(own)} nats a token on the model's own text"
    notes = "".join(f'<p class="about">Note: {escape(note)}</p>' for note in view.notes)
    return (f'<p id="summary">{_count(len(edited), "edited fact")}: {took} took, {exact} of them as an exact match. '
            f"Cost: KL {cost}.</p>{notes}")


def _card(fact: FactView) -> str:
    state = f"batch {fact.batch}" if fact.is_edited else f"batch {fact.batch}, not in the model now"
    rows = "".join(_rows(fact))
    return (
        f'<div class="card"><p class="fact">{escape(fact.record.prompt)} → {escape(fact.record.target)}</p>'
        f'<p class="about">{state}</p><table class="answers"><thead><tr><th>asked</th><th>before</th><th>now</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _rows(fact: FactView) -> Iterator[str]:
    record, before, after = fact.record, fact.before, fact.after
    yield _row("prompt", record.prompt, before.prompt, after.prompt, _took(before.prompt), _took(after.prompt))
    for text, old, new in zip(paraphrases_of(record), before.paraphrases, after.paraphrases, strict=True):
        yield _row("paraphrase", text, old, new, _took(old), _took(new))
    if before.chat is not None and after.chat is not None:
        yield _row("in a chat", record.prompt, before.chat, after.chat, _took(before.chat), _took(after.chat))
    for text, old, new in zip(neighbours_of(record), before.neighbours, after.neighbours, strict=True):
        stays = old.text == new.text
        yield _row("should stay", text, old, new, "", _mark("kept" if stays else "changed", stays))


def _row(what: str, prompt: str, before: Answer, after: Answer, mark_before: str, mark_after: str) -> str:
    return (
        f'<tr><td>{what}<span class="asked">{escape(prompt)}</span></td>'
        f'<td data-label="before">{_shown(before)} {mark_before}</td>'
        f'<td data-label="now">{_shown(after)} {mark_after}</td></tr>'
    )


def _shown(answer: Answer) -> str:
    return escape(answer.text) or "(nothing)"


def _took(answer: Answer) -> str:
    return _mark("✓ took", True) if answer.took else _mark("✗", False)


def _mark(text: str, good: bool) -> str:
    return f'<span class="{"yes" if good else "no"}">{text}</span>'


def _meter_rows(meter: Mapping[str, SelfDrift]) -> Iterator[str]:
    for key, drift in meter.items():
        numbers = (_kl(drift), f"{drift.original_perplexity:.4g}", f"{drift.perplexity:.4g}")
        yield f"<tr><td>{escape(NAMES[key])}</td>" + "".join(f'<td class="number">{n}</td>' for n in numbers) + "</tr>"


def _kl(drift: SelfDrift) -> str:
    return f"{round(drift.kl, 4) + 0.0:.4f}"  # rounding may have left -0.0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _block(inside: str) -> str:
    return f'<div class="rl">{inside}</div>'
