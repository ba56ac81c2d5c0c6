"""Runs passages through an LLM in few forward passes, and caches states that no edit changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rledit_env.lm.forward import Forward, Passage
from rledit_env.lm.kernels.layout import Layout, cheapest_chunks, even_chunks, sharing_chunks, tail_chunks
from rledit_env.lm.routing import ORIGINAL, Routing

WORTH_AHEAD = 128  # tokens from which on a pass for them alone saves time (135M parameters, bfloat16, a CPU)


class PrefixCache:
    """Tensors by passage; the least recently used are evicted above ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, value: Tensor) -> None:
        if key in self._entries:
            self.bytes -= self._entries.pop(key).nbytes
        self._entries[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def __deepcopy__(self, memo: dict[int, object]) -> PrefixCache:
        """A cache with the same tensors, which are never written."""
        other = memo[id(self)] = PrefixCache(self.max_bytes)
        other.bytes, other._entries = self.bytes, self._entries.copy()
        return other

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0


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


class Passes:
    """Runs passages through an LLM, each with the set of edited weights that it is routed to.

    Args:
        forward: runs one forward pass of the LLM.
        routing: multiplies passages by their weight sets.
        max_tokens_per_pass: most padded tokens of one pass with gradients (four times as many without).
        prefix_cache: keeps the states that enter the first edited layer, by passage.
        reference_cache: keeps the unedited model's final states at answer positions, by passage.
    """

    def __init__(
        self, forward: Forward, routing: Routing, max_tokens_per_pass: int, prefix_cache: PrefixCache,
        reference_cache: PrefixCache,
    ) -> None:  # fmt: skip
        self.forward, self.routing, self.max_tokens_per_pass = forward, routing, max_tokens_per_pass
        self.prefix_cache, self.reference_cache = prefix_cache, reference_cache

    @property
    def device(self) -> torch.device:
        """The device that computes final states."""
        return self.forward.device

    @property
    def token_limit(self) -> int:
        """Most padded tokens of a pass: more without gradients, when it keeps only one layer's activations."""
        return self.max_tokens_per_pass * (1 if torch.is_grad_enabled() else 4)

    def pad_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids (B, L), padded on the right."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        return ids.to(self.device)

    @contextmanager
    def caches_apart(self) -> Iterator[None]:
        """Context with empty caches of its own, which are dropped at its end. What is computed in it neither depends on
        the cached states, whose last bits depend on the passages computed with them, nor changes them."""
        kept = self.prefix_cache, self.reference_cache
        self.prefix_cache, self.reference_cache = (PrefixCache(cache.max_bytes) for cache in kept)
        try:
            yield
        finally:
            self.prefix_cache, self.reference_cache = kept

    # -- passes over chunks of passages ----------------------------------------------------------------------------

    def _is_short(self, row: Sequence[int]) -> bool:
        """Whether a passage may be packed with others."""
        return len(row) <= min(self.forward.longest_packed, self.token_limit)

    def chunks(
        self, rows: Sequence[Sequence[int]], sets: Sequence[int], sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout]]:
        """Yield the chunks of passages that run in one pass each: their indices, and their layout in its batch.

        Args:
            rows: the passages' token ids.
            sets: each passage's weight set.
            sharing: whether a batch may store a shared prefix once.
        """
        limit, quantum = self.token_limit, self.forward.quantum
        keys, lengths = self.routing.sort_keys(sets), [len(row) for row in rows]
        short = [i for i, row in enumerate(rows) if self._is_short(row)]
        short_rows, short_keys = [rows[i] for i in short], [keys[i] for i in short]
        if sharing and self.forward.shares:
            for chunk in sharing_chunks(short_rows, limit, short_keys, quantum):
                layout = Layout.sharing([short_rows[i] for i in chunk], [short_keys[i] for i in chunk], quantum)
                yield [short[i] for i in chunk], layout
        else:
            for chunk in even_chunks([len(row) for row in short_rows], limit, short_keys, quantum):
                yield [short[i] for i in chunk], Layout.end_to_end([len(short_rows[i]) for i in chunk], quantum)
        long = [i for i, row in enumerate(rows) if not self._is_short(row)]
        for chunk in cheapest_chunks([lengths[i] for i in long], limit, [keys[i] for i in long], quantum=quantum):
            members = [long[i] for i in chunk]
            yield members, Layout.padded([lengths[i] for i in members], quantum)

    def _prefix_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """States that enter the first edited layer, (L, d) for each passage; they are cached."""
        cached = [self.prefix_cache.get(p.input_ids) for p in passages]
        missing = list({p.input_ids: i for i, p in enumerate(passages) if cached[i] is None}.values())
        fresh: dict[tuple[int, ...], Tensor] = {}
        for chunk, layout in self.chunks([passages[i].input_ids for i in missing], [0] * len(missing)):
            ids = [passages[missing[i]].input_ids for i in chunk]
            hidden = self.forward.prefix(layout.batch([torch.tensor(row) for row in ids]).to(self.device), layout)
            for row, states in zip(ids, layout.split(hidden), strict=True):
                fresh[row] = states.clone()
        for key, value in fresh.items():
            self.prefix_cache.put(key, value)
        return [fresh[p.input_ids] if state is None else state for p, state in zip(passages, cached, strict=True)]

    def run(
        self, passages: Sequence[Passage], sets: Sequence[int] | None = None, sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout, Tensor]]:
        """Yield chunks of passages: their indices, their layout in the batch, and their normalised final states (P, d)
        at the answer positions. The arguments are those of :meth:`chunks`; without ``sets``, all passages use set 0."""
        states = self._prefix_states(passages)
        sets = [0] * len(passages) if sets is None else sets
        for chunk, layout in self.chunks([p.input_ids for p in passages], sets, sharing):
            yield chunk, layout, self._final_states(chunk, layout, states, passages, sets)

    def run_from(
        self, passages: Sequence[Passage], firsts: Sequence[int], sets: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], Layout, Tensor]]:
        """:meth:`run` for gradients at some tokens only, the first of each passage at index ``firsts[i]``; no prefix is
        shared among these.

        Such a gradient needs no backward pass through earlier tokens, which the later ones only read. Where the forward
        pass can do so, and there are enough of them, they run ahead, without gradients, and are not in the layout.
        """
        sets = [0] * len(passages) if sets is None else sets
        split = [i for i, p in enumerate(passages) if firsts[i] and self._is_short(p.input_ids)]
        if sum(firsts[i] for i in split) < WORTH_AHEAD or not self.forward.continues_packed:
            split = []
        whole = sorted({*range(len(passages))} - {*split})
        others = self.run([passages[i] for i in whole], [sets[i] for i in whole], sharing=False)
        for chunk, layout, final in others:
            yield [whole[i] for i in chunk], layout, final
        rows, keys = [passages[i].input_ids for i in split], self.routing.sort_keys([sets[i] for i in split])
        states, quantum = self._prefix_states(passages), self.forward.quantum
        for part in tail_chunks(rows, [firsts[i] for i in split], self.token_limit, keys, quantum):
            chunk = [split[i] for i in part]
            members, counts = [rows[i] for i in part], [firsts[i] for i in chunk]
            ahead, paths = Layout.heads(members, counts, [keys[i] for i in part], quantum)
            with self.routing.routed([sets[i] for i in chunk], ahead.sizes):
                past = self.forward.run_past(ahead.batch([states[i][: firsts[i]] for i in chunk]), ahead)
            layout = Layout.tails([len(row) for row in members], paths, past, quantum)
            yield chunk, layout, self._final_states(chunk, layout, states, passages, sets)

    def _final_states(
        self, chunk: Sequence[int], layout: Layout, states: Sequence[Tensor], passages: Sequence[Passage],
        sets: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Normalised final states (P, d) at the answer positions of a chunk of passages, given the states (L, d) of all
        that enter the first edited layer."""
        batch = layout.batch([states[i] for i in chunk])
        places = layout.places([passages[i].positions for i in chunk], self.device)
        padding = -len(places) % self.forward.quantum  # positions whose states are not used
        with self.routing.routed([sets[i] for i in chunk], layout.sizes):
            return self.forward.final_states(batch, F.pad(places, (0, padding)), layout)[: len(places)]

    # -- states at answer positions --------------------------------------------------------------------------------

    def answer_chunks(
        self, passages: Sequence[Passage], sets: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], AnswerStates]]:
        """Yield chunks of passage indices with their final states at the answer positions, at the current weights of
        the given sets, or of set 0.

        A caller that takes gradients thus keeps one chunk's graph in memory at a time.
        """
        for chunk, _, states in self.run(passages, sets):
            yield chunk, self._join([states], [passages[i] for i in chunk])

    def _join(self, pieces: Sequence[Tensor], passages: Sequence[Passage]) -> AnswerStates:
        return AnswerStates(
            hidden=torch.cat(list(pieces)) if pieces else self.forward.output.no_states(),
            targets=torch.tensor([t for p in passages for t in p.targets], dtype=torch.long, device=self.device),
            owner=torch.tensor(
                [i for i, p in enumerate(passages) for _ in p.targets], dtype=torch.long, device=self.device
            ),
        )

    def answer_states(self, passages: Sequence[Passage], sets: Sequence[int] | None = None) -> AnswerStates:
        """Final states at the answer positions of all passages, in their order; no gradients."""
        pieces: list[Tensor | None] = [None] * len(passages)
        with torch.no_grad():
            for chunk, states in self.answer_chunks(passages, sets):
                for index, piece in zip(
                    chunk, states.hidden.split([len(passages[i].targets) for i in chunk]), strict=True
                ):
                    pieces[index] = piece
        return self._join([p for p in pieces if p is not None], passages)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (P, |V|) float32 from normalised final states (P, d)."""
        return F.log_softmax(self.forward.logits(hidden), dim=-1)

    # -- the unedited model's states -------------------------------------------------------------------------------

    def reference_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """The unedited model's final states at each passage's answer positions, (answer tokens, d) each.

        KL divergences are measured against them. They are cached.
        """
        cached = self._cached_references(passages)
        missing = [i for i, state in enumerate(cached) if state is None]
        if missing:
            unknown = [passages[i] for i in missing]
            with self.routing.original():
                states = self.answer_states(unknown)
            for i, state in zip(missing, self._cache_references(unknown, states.hidden), strict=True):
                cached[i] = state
        return [state for state in cached if state is not None]

    def states_beside_reference(
        self, passages: Sequence[Passage], sets: Sequence[int], referenced: Sequence[int]
    ) -> tuple[AnswerStates, list[Tensor]]:
        """:meth:`answer_states` of the passages, and :meth:`reference_states` of those with indices ``referenced``.

        Both come from one pass where the routing serves the pre-trained weights as one more set.
        """
        beside = [passages[i] for i in referenced]
        if not self.routing.serves_original:
            reference = self.reference_states(beside)
            return self.answer_states(passages, sets), reference
        cached = self._cached_references(beside)
        missing = [p for p, state in zip(beside, cached, strict=True) if state is None]
        states = self.answer_states([*passages, *missing], [*sets, *[ORIGINAL] * len(missing)])
        count = sum(len(p.targets) for p in passages)
        fresh = iter(self._cache_references(missing, states.hidden[count:]))
        reference = [next(fresh) if state is None else state for state in cached]
        return AnswerStates(states.hidden[:count], states.targets[:count], states.owner[:count]), reference

    def _cached_references(self, passages: Sequence[Passage]) -> list[Tensor | None]:
        return [self.reference_cache.get((p.input_ids, len(p.targets))) for p in passages]

    def _cache_references(self, passages: Sequence[Passage], hidden: Tensor) -> list[Tensor]:
        """Cache the unedited model's states (P, d), and return them passage by passage."""
        pieces = [piece.clone() for piece in hidden.split([len(p.targets) for p in passages])]
        for passage, piece in zip(passages, pieces, strict=True):
            self.reference_cache.put((passage.input_ids, len(passage.targets)), piece)
        return pieces
