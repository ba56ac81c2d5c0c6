"""EditableLM: a causal LM some of whose linear weights are edited."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import PicklingError
from typing import NoReturn
from weakref import ref

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.delegation import AttributeOf, method_of
from rledit_env.files import whole_folder
from rledit_env.lm.decoding import Decoder
from rledit_env.lm.forward import Forward
from rledit_env.lm.freezing import Freeze
from rledit_env.lm.gradients import Gradients
from rledit_env.lm.gradients import Trace as Trace
from rledit_env.lm.kernels.switch import FastModules
from rledit_env.lm.loading.loader import ModelSource, load_model, stored_dtype
from rledit_env.lm.loading.placement import Spread, resolve_device, resolve_dtype
from rledit_env.lm.loading.registry import default_edit_modules
from rledit_env.lm.modules import chosen_modules, linear_module, linear_modules
from rledit_env.lm.passes import AnswerStates as AnswerStates
from rledit_env.lm.passes import Passes, PrefixCache
from rledit_env.lm.routing import InModules
from rledit_env.lm.saving import write_model, write_tokenizer
from rledit_env.lm.self_check import own_pass
from rledit_env.lm.sharing import frozen_weights
from rledit_env.lm.tokens import PassageEncoder, TextEncoder
from rledit_env.lm.weights import EditedWeights


class EditableLM:
    """A causal LM some of whose linear weights are edited. All other weights are frozen and never written.

    It is composed of these parts, whose methods can be called on it directly:

    | Part        | What it does                                                                            |
    |-------------|-----------------------------------------------------------------------------------------|
    | `weights`   | the edited weights: apply, snapshot, restore, drift (:class:`EditedWeights`)            |
    | `passes`    | forward passes, with states that no edit changes cached (:class:`Passes`)               |
    | `gradients` | keys and value gradients, gradients of the edited weights (:class:`Gradients`)          |
    | `tokens`    | prompts and answers as token ids (:class:`PassageEncoder`)                              |
    | `decoder`   | text generation (:class:`Decoder`)                                                      |

    The model's weights are edited in place; :meth:`close` restores the model.

    Args:
        model: a Hugging Face causal LM. While it is edited, it is in evaluation mode and its parameters do not
            require gradients.
        tokenizer: its fast tokenizer.
        edit_modules: names or globs of the linear modules to edit (``nn.Linear`` or GPT-2's ``Conv1D``).
        name: the model's name in messages and in what is saved.
        cache_bytes: most bytes of cached prefix states.
        max_tokens_per_pass: most padded tokens of one forward pass with gradients (four times as many without). None
            means 384 on a CPU (256 in float32), since larger matrix products gain little there and take more memory,
            and 4096 on other devices.
        revision: the hub revision that was loaded, for what is saved.
        optimize: replace modules of the model by faster ones of this package, where these give the same results to
            rounding. None means no here, and yes in :meth:`load`.

    Raises:
        ValueError: the model is no causal LM, is quantised, or has no linear modules that can be edited; a pattern in
            ``edit_modules`` matches none of those; or the tokenizer is a slow one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edit_modules: Sequence[str],
        name: str = "",
        cache_bytes: int = 2**30,
        max_tokens_per_pass: int | None = None,
        revision: str | None = None,
        optimize: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.revision = model, tokenizer, name, revision
        self.tokens = PassageEncoder(tokenizer, model, name)
        self._changes: list[Freeze | FastModules] = [Freeze(model)]
        try:
            linear = linear_modules(model)
            probe = own_pass(model, tokenizer, linear)
            weights = EditedWeights(chosen_modules(model, linear, probe.unfit, edit_modules))
            forward, fast = probe.forward(model, weights.modules, name, bool(optimize))
        except BaseException:
            self._undo_changes()
            raise
        if fast is not None:
            self._changes.append(fast)
        on_cpu = 384 if model.dtype.itemsize < 4 else 256
        max_tokens_per_pass = max_tokens_per_pass or (on_cpu if model.device.type == "cpu" else 4096)
        self.text_cache = PrefixCache(cache_bytes // 64)  # token ids of texts that the unedited model wrote
        caches = PrefixCache(cache_bytes), PrefixCache(cache_bytes)
        self.weights = weights
        self.passes = Passes(forward, InModules(weights), max_tokens_per_pass, *caches)
        self.gradients = Gradients(self.passes, weights, probe.overwritten)
        self.decoder = Decoder(self.passes, self.tokens)

    @classmethod
    def load(  # noqa: PLR0913  the arguments of `from_pretrained`, under its names
        cls,
        name: str,
        edit_modules: Sequence[str] | str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        device_map: str | Mapping[str, int | str | torch.device] | None = None,
        offload_folder: str | Path | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        optimize: bool | None = None,
    ) -> EditableLM:
        """Load an editable LM by registry name, hub id or folder.

        Args:
            name: such as ``"smollm2-135m"``, ``"owner/name"`` or a path.
            edit_modules: names or globs of the modules to edit; None means the registry's default for this model.
            dtype: precision of the frozen weights; ``"auto"`` (see :func:`resolve_dtype`); or ``"stored"``: the
                precision that the model was saved in, so that :meth:`save_pretrained` writes its frozen weights bit for
                bit.
            device: a torch device, or ``"auto"``: the accelerator if there is one.
            device_map: for a model larger than one device: ``"auto"``, or module → device, "cpu" or "disk", as
                Accelerate takes it. Edited modules must be on a device.
            offload_folder: folder for the weights that ``device_map`` puts on the disk.
            max_memory: device → bytes that ``"auto"`` may use there.
            revision: branch, tag or commit of a hub id; None means its main branch.
            trust_remote_code: run code that comes with the model, where it needs that.
            optimize: use faster modules, as described for the class; None means yes.

        Raises:
            ModelError: the model cannot be found, fetched or used.
            ValueError: a pattern in ``edit_modules`` matches nothing, or an edited module is offloaded.
        """
        device = resolve_device(device)
        source: ModelSource = {"revision": revision, "trust_remote_code": trust_remote_code}
        dtype = stored_dtype(name, **source) if dtype == "stored" else resolve_dtype(dtype, device)
        spread = Spread(device_map, offload_folder, max_memory)
        model, tokenizer = load_model(name, dtype, device, spread=spread, **source)
        patterns = default_edit_modules(name, model) if edit_modules is None else edit_modules
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return cls(model, tokenizer, patterns, name, revision=revision, optimize=optimize is not False)

    # -- the model -------------------------------------------------------------------------------------------------

    forward = AttributeOf[Forward]("passes")
    device = AttributeOf[torch.device]("passes")

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model with its current weights, and its tokenizer, for ``from_pretrained`` to load anywhere.

        The weights are written in the precision that the model runs in, the tokenizer and the generation settings as
        they were loaded. The folder appears when it is complete.

        Raises:
            FileExistsError: the folder is not empty. With ``overwrite`` it is replaced, if rledit wrote all of it in
                one piece, as its marker says (`rledit_env.files.check_free`).
        """
        with whole_folder(folder, overwrite, "edited model") as work, self.weights.in_modules():
            write_model(self.model, work)
            write_tokenizer(self.tokenizer, work)
        return Path(folder)

    def clear_caches(self) -> None:
        """Clear the cached states and texts of the unedited model."""
        for cache in (self.prefix_cache, self.reference_cache, self.text_cache):
            cache.clear()

    def close(self) -> None:
        """Restore the model's pre-trained weights, modules and mode, and clear the caches.

        The LM must not be used afterwards.
        """
        self.restore()
        self.clear_caches()
        self._undo_changes()

    def _undo_changes(self) -> None:
        while self._changes:
            self._changes.pop().undo()

    # -- copies ----------------------------------------------------------------------------------------------------

    def __copy__(self) -> EditableLM:
        """Another object of the same LM: it shares all parts."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> EditableLM:
        """A copy with its own edited weights, equal to these, over the same frozen weights."""
        memo |= frozen_weights(self.model, self.module_shapes) | {id(self.tokenizer): self.tokenizer}
        model = copy.deepcopy(self.model, memo)
        memo[id(self.weights)] = self.weights.copied({name: linear_module(model, name) for name in self.module_shapes})
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(part, memo) for name, part in self.__dict__.items()})
        return other

    def __reduce__(self) -> NoReturn:
        raise PicklingError(
            f"an {type(self).__name__} is not pickled, since its model may take gigabytes; write it by "
            "save_pretrained(folder) and load it by the folder's name, or copy it in this process: copy.deepcopy(lm)"
        )

    # -- attributes and methods of its parts -----------------------------------------------------------------------

    holder = AttributeOf[ref[object] | None]("weights")
    module_shapes = AttributeOf[dict[str, tuple[int, int]]]("weights")
    edit_dtype = AttributeOf[torch.dtype]("weights")
    weight = method_of("weights", EditedWeights.weight)
    original_weight = method_of("weights", EditedWeights.original_weight)
    apply = method_of("weights", EditedWeights.apply)
    add = method_of("weights", EditedWeights.add)
    replace = method_of("weights", EditedWeights.replace)
    matrices = method_of("weights", EditedWeights.matrices)
    restore = method_of("weights", EditedWeights.restore)
    snapshot = method_of("weights", EditedWeights.snapshot)
    preserved = method_of("weights", EditedWeights.preserved)
    drift = method_of("weights", EditedWeights.drift)

    max_tokens_per_pass = AttributeOf[int]("passes")
    prefix_cache = AttributeOf[PrefixCache]("passes")
    reference_cache = AttributeOf[PrefixCache]("passes")
    answer_chunks = method_of("passes", Passes.answer_chunks)
    answer_states = method_of("passes", Passes.answer_states)
    log_probabilities = method_of("passes", Passes.log_probabilities)
    reference_states = method_of("passes", Passes.reference_states)
    states_beside_reference = method_of("passes", Passes.states_beside_reference)
    pad_ids = method_of("passes", Passes.pad_ids)

    def original_weights(self) -> AbstractContextManager[None]:
        """Context in which the model runs with its pre-trained weights; nothing is copied."""
        return self.passes.routing.original()

    def caches_apart(self) -> AbstractContextManager[None]:
        """Context that neither reads nor fills the caches of states, see `Passes.caches_apart`."""
        return self.passes.caches_apart()

    trace = method_of("gradients", Gradients.trace)
    trace_batches = method_of("gradients", Gradients.trace_batches)
    collecting = method_of("gradients", Gradients.collecting)

    text = AttributeOf[TextEncoder]("tokens")
    context_length = AttributeOf[int]("tokens")
    pad_token_id = AttributeOf[int]("tokens")
    encode = method_of("tokens", PassageEncoder.encode)
    tokenize = method_of("tokens", PassageEncoder.tokenize)
    tokenize_all = method_of("tokens", PassageEncoder.tokenize_all)

    generate = method_of("decoder", Decoder.generate)
    decode = method_of("decoder", Decoder.decode)
    decoded_together = method_of("decoder", Decoder.decoded_together)
    pad_on_left = method_of("decoder", Decoder.pad_on_left)
