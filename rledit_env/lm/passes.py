"""Passages through an LLM, in few forward passes: what no edit changes is cached, the rest is run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rledit_env.lm.forward import Forward, Passage
from rledit_env.lm.kernels.layout import Layout, cheapest_chunks, even_chunks, sharing_chunks
from rledit_env.lm.routing import ORIGINAL, Routing


class PrefixCache:
    """Tensors by passage, evicted least recently used first once ``max_bytes`` is reached."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Any, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Any) -> Tensor | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Any, value: Tensor) -> None:
        if key in self._entries:
            self.bytes -= self._entries.pop(key).nbytes
        self._entries[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """A cache that begins with the same tensors, which are never written."""
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
    """Runs passages through an LLM, each at the edited weights that it is routed to.

    Args:
        forward: one forward pass of the LLM.
        routing: which set of edited weights passages meet.
        max_tokens_per_pass: bound on the padded tokens of one pass that takes gradients (four times as many where none
            are taken).
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
        """Where final states are computed."""
        return self.forward.device

    @property
    def token_limit(self) -> int:
        """The most padded tokens of a pass; where nothing takes gradients, it holds one layer's activations only."""
        return self.max_tokens_per_pass * (1 if torch.is_grad_enabled() else 4)

    def pad_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids (B, L), padded on the right."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        return ids.to(self.device)

    # -- one pass after the other ----------------------------------------------------------------------------------

    def chunks(
        self, rows: Sequence[Sequence[int]], sets: Sequence[int], sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout]]:
        """Indices of passages, given as token ids, in chunks for one pass each, and how they lie in its batch.

        ``sets`` says which set of edited weights each passage meets; ``sharing`` whether what passages begin with may
        be in the batch once.
        """
        limit, quantum = self.token_limit, self.forward.quantum
        longest = min(self.forward.longest_packed, limit)
        keys, lengths = self.routing.sort_keys(sets), [len(row) for row in rows]
        short = [i for i, length in enumerate(lengths) if length <= longest]
        short_rows, short_keys = [rows[i] for i in short], [keys[i] for i in short]
        if sharing and self.forward.shares:
            for chunk in sharing_chunks(short_rows, limit, short_keys, quantum):
                layout = Layout.sharing([short_rows[i] for i in chunk], [short_keys[i] for i in chunk], quantum)
                yield [short[i] for i in chunk], layout
        else:
            for chunk in even_chunks([len(row) for row in short_rows], limit, short_keys, quantum):
                yield [short[i] for i in chunk], Layout.end_to_end([len(short_rows[i]) for i in chunk], quantum)
        long = [i for i, length in enumerate(lengths) if length > longest]
        for chunk in cheapest_chunks([lengths[i] for i in long], limit, [keys[i] for i in long], quantum=quantum):
            members = [long[i] for i in chunk]
            yield members, Layout.padded([lengths[i] for i in members], quantum)

    def _prefix_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """Cached states that enter the first edited layer, one (L, d) a passage."""
        found = [self.prefix_cache.get(p.input_ids) for p in passages]
        missing = list({p.input_ids: i for i, p in enumerate(passages) if found[i] is None}.values())
        fresh: dict[tuple[int, ...], Tensor] = {}
        for chunk, layout in self.chunks([passages[i].input_ids for i in missing], [0] * len(missing)):
            ids = [passages[missing[i]].input_ids for i in chunk]
            hidden = self.forward.prefix(layout.batch([torch.tensor(row) for row in ids]).to(self.device), layout)
            for row, states in zip(ids, layout.split(hidden), strict=True):
                fresh[row] = states.clone()
        for key, value in fresh.items():
            self.prefix_cache.put(key, value)
        return [fresh[p.input_ids] if state is None else state for p, state in zip(passages, found, strict=True)]

    def run(
        self, passages: Sequence[Passage], sets: Sequence[int] | None = None, sharing: bool = True
    ) -> Iterator[tuple[list[int], Layout, Tensor]]:
        """Chunks of passage indices, how they lie in the pass's batch, and their normalised final states at the answer
        positions (P, d); arguments as for :meth:`chunks`, all at set 0 where no ``sets`` are given."""
        states = self._prefix_states(passages)
        sets, quantum = [0] * len(passages) if sets is None else sets, self.forward.quantum
        for chunk, layout in self.chunks([p.input_ids for p in passages], sets, sharing):
            batch = layout.batch([states[i] for i in chunk])
            places = layout.places([passages[i].positions for i in chunk], self.device)
            more = -len(places) % quantum  # positions that nobody asks for
            with self.routing.routed([sets[i] for i in chunk], layout.sizes):
                final = self.forward.final_states(batch, F.pad(places, (0, more)), layout)
            yield chunk, layout, final[: len(places)]

    # -- states at answer positions --------------------------------------------------------------------------------

    def answer_chunks(
        self, passages: Sequence[Passage], sets: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], AnswerStates]]:
        """Chunks of passage indices with their final states at the answer positions, under the current weights: of set
        0, or the sets given.

        Chunk by chunk, so that a caller that takes gradients holds one chunk's graph at a time.
        """
        for chunk, _, states in self.run(passages, sets):
            yield chunk, self._joined([states], [passages[i] for i in chunk])

    def _joined(self, pieces: Sequence[Tensor], passages: Sequence[Passage]) -> AnswerStates:
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
        return self._joined([p for p in pieces if p is not None], passages)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (P, |V|) float32 from normalised final states (P, d)."""
        return F.log_softmax(self.forward.logits(hidden), dim=-1)

    # -- the unedited model's states -------------------------------------------------------------------------------

    def reference_states(self, passages: Sequence[Passage]) -> list[Tensor]:
        """θ₀'s final states at each passage's answer positions, (answer tokens, d) each: what the KL is measured
        against. Cached."""
        found = self._known_references(passages)
        missing = [i for i, state in enumerate(found) if state is None]
        if missing:
            unknown = [passages[i] for i in missing]
            with self.routing.original():
                states = self.answer_states(unknown)
            for i, state in zip(missing, self._keep_references(unknown, states.hidden), strict=True):
                found[i] = state
        return [state for state in found if state is not None]

    def states_beside_reference(
        self, passages: Sequence[Passage], sets: Sequence[int], referenced: Sequence[int]
    ) -> tuple[AnswerStates, list[Tensor]]:
        """:meth:`answer_states`, and :meth:`reference_states` of the passages with these indices: in one pass where the
        routing serves θ₀ as one more set."""
        beside = [passages[i] for i in referenced]
        if not self.routing.serves_original:
            reference = self.reference_states(beside)
            return self.answer_states(passages, sets), reference
        found = self._known_references(beside)
        missing = [p for p, state in zip(beside, found, strict=True) if state is None]
        states = self.answer_states([*passages, *missing], [*sets, *[ORIGINAL] * len(missing)])
        own = sum(len(p.targets) for p in passages)
        fresh = iter(self._keep_references(missing, states.hidden[own:]))
        reference = [next(fresh) if state is None else state for state in found]
        return AnswerStates(states.hidden[:own], states.targets[:own], states.owner[:own]), reference

    def _known_references(self, passages: Sequence[Passage]) -> list[Tensor | None]:
        return [self.reference_cache.get((p.input_ids, len(p.targets))) for p in passages]

    def _keep_references(self, passages: Sequence[Passage], hidden: Tensor) -> list[Tensor]:
        """θ₀'s states (P, d) of passages by passage, which are cached."""
        pieces = [piece.clone() for piece in hidden.split([len(p.targets) for p in passages])]
        for passage, piece in zip(passages, pieces, strict=True):
            self.reference_cache.put((passage.input_ids, len(passage.targets)), piece)
        return pieces
