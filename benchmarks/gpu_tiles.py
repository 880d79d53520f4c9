"""Other tiles in the place of those of octavo.kernels.triton.tiles, and what is found as lines of that table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from octavo.kernels.triton import attention, splits, tiles

Tile = tiles.AttentionTile | tiles.MatmulTile


@contextmanager
def tile_of(kernel: str, tile: Tile) -> Iterator[None]:
    """The kernel has this tile for every size on every device."""
    table: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = (
        tiles.ATTENTION if kernel in tiles.ATTENTION else tiles.MATMUL
    )
    before, table[kernel] = table[kernel], {0: ((tiles.ALL, tile),)}
    _forget()
    try:
        yield
    finally:
        table[kernel] = before
        _forget()


def try_tiles(kernel: str, candidates: Iterable[Tile], seconds: Callable[[], float]) -> list[tuple[float, Tile]]:
    """(seconds of a call, tile), the fastest first. What does not fit the device is left out."""
    found: list[tuple[float, Tile]] = []
    for tile in candidates:
        with tile_of(kernel, tile):
            try:
                found.append((seconds(), tile))
            except Exception as error:  # Triton's OutOfResources is a bare Exception
                if "out of resource" not in str(error):
                    raise
    return sorted(found, key=lambda pair: pair[0])


def lines(kernel: str, capability: int, most: int, found: list[tuple[float, Tile]], what: str) -> str:
    """The entry of the fastest for sizes up to `most`, to be put into the kernel's table under the capability; the next
    four as remarks. what: was measured, and on which device."""
    size = "ALL" if most == tiles.ALL else str(most)
    entries = [f"({size}, {tile}),  # {seconds * 1e6:.1f} µs" for seconds, tile in found[:5]]
    return "\n    # ".join([f"{kernel!r}, {capability}: {what}\n    {entries[0]}", *entries[1:]])


def _forget() -> None:
    attention._tile.cache_clear()
    splits.cut.cache_clear()
