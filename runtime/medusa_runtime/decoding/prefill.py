"""Reading prompts: whose turn it is, how large each chunk is, and which prompts are read in one pass.

A prompt that has not had a turn yet comes first; then prompts take turns, a chunk each. So a short prompt waits for one chunk
of a long one, never for all of it. Prompts in neighbouring slots are read in one pass if their first tokens then come sooner on
average: passes over few tokens cost little more than one token's, passes over many are best made one after the other.

While other sequences decode, the time of a pass is limited, because they wait for it between two of their tokens. The costs of
passes are learned from the passes made. If no sequence decodes, a pass has as many tokens as the bundle allows, up to `CHUNK`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from medusa_runtime.arrays import IntArray
from medusa_runtime.backends.base import Backend, StepOutput, not_finite
from medusa_runtime.decoding.sequence import DecodingSequence, token_logprob
from medusa_runtime.decoding.slots import Slot, SlotPool
from medusa_runtime.drafting.costs import Costs, LearnedCosts
from medusa_runtime.errors import CapacityError

CHUNK = 256  # prompt tokens of a pass if nobody decodes; larger passes were no faster on a CPU, and others wait for them
FIRST_SHARED_CHUNK = 64  # prompt tokens of a pass beside sequences that decode, until a pass was timed
LEAST_CHUNK = 16  # a shorter pass is hardly cheaper: it reads all weights, too
SCORED_CHUNK = 64  # prompt tokens if their log-probabilities are asked for: each token gives a row of logits
GAP_STEPS, FIRST_GAP_SECONDS = 6.0, 0.05  # the default gap, in steps of decoding, and until a step was timed
log = logging.getLogger(__name__)


@dataclass
class Pass:
    """One forward pass over chunks of some prompts."""

    sequences: list[DecodingSequence]  # [B]
    num_tokens: int  # padding included
    output: StepOutput
    last_rows: IntArray  # [B] the output row of each chunk's last token, among R rows
    complete: list[int] = field(default_factory=list)  # indices of the sequences whose prompts are read to their end


class PromptReader:
    """Admits waiting sequences to slots, and reads their prompts.

    Args:
        backend: runs the passes.
        slots: where the entries go.
        asks_ahead: whether the heads will be asked about some sequences after a pass.
        blame: ends a sequence with an error.
    """

    def __init__(
        self,
        backend: Backend,
        slots: SlotPool,
        asks_ahead: Callable[[Sequence[DecodingSequence]], bool],
        blame: Callable[[DecodingSequence, BaseException], None],
    ) -> None:
        self._backend, self._slots, self._asks_ahead, self._blame = backend, slots, asks_ahead, blame
        self._waiting: deque[DecodingSequence] = deque()
        self._new: deque[DecodingSequence] = deque()  # with a slot, but without a turn yet
        self._begun: deque[DecodingSequence] = deque()  # with a turn behind them, in the order of their next turns
        self.costs: Costs = LearnedCosts()  # of passes
        self.has_memory = True  # False after `put_back`, until a sequence ends
        self.held_back: list[DecodingSequence] = []  # there was a slot for them, but they wait for the prompt of another

    @property
    def waiting(self) -> list[DecodingSequence]:
        """The sequences that have no slot yet."""
        return list(self._waiting)

    def add(self, sequence: DecodingSequence) -> None:
        """Let a sequence wait for a slot."""
        self._waiting.append(sequence)

    def put_back(self, sequence: DecodingSequence) -> None:
        """Let a sequence wait again, before all others, because there is no memory for it until another sequence ends."""
        self.remove(sequence)
        self._waiting.appendleft(sequence)
        self.has_memory = False

    def remove(self, sequence: DecodingSequence) -> None:
        """Forget a sequence that has ended."""
        for queue in (self._waiting, self._new, self._begun):
            if sequence in queue:
                queue.remove(sequence)

    def admit(self) -> list[tuple[DecodingSequence, int]]:
        """Give free slots to waiting sequences, the oldest first. Returns those that got one, with their cached tokens.

        A sequence keeps waiting if a prompt that is being read begins alike: it will then start from that prompt's entries.
        """
        admitted: list[tuple[DecodingSequence, int]] = []
        self.held_back.clear()
        for sequence in list(self._waiting):
            if not self.has_memory or len(self._slots.active) >= self._slots.num_slots:
                break
            if self._slots.should_wait(sequence):
                self.held_back.append(sequence)
                continue
            try:
                num_cached = self._slots.admit(sequence, is_long=sequence.num_to_read > FIRST_SHARED_CHUNK)
            except CapacityError as error:
                if self._slots.active:  # one of them will make room
                    log.info("sequence %d waits for memory: %s", sequence.id, error)
                    break
                self._blame(sequence, error)
                continue
            except Exception as error:  # noqa: BLE001 - the device's own; it ends this sequence, and the engine goes on
                self._blame(sequence, error)
                continue
            self._waiting.remove(sequence)
            self._new.append(sequence)
            if sequence.is_scored:
                sequence.prompt_logprobs.clear()
            admitted.append((sequence, num_cached))
        return admitted

    def read(self, room: int, seconds: float | None) -> Pass | None:
        """Read a chunk of the prompt whose turn it is, and of its neighbours if first tokens then come sooner on average.

        If the pass fails, the sequences on it end with the error.

        Args:
            room: the most tokens of the pass, padding included.
            seconds: the longest time that the pass may take; None for no limit.

        Returns:
            The pass, or None if there was no prompt to read or the pass failed.
        """
        if (head := next(itertools.chain(self._new, self._begun), None)) is None:
            return None
        place = self._slots.place(head)
        assert place is not None
        chunks = self._chunks(place, room, seconds)
        sequences = [sequence for place in sorted(chunks) if (sequence := self._slots[place].sequence) is not None]
        for sequence in sequences:
            self.remove(sequence)
            self._begun.append(sequence)
        try:
            done = self._run(sequences, chunks)
        except Exception as error:  # noqa: BLE001 - a pass that fails ends the sequences on it, and the engine goes on
            for sequence in sequences:
                self._blame(sequence, error)
            return None
        for row, (sequence, place) in enumerate(zip(sequences, sorted(chunks), strict=True)):
            self._slots[place].length += chunks[place]
            if not done.output.is_row_finite(row, int(done.last_rows[row])):
                self._blame(sequence, not_finite())
            elif self._slots[place].length == sequence.num_to_read:
                self._begun.remove(sequence)
                done.complete.append(row)
        return done

    def _chunks(self, place: int, room: int, seconds: float | None) -> dict[int, int]:
        """The slots of a pass, and how many tokens of each it reads: the slot `place`, and neighbours that join it."""
        chunks = {place: self._chunk(place, room, seconds, batch=1)}
        for behind in range(place + 1, len(self._slots)):
            if not self._join(behind, chunks, room, seconds):
                break
        for before in range(place - 1, self._slots.num_decoding - 1, -1):
            if not self._join(before, chunks, room, seconds):
                break
        return chunks

    def _chunk(self, place: int, room: int, seconds: float | None, batch: int) -> int:
        """Tokens of a prompt that a pass reads."""
        slot = self._slots[place]
        assert slot.sequence is not None
        limits = self._backend.manifest.limits
        most = min(max(room // batch, 1), slot.sequence.num_to_read - slot.length, limits.max_prefill_tokens or CHUNK)
        if slot.sequence.is_scored:
            most = min(most, SCORED_CHUNK, limits.max_tree_nodes or SCORED_CHUNK)
        if seconds is None or most <= LEAST_CHUNK:
            return most
        if not self.costs.is_warm:
            return min(most, FIRST_SHARED_CHUNK)
        affordable = int(np.searchsorted(self.costs.steps(batch, slot.length + most, most), seconds, side="right"))
        return max(affordable, LEAST_CHUNK)

    def _join(self, place: int, chunks: dict[int, int], room: int, seconds: float | None) -> bool:
        """Add a neighbour to a pass if all first tokens then come sooner on average. Returns whether it was added."""
        slot, batch, width = self._slots[place], len(chunks) + 1, max(chunks.values())
        if (
            slot.sequence is None
            or slot.sequence.is_finished
            or self._is_scored(place)
            or any(self._is_scored(member) for member in chunks)
        ):
            return False
        chunk = self._chunk(place, room, seconds, batch)
        wider, longest = max(width, chunk), max(self._slots[member].length for member in [*chunks, place])
        if batch * wider > room or longest + wider > self._backend.capacity:  # padding is written to the cache, too
            return False
        before, together = self._cost(batch - 1, width, longest), self._cost(batch, wider, longest)
        # All of a pass wait for its end. Apart, the neighbour would wait for its own pass as well, but the others would not.
        if together >= before + self._cost(1, chunk, slot.length) / batch or (seconds is not None and together > seconds):
            return False
        chunks[place] = chunk
        return True

    def _is_scored(self, place: int) -> bool:
        sequence = self._slots[place].sequence
        return sequence is not None and sequence.is_scored

    def _cost(self, batch: int, width: int, length: int) -> float:
        return float(self.costs.steps(batch, length + width, width)[-1])

    def _run(self, sequences: list[DecodingSequence], chunks: dict[int, int]) -> Pass:
        """Run one pass. A chunk smaller than the largest is padded: padding attends to itself and the cache."""
        first, batch, width = min(chunks), len(chunks), max(chunks.values())
        slots, counts = [self._slots[place] for place in sorted(chunks)], [chunks[place] for place in sorted(chunks)]
        starts = np.array([slot.length for slot in slots])
        self._slots.reserve(first, batch, width)
        ids, positions = np.zeros((batch, width), np.int64), np.repeat(starts[:, None], width, axis=1)
        mask = np.repeat(np.eye(width, dtype=np.bool_)[None], batch, axis=0)
        for row, (sequence, start, count) in enumerate(zip(sequences, starts.tolist(), counts, strict=True)):
            ids[row, :count] = sequence.tokens.ids[start : start + count]
            positions[row, :count] += np.arange(count)
            mask[row, :count, :count] = np.tri(count, dtype=np.bool_)
        ends = zip(sequences, starts.tolist(), counts, strict=True)
        finishing = [sequence for sequence, start, count in ends if start + count == sequence.num_to_read]
        scored, last_rows = self._is_scored(first), np.array(counts) - 1
        started = time.perf_counter()
        output = self._backend.step(
            ids,
            positions,
            mask,
            starts,
            np.arange(width)[None] if scored else last_rows[:, None],
            first_slot=first,
            with_logits=scored or any(sequence.needs_logits for sequence in finishing),
            propose_ahead=bool(finishing) and self._asks_ahead(finishing),
        )
        if output.is_warm:
            self.costs.observe(batch, width, int(starts.max()) + width, time.perf_counter() - started)
        if scored:
            self._score(slots[0], output)
        return Pass(sequences, batch * width, output, last_rows if scored else np.zeros(batch, np.int64))

    def _score(self, slot: Slot, output: StepOutput) -> None:
        """Keep the log-probabilities of the tokens that follow a chunk's tokens in its prompt."""
        sequence, logits = slot.sequence, output.logits
        assert sequence is not None
        assert logits is not None
        following = sequence.tokens.ids[slot.length + 1 : slot.length + 1 + logits.shape[1]].tolist()
        sequence.prompt_logprobs += [
            token_logprob(row, token, sequence.options.prompt_logprobs or 0)
            for row, token in zip(logits[0], following, strict=False)
        ]
