"""The forms in which an edited model is written: the model, or only the change, as a delta or as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rledit_env.lm.delta import relative_error, save_delta, save_lora
from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import JsonObject

FORMS = ("model", "delta", "lora")


def save_forms(lm: EditableLM, folder: Path, forms: Sequence[str], lora_rank: int | None) -> dict[str, JsonObject]:
    """Write these forms; returns form → its folder within ``folder``, and its description."""
    ordered = [form for form in FORMS if form in forms]
    saved: dict[str, JsonObject] = {}
    for form in ordered:
        place = "." if len(ordered) == 1 else form
        if form == "model":
            lm.save_pretrained(folder / place)
            what = "for AutoModelForCausalLM.from_pretrained"
        elif form == "delta":
            save_delta(lm, folder / place)
            what = f"for rledit_env.lm.delta.load_delta(model, folder), with {lm.name} as the model"
        else:
            factors = save_lora(lm, folder / place, lora_rank)
            error = relative_error(lm, factors)
            rank = max(factor.rank for factor in factors.values())
            exact = all(factor.exact for factor in factors.values())
            how = "exact" if exact else f"truncated, relative error of the change {error:.3g}"
            what = f"for peft.PeftModel.from_pretrained({lm.name}, folder), rank {rank}, {how}"
            saved[form] = {"rank": rank, "exact": exact, "relative_error": error}
        saved[form] = {"folder": place, "what": what, **saved.get(form, {})}
    return saved
