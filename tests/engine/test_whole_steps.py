"""Steps that a device repeats by itself: the same answers as op by op, in any company, and no wait in between.

On the CPU, in Triton's interpreter, with emulated graphs: the path that a GPU takes, but for CUDA's part of it.
"""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import plain_ops
from emulated_graphs import NoWaits, install, record
from launchers import Threads

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.runner import build
from octavo.engine.runner.device_buffers import DeviceBuffers
from octavo.engine.runner.in_flight import HostCopies
from octavo.engine.runner.whole_steps import Kind, WholeSteps
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.types import Request
from octavo.kernels import triton
from octavo.kernels.ops import NotRecordable, Ops

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

LENGTHS = (5, 14, 3, 9, 1, 7, 4, 6)  # of prompts
GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 0.9, "seed": 3}
FILTERED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4}
EVERY_WAY = (
    GREEDY,
    DRAWN,
    FILTERED,
    {**GREEDY, "logprobs": 2},
    {**DRAWN, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {**GREEDY, "logit_bias": {5: 4.0}, "min_tokens": 2},
    {**DRAWN, "n": 2},
)


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device, which records what a GPU would. `ref` gets what it lacks for that."""
    choose = build.kernel_ops.select

    def select(*args: Any, **kwargs: Any) -> Ops:
        ops = replace(choose(*args, **kwargs), record=record)
        if dict(ops.bodies)["paged_attention"] == "triton":
            return ops
        attention = {"write_kv": plain_ops.write_kv, "paged_attention": plain_ops.paged_attention}
        return replace(ops, **attention, draw_rows=triton.draw_rows)

    install(monkeypatch)
    for module in ("runner", "sampler"):  # a copy from a device is of what was there then
        monkeypatch.setattr(
            f"octavo.engine.runner.{module}.HostCopies", lambda given: HostCopies(tuple(x.clone() for x in given))
        )
    monkeypatch.setattr(build, "is_host", lambda device: False)
    monkeypatch.setattr(build.kernel_ops, "select", select)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("checkpoint"))


def config_of(folder: Path, **options: object) -> EngineConfig:
    settings = {"dtype": "float32", "kernels": "ref", "block_size": 8, "max_model_len": 64, "max_num_seqs": 8}
    settings |= {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 40}
    return EngineConfig(model=str(folder), **settings | options)


def start(folder: Path, **options: object) -> EngineCore:
    return build_engine(config_of(folder, **options)).core


def start_ranks(folder: Path, **options: object) -> EngineCore:
    config = config_of(folder, **options)
    layout = Layout(config.tensor_parallel_size, config.pipeline_parallel_size)
    ranks = Ranks(config, layout, Threads(), Deadlines(hang_s=60), Phases(None))
    return assemble(config, ranks.info, ranks).core


def steps_of(core: EngineCore) -> WholeSteps:
    return core.process._runner.replay


def recorded(core: EngineCore) -> set[tuple[Kind, bool]]:
    """(kind, of decode steps)"""
    return {(shape.kind, shape.decode) for shape in steps_of(core)._graphs}


def answers(core: EngineCore, *ways: dict, length: int = 6, lengths: tuple[int, ...] = LENGTHS) -> dict:
    found: dict[tuple[str, int], list[object]] = {}
    for i, (prompt, params) in enumerate(zip(tiny.prompts(lengths[: len(ways)]), ways, strict=True)):
        core.add(Request(str(i), tuple(prompt), SamplingParams(max_tokens=length, ignore_eos=True, **params)))
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    return found


@pytest.mark.parametrize("overlap", [True, False])
def test_every_way_to_draw_in_one_batch(folder: Path, overlap: bool) -> None:
    """Requests that a graph draws for and requests that it leaves to the sampler, together and alone."""
    core = start(folder, async_scheduling=overlap)
    eager = start(folder, enforce_eager=True)
    assert answers(core, *EVERY_WAY) == answers(eager, *EVERY_WAY)
    assert recorded(core) >= {(Kind.LOGITS, True)}
    assert not steps_of(eager)._graphs


@pytest.mark.parametrize(
    ("ways", "kind"),
    [((GREEDY,) * 3, Kind.GREEDY), ((GREEDY, DRAWN, DRAWN), Kind.DRAWN), ((FILTERED, GREEDY, DRAWN), Kind.FILTERED)],
    ids=lambda value: value.value if isinstance(value, Kind) else "",
)
def test_a_graph_draws(folder: Path, ways: tuple[dict, ...], kind: Kind) -> None:
    core = start(folder)
    found = answers(core, *ways)
    assert recorded(core) >= {(kind, True)}
    assert found == answers(start(folder, enforce_eager=True), *ways)
    assert answers(core, *ways) == found  # prefixes found in the cache, chunks recorded


def test_steps_with_chunks_are_recorded_when_they_come_again(folder: Path) -> None:
    core = start(folder, enable_prefix_caching=False)
    found = answers(core, GREEDY, DRAWN)
    assert not any(not decode for _, decode in recorded(core))
    assert answers(core, GREEDY, DRAWN) == found
    assert any(not decode for _, decode in recorded(core))
    assert answers(core, GREEDY, DRAWN) == found


def test_preempted_sequences_resume(folder: Path) -> None:
    """Too few blocks for all: some lose theirs, and come back in other slots with the tokens they had."""
    ways = (GREEDY, DRAWN, FILTERED, GREEDY)
    tight = start(folder, num_gpu_blocks_override=10, enable_prefix_caching=False)
    assert answers(tight, *ways, length=20) == answers(start(folder), *ways, length=20)
    assert tight.stats().preemptions > 0


def test_masks_are_waited_for_while_the_graph_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.build.tokenizer_of", lambda config: ByteTokenizer())
    form = StructuredOutputs(regex="(ab|ba){2}")
    ways = ({**DRAWN, "structured_outputs": form}, GREEDY, DRAWN)
    core = start(folder)
    found = answers(core, *ways)
    assert re.fullmatch("(ab|ba){2}", bytes(found["0", 0][:4]).decode())
    assert found == answers(start(folder, enforce_eager=True), *ways)
    assert recorded(core) >= {(Kind.LOGITS, True)}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_families(name: str, tmp_path: Path) -> None:
    made = tiny.make(name, tmp_path)
    core = start(made)
    assert answers(core, GREEDY, DRAWN, length=4) == answers(start(made, enforce_eager=True), GREEDY, DRAWN, length=4)
    assert recorded(core) >= {(Kind.DRAWN, True)}


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2)])
def test_ranks(folder: Path, tp: int, pp: int) -> None:
    """Stages hand on hidden states between graphs, the ranks of a stage add up within theirs."""
    options = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    ways = (GREEDY, DRAWN, FILTERED, {**GREEDY, "logprobs": 1})
    assert answers(start_ranks(folder, **options), *ways) == answers(start(folder, enforce_eager=True), *ways)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=["floats", "int8"])
def test_the_bodies_of_a_gpu(folder: Path, options: dict) -> None:
    options = {**options, "kernels": "triton"}
    core = start(folder, enable_prefix_caching=False, **options)
    found = answers(core, GREEDY, FILTERED, length=4, lengths=(3, 5))
    assert answers(core, GREEDY, FILTERED, length=4, lengths=(3, 5)) == found
    assert recorded(core) >= {(Kind.FILTERED, True), (Kind.FILTERED, False)}
    eager = start(folder, enforce_eager=True, **options)
    assert found == answers(eager, GREEDY, FILTERED, length=4, lengths=(3, 5))


def test_a_decode_step_waits_for_nothing_and_sends_one_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(folder)
    params = SamplingParams(max_tokens=12, ignore_eos=True, **FILTERED)
    for i, prompt in enumerate(tiny.prompts((5, 3))):
        core.add(Request(str(i), tuple(prompt), params))
    for _ in range(4):
        core.step()  # the prompts, and the first steps that record
    sent: list[int] = []
    runner = core.process._runner
    for module in ("device_buffers", "runner", "sampler", "masks", "vocab"):
        monkeypatch.setattr(
            f"octavo.engine.runner.{module}.send", lambda *args: pytest.fail("more than one tensor sent")
        )
    once = runner.replay._send
    monkeypatch.setattr(runner.replay, "_send", lambda *args: (sent.append(1), once(*args))[1])
    execute = runner.execute

    def watched(plan: object, masks: object) -> object:
        with NoWaits():
            return execute(plan, masks)

    monkeypatch.setattr(runner, "execute", watched)
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
    assert len(sent) >= 8
    assert isinstance(runner.buffers, DeviceBuffers)


@pytest.mark.parametrize("eager", [False, True])
def test_no_step_waits_whatever_its_rows_ask_for(folder: Path, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(folder, enforce_eager=eager)
    runner = core.process._runner
    execute = runner.execute

    def watched(plan: object, masks: object) -> object:
        with NoWaits():
            return execute(plan, masks)

    monkeypatch.setattr(runner, "execute", watched)
    found = answers(core, *EVERY_WAY, {**GREEDY, "bad_words": (), "allowed_token_ids": (3, 4, 5)})
    assert len(found) == len(EVERY_WAY) + 2


def test_the_gap_between_steps_is_counted(folder: Path) -> None:
    core = start(folder)
    answers(core, GREEDY, GREEDY)
    stats = core.stats()
    assert stats.step_s > 0
    assert 0 <= stats.gap_s < stats.step_s


def test_what_cannot_be_recorded_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(forward: object) -> None:
        raise NotRecordable("a reason")

    found = answers(start(folder, enforce_eager=True), GREEDY, FILTERED)
    select = build.kernel_ops.select
    monkeypatch.setattr(build.kernel_ops, "select", lambda *args, **kw: replace(select(*args, **kw), record=refuse))
    core = start(folder)
    assert answers(core, GREEDY, FILTERED) == found
    assert not steps_of(core)._graphs
