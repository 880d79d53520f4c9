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
MAX_STRIDE = 128
# Ends of what replicas hold are found to within this part of a prompt, and to the block in prompts that are shorter.
GRAIN = 1 / 128
# Names in one shard, about. Growing a dict, or going over one, takes time in proportion to its size, a second for a
# million names: here it is one shard at a time.
SHARD = 1024
MAX_SHARDS = 1024


class BlockIndex:
    """At most `max_blocks` names."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        count = 1 << min(MAX_SHARDS, max(1, max_blocks // SHARD)).bit_length() - 1
        self._max_shard = max_blocks // count
        # name → holders, least recently used first; which shard, its hash says
        self._shards: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in range(count)]
        self._of = count - 1
        self._bits: dict[str, int] = {}  # replica → its bit, as a mask
        self._replicas: list[str] = []  # bit number → replica
        self._live = 0  # bits that stand for a replica
        self._dead = 0  # bits that some entry may still show
        self._free: list[int] = []  # bit numbers no entry shows

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def names(self, replica: str) -> set[bytes]:
        """All that `replica` is known to hold. Looks at everything."""
        bit = self._bits.get(replica, 0)
        return {name for shard in self._shards for name, known in shard.items() if known & bit}

    def store(self, replica: str, names: Sequence[bytes]) -> None:
        """`replica` holds the blocks `names`, in the order of their chain as far as they are of one."""
        bit = self._bits.get(replica) or self._new_bit(replica)
        for name in reversed(names):  # so that of one chain the leaf is forgotten before its ancestors
            shard = self._shards[hash(name) & self._of]
            known = shard.get(name)
            if known is None:
                shard[name] = bit
                if len(shard) > self._max_shard:
                    shard.popitem(last=False)
            else:
                shard[name] = known & ~self._dead | bit
                shard.move_to_end(name)

    def evict(self, replica: str, names: Sequence[bytes]) -> None:
        """`replica` no longer holds `names`."""
        bit = self._bits.get(replica, 0)
        for name in names:
            shard = self._shards[hash(name) & self._of]
            known = shard.get(name, 0)
            if known & bit:
                _set(shard, name, known & ~(bit | self._dead))

    def drop(self, replica: str) -> None:
        """Forget all that `replica` holds, and itself."""
        bit = self._bits.pop(replica, 0)
        self._live &= ~bit
        self._dead |= bit

    def match(self, chain: Chain) -> dict[str, int]:
        """How many leading blocks of `chain` each replica holds, for those that hold the first. Of a long chain it may
        say up to GRAIN of it less: the last few lookups would cost as much as all before and decide nothing.

        Whoever holds a block is taken to hold all before it, which is so but for the odd one that was evicted early: a
        few names along the chain are looked up, and the rest is bisected.
        """
        found: dict[str, int] = {}
        total, shards, of = len(chain), self._shards, self._of
        at, mask, stride = 0, self._live, 1
        grain = max(1, int(total * GRAIN))
        while mask and at < total:
            to = min(total, at + stride)
            names = chain.names(to)
            name = names[to - 1]
            there = shards[hash(name) & of].get(name, 0) & mask
            if there != mask:
                self._find_ends(names, at, mask, to, there, grain, found)
            at, mask, stride = to, there, min(MAX_STRIDE, 2 * stride)
        self._note(mask, at, found)
        return found

    def touch(self, chain: Chain, count: int) -> None:
        """The first `count` blocks of `chain` were used. Costs nothing while there is room for all."""
        if 2 * len(self._shards[0]) < self._max_shard:
            return
        for name in reversed(chain.names(count)[:count]):
            shard = self._shards[hash(name) & self._of]
            if name in shard:
                shard.move_to_end(name)

    def sweep(self) -> Iterator[None]:
        """Remove the bits of replicas that were dropped so far. Yields often: the index may be used, and changed,
        between two steps.
        """
        dead = self._dead
        if not dead:
            return
        for shard in self._shards:
            for name in list(shard):
                if shard[name] & dead:
                    _set(shard, name, shard[name] & ~dead)
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

    def _find_ends(
        self, names: list[bytes], low: int, at_low: int, high: int, at_high: int, grain: int, found: dict[str, int]
    ) -> None:
        """Of those that hold `low` blocks but not `high`, find how many each holds. `at_…`: the masks there."""
        if high - low <= grain:
            self._note(at_low & ~at_high, low, found)
            return
        middle = (low + high) // 2
        name = names[middle - 1]
        at_middle = self._shards[hash(name) & self._of].get(name, 0) & at_low | at_high
        if at_middle != at_low:
            self._find_ends(names, low, at_low, middle, at_middle, grain, found)
        if at_middle != at_high:
            self._find_ends(names, middle, at_middle, high, at_high, grain, found)

    def _note(self, mask: int, count: int, found: dict[str, int]) -> None:
        while mask and count:
            lowest = mask & -mask
            found[self._replicas[lowest.bit_length() - 1]] = count
            mask ^= lowest


def _set(shard: OrderedDict[bytes, int], name: bytes, mask: int) -> None:
    if mask:
        shard[name] = mask
    else:
        del shard[name]
