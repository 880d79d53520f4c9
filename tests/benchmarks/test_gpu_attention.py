"""What a GPU's rates are made of, counted by hand; the kernels' own tests are in tests/kernels/triton."""

import gpu_attention
import pytest
import torch


def test_a_prompt_is_measured_by_the_scores_that_it_cannot_do_without() -> None:
    case = gpu_attention.attention_case("", [(3, 5), (2, 2)])
    pairs = (3 + 4 + 5) + (1 + 2)
    assert case.flops == pairs * gpu_attention.HEADS * gpu_attention.HEAD_SIZE * 4  # two matmuls, add and multiply
    assert case.rival is None
    assert gpu_attention.attention_case("", [(8, 8)]).rival is not None


@pytest.mark.parametrize(("dtype", "row"), [(torch.bfloat16, 256), (torch.float8_e4m3fn, 132), (torch.int8, 132)])
def test_a_decode_step_is_measured_by_its_kv(dtype: torch.dtype, row: int) -> None:
    case = gpu_attention.attention_case("", [(1, 10), (1, 20)], dtype)
    queries_and_results = 2 * 2 * 2 * gpu_attention.HEADS * gpu_attention.HEAD_SIZE
    assert case.num_bytes == 30 * 2 * gpu_attention.KV_HEADS * row + queries_and_results


def test_a_goal_is_of_the_rival_where_there_is_one() -> None:
    result = gpu_attention.Result("paged_attention", "x", 1.0, 1.0, "TFLOP/s", 0.7, 1.1, "FLASH", 1.0)
    assert "reached" in gpu_attention.line(result)
    alone = gpu_attention.Result("rotary", "x", 1.0, 1.0, "GB/s", 0.7, None, None, 0.9)
    assert "MISSED" in gpu_attention.line(alone)
