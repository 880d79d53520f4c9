"""The sampler on a CPU, native ops beside `ref`: python benchmarks/sampling_cpu.py

Microseconds of `Sampler.sample` and `to_host` together, all Python included, by what the rows ask for. Logits are a
broad normal distribution with forty likely tokens on top: a heavier tail than a language model's, and so a hard case
for top_p. Times are minima, since a busy neighbour can only add.
"""

from __future__ import annotations

import argparse
import time

import torch

from octavo.engine.core.plan import NewSequence
from octavo.engine.params import SamplingParams
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.sampling_state import SamplingState
from octavo.kernels import ops

CPU = torch.device("cpu")
PROMPT = tuple(range(200))
GREEDY, DRAWN = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)
CASES = {
    "greedy": GREEDY,
    "temperature 0.8": DRAWN,
    "top_k 50": DRAWN.replace(top_k=50),
    "top_p 0.9": DRAWN.replace(top_p=0.9),
    "min_p 0.05": DRAWN.replace(min_p=0.05),
    "top_k 50, top_p 0.9": DRAWN.replace(top_k=50, top_p=0.9),
    "greedy, logprobs 5": GREEDY.replace(logprobs=5),
    "top_p 0.9, logprobs 5": DRAWN.replace(top_p=0.9, logprobs=5),
    "greedy, penalties": GREEDY.replace(repetition_penalty=1.1, frequency_penalty=0.2),
}


def logits_like(rows: int, vocab: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab) * 2.2
    likely = 12 - 1.5 * torch.arange(1, 41).log() + 0.7 * torch.randn(rows, 40)
    return logits.scatter_(1, torch.randint(vocab, (rows, 40)), likely)


def microseconds(body: ops.Ops, params: SamplingParams, rows: int, vocab: int, budget: float) -> float:
    state, sampler = SamplingState(rows, 4096, vocab, CPU), Sampler(body)
    tokens = torch.zeros((rows, 4097), dtype=torch.int32)
    for slot in range(rows):
        state.enter(NewSequence(slot, PROMPT, len(PROMPT), params, slot, ()))
    logits, best, step = logits_like(rows, vocab), float("inf"), 0
    end = time.perf_counter() + budget
    while step < 5 or time.perf_counter() < end:
        edited = logits.clone()
        begin = time.perf_counter()
        sampler.sample(edited, range(rows), [len(PROMPT) + step] * rows, state, tokens).to_host()
        best = min(best, time.perf_counter() - begin)
        step += 1
    return best * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    native, ref = ops.select(CPU, torch.float32), ops.select(CPU, torch.float32, force="ref")
    print(f"{options.threads} threads; bodies: {sorted({body for _, body in native.bodies})}")
    print(f"{'case':24}{'vocab':>8}{'rows':>6}{'ours µs':>10}{'ref µs':>10}{'ref/ours':>10}")
    for vocab in options.vocab:
        for name, params in CASES.items():
            for rows in options.rows:
                ours, theirs = (microseconds(body, params, rows, vocab, options.budget) for body in (native, ref))
                print(f"{name:24}{vocab:8}{rows:6}{ours:10.0f}{theirs:10.0f}{theirs / ours:10.1f}", flush=True)


if __name__ == "__main__":
    main()
