"""Second moments of modules' inputs on ordinary text, which locate-then-edit methods preserve.

C = E[k kᵀ] over the tokens of a corpus, with k a module's input (Meng et al., NeurIPS 2022, section 3.1). The published
code reads Wikipedia. The default here is text that the LLM itself writes, sampled from many short beginnings with a
seed, so that nothing has to be downloaded; a text file works as well. `KeyStatistics.source` names the text.

The text and the moments are cached in the package's cache folder, under a hash of everything they depend on. Those of
the default model's usual modules ship with the package (`agents.shipped_moments`).
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from agents.corpus import (
    GENERATED,
    GIVEN,
    OPENINGS,
    ROW,
    TOPICS,
    generated_corpus,
    text_corpus,
    text_key,
    texts_at_once,
)
from agents.shipped_moments import shipped_moments
from rledit_env.files import write_tensors
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.lm.hooks import module_hooks
from rledit_env.lm.loading.registry import cache_dir
from rledit_env.lm.names import module_layer

_TRACED = 32  # texts in one backward pass
_SAMPLE = 4  # tokens of a text from which the time is estimated

@dataclass(frozen=True)
class KeyStatistics:
    """Second moments of some modules' inputs, or of the gradients with respect to their outputs.

    Attributes:
        second_moments: module → C = E[k kᵀ], (d_in, d_in) float32, or G = E[g gᵀ], (d_out, d_out).
        tokens: number of tokens in the mean.
        source: the text, in words.
        seconds: time of the computation, the text included, even if an earlier run did it.
    """

    second_moments: dict[str, Tensor]
    tokens: int
    source: str
    seconds: float = 0.0


def key_statistics(
    lm: EditableLM,
    modules: Sequence[str],
    corpus: str | Path = GENERATED,
    tokens: int = 65_536,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
    shipped: bool = True,
) -> KeyStatistics:
    """C of some modules under the pre-trained weights: as it ships with the package, from the cache, or computed.

    Args:
        lm: the LLM, edited or not; it is not changed.
        modules: names of linear modules.
        corpus: ``"generated"``, or a UTF-8 text file.
        tokens: the largest number of tokens; a multiple of 64 is used. C has full rank only with more tokens than d_in.
        seed: of the generated text.
        cache: a folder to use instead of the package's cache.
        progress: show a progress bar while computing, and say beforehand how long it will take.
        shipped: take the moments that ship with the package, which were rounded to half precision.

    Raises:
        FileNotFoundError: the text file does not exist.
        ValueError: the text has fewer than 64 tokens.
    """
    cache = cache_dir() if cache is None else cache
    generated = str(corpus) == GENERATED
    with lm.original_weights():
        found = shipped_moments(lm, modules, text_key(tokens, seed)) if generated and shipped else {}
        to_find = [m for m in modules if m not in found]
        seconds, count = 0.0, max(1, tokens // ROW) * ROW
        source = _own_text(seed)
        if to_find:
            if generated and progress:
                what = f"second moments of {len(to_find)} modules' inputs"
                _announce(what, tokens, _expected_of_inputs(lm, to_find, tokens, seed, cache))
            ids, key, source, seconds = _text(lm, corpus, tokens, seed, cache, progress)
            count = ids.numel()
            found |= _cached_or_computed(lm, to_find, ids, key, cache, progress)
    moments = {m: found[m]["second_moment"].to(lm.device) for m in modules}
    seconds += sum(map(_seconds, found.values()))
    return KeyStatistics(moments, count, f"{count:,} tokens of {source}", seconds)


def _cached_or_computed(
    lm: EditableLM, modules: Sequence[str], ids: Tensor, key: str, cache: Path, progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Module → C over a text and the seconds of computing it, from the cache or computed."""
    model = fingerprint(lm)
    paths = {m: _moment_path(cache, model, key, m) for m in modules}
    cached = {m: cached_tensors(path) for m, path in paths.items()}
    missing = [m for m, tensors in cached.items() if "second_moment" not in tensors]
    if missing:
        started = time.perf_counter()
        for m, c in second_moments(lm, missing, ids, progress).items():
            cached[m] = _with_seconds(started, {"second_moment": c}, len(missing))
            keep_tensors(paths[m], cached[m])
    return cached


def _announce(what: str, tokens: int, seconds: float) -> None:
    """Say how long a computation will take, unless it is in the cache."""
    if seconds:
        shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        print(f"once for this model: {what} over {tokens:,} tokens of text that the model writes, about {shown}",
              flush=True)


