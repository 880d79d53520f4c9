"""Reading ahead: the right bytes whatever the slice and the way, bounded, in order, and over when the taker is."""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import Source
from octavo.engine.loader import file_tensor, folder, read_ahead
from octavo.engine.loader.file_tensor import FileTensor, OpenFile, Run
from octavo.engine.loader.staging import Staging

sys.path.insert(0, str(Path(__file__).parent))
from elsewhere import Elsewhere, TensorThere

DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn, torch.uint8, torch.int64)


class LateCopies:
    """A device whose copies are made later, by a thread that takes its time; not before do buffers lose their content.

    there: what is allocated, as TensorThere.
    """

    def __init__(self, there: bool = False) -> None:
        self.there, self.buffers, self.alive, self.most = there, 0, 0, 0
        self._asked: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def empty(self, num_bytes: int) -> torch.Tensor:
        made = torch.full((num_bytes,), 0xAA, dtype=torch.uint8)
        return TensorThere(made) if self.there else made

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self.buffers += 1
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, buffer: torch.Tensor, out: torch.Tensor) -> threading.Event:
        done = threading.Event()
        self._asked.put((buffer, out, done))
        return done

    def wait(self, sent: threading.Event) -> None:
        sent.wait()

    def receive(self, tensor: torch.Tensor, sent: Sequence[threading.Event]) -> None:
        for done in sent:
            done.wait()

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def _copy(self) -> None:
        while (asked := self._asked.get()) is not None:
            buffer, out, done = asked
            time.sleep(random.random() / 2000)
            (out.held if isinstance(out, TensorThere) else out).copy_(buffer)
            done.set()


