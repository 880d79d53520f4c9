"""Graphs of native CPU ops: a replay computes what a call would, and what cannot be replayed is refused."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import cpu
from octavo.kernels.cpu.graph import Arena
from octavo.kernels.cpu.library import runnable
from octavo.kernels.matrix import Matrix
from octavo.kernels.ops import NotRecordable


@pytest.fixture(params=list(runnable()) or ["none"])
def body(request: pytest.FixtureRequest) -> cpu.Body:
    loaded = cpu.load(request.param)
    assert loaded is not None
    return loaded


def test_a_graph_repeats_what_was_recorded(body: cpu.Body) -> None:
    first = body.pack_linear([Matrix(torch.randn(128, 96))])
    second = body.pack_linear([Matrix(torch.randn(96, 64).bfloat16())])
    norm, x = torch.rand(96), torch.randn(3, 96)

    def forward() -> torch.Tensor:
        hidden = body.rms_norm(x, norm, 1e-6)
        hidden = body.silu_and_mul(body.linear(hidden, first))
        hidden = body.linear(hidden.view(3, 64), second)
        return body.rms_norm(hidden, norm, 1e-6)

    expected = forward()
    graph, recorded = body.record(forward)
    assert torch.equal(recorded, expected)
    for _ in range(3):
        x.normal_()
        expected = forward()
        assert torch.equal(graph.replay(), expected)


def test_several_graphs_share_their_memory(body: cpu.Body) -> None:
    norm = torch.rand(64)
    inputs = [torch.randn(rows, 64) for rows in (1, 2, 7)]
    graphs = [body.record(lambda x=x: body.silu_and_mul(body.rms_norm(x, norm, 1e-6)))[0] for x in inputs]
    for x, graph in [*zip(inputs, graphs, strict=True)] * 2:
        x.normal_()
        assert torch.equal(graph.replay(), body.silu_and_mul(body.rms_norm(x, norm, 1e-6)))


def test_what_a_replay_would_leave_out_is_refused(body: cpu.Body) -> None:
    x = torch.randn(3, 96)
    with pytest.raises(NotRecordable, match="add"):
        body.record(lambda: body.rms_norm(x + 1, x[0], 1e-6))
    with pytest.raises(NotRecordable, match="clone"):
        body.record(lambda: body.rms_norm(x.t(), x[0, :3], 1e-6))
    graph, _ = body.record(lambda: body.rms_norm(x, x[0], 1e-6))
    assert torch.equal(graph.replay(), body.rms_norm(x, x[0], 1e-6))


def test_memory_is_handed_out_again_when_the_last_view_is_gone() -> None:
    arena = Arena(1 << 10)
    first = arena.empty((4, 16), torch.float32)
    second = arena.empty((2, 16), torch.bfloat16)
    assert second.data_ptr() >= first.data_ptr() + 256
    view = first.view(-1)[8:]
    address = first.data_ptr()
    del first
    assert arena.empty((4, 16), torch.float32).data_ptr() != address, "a view still needs it"
    del view
    assert arena.empty((4, 16), torch.float32).data_ptr() == address
    with pytest.raises(NotRecordable, match="memory"):
        arena.empty((1 << 10,), torch.float32)


def test_what_was_handed_out_before_a_reset_is_not_given_back_twice() -> None:
    arena = Arena(1 << 10)
    old = arena.empty((16,), torch.float32)
    arena.reset()
    new = arena.empty((16,), torch.float32)
    del old
    assert arena.empty((16,), torch.float32).data_ptr() != new.data_ptr()