def _own_text(seed: int) -> str:
    return f"text that the LLM wrote itself (seed {seed})"


def _text(
    lm: EditableLM, corpus: str | Path, tokens: int, seed: int, cache: Path, progress: bool
) -> tuple[Tensor, str, str, float]:
    """A corpus: its texts (R, 64), its key in the cache, its description, and the seconds of writing it."""
    if str(corpus) != GENERATED:
        ids = text_corpus(lm, corpus, tokens)
        return ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), f"the text file {Path(corpus).name}", 0.0
    key = _corpus_key(fingerprint(lm), tokens, seed)
    path = _corpus_path(cache, key)
    text = cached_tensors(path)
    if "ids" not in text:
        started = time.perf_counter()
        text = _with_seconds(started, {"ids": generated_corpus(lm, tokens, seed, progress)})
        keep_tensors(path, text)
    return text["ids"], key, _own_text(seed), _seconds(text)


def expected_seconds(
    lm: EditableLM, modules: Sequence[str], tokens: int = 65_536, seed: int = 0, cache: Path | None = None
) -> float:
    """The approximate time of :func:`key_statistics` with generated text, estimated from a few tokens; 0 if everything
    ships with the package or is in the cache."""
    cache = cache_dir() if cache is None else cache
    with lm.original_weights():
        shipped = shipped_moments(lm, modules, text_key(tokens, seed))
        return _expected_of_inputs(lm, [m for m in modules if m not in shipped], tokens, seed, cache)


def _expected_of_inputs(lm: EditableLM, modules: Sequence[str], tokens: int, seed: int, cache: Path) -> float:
    """:func:`expected_seconds` of modules whose moments do not ship."""
    model = fingerprint(lm)
    key = _corpus_key(model, tokens, seed)
    if all(_moment_path(cache, model, key, m).exists() for m in modules):
        return 0.0
    return _expected(lm, lambda ids: second_moments(lm, modules, ids), tokens, seed, cache)


