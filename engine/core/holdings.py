"""Holdings: which slot and which blocks each sequence holds. Who gets them is the scheduler's decision.

Knows the block pool, sequences and their block tables. Whatever is given back may be handed out again in the next plan:
ranks execute plans in order.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.draft import Draft
from octavo.engine.core.sequence import Sequence


class Holdings:
    """free_slots: the last one is given out next."""

    def __init__(self, pool: BlockPool, block_size: int, num_slots: int) -> None:
        self.pool = pool
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self._block_size = block_size
        self._released: list[int] = []

    def find(self, sequence: Sequence, step: int) -> tuple[list[int], int]:
        """Blocks that hold the KV of the sequence's beginning before `step`, and how many positions that is."""
        leader = sequence.leader
        if sequence.is_beam and leader is not None and leader.has_copies(sequence.num_shared, step):
            return leader.blocks[: self.blocks_for(sequence.num_shared)], sequence.num_shared
        prompt_is_there = leader is not None and len(leader.blocks) > 0 and leader.num_computed >= leader.num_prompt
        if leader is not None and prompt_is_there and sequence.num_output == 0:
            return leader.blocks[: self.blocks_for(leader.num_prompt)], leader.num_prompt
        found: list[int] = []
        if sequence.reads_cache:
            for name in sequence.block_names(self._block_size):
                block = self.pool.find(name)
                if block is None:
                    break
                found.append(block)
        return found, len(found) * self._block_size

    def enter(self, sequence: Sequence, blocks: list[int], num_kv: int) -> None:
        """Give the sequence a slot and a share in `blocks`, which hold the KV of its first `num_kv` positions."""
        self.pool.share(blocks)
        sequence.enter(list(blocks), num_kv, num_kv // self._block_size)
        sequence.slot = self.free_slots.pop()

    def extend(self, sequence: Sequence, count: int, draft: Draft) -> bool:
        """Give the sequence blocks for `count` more positions, its own to write. False: too few are left."""
        size = self._block_size
        end = sequence.num_computed + count
        grow = max(0, self.blocks_for(end) - len(sequence.blocks))
        first_write = max(sequence.num_computed, sequence.kv_from)
        at = first_write // size
        copy = first_write < end and at < len(sequence.blocks) and not self.pool.writable(sequence.blocks[at])
        if grow + copy > self.pool.available:
            return False
        taken = self.pool.take(grow + copy)
        if copy:
            source, own = sequence.blocks[at], taken.pop()
            draft.copies.append((source, own))
            sequence.blocks[at] = own
            self.pool.release([source])
            draft.table_edits.append((sequence.slot, at, own))
        for block in taken:
            draft.table_edits.append((sequence.slot, len(sequence.blocks), block))
            sequence.blocks.append(block)
        return True

    def fork(self, member: Sequence, parent: Sequence, known: int) -> None:
        """Of the running `member` make a copy of `parent`'s first `known` positions, in the slot it has."""
        shared = parent.blocks[: self.blocks_for(known)]
        self.pool.share(shared)
        self.pool.release(member.blocks)
        member.share(shared, known, known // self._block_size)

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks behind what is computed."""
        kept = self.blocks_for(max(sequence.num_computed, sequence.kv_from))
        self.pool.release(sequence.blocks[kept:])
        del sequence.blocks[kept:]

    def give_back(self, sequence: Sequence) -> None:
        """Take all from the sequence; the ranks are told with the next plan."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.free_slots.append(sequence.slot)
        self._released.append(sequence.slot)

    def release_slot(self, slot: int) -> None:
        """The ranks are to forget what is in a slot that stays in use."""
        self._released.append(slot)

    def take_released(self) -> tuple[int, ...]:
        """Slots whose sequence has left since the last call."""
        released = tuple(self._released)
        self._released.clear()
        return released

    def name_blocks(self, sequence: Sequence) -> None:
        """Make blocks findable that the plans so far fill. Ranks execute in order, so the next row may read them."""
        fresh = sequence.newly_full(self._block_size)
        if fresh:
            names = sequence.block_names(self._block_size)
            for index in fresh:
                self.pool.set_name(sequence.blocks[index], names[index])

    def blocks_for(self, positions: int) -> int:
        """So many positions lie in so many blocks."""
        return -(-positions // self._block_size)

    def promised(self, running: Seq[Sequence]) -> int:
        """Blocks that running sequences still need for tokens known today."""
        return sum(max(0, self.blocks_for(len(s.tokens)) - len(s.blocks)) for s in running)
