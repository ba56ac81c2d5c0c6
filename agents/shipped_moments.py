"""Second moments of keys that ship with the package, so that nobody has to wait for a model to write its text.

`agents.key_statistics.key_statistics` reads them for the modules, the text and the model that they were computed with.
``python -m agents.running.ship_moments`` computes and writes them.

A file has the moment C (d, d) of one input; modules with the same input, such as gate and up of an MLP, share it. It is
stored as C = D L Lᵀ D: D is the root of C's diagonal in float32, and L is a lower triangle with rows of norm 1, in half
precision. However L is rounded, L Lᵀ is positive definite as long as no entry of its diagonal is zero; C itself,
rounded to half precision, need not be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rledit_env.files import write_tensors, write_text
from rledit_env.lm.editable import EditableLM

FOLDER = Path(__file__).parent / "pretrained"
INDEX = "moments.json"
FORMAT = 1
_SAMPLE = 64  # entries of every weight that a model is recognised by


def shipped_moments(
    lm: EditableLM, modules: Sequence[str], text: str, folder: Path = FOLDER
) -> dict[str, dict[str, Tensor]]:
    """The moments that ship for some modules: module → ``second_moment`` (d_in, d_in), float32, and ``seconds``, the
    time that computing it took. Modules without shipped moments are left out.

    Args:
        lm: the LLM, at its pre-trained weights.
        modules: names of linear modules.
        text: the key of the text that the LLM would write (`agents.corpus.text_key`).
        folder: the folder that is searched for moments, with those below it.
    """
    for path in sorted(folder.rglob(INDEX)):
        index = json.loads(path.read_text(encoding="utf-8"))
        entries = {m: index["modules"][m] for m in modules if m in index["modules"]}
        if index["format"] == FORMAT and index["text"] == text and entries and index["weights"] == weights_digest(lm):
            files = {entry["file"] for entry in entries.values()}
            moments = {file: unpacked(load_file(path.parent / file)) for file in files}
            return {
                m: {"second_moment": moments[entry["file"]], "seconds": torch.tensor(entry["seconds"])}
                for m, entry in entries.items()
            }
    return {}


def ship(
    lm: EditableLM, statistics: Mapping[str, Tensor], seconds: float, text: str, folder: Path
) -> Path:
    """Write moments into a folder: a file for each distinct one, and the index; returns the index's path.

    Args:
        lm: the LLM, at its pre-trained weights.
        statistics: module → C (d_in, d_in).
        seconds: the time that computing all of them took, the text included.
        text: the key of the text.
        folder: the folder, created if it does not exist.

    Raises:
        ValueError: a moment is not positive definite after packing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for module, moment in statistics.items():
        name = next((name for name, other in files.items() if torch.equal(other, moment)), None)
        if name is None:
            name = f"{module}.safetensors"
            packed = pack(moment)
            if not is_positive_definite(unpacked(packed)):
                raise ValueError(f"the second moment of {module} is not positive definite in half precision; compute "
                                 "it from more tokens")
            write_tensors(folder / name, packed)
            files[name] = moment
        modules[module] = {"file": name, "seconds": round(seconds / len(statistics), 3)}
    index = {"format": FORMAT, "model": lm.name, "weights": weights_digest(lm), "text": text, "modules": modules}
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return folder / INDEX


def pack(moment: Tensor) -> dict[str, Tensor]:
    """C (d, d) as the tensors of a file: ``root`` (d,), float32, and the rows of ``triangle`` one after another,
    (d(d+1)/2,), float16.

    Raises:
        torch.linalg.LinAlgError: C is not positive definite.
    """
    moment = moment.double()
    root = moment.diagonal().sqrt()
    factor = torch.linalg.cholesky(moment / torch.outer(root, root))
    rows, columns = torch.tril_indices(len(root), len(root))
    return {"root": root.float(), "triangle": factor[rows, columns].half()}


def unpacked(tensors: Mapping[str, Tensor]) -> Tensor:
    """The moment C (d, d) in a file, float32."""
    root = tensors["root"].double()
    factor = root.new_zeros(len(root), len(root))
    rows, columns = torch.tril_indices(len(root), len(root))
    factor[rows, columns] = tensors["triangle"].double()
    factor *= root[:, None]
    return (factor @ factor.T).float()


def is_positive_definite(moment: Tensor) -> bool:
    """Whether a symmetric matrix (d, d) is positive definite."""
    return int(torch.linalg.cholesky_ex(moment.double()).info) == 0


def weights_digest(lm: EditableLM) -> str:
    """A hash of 64 entries of every present weight, rounded to bfloat16, so that a model loaded in float32 and the same
    model loaded in bfloat16 have the same one."""
    digest = hashlib.sha256()
    for name, weight in lm.model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].bfloat16().float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
