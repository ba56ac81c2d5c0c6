"""A model that is spread over several places edits as it does in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rledit_env.env import LifelongEditEnv
from rledit_env.knowledge import KnowledgeDataset
from rledit_env.lm.editable import EditableLM

MODULES = "model.layers.[1-2].mlp.{gate,up}_proj"
LAYERS = [f"model.layers.{i}" for i in range(4)]


def stored(tmp_path: Path) -> str:
    EditableLM.load("tiny-llama", MODULES, dtype="float32", device="cpu").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def split(**places: str) -> dict[str, str]:
    """A device map with the edited layers on the CPU."""
    names = ["model.embed_tokens", *LAYERS, "model.norm", "model.rotary_emb", "lm_head"]
    return {name: places.get(name.rsplit(".", 1)[-1], "cpu") for name in names}


def history(lm: EditableLM, facts: KnowledgeDataset) -> list[dict[str, float]]:
    """Rewards and losses of plain fine-tuning."""
    env = LifelongEditEnv("zsre", lm, data=facts, num_batches=2, batch_size=2, array_backend="torch",
                          reward_gradient=True)
    observation, _ = env.reset(seed=0)
    while not env.episode.over:
        values = {m: -0.1 * g for m, g in observation["value_gradients"].items()}
        observation, *_ = env.step({"keys": observation["keys"], "values": values})
    return env.history


MAPS: dict[str, Any] = {
    "first and last layer on the disk": split(**{"0": "disk", "3": "disk"}),
    "head, norm and embeddings on the disk": split(embed_tokens="disk", norm="disk", lm_head="disk"),
    "auto": "auto",
}


@pytest.mark.parametrize("name", MAPS)
def test_a_model_split_between_memory_and_disk_edits_like_a_whole_one(
    tmp_path: Path, facts: Callable[..., KnowledgeDataset], name: str
) -> None:
    folder = stored(tmp_path)
    whole = EditableLM.load(folder, MODULES, dtype="float32", device="cpu")
    spread = EditableLM.load(
        folder, MODULES, dtype="float32", device="cpu", device_map=MAPS[name], offload_folder=tmp_path / "offload",
        max_memory={"cpu": "1GiB"} if MAPS[name] == "auto" else None,
    )  # fmt: skip
    meta = [n for n, p in spread.model.named_parameters() if p.is_meta]
    assert bool(meta) == ("disk" in name), "something is offloaded"
    wanted, found = history(whole, facts()), history(spread, facts())
    for one, other in zip(wanted, found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for m in whole.module_shapes:
        torch.testing.assert_close(whole.weight(m), spread.weight(m), rtol=1e-4, atol=1e-6)
    assert whole.generate(["Rome is in"], extra=4) == spread.generate(["Rome is in"], extra=4)


def test_an_edited_module_on_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.gate_proj is offloaded"):
        EditableLM.load(
            stored(tmp_path), MODULES, dtype="float32", device="cpu", device_map=split(**{"2": "disk"}),
            offload_folder=tmp_path / "offload",
        )  # fmt: skip
