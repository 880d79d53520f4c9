"""BlockPool: who holds which KV block, and which free block still holds KV worth finding again.

Knows block ids, reference counts and names. Does not know sequences, tokens or tensors.

A block is in exactly one of three states: *held* (references > 0), *cached* (no reference, named: its KV can be found
by name until the block is needed for something else), *free* (no reference, no name). free + cached + held = total.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Changes that wait to be drained; at more than that a listener is better off with a new list of all names.
LOG_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """What became of names between two drains. A name is in at most one of the two.

    cleared: before all else, every name was forgotten. lost: some changes are missing; only a new list of all names,
    made after this was drained, tells what is there.
    """

    stored: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    cleared: bool = False
    lost: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.evicted or self.cleared or self.lost)


class BlockLog:
    """Which names became findable and which ceased to be. One thread records, another one drains; at most `limit` wait.

    Applied in order to any list of names taken after the log was opened, the changes lead to what is findable now:
    a change that the list holds already is no different the second time.
    """

    def __init__(self, limit: int = LOG_LIMIT) -> None:
        self._limit = limit
        self._changes: deque[tuple[bytes | None, bool]] = deque()  # (None, False): cleared; (None, True): lost

    def record(self, name: bytes | None, stored: bool) -> None:
        if len(self._changes) >= self._limit:
            self._changes.clear()
            self._changes.append((None, True))
        self._changes.append((name, stored))

    def drain(self) -> BlockChanges:
        newest: dict[bytes, bool] = {}
        cleared = lost = False
        for _ in range(len(self._changes)):
            try:
                name, stored = self._changes.popleft()
            except IndexError:  # it overflowed meanwhile; what it holds next begins with `lost`
                break
            if name is not None:
                newest[name] = stored
            else:
                lost, cleared = lost or stored, cleared or not stored
                newest.clear()
        return BlockChanges(
            tuple(name for name, stored in newest.items() if stored),
            tuple(name for name, stored in newest.items() if not stored),
            cleared,
            lost,
        )


class BlockPool:
    """A fixed set of blocks 0 … total - 1. Not thread-safe; owned by the scheduler."""

    def __init__(self, total: int, enable_prefix_caching: bool = True) -> None:
        self.total = total
        self._caching = enable_prefix_caching
        self._refs = [0] * total
        self._names: list[bytes | None] = [None] * total
        self._by_name: dict[bytes, int] = {}
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.log: BlockLog | None = None  # set while somebody listens, from any thread

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.total - self.available

    def take(self, count: int) -> list[int]:
        """Hand out `count` nameless blocks with one reference each; evicts cached blocks, least recently used first.

        The caller has checked `available`.
        """
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; a cached block becomes held."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a block table.

        Walks from the last block to the first, so that of one chain the leaf is evicted before its ancestors.
        """
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} was released more often than taken"
            if self._refs[block] == 0:
                if self._names[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def writable(self, block: int) -> bool:
        """Whether its one holder may write into the block: nobody shares it and nobody can find it by name."""
        return self._refs[block] == 1 and self._names[block] is None

    def set_name(self, block: int, name: bytes) -> None:
        """Make a full, held block findable. If another block has the name already, this one stays nameless."""
        if self._caching and self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block
            if (log := self.log) is not None:
                log.record(name, stored=True)

    def find(self, name: bytes) -> int | None:
        """The block of that name, held or cached. Takes no reference: `share` it before the next `take`."""
        return self._by_name.get(name)

    def names(self) -> list[bytes]:
        """All names that can be found now. Any thread may ask: copying a dict's keys is one step to others."""
        return list(self._by_name)

    def is_cached(self, block: int) -> bool:
        """Whether the block is named and held by nobody: sharing it takes one off `available`."""
        return self._refs[block] == 0

    def forget_names(self) -> None:
        """Empty the prefix cache; held blocks stay with their holders."""
        for block in self._by_name.values():
            self._names[block] = None
        self._by_name.clear()
        if (log := self.log) is not None:
            log.record(None, stored=False)
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and the name table agrees with it."""
        for block in range(self.total):
            held = self._refs[block] > 0
            cached = block in self._cached
            assert not (held and cached), f"block {block} is held and cached"
            assert not cached or self._names[block] is not None, f"cached block {block} has no name"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a block is free and cached"
        assert all(self._refs[b] == 0 and self._names[b] is None for b in free), "a free block is held or named"
        held_count = sum(refs > 0 for refs in self._refs)
        assert len(free) + len(self._cached) + held_count == self.total, "blocks were lost"
        assert all(self._names[block] == name for name, block in self._by_name.items()), "the name table is stale"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        name = self._names[block]
        assert name is not None
        del self._by_name[name]
        self._names[block] = None
        if (log := self.log) is not None:
            log.record(name, stored=False)
        return block
