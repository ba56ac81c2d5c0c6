"""EditableLM: a causal LM some of whose linear weights are edited."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rledit_env.files import whole_folder
from rledit_env.knowledge.text import find_subject
from rledit_env.lm.forward import (
    Forward,
    Passage,
    PrefixCache,
    at_least_float32,
    decoder_layers,
)
from rledit_env.lm.kernels.layout import Layout, cheapest_chunks, even_chunks, padded_on_left, sharing_chunks
from rledit_env.lm.kernels.products import outer
from rledit_env.lm.loading.placement import resolve_device, resolve_dtype
from rledit_env.lm.loading.registry import default_edit_modules, load_model, stored_dtype
from rledit_env.lm.losses import negative_log_likelihood
from rledit_env.lm.modules import chosen_modules, linear_modules
from rledit_env.lm.saving import write_model, write_tokenizer
from rledit_env.lm.self_check import own_pass
from rledit_env.lm.sharing import frozen_weights
from rledit_env.lm.tokens import Offsets, TextEncoder
from rledit_env.lm.weights import EditedWeights

CONTEXT_SETTINGS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "context_length", "max_target_positions",
)  # fmt: skip
NO_BOUND = 10**9  # tokens; tokenizers without a bound name a larger number


@dataclass(frozen=True)
class Trace:
    """The fine-tuning gradient of a batch in factored form.

    Attributes:
        keys: module name → its inputs u at the N traced positions, (N, d_in) float32.
        value_gradients: module name → gradient δ of the loss with respect to its outputs there, (N, d_out) float32.
        owner: index of the passage that each position belongs to, (N,) int64.
        loss: mean answer-token cross-entropy of the batch.
        hardest: the largest cross-entropy of any of a passage's answer tokens, (passages,) in nats.
        sums: the sum of the cross-entropies of a passage's answer tokens, (passages,) in nats.
        answers: how many answer tokens a passage has, (passages,) float.
    """

    keys: dict[str, Tensor]
    value_gradients: dict[str, Tensor]
    owner: Tensor
    loss: float
    hardest: Tensor
    sums: Tensor
    answers: Tensor

    def of(self, passages: Tensor) -> Trace:
        """What a batch of only some of the passages would give, chosen by a mask (passages,): the gradient is that of
        the mean over their own answer tokens, and they are numbered anew."""
        chosen = passages.to(self.owner.device)
        rows = chosen[self.owner]
        keys, gradients = ({m: t[rows] for m, t in part.items()} for part in (self.keys, self.value_gradients))
        tokens = float(self.answers[chosen].sum())
        factor = float(self.answers.sum()) / max(tokens, 1.0)
        return Trace(
            keys, {m: factor * g for m, g in gradients.items()}, (chosen.cumsum(0) - 1)[self.owner[rows]],
            float(self.sums[chosen].sum()) / max(tokens, 1.0), self.hardest[chosen], self.sums[chosen],
            self.answers[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class AnswerStates:
    """Final normalised states of passages at their answer positions, P in all, in the passages' order.

    Attributes:
        hidden: (P, d).
        targets: (P,) token ids.
        owner: (P,) index of the passage.
    """

    hidden: Tensor
    targets: Tensor
    owner: Tensor


class EditableLM(EditedWeights):
    """A causal LM with edited weights (see :class:`EditedWeights`): its text, its passes and their gradients. Frozen
    weights are never written.

    Args:
        model: a Hugging Face causal LM in evaluation mode.
        tokenizer: its fast tokenizer.
        edit_modules: names or globs of the linear modules to edit (``nn.Linear`` or GPT-2's ``Conv1D``).
        name: what to call the model in logs.
        cache_bytes: bound on the cached prefix states.
        max_tokens_per_pass: bound on the padded tokens of one pass that takes gradients (four times as many where none
            are taken); None means what suits the device: on a CPU, where matrix products gain little by more and memory
            grows with it, 384, or 256 in float32; 4096 elsewhere.
        revision: of the name, where it is a hub id: for the record.

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
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{name or type(model).__name__}: a fast tokenizer is needed, since it tells which characters a token "
                "covers; convert it with the tokenizers library or choose another model"
            )
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.text = TextEncoder(tokenizer)
        self.revision = revision
        linear = linear_modules(model)
        own = own_pass(model, tokenizer, linear)
        on_cpu = 384 if model.dtype.itemsize < 4 else 256
        self.max_tokens_per_pass = max_tokens_per_pass or (on_cpu if model.device.type == "cpu" else 4096)
        super().__init__(chosen_modules(model, linear, own.unfit, edit_modules))
        _, layers = decoder_layers(model)
        self._overwritten = own.overwritten
        self.forward: Forward = own.forward(model, layers, self._modules, name)
        self.prefix_cache = PrefixCache(cache_bytes)
        self.reference_cache = PrefixCache(cache_bytes)
        self.text_cache = PrefixCache(cache_bytes // 64)  # token ids that θ₀ wrote

    @classmethod
    def load(
        cls,
        name: str,
        edit_modules: Sequence[str] | str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        offload_folder: str | Path | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> EditableLM:
        """An editable LM by registry name, hub id or folder.

        Args:
            name: such as ``"smollm2-135m"``, ``"owner/name"`` or a path.
            edit_modules: names or globs of the modules to edit; None means the registry's default for this model.
            dtype: precision of the frozen weights, ``"auto"`` (see :func:`resolve_dtype`), or ``"stored"``: the one
                that the model was saved in, so that :meth:`save_pretrained` leaves its frozen weights bit for bit.
            device: or ``"auto"``: the accelerator if there is one.
            device_map: for a model larger than one device: ``"auto"``, or module → device, "cpu" or "disk", as
                Accelerate takes it. Edited modules must lie on a device.
            offload_folder: where what is mapped to the disk goes.
            max_memory: device → bytes that ``"auto"`` may fill there.
            revision: branch, tag or commit of a hub id; None means its main branch.
            trust_remote_code: run the code that the model brings, where it needs that.

        Raises:
            ModelError: the model cannot be had.
            ValueError: a pattern in ``edit_modules`` matches nothing, or an edited module is offloaded.
        """
        device = resolve_device(device)
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        dtype = stored_dtype(name, **source) if dtype == "stored" else resolve_dtype(dtype, device)
        model, tokenizer = load_model(
            name, dtype, device, device_map=device_map, offload_folder=offload_folder, max_memory=max_memory, **source
        )
        patterns = default_edit_modules(name, model) if edit_modules is None else edit_modules
        return cls(model, tokenizer, [patterns] if isinstance(patterns, str) else patterns, name, revision=revision)

    def __deepcopy__(self, memo: dict[int, Any]) -> EditableLM:
        """A copy with edited weights of its own, equal to these, over the same frozen weights."""
        shared = [self.tokenizer, *self._original.values(), *self._original_run.values()]
        memo |= frozen_weights(self.model, self._modules) | {id(part): part for part in shared}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        parts = {name: part for name, part in self.__dict__.items() if name not in ("_master", "holder")}
        other.__dict__.update({name: copy.deepcopy(part, memo) for name, part in parts.items()})
        other.holder = None
        other._take_masters()
        other.restore(self._master)
        return other

    # -- names, places -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.forward.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context_length(self) -> int:
        """The most tokens that the model takes; ``sys.maxsize`` where nothing bounds them, as with ALiBi and state
        spaces."""
        config = self.model.config.get_text_config()
        named = (getattr(config, name, None) for name in CONTEXT_SETTINGS)
        bounds = [bound for bound in named if isinstance(bound, int) and bound > 0]
        if not bounds and self.tokenizer.model_max_length < NO_BOUND:
            bounds = [self.tokenizer.model_max_length]
        return bounds[0] if bounds else sys.maxsize

    @property
    def pad_token_id(self) -> int:
        """What fills up rows of token ids, which no token sees: the tokenizer's pad token, or another one where it has
        none, or none that the model has an embedding for."""
        tokenizer, known = self.tokenizer, len(self.model.get_input_embeddings().weight)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        return next((token for token in candidates if token is not None and token < known), 0)

    # -- text ----------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued (see :class:`TextEncoder`)."""
        return self.text.encode(text)

    def tokenize(
        self, prompt: str, answer: str, subject: str | tuple[int, int] | None = None, origin: str = ""
    ) -> Passage:
        """The passage of a prompt and its answer, joined as :class:`TextEncoder` joins them.

        Args:
            prompt, answer: texts.
            subject: what the prompt is about: its text, sought in the prompt (`find_subject`), or its first character
                there and the one after its last.
            origin: the place of the fact, for messages.

        Raises:
            ValueError: the passage is longer than the model's context, or the answer has no token.
        """
        return self.tokenize_all([prompt], [answer], [subject], [origin])[0]

    def tokenize_all(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        subjects: Sequence[str | tuple[int, int] | None],
        origins: Sequence[str],
    ) -> list[Passage]:
        """:meth:`tokenize` for many texts at once."""
        passages = []
        rows = zip(self.text.pairs(prompts, answers), prompts, answers, subjects, origins, strict=True)
        for (ids, offsets, first), prompt, answer, subject, origin in rows:
            if not 0 < first < len(ids):
                raise ValueError(f"{origin}: the prompt {prompt!r} or its answer {answer!r} has no token")
            if len(ids) > self.context_length:
                raise ValueError(
                    f"{origin}: prompt and answer have {len(ids)} tokens, but the context of "
                    f"{self.name or 'the model'} holds {self.context_length}; shorten or leave out {prompt[:60]!r}"
                )
            position = _last_token(offsets[:first], _span(prompt, subject))
            passages.append(Passage(tuple(ids[:-1]), tuple(ids[first:]), position))
        return passages

    # -- forward -------------------------------------------------------------------------------------------------

    def _prefix_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """Cached states that enter the first edited layer, one (L, d) a passage."""
        found = [self.prefix_cache.get(p.input_ids) for p in passages]
        missing = list({p.input_ids: i for i, p in enumerate(passages) if found[i] is None}.values())
        fresh: dict[tuple[int, ...], Tensor] = {}
        for chunk, layout in self._passes([passages[i].input_ids for i in missing], [0] * len(missing)):
            ids = [passages[missing[i]].input_ids for i in chunk]
            hidden = self.forward.prefix(layout.batch([torch.tensor(row) for row in ids]).to(self.device), layout)
            for row, states in zip(ids, layout.split(hidden), strict=True):
                fresh[row] = states.clone()
        for key, value in fresh.items():
            self.prefix_cache.put(key, value)
        return [fresh[p.input_ids] if state is None else state for p, state in zip(passages, found, strict=True)]

    def pad_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids (B, L), padded on the right."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        return ids.to(self.device)

    def _suffix_chunks(
        self, passages: Sequence[Passage], streams: Sequence[int] | None = None, sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout, Tensor]]:
        """Chunks of passage indices, how they lie in the pass's batch, and their normalised final states at the answer
        positions (P, d).

        ``streams`` says whose weights each passage meets, where there are several (see `rledit_env.lm.streams`);
        ``sharing`` whether what passages begin with may be in the batch once.
        """
        states = self._prefix_states(passages)
        streams, quantum = [0] * len(passages) if streams is None else streams, self.forward.quantum
        for chunk, layout in self._passes([p.input_ids for p in passages], streams, sharing):
            batch = layout.batch([states[i] for i in chunk])
            places = layout.places([passages[i].positions for i in chunk], self.device)
            more = -len(places) % quantum  # positions that nobody asks for
            with self._routed([streams[i] for i in chunk], layout.sizes):
                final = self.forward.final_states(batch, F.pad(places, (0, more)), layout)
            yield chunk, layout, final[: len(places)]

    def _passes(
        self, rows: Sequence[Sequence[int]], streams: Sequence[int], sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout]]:
        """Indices of passages, given as token ids, in chunks for one pass each, and how they lie in its batch."""
        limit, quantum = self._tokens_now, self.forward.quantum
        longest = min(self.forward.longest_packed, limit)
        meeting, lengths = self._meeting(streams), [len(row) for row in rows]
        short = [i for i, length in enumerate(lengths) if length <= longest]
        theirs, whose = [rows[i] for i in short], [meeting[i] for i in short]
        if sharing and self.forward.shares:
            for chunk in sharing_chunks(theirs, limit, whose, quantum):
                layout = Layout.sharing([theirs[i] for i in chunk], [whose[i] for i in chunk], quantum)
                yield [short[i] for i in chunk], layout
        else:
            for chunk in even_chunks([len(row) for row in theirs], limit, whose, quantum):
                yield [short[i] for i in chunk], Layout.end_to_end([len(theirs[i]) for i in chunk], quantum)
        other = [i for i, length in enumerate(lengths) if length > longest]
        for chunk in cheapest_chunks(
            [lengths[i] for i in other], limit, [meeting[i] for i in other], quantum=quantum
        ):
            members = [other[i] for i in chunk]
            yield members, Layout.padded([lengths[i] for i in members], quantum)

    def _meeting(self, streams: Sequence[int]) -> Sequence[int]:
        """The streams by whose weights passages are to be sorted: here, there is one."""
        return [0] * len(streams)

    def _routed(self, streams: Sequence[int], sizes: Sequence[int]) -> AbstractContextManager[None]:
        """Within it, the tokens of a batch meet their stream's weights, the first ``sizes[0]`` those of ``streams[0]``
        and so on: here, the model's own."""
        return nullcontext()

    @property
    def _tokens_now(self) -> int:
        """The most padded tokens of a pass; where nothing takes gradients, it holds one layer's activations only."""
        return self.max_tokens_per_pass * (1 if torch.is_grad_enabled() else 4)

    @property
    def _streams(self) -> int:
        """How many streams' weights it holds."""
        return 1

    @property
    def _route(self) -> Sequence[tuple[int, int]]:
        """Of the pass that runs now: the stream of the first tokens and their number, and so on; empty where there is
        one stream."""
        return ()

    def answer_chunks(
        self, passages: Sequence[Passage], streams: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], AnswerStates]]:
        """Chunks of passage indices with their final states at the answer positions, under the current weights.

        Chunk by chunk, so that a caller that takes gradients holds one chunk's graph at a time.
        """
        for chunk, _, states in self._suffix_chunks(passages, streams):
            yield chunk, self._joined([states], [passages[i] for i in chunk])

    def _joined(self, pieces: Sequence[Tensor], passages: Sequence[Passage]) -> AnswerStates:
        return AnswerStates(
            hidden=torch.cat(list(pieces)) if pieces else self.forward.output.no_states(),
            targets=torch.tensor([t for p in passages for t in p.targets], dtype=torch.long, device=self.device),
            owner=torch.tensor(
                [i for i, p in enumerate(passages) for _ in p.targets], dtype=torch.long, device=self.device
            ),
        )

    def answer_states(self, passages: Sequence[Passage], streams: Sequence[int] | None = None) -> AnswerStates:
        """Final states at the answer positions of all passages, in their order; no gradients."""
        pieces: list[Tensor | None] = [None] * len(passages)
        with torch.no_grad():
            for chunk, states in self.answer_chunks(passages, streams):
                for index, piece in zip(
                    chunk, states.hidden.split([len(passages[i].targets) for i in chunk]), strict=True
                ):
                    pieces[index] = piece
        return self._joined([p for p in pieces if p is not None], passages)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (P, |V|) float32 from normalised final states (P, d)."""
        return F.log_softmax(self.forward.logits(hidden), dim=-1)

    def reference_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """θ₀'s final states at each passage's answer positions, (answer tokens, d) each: what the KL is measured
        against. Cached."""
        found = self._known_references(passages)
        missing = [i for i, state in enumerate(found) if state is None]
        if missing:
            theirs = [passages[i] for i in missing]
            with self.original_weights():
                states = self.answer_states(theirs)
            for i, state in zip(missing, self._keep_references(theirs, states.hidden), strict=True):
                found[i] = state
        return [state for state in found if state is not None]

    def states_beside_reference(
        self, passages: Sequence[Passage], streams: Sequence[int], referenced: Sequence[int]
    ) -> tuple[AnswerStates, list[Tensor]]:
        """:meth:`answer_states`, and :meth:`reference_states` of the passages with these indices."""
        reference = self.reference_states([passages[i] for i in referenced])
        return self.answer_states(passages, streams), reference

    def _known_references(self, passages: Sequence[Passage]) -> list[Tensor | None]:
        return [self.reference_cache.get((p.input_ids, len(p.targets))) for p in passages]

    def _keep_references(self, passages: Sequence[Passage], hidden: Tensor) -> list[Tensor]:
        """θ₀'s states (P, d) of passages by passage, which are cached."""
        pieces = [piece.clone() for piece in hidden.split([len(p.targets) for p in passages])]
        for passage, piece in zip(passages, pieces, strict=True):
            self.reference_cache.put((passage.input_ids, len(passage.targets)), piece)
        return pieces

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], longest: Sequence[str] | None = None, extra: int = 4, batch_size: int = 64
    ) -> list[str]:
        """Greedy continuations, batched over prompts of similar length with a KV cache.

        Args:
            prompts: texts to continue.
            longest: expected answers; the continuation may be ``extra`` tokens longer than the longest of its batch.
            extra: tokens beyond that (or in all, without ``longest``).
            batch_size: prompts decoded together.
        """
        tokenizer = self.tokenizer
        answers = [len(self.encode(" " + text.strip(" "))) for text in longest] if longest else [0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (answers[i], len(prompts[i])))
        texts = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            rows = [self.encode(prompts[i]) for i in chunk]
            for members in self.decoded_together(rows):
                output = self.decode([rows[m] for m in members], max(answers[i] for i in chunk) + extra)
                for m, row in zip(members, output, strict=True):
                    texts[chunk[m]] = str(tokenizer.decode(row, skip_special_tokens=True))
        return texts

    def decoded_together(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows of token ids in batches that the model continues as it continues each row alone."""
        batching = self.forward.batching
        keys = [0 if batching == "padded" else len(row) if batching == "by length" else i for i, row in enumerate(rows)]
        for key in sorted(set(keys)):
            yield [i for i, each in enumerate(keys) if each == key]

    def decode(self, rows: Sequence[Sequence[int]], most: int, **sampling: Any) -> Tensor:
        """Continuations (B, most or less) of rows of token ids, which the model sees together (see
        :meth:`decoded_together`): greedy ones, unless ``sampling`` says otherwise, as transformers' ``generate`` takes
        it."""
        ids, mask = self.pad_on_left(rows)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, pad_token_id=self.pad_token_id,
            **{"do_sample": False, **sampling},
        )  # fmt: skip
        return output[:, ids.shape[1] :]

    def pad_on_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), padded on the left, and where they are not padding."""
        ids, mask = padded_on_left(rows, self.pad_token_id)
        return ids.to(self.device), mask.to(self.device)

    # -- the fine-tuning gradient --------------------------------------------------------------------------------

    def trace(self, passages: Sequence[Passage], token: str = "answer") -> Trace:
        """Keys and value gradients of the mean answer-token cross-entropy at the current weights.

        Args:
            passages: the batch's edits.
            token: which positions: those that predict an answer token (``"answer"``), the subject's last token
                (``"subject"``; the answer positions where a record names no subject), both
                (``"subject+answer"``), or every token (``"all"``).
        """
        return self.trace_batches([passages], token)[0]

    def trace_batches(self, batches: Sequence[Sequence[Passage]], token: str = "answer") -> list[Trace]:
        """:meth:`trace` of several batches in one pass, each the gradient of the mean over its own answer tokens.

        Batch b meets the weights of stream b, where there are several (see `rledit_env.lm.streams`).
        """
        passages = [p for batch in batches for p in batch]
        batch_of = [b for b, batch in enumerate(batches) for _ in batch]
        totals = [sum(len(p.targets) for p in batch) for batch in batches]
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def record(name: str) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                inputs[name] = args[0].detach()
                outputs[name], passed_on = self._watched(name, output)
                return passed_on

            return hook

        order: list[int] = []
        loss = [0.0] * len(batches)
        hardest, sums = torch.zeros(2, len(passages), dtype=self.edit_dtype, device=self.device)
        answers = torch.tensor([float(len(p.targets)) for p in passages], device=self.device)
        handles = [module.register_forward_hook(record(name)) for name, module in self._modules.items()]
        keys: dict[str, list[Tensor]] = {n: [] for n in self._modules}
        gradients: dict[str, list[Tensor]] = {n: [] for n in self._modules}
        try:
            with torch.enable_grad():
                for chunk, layout, states in self._suffix_chunks(passages, batch_of, sharing=False):
                    members = [passages[i] for i in chunk]
                    targets = torch.tensor([t for p in members for t in p.targets], device=self.device)
                    losses = negative_log_likelihood(self.forward, states, targets)
                    whose = [batch_of[i] for i in chunk for _ in passages[i].targets]
                    share = torch.tensor([1 / totals[b] for b in whose], dtype=losses.dtype, device=self.device)
                    traced = [outputs[n] for n in self._modules]
                    grads = torch.autograd.grad((share * losses).sum(), traced, materialize_grads=True)
                    passage_of = torch.tensor([i for i in chunk for _ in passages[i].targets], device=self.device)
                    hardest.scatter_reduce_(0, passage_of, losses.detach().to(hardest), "amax")
                    sums.index_add_(0, passage_of, losses.detach().to(sums))
                    theirs = torch.tensor(whose, device=self.device)
                    for b in sorted(set(whose)):
                        loss[b] += float(losses.detach()[theirs == b].sum() / totals[b])
                    chosen = [p.chosen_positions(token) for p in members]
                    places = layout.places(chosen, self.device)
                    for n, g in zip(self._modules, grads, strict=True):
                        for parts, whole in ((keys, inputs[n]), (gradients, g)):
                            part = whole.flatten(0, -2)[places.to(whole.device)]
                            parts[n].append(at_least_float32(part).to(self.device))
                    order.extend(i for i, positions in zip(chunk, chosen, strict=True) for _ in positions)
        finally:
            for handle in handles:
                handle.remove()
        owner = torch.tensor(order, device=self.device)
        permutation = torch.argsort(owner, stable=True)
        counts = [sum(len(p.chosen_positions(token)) for p in batch) for batch in batches]
        first = [sum(map(len, batches[:b])) for b in range(len(batches))]

        def by_batch(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor[permutation].split(counts)

        split_keys = {n: by_batch(torch.cat(v)) for n, v in keys.items()}
        split_gradients = {n: by_batch(torch.cat(v)) for n, v in gradients.items()}
        return [
            Trace(
                keys={n: v[b] for n, v in split_keys.items()},
                value_gradients={n: v[b] for n, v in split_gradients.items()},
                owner=theirs - first[b],
                loss=loss[b],
                hardest=hardest[first[b] : first[b] + len(batches[b])],
                sums=sums[first[b] : first[b] + len(batches[b])],
                answers=answers[first[b] : first[b] + len(batches[b])],
            )
            for b, theirs in enumerate(by_batch(owner))
        ]

    # -- gradients of the weights, files ---------------------------------------------------------------------------

    @contextmanager
    def collecting(self, wanted: bool = True) -> Iterator[list[dict[str, Tensor]]]:
        """Within it, backward passes add their gradients of the edited weights (d_out, d_in), in the edited weights'
        precision, to what it yields: a dictionary by module for each stream, of which there is one here.

        A pass's gradient δᵀu is added to the sum in one product, at an edited module's outputs, so that the weights
        themselves need no gradient and no pass leaves one to be added up. Unless ``wanted``, nothing takes gradients.
        """
        sums: list[dict[str, Tensor]] = [{} for _ in range(self._streams)]
        places: list[dict[str, Tensor]] = [{} for _ in range(self._streams)]

        def watch(name: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            keys, route = arguments[0].detach(), self._route
            output, passed_on = self._watched(name, output)
            output.register_hook(lambda gradient: add(name, keys, gradient, route))
            return passed_on

        def add(name: str, keys: Tensor, gradient: Tensor, route: Sequence[tuple[int, int]]) -> None:
            keys, gradient, first = keys.flatten(0, -2), gradient.flatten(0, -2), 0
            for stream, count in route or [(0, len(keys))]:
                rows = slice(first, first := first + count)
                u, delta = keys[rows], gradient[rows]
                total = sums[stream].get(name)
                if total is None:
                    if not places[stream]:
                        places[stream] = self._side_by_side()
                    sums[stream][name] = places[stream].pop(name).copy_(outer(delta, u))
                else:
                    total.add_(outer(delta, u))

        handles = [m.register_forward_hook(partial(watch, n)) for n, m in self._modules.items() if wanted]
        try:
            with torch.set_grad_enabled(wanted):
                yield sums
            for total in filter(None, sums):  # of modules whose outputs no loss depends on
                total |= {n: self._zero(n) for n in self._modules if n not in total}
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, name: str, output: Tensor) -> tuple[Tensor, Tensor]:
        """A module's output, which takes a gradient, and what the model goes on with: a copy, if it changes that."""
        output = output if output.requires_grad else output.requires_grad_()
        return output, output.clone() if name in self._overwritten else output

    def _zero(self, name: str) -> Tensor:
        d_in, d_out = self.module_shapes[name]
        return torch.zeros(d_out, d_in, dtype=self.edit_dtype, device=self.device)

    def _side_by_side(self) -> dict[str, Tensor]:
        """Room for as many numbers as each edited weight has, (d_out, d_in) by module, in one piece of memory: many
        smaller ones, made between a pass's activations, would leave holes that nothing else fits in."""
        sizes = {n: d_in * d_out for n, (d_in, d_out) in self.module_shapes.items()}
        whole = torch.empty(sum(sizes.values()), dtype=self.edit_dtype, device=self.device)
        pieces = zip(self.module_shapes.items(), whole.split(list(sizes.values())), strict=True)
        return {n: piece.view(d_out, d_in) for (n, (d_in, d_out)), piece in pieces}

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model with its current weights, and its tokenizer, for ``from_pretrained`` to load anywhere.

        The weights are written as the model runs with them, in its precision; the tokenizer and the settings of
        generation as they were read. The folder appears when it is complete.

        Raises:
            FileExistsError: the folder is not empty. With ``overwrite`` it is replaced, if rledit wrote all of it in
                one piece, as its marker says (`rledit_env.files.check_free`).
        """
        with whole_folder(folder, overwrite, "edited model") as work:
            write_model(self.model, work)
            write_tokenizer(self.tokenizer, work)
        return Path(folder)


def _span(prompt: str, subject: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Where the subject stands in the prompt."""
    if not isinstance(subject, str):
        return subject
    start = find_subject(prompt, subject)
    return None if start is None else (start, start + len(subject))


def _last_token(offsets: Offsets, span: tuple[int, int] | None) -> int | None:
    """The index of the last token that covers a character of the span."""
    if span is None:
        return None
    return max((i for i, (start, end) in enumerate(offsets) if start < span[1] and end > start), default=None)