def _expected(
    lm: EditableLM, read: Callable[[Tensor], object], tokens: int, seed: int, cache: Path
) -> float:
    """The approximate time of writing a text, unless it is in the cache, and of reading it with ``read``."""
    key = _corpus_key(fingerprint(lm), tokens, seed)
    texts = max(1, tokens // ROW)
    at_once = min(texts, texts_at_once(lm))
    writing = 0.0
    sample = torch.zeros(at_once, GIVEN + _SAMPLE, dtype=torch.long)
    if not _corpus_path(cache, key).exists():
        started = time.perf_counter()
        sample = generated_corpus(lm, at_once * ROW, seed, length=GIVEN + _SAMPLE)
        writing = (time.perf_counter() - started) * (ROW - GIVEN) / _SAMPLE
    read(sample)  # the first pass is slower than others
    started = time.perf_counter()
    read(sample)
    reading = (time.perf_counter() - started) * ROW / sample.shape[1]
    return (writing + reading) * texts / at_once


def _corpus_key(model: str, tokens: int, seed: int) -> str:
    return digest(model, GENERATED, tokens, seed, OPENINGS, TOPICS)


def _corpus_path(cache: Path, key: str) -> Path:
    return cache / "corpora" / f"{key}.safetensors"


def _moment_path(cache: Path, model: str, key: str, module: str) -> Path:
    return cache / "key_statistics" / f"{digest(model, key, module)}.safetensors"


def _with_seconds(started: float, tensors: dict[str, Tensor], parts: int = 1) -> dict[str, Tensor]:
    """The tensors, and the seconds since ``started`` divided by the number of parts computed in that time."""
    return {**tensors, "seconds": torch.tensor((time.perf_counter() - started) / parts)}


def _seconds(cached: dict[str, Tensor]) -> float:
    return float(cached.get("seconds", 0.0))


@torch.no_grad()
def second_moments(
    lm: EditableLM, modules: Sequence[str], ids: Tensor, progress: bool = False
) -> dict[str, Tensor]:
    """C of each module over all tokens of texts (R, L), under the current weights: (d_in, d_in), at least float32.

    The memory is that of one forward pass and one matrix a module.
    """
    sums = {m: torch.zeros(lm.module_shapes[m][0], lm.module_shapes[m][0], device=lm.device, dtype=lm.edit_dtype)
            for m in modules}  # fmt: skip

    def add_keys(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys = args[0].flatten(0, -2).to(lm.edit_dtype)
            sums[name].addmm_(keys.T, keys)

        return hook

    above = 1 + max(module_layer(m) for m in modules)
    rows = ids.split(max(1, lm.max_tokens_per_pass // ids.shape[1]))
    with module_hooks(before=[(lm.model.get_submodule(m), add_keys(m)) for m in modules]):
        for part in tqdm(rows, "key statistics", disable=None if progress else True, leave=False):
            lm.forward.run_below(part.to(lm.device), above)
    return {m: total / ids.numel() for m, total in sums.items()}


def output_moments(
    lm: EditableLM, modules: Sequence[str], corpus: str | Path = GENERATED, tokens: int = 16_384, seed: int = 0,
    cache: Path | None = None, progress: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The second moments of :func:`output_statistics`, by module."""
    return output_statistics(lm, modules, corpus, tokens, seed, cache, progress).second_moments


def output_statistics(
    lm: EditableLM, modules: Sequence[str], corpus: str | Path = GENERATED, tokens: int = 16_384, seed: int = 0,
    cache: Path | None = None, progress: bool = True,
) -> KeyStatistics:  # fmt: skip
    """G = E[g gᵀ] of some modules under the pre-trained weights, (d_out, d_out) float32, from the cache if it is there.

    g is the gradient of a text's −log p, summed over its tokens, with respect to the module's outputs at a position.
    With text that the LLM writes itself, G is K-FAC's factor of the outputs (Martens and Grosse, ICML 2015).

    Args:
        lm: the LLM, edited or not; it is not changed.
        modules: names of edited modules.
        corpus, tokens, seed, cache, progress: as for :func:`key_statistics`.

    Raises:
        FileNotFoundError: the text file does not exist.
        ValueError: the text has fewer than 64 tokens.
    """
    cache = cache_dir() if cache is None else cache
    with lm.original_weights():
        model = fingerprint(lm)
        if str(corpus) == GENERATED and progress:
            paths = _output_paths(cache, model, _corpus_key(model, tokens, seed), modules)
            if not all(path.exists() for path in paths.values()):
                seconds = _expected(lm, lambda ids: _output_moments(lm, modules, ids, False), tokens, seed, cache)
                _announce(f"second moments of {len(modules)} modules' output gradients", tokens, seconds)
        ids, key, source, seconds = _text(lm, corpus, tokens, seed, cache, progress)
        paths = _output_paths(cache, model, key, modules)
        cached = {m: cached_tensors(path) for m, path in paths.items()}
        if any("output_moment" not in tensors for tensors in cached.values()):
            started = time.perf_counter()
            for m, g in _output_moments(lm, modules, ids, progress).items():
                cached[m] = _with_seconds(started, {"output_moment": g}, len(modules))
                keep_tensors(paths[m], cached[m])
    moments = {m: tensors["output_moment"].to(lm.device) for m, tensors in cached.items()}
    return KeyStatistics(moments, ids.numel(), f"{ids.numel():,} tokens of {source}",
                         seconds + sum(map(_seconds, cached.values())))


def _output_paths(cache: Path, model: str, key: str, modules: Sequence[str]) -> dict[str, Path]:
    """Module → the file of its output moment in the cache."""
    return {m: cache / "output_moments" / _moment_path(cache, model, key, m).name for m in modules}


def _output_moments(lm: EditableLM, modules: Sequence[str], ids: Tensor, progress: bool) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    rows = 0
    texts = [Passage(tuple(row[:-1]), tuple(row[GIVEN:])) for row in ids.tolist()]
    parts = range(0, len(texts), _TRACED)
    for start in tqdm(parts, "output curvature", disable=None if progress else True, leave=False):
        part = texts[start : start + _TRACED]
        trace = lm.trace(part, "all")
        answers = sum(len(p.targets) for p in part)  # δ is the gradient of the mean over them
        rows += len(trace.owner)
        for m in modules:
            g = answers * trace.value_gradients[m]  # (N, d_out)
            sums[m] = sums.get(m, 0.0) + g.T @ g
    return {m: total / rows for m, total in sums.items()}


def fingerprint(lm: EditableLM) -> str:
    """A hash of the present model: its configuration, precision, vocabulary size and 256 entries of every weight."""
    config = lm.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"{lm.dtype} {len(lm.tokenizer)}".encode())
    for name, weight in lm.model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def cached_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of the cache; none if the file does not exist or is damaged."""
    try:
        return load_file(path) if path.exists() else {}
    except Exception as error:  # safetensors raises its own errors and the system's
        warnings.warn(f"{path} is damaged ({error}) and will be written anew", stacklevel=2)
        return {}


def keep_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}); the next run computes it again", stacklevel=2)
