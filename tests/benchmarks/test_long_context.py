"""The long-context benchmark by hand, and its attention batch."""

import pytest
import torch
from long_context import Measured, parse, random_batch, show_results


def test_figures_by_hand(capsys):
    one = Measured("int8", kv_bytes=80_000_000, prefill_s=1.5, step_s=0.04, attention_s=0.01, read_gbps=10)
    assert one.share == pytest.approx(0.25)
    assert one.of_floor == pytest.approx(0.8)
    show_results([one], parse(["--context", "1024"]))
    words = capsys.readouterr().out
    assert "1,024" in words
    assert "80%" in words


def test_sequences_share_no_block():
    batch = random_batch(num_blocks=70, block_size=16, n=8, context=120)
    assert batch.block_tables.shape == (8, 8)
    assert len(set(batch.block_tables.flatten().tolist())) == 64
    assert torch.equal(batch.query_start, torch.arange(9, dtype=torch.int32))
    with pytest.raises(SystemExit, match="need 64 KV blocks, of 63"):
        random_batch(num_blocks=63, block_size=16, n=8, context=120)
