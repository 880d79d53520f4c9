"""The floor's arithmetic, by hand, and that the machine can be measured."""

import pytest
import torch
from floor import Machine, ModelShape, best_of, decode_s, measure_machine, prefill_s, run_s

MACHINE = Machine(gflops=100.0, read_gbps=10.0, copy_gbps=12.0, threads=2)
SHAPE = ModelShape(
    layer_parameters=100_000_000,
    head_parameters=25_000_000,
    bytes_per_parameter=4.0,
    kv_bytes_per_token=40_000,
    attention_width=10_000,
)


def test_decode_of_one_row_is_bound_by_reading_the_weights():
    num_bytes = 125e6 * 4 + 100 * 40_000
    assert decode_s(MACHINE, SHAPE, 1, 100) == pytest.approx(num_bytes / 10e9)


def test_decode_of_many_rows_is_bound_by_operations():
    operations = 64 * (2 * 125e6 + 4 * 10_000 * 100)
    assert decode_s(MACHINE, SHAPE, 64, 100) == pytest.approx(operations / 100e9)


def test_prefill_computes_the_head_once_per_sequence():
    operations = 2 * 100e6 * 256 + 2 * 25e6 * 2 + 4 * 10_000 * 2 * 128 * 129 / 2
    assert prefill_s(MACHINE, SHAPE, 2, 128) == pytest.approx(operations / 100e9)


def test_a_run_is_a_prefill_and_a_decode_step_per_further_token():
    expected = prefill_s(MACHINE, SHAPE, 2, 128) + 63 * decode_s(MACHINE, SHAPE, 2, 128 + 32)
    assert run_s(MACHINE, SHAPE, 2, 128, 64) == pytest.approx(expected)


def test_best_of_takes_each_figure_by_itself():
    other = Machine(gflops=90.0, read_gbps=11.0, copy_gbps=1.0, threads=2)
    assert best_of(MACHINE, other) == Machine(100.0, 11.0, 12.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_machine_can_be_measured(monkeypatch, dtype):
    monkeypatch.setattr("floor.ARRAY_BYTES", 2**20)
    monkeypatch.setattr("floor.MATMULS", ((64, 64, 64),))
    machine = measure_machine(0.06, dtype)
    assert machine.gflops > 0.01
    assert machine.read_gbps > 0.01
    assert machine.copy_gbps > 0.01
    assert machine.threads == torch.get_num_threads()
