"""gpu.py's sections of kernels: every op against `ref`, then rates beside the device's own. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_attention
import gpu_matmul
import numpy as np
import torch
from gpu_attention import Case, Layer, attention_case, row_cases
from gpu_matmul import Measured
from gpu_profile import profiled
from gpu_rows import Bench, Row
from gpu_timing import measure_device, seconds_of, sets_of

from octavo.kernels import ref
from octavo.kernels import triton as ops
from octavo.kernels.sampling import Draws, Masks
from octavo.kernels.triton.draw import draw_rows
from octavo.kernels.triton.mask_logits import mask_rows

TINY = Layer(4, 2, 64, 64, 96, device="cpu", dtype=torch.float32)
VOCAB, TINY_VOCAB = 128256, 500
E4M3 = torch.float8_e4m3fn
# Of a draw's place in the CDF: float32 sums of a whole vocabulary, as two bodies add them up.
EDGE = 1e-5


def device(bench: Bench) -> None:
    """What all the others are measured by."""
    rates = measure_device()
    for name, rate, unit in (("copy", rates.copy, "GB/s"), ("read", rates.read, "GB/s")):
        bench.figure(name, rate)
        bench.row(Row(f"device: {name}", "2 GiB", rate / 1e9, unit))
    bench.figure("matmul", rates.matmul)
    bench.row(Row("device: matmul", "8192³ bfloat16", rates.matmul / 1e12, "TFLOP/s"))


def other_ops(bench: Bench) -> None:
    """Those that no rate is asked of, against `ref`."""
    layer = _layer(bench)
    tokens, lengths = (5, [3, 2]) if bench.tiny else (300, [200, 37, 63])

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=layer.device).to(layer.dtype)

    def rows() -> tuple[Any, ...]:
        (rows,) = [gpu_attention.attention([(n, n) for n in lengths], layer.dtype, layer.device, layer.dtype, sizes)]
        query, *_, batch, scale = rows
        return query, *randn(2, tokens, layer.kv_heads, layer.head_size), batch, scale

    sizes = (layer.heads, layer.kv_heads, layer.head_size)
    cases = [case for case in row_cases(tokens, None, layer) if case.op == "rms_norm"] + [
        Case("gelu_tanh_and_mul", f"T={tokens}", lambda: (randn(tokens, 2 * layer.ffn),)),
        Case("gelu_tanh", f"T={tokens}", lambda: (randn(tokens, layer.ffn),)),
        Case("row_attention", f"rows of {lengths}", rows),
    ]
    for case in cases:
        if bench.checked(case.op, case.shape, partial(gpu_attention.check, case, getattr(ops, case.op))):
            bench.row(Row(case.op, case.shape, note="as ref has it"))


def attention(bench: Bench) -> None:
    _rated(bench, _attention_cases(bench))


def row_ops(bench: Bench) -> None:
    layer = _layer(bench)
    few, many = (3, 5) if bench.tiny else (64, 8192)
    wanted = [case for case in row_cases(many, 0.90, layer) if case.op != "rms_norm"]
    if bench.device.type == "cpu":  # the interpreter cuts off where a GPU rounds
        wanted = [case for case in wanted if "float8" not in case.shape]
    _rated(bench, wanted + [case for case in row_cases(few, None, layer) if case.op == "add_rms_norm"])


def _layer(bench: Bench) -> Layer:
    if not bench.tiny:
        return Layer()
    return Layer(TINY.heads, TINY.kv_heads, TINY.head_size, TINY.width, TINY.ffn, bench.device.type, TINY.dtype)


def _attention_cases(bench: Bench) -> list[Case]:
    case = partial(attention_case, layer=_layer(bench))
    if bench.tiny:
        return [
            case("decode n=3 ctx=40", [(1, 40)] * 3, goal=0.90),
            case("decode n=3 ctx=40", [(1, 40)] * 3, E4M3, goal=0.85),
            case("prefill 24", [(24, 24)], goal=1.0),
        ]
    return [
        case("decode n=64 ctx=8192", [(1, 8192)] * 64, goal=0.90),
        case("decode n=64 ctx=8192", [(1, 8192)] * 64, E4M3, goal=0.85),
        case("prefill 8192", [(8192, 8192)], goal=1.0),
        case("decode n=1 ctx=8192", [(1, 8192)]),
        case("decode n=64 ragged", [(1, 64 + 251 * i) for i in range(64)]),
        case("63 decode, chunk 1024", [(1, 2048)] * 63 + [(1024, 4096)]),
    ]


def _rated(bench: Bench, cases: Sequence[Case]) -> None:
    """All are checked before any is measured; what is wrong is not measured."""
    sound = [
        case
        for case in cases
        if bench.checked(case.op, case.shape, partial(gpu_attention.check, case, getattr(ops, case.op)))
    ]
    for case in sound:
        op = getattr(ops, case.op)
        found = gpu_attention.measure(case, op, bench.rates)
        floor, of, share = found.rate / found.share, "matmul" if case.flops else "copy", found.share
        if found.ratio is not None:
            floor, of, share = found.rate / found.ratio, f"SDPA {found.rival}", found.ratio
        row = Row(case.op, case.shape, found.rate, found.unit, floor, of, share, case.goal, note=f"{found.us:.1f} µs")
        made = case.make()
        bench.row(row, partial(profiled, partial(op, *made)))


def matmuls(bench: Bench) -> None:
    """FP8, INT8, AWQ and GPTQ weights and experts: few rows beside a copy of the weights, many beside bfloat16."""
    layers = gpu_matmul.SMALL if bench.tiny else gpu_matmul.LAYERS
    experts, routing = ((64, 128), gpu_matmul.SMALL_EXPERTS) if bench.tiny else ((1536, 2048), gpu_matmul.EXPERTS)
    repeats = 1 if bench.tiny else 15
    for rows in (3,) if bench.tiny else (1, 64, 4096):
        for name, shape in list(layers.items())[-2:]:
            bench.checked("matmul", f"{name}, {rows} rows", partial(_measure_layer, bench, name, shape, rows, repeats))
        bench.checked("experts", f"{rows} rows", partial(_measure_experts, bench, experts, routing, rows, repeats))


def _measure_layer(bench: Bench, name: str, shape: tuple[int, int], rows: int, repeats: int) -> None:
    for found in gpu_matmul.measure_layer(name, shape, rows, bench.device, repeats):
        _matmul_row(bench, found)


def _measure_experts(bench: Bench, shape: tuple[int, int], routing: tuple[int, int], rows: int, repeats: int) -> None:
    for found in gpu_matmul.measure_experts(shape, rows, bench.device, repeats, routing):
        _matmul_row(bench, found)


def _matmul_row(bench: Bench, found: Measured) -> None:
    shape, note = f"{found.layer}, {found.rows} rows", f"{found.plain_seconds / found.seconds:.2f} × torch's bf16"
    if found.rows > 64:
        floor = bench.rates.matmul / 1e12
        bench.row(Row(found.what, shape, found.tflops, "TFLOP/s", floor, "matmul", found.tflops / floor, note=note))
    else:
        floor = bench.rates.copy / 1e9
        bench.row(Row(found.what, shape, found.gbytes, "GB/s", floor, "copy", found.gbytes / floor, note=note))


def sampling(bench: Bench) -> None:
    """Of 64 rows of logits, beside reading them once."""
    rows, vocab = (3, TINY_VOCAB) if bench.tiny else (64, VOCAB)
    generator = torch.Generator(bench.device).manual_seed(0)
    logits = torch.randn(rows, vocab, device=bench.device, generator=generator) * 3
    rng, ones = np.random.default_rng(0), np.ones(rows)
    order = np.arange(rows)
    plain = Draws(order, ones, np.full(rows, vocab), ones, ones * 0, rng.random(rows))
    filtered = Draws(order, ones * 0.8, np.full(rows, 50), ones * 0.9, ones * 0.01, rng.random(rows))
    ids = torch.randint(0, vocab, (rows,), device=bench.device, generator=generator)
    words = torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), device=bench.device, generator=generator)
    masks = Masks(order, words.to(torch.int32))

    # As graphs have them: what the host says is on the device already.
    peaks, places = ops.find_peaks(logits), torch.from_numpy(order).to(bench.device)
    of_plain, of_filtered = (torch.from_numpy(draws.numbers()).to(bench.device) for draws in (plain, filtered))
    calls: dict[str, tuple[Callable[[], None], Callable[[torch.Tensor], Any]]] = {
        "find_peaks": (lambda: check_peaks(logits), ops.find_peaks),
        "draw": (lambda: check_draw(logits, plain), lambda x: draw_rows(x, peaks, of_plain, False)),
        "draw, top_k 50, top_p 0.9": (
            lambda: check_draw(logits, filtered),
            lambda x: draw_rows(x, peaks, of_filtered, True),
        ),
        "take_logprobs, k 20": (lambda: check_logprobs(logits, ids), lambda x: ops.take_logprobs(x, ids, 20)),
        "mask_logits": (lambda: check_masks(logits, masks), lambda x: mask_rows(x, places, masks.bits)),
    }
    floor = bench.rates.read / 1e9
    for name, (check, call) in calls.items():
        if not bench.checked(name, f"{rows} × {vocab}", check):
            continue
        took = seconds_of([partial(call, logits.clone()) for _ in range(sets_of(logits.nbytes))])
        rate = logits.nbytes / took / 1e9
        note = f"{took * 1e6:.1f} µs"
        bench.row(Row(name, f"{rows} × {vocab}", rate, "GB/s", floor, "read", rate / floor, note=note))


def check_peaks(logits: torch.Tensor) -> None:
    found, wanted = ops.find_peaks(logits), ref.find_peaks(logits)
    assert torch.equal(found.maxima, wanted.maxima), "largest logits of blocks"
    assert torch.equal(found.top, wanted.top), "largest logits"
    assert torch.equal(found.token_ids, wanted.token_ids), "most likely tokens"


def check_draw(logits: torch.Tensor, draws: Draws) -> None:
    """A token is where its uniform is in the CDF of the kept ones, computed in float64, to EDGE of it."""
    found = ops.draw(logits, ref.find_peaks(logits), draws)
    for at, row in enumerate(draws.rows.tolist()):
        weights = torch.softmax(logits[row].double() / float(draws.temperature[at]), dim=0)
        ordered, order = weights.sort(descending=True)
        ordered[int(draws.top_k[at]) :] = 0
        ordered[ordered < float(draws.min_p[at]) * ordered[0]] = 0
        before = ordered.cumsum(0) - ordered
        ordered[before >= float(draws.top_p[at]) * ordered.sum()] = 0
        kept = torch.zeros_like(weights).scatter_(0, order, ordered / ordered.sum())
        token, uniform = int(found[at]), float(draws.uniforms[at])
        end = float(kept.cumsum(0)[token])
        assert kept[token] > 0, f"row {at} drew a token that is not kept"
        assert end - float(kept[token]) - EDGE <= uniform <= end + EDGE, f"row {at} drew a token from elsewhere"


def check_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> None:
    found, wanted = ops.take_logprobs(logits, ids, 20), ref.take_logprobs(logits, ids, 20)
    assert torch.equal(found.ranks, wanted.ranks), "ranks"
    torch.testing.assert_close(found.own, wanted.own, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=2e-5)


def check_masks(logits: torch.Tensor, masks: Masks) -> None:
    found, wanted = logits.clone(), logits.clone()
    ops.mask_logits(found, masks)
    ref.mask_logits(wanted, masks)
    assert torch.equal(found, wanted), "masked logits"