def write(path: Path, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, shape in enumerate(shapes):
        dtype = DTYPES[i % len(DTYPES)]
        raw = torch.randint(0, 100, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"t{i}"] = raw.view(dtype)
    save_file(tensors, path)
    return tensors


def stored(path: Path) -> Iterator[tuple[str, FileTensor]]:
    file = OpenFile(path)
    return ((e.name, FileTensor.of(file, e.dtype, e.shape, e.offset)) for e in folder._entries(path))


def cut(tensor: Any, chance: random.Random) -> Any:
    """A random slice, the same of a tensor and of one in a file."""
    for axis in range(len(tensor.shape)):
        if chance.random() < 0.7:
            start = chance.randrange(tensor.shape[axis])
            tensor = tensor.narrow(axis, start, chance.randint(1, tensor.shape[axis] - start))
    return tensor.t() if len(tensor.shape) == 2 and chance.random() < 0.3 else tensor


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (tensor.flatten().clone().view(torch.uint8) for tensor in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(raw_a, raw_b)


@pytest.mark.parametrize("worth_skipping", [1, 64, 1 << 20])
@pytest.mark.parametrize("on_device", [False, True])
def test_any_slice(on_device: bool, worth_skipping: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of many jobs, through buffers that are used again, in pieces longer and shorter than they are."""
    monkeypatch.setattr(file_tensor, "WORTH_SKIPPING", worth_skipping)
    monkeypatch.setattr(read_ahead, "SEGMENT", 256)
    monkeypatch.setattr(read_ahead, "SCRATCH", 96)
    chance = random.Random(worth_skipping)
    shapes = [tuple(chance.randint(1, 12) for _ in range(chance.randint(1, 4))) for _ in range(30)]
    tensors = write(tmp_path / "a.safetensors", [*shapes, (40, 50), (3, 700), (0, 4)])
    slices = {name: chance.random() for name in tensors}

    def wanted(name: str, source: Source) -> list[Source]:
        return [source if source.shape[0] == 0 else cut(source, random.Random(slices[name]))]

    staging = LateCopies() if on_device else None
    seen = []
    with closing(read_ahead.read_ahead(stored(tmp_path / "a.safetensors"), wanted, staging, ahead=2000)) as found:
        for name, source in found:
            (mine,) = wanted(name, source)
            want = tensors[name] if not len(tensors[name]) else cut(tensors[name], random.Random(slices[name]))
            assert tuple(mine.shape) == tuple(want.shape)
            assert same(mine.read(), want), name
            assert same(source.read(), tensors[name])  # nobody expected that
            seen.append(name)
    assert seen == [e.name for e in folder._entries(tmp_path / "a.safetensors")]
    assert staging is None or staging.buffers <= read_ahead.DEVICE_THREADS * read_ahead.BUFFERS


@pytest.mark.parametrize("size", [1, 7, 64, 100, 1 << 20])
def test_runs_are_split_into_what_fits(size: int) -> None:
    run = Run(start=1000, count=9, pitch=80, size=33)
    parts = list(run.split(size))
    assert all(part.nbytes <= size for part in parts)
    at = [piece.start + i for part in parts for piece in part.pieces() for i in range(piece.size)]
    assert at == [piece.start + i for piece in run.pieces() for i in range(piece.size)]


def test_a_rank_reads_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, and columns where they are long; where they are short, whole rows in one go."""
    tensors = {"rows": torch.zeros(64, 4096), "long": torch.zeros(8, 1 << 16), "short": torch.zeros(4096, 64)}
    save_file(tensors, tmp_path / "a.safetensors")
    counted = {"bytes": 0, "reads": 0}
    plain = OpenFile.read_into

    def count(self: OpenFile, start: int, buffer: memoryview) -> None:
        counted["bytes"] += len(buffer)
        counted["reads"] += 1
        plain(self, start, buffer)

    monkeypatch.setattr(OpenFile, "read_into", count)

    def reads(name: str, axis: int) -> tuple[float, int]:
        counted.update(bytes=0, reads=0)
        tensor = dict(stored(tmp_path / "a.safetensors"))[name]
        half = tensor.narrow(axis, 0, tensor.shape[axis] // 2)
        (source,) = [s for n, s in read_ahead.read_ahead([(name, tensor)], lambda *_: [half], LateCopies())]
        source.narrow(axis, 0, tensor.shape[axis] // 2).read()
        return counted["bytes"] / tensor.nbytes, counted["reads"]

    assert reads("rows", 0) == (0.5, 1)
    assert reads("long", 1) == (0.5, 8)
    share, number = reads("short", 1)
    assert share <= 1
    assert number <= tensors["short"].nbytes / read_ahead.SCRATCH + 1


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]


@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_read_and_not_taken_is_bounded(on_device: bool, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", [(64, 16)] * 60)
    asked: list[str] = []

    def wanted(name: str, source: Source) -> list[Source]:
        asked.append(name)
        return [source]

    staging: Staging | None = LateCopies() if on_device else None
    most = 64 * 16 * 8
    with closing(read_ahead.read_ahead(stored(tmp_path / "a.safetensors"), wanted, staging, ahead=3 * most)) as found:
        for taken, _ in enumerate(found, 1):
            assert len(asked) - taken <= 3 * most // (64 * 16)
    assert not running()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError, None])
def test_the_threads_end_with_the_taker(error: type[BaseException] | None, on_device: bool, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", [(64, 16)] * 60)
    tensors = read_ahead.read_ahead(
        stored(tmp_path / "a.safetensors"), lambda _, source: [source], LateCopies() if on_device else None
    )

    def take() -> None:
        with closing(tensors):
            next(tensors)
            if error is not None:
                raise error("now")

    with pytest.raises(error) if error is not None else nullcontext():
        take()
    assert not running()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_file_that_became_shorter_is_named(on_device: bool, tmp_path: Path) -> None:
    """By the error of the tensor that is lost; those before it are read."""
    path = tmp_path / "model-00001.safetensors"
    tensors = write(path, [(64, 64)] * 12)
    opened = list(stored(path))
    path.write_bytes(path.read_bytes()[: opened[6][1].offset + 1])
    read: list[str] = []

    def take() -> None:
        with closing(read_ahead.read_ahead(opened, lambda _, s: [s], LateCopies() if on_device else None)) as found:
            for name, source in found:
                assert same(source.read(), tensors[name])
                read.append(name)

    with pytest.raises(
        ConfigError, match=r"Cannot read weights from .*model-00001\.safetensors: it has become shorter"
    ):
        take()
    assert read == [name for name, _ in opened[:6]]
    assert not running()


def test_errors_of_the_walk_come_at_their_turn() -> None:
    def walk() -> Iterator[tuple[str, Source]]:
        yield "a", torch.zeros(1)
        yield "b", torch.zeros(1)
        raise ConfigError("broken")

    found = read_ahead.read_ahead(walk(), lambda *_: [], None)
    assert [next(found)[0], next(found)[0]] == ["a", "b"]
    with pytest.raises(ConfigError, match="broken"):
        next(found)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read weights from .*gone\.safetensors: No such file"):
        OpenFile(tmp_path / "gone.safetensors")


def test_two_devices_do_not_mix() -> None:
    """The test's device is as strict as a GPU."""
    with Elsewhere():
        there = torch.arange(4).to("lazy:0")
        assert there.device.type == (there + 1).device.type == there.new_empty(2).device.type == "lazy"
        for wrong in (lambda: there + torch.arange(4), lambda: there[torch.arange(2)]):
            with pytest.raises(AssertionError, match="two devices"):
                wrong()
