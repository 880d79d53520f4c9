"""Which GPUs may run what, and what is said to those that may not. No GPU is asked."""

import re

import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.quant.scheme import AWQ, Floats, Rule, Scheme
from octavo.engine.runner.capability import Gpu, Wanted, check_gpu, check_triton

TURING, AMPERE = Gpu("Tesla T4", (7, 5)), Gpu("NVIDIA A100", (8, 0))
NEWER = (Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA B200", (10, 0)))
PLAIN = Wanted(True, torch.bfloat16, torch.bfloat16, False)
FLOAT8_WEIGHTS = Wanted(True, torch.bfloat16, torch.bfloat16, True)
FLOAT8_KV = Wanted(True, torch.bfloat16, torch.float8_e4m3fn, False)


@pytest.mark.parametrize(
    ("gpu", "wanted", "message"),
    [
        (TURING, PLAIN, "need compute capability 8.0 (Ampere) or newer, and Tesla T4 has 7.5: use another GPU"),
        (TURING, Wanted(False, torch.bfloat16, torch.bfloat16, False), "and Tesla T4 has 7.5: set dtype to float16"),
        (AMPERE, FLOAT8_WEIGHTS, "8.9 (Ada, Hopper) or newer, and NVIDIA A100 has 8.0: set quantization to int8"),
        (AMPERE, FLOAT8_KV, "kv_cache_dtype fp8 needs compute capability 8.9"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(gpu: Gpu, wanted: Wanted, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        check_gpu(gpu, wanted)
    assert str(refused.value).count(". ") == 0, "one sentence"


def test_what_it_can_do_is_not() -> None:
    for gpu in NEWER:
        for wanted in (PLAIN, FLOAT8_WEIGHTS, FLOAT8_KV):
            check_gpu(gpu, wanted)
    check_gpu(AMPERE, PLAIN)
    check_gpu(AMPERE, Wanted(True, torch.float16, torch.int8, False))
    check_gpu(TURING, Wanted(False, torch.float16, torch.float8_e4m3fn, True))  # plain torch converts by itself


@pytest.mark.parametrize("kernels", [None, "triton"])
def test_without_triton_nothing_is_left_to_serve_with(kernels: str | None) -> None:
    with pytest.raises(ConfigError, match="pip install triton"):
        check_triton(kernels, installed=False)
    check_triton(kernels, installed=True)
    check_triton("ref", installed=False)


def test_a_checkpoint_says_whether_it_holds_float8() -> None:
    assert Scheme("fp8", (Rule(("Linear",), Floats((128, 128))),)).has_float8
    assert not Scheme("awq", (Rule(("Linear",), AWQ(128, True)),)).has_float8
