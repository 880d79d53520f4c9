"""BlockIndex: which replica holds which KV block, by the block's name. Bounded; what is not used longest is forgotten.

Knows names and replica ids. Does not know tokens, load or transport. Not thread-safe.

Per name one int, a bit per replica. A replica that leaves or is cleared loses its bit at once, in one step whatever it
held; the entries that still show the bit are gone over later (`sweep`), and only then is the bit given out again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from octavo.engine.core.prefix import Chain

# Blocks between two looks at the index along a chain: the first is looked at alone, then the strides double up to this.
MAX_STRIDE = 64
SWEEP_CHUNK = 2048


class BlockIndex:
    """At most `max_blocks` names."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._bits: dict[str, int] = {}  # replica → its bit, as a mask
        self._replicas: list[str] = []  # bit number → replica
        self._live = 0  # bits that stand for a replica
        self._dead = 0  # bits that some entry may still show
        self._free: list[int] = []  # bit numbers no entry shows

    def __len__(self) -> int:
        return len(self._holders)

    def store(self, replica: str, names: Sequence[bytes]) -> None:
        """`replica` holds the blocks `names`, in the order of their chain as far as they are of one."""
        bit = self._bits.get(replica) or self._new_bit(replica)
        holders = self._holders
        for name in reversed(names):  # so that of one chain the leaf is forgotten before its ancestors
            known = holders.get(name)
            if known is None:
                holders[name] = bit
            else:
                holders[name] = known & ~self._dead | bit
                holders.move_to_end(name)
        while len(holders) > self._max_blocks:
            holders.popitem(last=False)

    def evict(self, replica: str, names: Sequence[bytes]) -> None:
        """`replica` no longer holds `names`."""
        bit = self._bits.get(replica, 0)
        for name in names:
            known = self._holders.get(name, 0)
            if known & bit:
                self._set(name, known & ~(bit | self._dead))

    def drop(self, replica: str) -> None:
        """Forget all that `replica` holds, and itself."""
        bit = self._bits.pop(replica, 0)
        self._live &= ~bit
        self._dead |= bit

    def match(self, chain: Chain) -> dict[str, int]:
        """How many leading blocks of `chain` each replica holds, for those that hold the first.

        Whoever holds a block is taken to hold all before it, which is so but for the odd one that was evicted early: a
        few names along the chain are looked up, and the rest is bisected.
        """
        found: dict[str, int] = {}
        total, holders = len(chain), self._holders
        at, mask, stride = 0, self._live, 1
        while mask and at < total:
            to = min(total, at + stride)
            names = chain.names(to)
            there = holders.get(names[to - 1], 0) & mask
            if there != mask:
                self._find_ends(names, at, mask, to, there, found)
            at, mask, stride = to, there, min(MAX_STRIDE, 2 * stride)
        self._note(mask, at, found)
        return found

    def touch(self, chain: Chain, count: int) -> None:
        """The first `count` blocks of `chain` were used. Costs nothing while there is room for all."""
        if 2 * len(self._holders) < self._max_blocks:
            return
        for name in reversed(chain.names(count)[:count]):
            if name in self._holders:
                self._holders.move_to_end(name)

    def sweep(self) -> Iterator[None]:
        """Remove the bits of replicas that were dropped so far. Yields often: the index may be used, and changed,
        between two steps.
        """
        dead = self._dead
        if not dead:
            return
        names = list(self._holders)
        for start in range(0, len(names), SWEEP_CHUNK):
            for name in names[start : start + SWEEP_CHUNK]:
                known = self._holders.get(name, 0)
                if known & dead:
                    self._set(name, known & ~dead)
            yield
        self._dead &= ~dead
        self._free.extend(number for number in range(dead.bit_length()) if dead >> number & 1)

    def _new_bit(self, replica: str) -> int:
        if self._free:
            number = self._free.pop()
            self._replicas[number] = replica
        else:
            number = len(self._replicas)
            self._replicas.append(replica)
        self._bits[replica] = 1 << number
        self._live |= 1 << number
        return 1 << number

    def _set(self, name: bytes, mask: int) -> None:
        if mask:
            self._holders[name] = mask
        else:
            del self._holders[name]

    def _find_ends(
        self, names: list[bytes], low: int, at_low: int, high: int, at_high: int, found: dict[str, int]
    ) -> None:
        """Of those that hold `low` blocks but not `high`, find how many each holds. `at_…`: the masks there."""
        if high - low == 1:
            self._note(at_low & ~at_high, low, found)
            return
        middle = (low + high) // 2
        at_middle = self._holders.get(names[middle - 1], 0) & at_low | at_high
        if at_middle != at_low:
            self._find_ends(names, low, at_low, middle, at_middle, found)
        if at_middle != at_high:
            self._find_ends(names, middle, at_middle, high, at_high, found)

    def _note(self, mask: int, count: int, found: dict[str, int]) -> None:
        while mask and count:
            lowest = mask & -mask
            found[self._replicas[lowest.bit_length() - 1]] = count
            mask ^= lowest
