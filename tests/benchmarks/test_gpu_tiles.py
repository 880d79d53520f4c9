"""What a search for tiles prints is what the table holds, and the search leaves the table as it was."""

import gpu_tiles
import pytest
import torch

from octavo.kernels.triton import splits, tiles
from octavo.kernels.triton.tiles import ALL, AttentionTile, MatmulTile

CPU = torch.device("cpu")
MINE = MatmulTile(16, 32, 2, 1, programs=3)


def test_a_tile_takes_the_place_of_the_tables_for_a_while() -> None:
    before = splits.cut("scaled", 5, 256, 8, CPU)
    with gpu_tiles.tile_of("scaled", MINE):
        assert {tiles.matmul_tile("scaled", rows, CPU) for rows in (1, 40, 5000)} == {MINE}
        assert splits.cut("scaled", 5, 256, 8, CPU).tile == MINE
    assert splits.cut("scaled", 5, 256, 8, CPU) == before
    assert before.tile != MINE


def test_what_is_printed_can_be_put_into_the_table() -> None:
    other = AttentionTile(64, 32, 4, 1)
    took = iter((3e-6, RuntimeError("out of resource: shared memory"), 2e-6))

    def seconds() -> float:
        found = next(took)
        if isinstance(found, Exception):
            raise found
        return found

    found = gpu_tiles.try_tiles(
        "prefill 2", [AttentionTile(128, 64, 8, 2), AttentionTile(128, 128, 8, 3), other], seconds
    )
    assert found[0] == (2e-6, other)
    head, first, second = gpu_tiles.lines("prefill 2", 90, 128, found, "8192 tokens, some GPU").splitlines()
    assert head == "'prefill 2', 90: 8192 tokens, some GPU"
    assert eval(first) == ((128, other),)
    assert second.strip() == f"# (128, {AttentionTile(128, 64, 8, 2)}),  # 3.0 µs"
    assert eval(gpu_tiles.lines("scaled", 90, ALL, [(1e-6, MINE)], "").splitlines()[1]) == ((ALL, MINE),)


def test_other_failures_are_not_passed_over() -> None:
    def seconds() -> float:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu_tiles.try_tiles("scaled", [MINE], seconds)


@pytest.mark.parametrize("table", [tiles.ATTENTION, tiles.MATMUL], ids=["attention", "matmul"])
def test_tables_are_in_order_and_have_an_entry_for_every_gpu(table: dict) -> None:
    for by_capability in table.values():
        assert min(by_capability) == 80
        for entries in by_capability.values():
            sizes = [most for most, _ in entries]
            assert sizes == sorted(set(sizes))
