"""What the NCCL link asks of torch, seen by a backend that notes it: no wait on the host, what is sent lives on."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from octavo.engine.errors import RankLost
from octavo.engine.parallel.connect import SENDS_IN_FLIGHT, HostedRendezvous, connect
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.nccl import NCCLLink


class Work:
    """A timeout given to `wait` would make the host wait."""

    def __init__(self) -> None:
        self.done, self.waits = False, 0

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waits += 1


class Backend:
    """Two ranks with the same values. `eager`: gives works to wait for, as torch did before 2.8."""

    def __init__(self, eager: bool = True) -> None:
        self.works: list[Work] = []
        self.sent: list[torch.Tensor] = []
        self.failing = self.aborted = False
        self.eager = eager

    def _work(self) -> Work | None:
        if self.failing:
            raise RuntimeError("NCCL error: unhandled system error\nmore")
        if not self.eager:
            return None
        self.works.append(Work())
        return self.works[-1]

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> Work | None:
        assert not options.asyncOp, "beside the current stream"
        assert tensors[0].is_contiguous()
        tensors[0] *= 2
        return self._work()

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: object) -> Work | None:
        assert not options.asyncOp, "beside the current stream"
        assert x.is_contiguous()
        out.copy_(torch.stack((x, x)))
        return self._work()

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work | None:
        self.sent.append(tensors[0])
        return self._work()

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work | None:
        tensors[0].fill_(source)
        return self._work()

    def abort(self) -> None:
        self.aborted = True


def linked(eager: bool = True) -> tuple[NCCLLink, Backend]:
    backend = Backend(eager)
    return NCCLLink("tp group of ranks 0, 1", 0, 2, backend), backend


@pytest.mark.parametrize("eager", [True, False])
def test_collectives_are_ordered_on_the_stream(eager: bool) -> None:
    link, backend = linked(eager)
    x = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(link.all_reduce(x.clone()), 2 * x)
    assert torch.equal(link.all_gather(x), torch.stack((x, x)))
    out = torch.zeros(3)
    link.recv(out, 1)
    assert out.tolist() == [1.0] * 3
    assert all(work.waits == 1 for work in backend.works)
    assert link.recordable
    assert not link.fuses_norm
    assert link.sum_add_rms_norm(x, x, x, 1e-5, None) is None


def test_what_is_sent_lives_until_it_is_sent() -> None:
    link, backend = linked()
    x = torch.zeros(2, 3)
    for step in range(SENDS_IN_FLIGHT):
        x.fill_(step)
        link.send(x.t(), 1)
    x.fill_(-1)
    assert [float(sent[0, 0]) for sent in backend.sent] == list(range(SENDS_IN_FLIGHT))
    assert all(sent.is_contiguous() for sent in backend.sent)
    assert not any(work.waits for work in backend.works)
    held = [copy for _, copy in link._sent[1]]
    assert all(copy is sent for copy, sent in zip(held, backend.sent, strict=True))
    link.send(x, 1)  # one too many: the stream waits for the oldest
    assert [work.waits for work in backend.works] == [1, *[0] * SENDS_IN_FLIGHT]
    for work in backend.works:
        work.done = True
    link.send(x, 1)
    assert len(link._sent[1]) == 1


@pytest.mark.parametrize(
    ("call", "doing"),
    [
        (lambda link: link.all_reduce(torch.ones(2)), "summing"),
        (lambda link: link.all_gather(torch.ones(2)), "gathering"),
        (lambda link: link.send(torch.ones(2), 1), "sending to its member 1"),
        (lambda link: link.recv(torch.ones(2), 1), "receiving from its member 1"),
    ],
)
def test_errors_say_who_was_doing_what(call: Callable[[NCCLLink], object], doing: str) -> None:
    link, backend = linked()
    backend.failing = True
    with pytest.raises(RankLost, match=f"^The tp group of ranks 0, 1 broke while member 0 was {doing}: NCCL error"):
        call(link)
    link.close()
    assert backend.aborted
    with pytest.raises(RankLost, match="is closed"):
        call(link)


def test_the_backend_alone_has_a_timeout() -> None:
    assert linked()[0].timeout == timedelta(0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_stages_meet_their_neighbours_before_the_first_step(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pipeline: a stage's first message comes when the stage before has its own."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    link = NCCLLink("pp group of ranks 0, 1, 2", rank, 3, backend := Backend())
    met: list[tuple[str, int]] = []
    monkeypatch.setattr(backend, "recv", lambda tensors, source, tag: met.append(("recv", source)))
    monkeypatch.setattr(backend, "send", lambda tensors, to, tag: met.append(("send", to)))
    link.greet_neighbours(torch.device("cpu"))
    assert met == [[("send", 1)], [("recv", 0), ("send", 2)], [("recv", 1)]][rank]


@pytest.mark.parametrize("custom", [True, False])
def test_groups_of_gpus(custom: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have a pipeline; ranks that share layers share memory, unless it is not wanted."""

    def connect_nccl(label, store, rank, size, timeouts, device, pipeline):
        return label, rank, size, timeouts, str(device), pipeline

    monkeypatch.setattr("octavo.engine.parallel.nccl.connect_nccl", connect_nccl)
    monkeypatch.setattr("octavo.engine.parallel.symmetric.share_memory", lambda link, store, device: ("shared", link))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    hosted = HostedRendezvous("127.0.0.1", timeout_s=20, step_timeout_s=30)
    mesh = connect(Layout(tp=2, pp=2), 3, hosted.rendezvous, torch.device("cuda"), custom)
    hosted.close()
    tp = ("tp group of ranks 2, 3", 1, 2, (20, 30), "cuda:0", False)
    assert mesh.tp.link == (("shared", tp) if custom else tp)
    assert mesh.pp.link == ("pp group of ranks 1, 3", 1, 2, (20, 30), "cuda:0", True)
