"""Where ranks are, and how things are dealt to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.errors import ConfigError
from octavo.engine.parallel.layout import Layout, deal, deal_evenly


def test_ranks_of_a_stage_are_neighbours() -> None:
    layout = Layout(tp=3, pp=2)
    assert layout.size == 6
    assert [layout.place(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(layout.rank(*layout.place(rank)) == rank for rank in range(6))
    with pytest.raises(ConfigError, match="must be at least 1, got 0 and 2"):
        Layout(tp=0, pp=2)


def test_layers_are_dealt_in_order_the_last_stage_has_fewest() -> None:
    assert [Layout(pp=4).layers(30, stage) for stage in range(4)] == [
        range(8),
        range(8, 16),
        range(16, 23),
        range(23, 30),
    ]


@given(st.integers(1, 10_000), st.integers(1, 9), st.sampled_from([1, 2, 16, 64]))
def test_shares_cover_everything_once(total: int, shares: int, unit: int) -> None:
    for found in (deal(total, shares, unit), deal_evenly(total, shares, unit)):
        assert [i for share in found for i in share] == list(range(total))
    units = [-(-len(share) // unit) for share in deal(total, shares, unit)]
    assert max(units) - min(units) <= 1
    if total >= shares:
        assert all(deal_evenly(total, shares, unit))
    sizes = [len(share) for share in deal_evenly(total, shares, unit)]
    assert max(sizes) - min(sizes) <= max(1, total / shares / 2)


def test_units_are_kept_where_shares_stay_about_equal() -> None:
    assert [len(share) for share in deal_evenly(1536, 2, 64)] == [768, 768]
    assert [len(share) for share in deal_evenly(1536, 3, 64)] == [512, 512, 512]
    assert [len(share) for share in deal_evenly(8960, 4, 64)] == [2240] * 4
    assert [len(share) for share in deal_evenly(48, 3, 64)] == [16, 16, 16]
    assert [len(share) for share in deal_evenly(49155, 2, 64)] == [24640, 24515]
