"""What structured output costs: a batch with forms against the same batch without, and what a form takes by itself.

    python benchmarks/structured.py --n 16

All rows draw at temperature 1 and generate exactly --output-len tokens: the forms are too long to end before, and the
plain rows ignore the end token. In each round every kind of batch runs once, in turn; ratios are of one round, and the
median over the rounds is shown, so that what else the machine does falls on all alike.

Columns: plain = no row has a form; half, all = so many have one, of several kinds; no jumps = forced tokens are drawn
one by one. of plain = against the plain batch of the same round; step = median turn of the loop in which every row got
a token; CPU = of all threads, which what else the machine does changes least (with OMP_NUM_THREADS=1, where nobody
spins). Below: per form, compiling it (away from the steps), and per row and token, following it and making the mask
(while the model runs).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from metrics import percentile
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

import octavo.engine.core.sequence as sequence_module
from octavo.engine.assets import tokenizer_of
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.grammar.compiler import compile_form
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.grammar.tokens import grammar_tokenizer
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

_RECORD = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 30},
        "quantity": {"type": "integer", "minimum": 0, "maximum": 500},
        "delivery": {"enum": ["express", "standard", "collection in store"]},
        "remarks": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["customer_name", "quantity", "delivery", "remarks"],
    "additionalProperties": False,
}
_RECORDS = {"type": "array", "items": _RECORD, "minItems": 400}
# Forms that no output of a few hundred tokens completes.
FORMS = {
    "records": StructuredOutputs(json=_RECORDS),
    "records, no white space": StructuredOutputs(json=_RECORDS, disable_any_whitespace=True),
    "any JSON": StructuredOutputs(
        json={"type": "array", "items": {"type": ["object", "array", "string"]}, "minItems": 400}
    ),
    "regex": StructuredOutputs(regex=r"([A-Z][a-z]{2,9} [0-9]{1,4}(, |;\n)){400}"),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of batch. forms: of its rows, in turn; None = a plain row."""

    name: str
    forms: tuple[StructuredOutputs | None, ...]
    jumps: bool = True


TIGHT = FORMS["records, no white space"]
KINDS = (
    Kind("plain", (None,)),
    Kind("half", tuple(form for pair in zip(FORMS.values(), [None] * len(FORMS), strict=True) for form in pair)),
    Kind("all", tuple(FORMS.values())),
    Kind("all alike, no white space", (TIGHT,)),
    Kind("the same, no jumps", (TIGHT,), jumps=False),
)


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    cpu_s: float  # of all threads
    step_s: float
    steps: int
    tokens: int

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds


@contextmanager
def jumps(allowed: bool) -> Iterator[None]:
    before = sequence_module.LEAST_JUMP
    sequence_module.LEAST_JUMP = before if allowed else 1 << 30
    try:
        yield
    finally:
        sequence_module.LEAST_JUMP = before


def run(core: EngineCore, kind: Kind, prompts: Sequence[Sequence[int]], output_len: int, tag: str) -> Run:
    """One batch, from the first request to the last token; forms are compiled before."""
    base = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)
    requests = [
        Request(f"{tag}-{i}", tuple(ids), base.replace(seed=i, structured_outputs=kind.forms[i % len(kind.forms)]))
        for i, ids in enumerate(prompts)
    ]
    core.prepare(requests)
    tokens, turns = 0, []
    with jumps(kind.jumps):
        cpu_began = time.process_time()
        began = turn = time.perf_counter()
        for request in requests:
            core.add(request)
        while core.has_work:
            got = [len(delta.token_ids) for delta in core.step()]
            now = time.perf_counter()
            if len(got) == len(requests):
                turns.append(now - turn)
            tokens, turn = tokens + sum(got), now
    return Run(turn - began, time.process_time() - cpu_began, median(turns), len(turns), tokens)


def compare(core: EngineCore, args: argparse.Namespace) -> dict[str, Any]:
    vocab = core.scheduler.limits.vocab_size
    rounds: list[dict[str, Run]] = []
    for number in range(args.rounds + 1):  # the first is the warm-up
        prompts = random_prompts(args.n, args.input_len, vocab, (number, args.n))
        order = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
        with console.status(f"round {number} of {args.rounds}"):
            rounds.append(
                {kind.name: run(core, kind, prompts, args.output_len, f"{number}-{kind.name}") for kind in order}
            )
    del rounds[0]
    found = table(["batch", "tokens/s", "of plain", "least, most", "step", "of plain", "CPU of plain"])
    results = {}
    for kind in KINDS:
        runs = [by_kind[kind.name] for by_kind in rounds]
        speeds = [by_kind[kind.name].tps / by_kind["plain"].tps for by_kind in rounds]
        turns = [by_kind[kind.name].step_s / by_kind["plain"].step_s for by_kind in rounds]
        cpu = [by_kind[kind.name].cpu_s / by_kind["plain"].cpu_s for by_kind in rounds]
        step_ms = 1000 * median(r.step_s for r in runs)
        found.add_row(
            *(kind.name, f"{median(r.tps for r in runs):,.1f}", f"{median(speeds):.1%}"),
            *(f"{min(speeds):.0%}, {max(speeds):.0%}", f"{step_ms:.2f} ms", f"{median(turns):.1%}"),
            f"{median(cpu):.1%}",
        )
        ratios = {"speed_ratios": speeds, "step_ratios": turns, "cpu_ratios": cpu}
        results[kind.name] = {**ratios, "runs": [asdict(r) for r in runs]}
    show(f"{args.model}: n = {args.n}, {args.output_len} tokens each, {args.rounds} rounds", found)
    return results


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def forms_alone(core: EngineCore, config: EngineConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Compile each form, and follow an output of the model's through it."""
    limits, text = core.scheduler.limits, tokenizer_of(config)
    load_s, tokenizer = timed(lambda: grammar_tokenizer(text, limits.vocab_size, limits.eos_token_ids))
    found = table(["form", "compile", "mask: median", "p99", "most", "follow a token"])
    results: dict[str, Any] = {"tokenizer_s": load_s}
    for name, form in FORMS.items():
        compile_s = median(timed(lambda form=form: compile_form(form, tokenizer))[0] for _ in range(5))  # type: ignore[misc]
        tokens: list[int] = []
        params = SamplingParams(max_tokens=2 * args.output_len, seed=1, structured_outputs=form)
        core.add(Request(f"alone-{name}", (1, 2, 3), params))
        while core.has_work:
            for delta in core.step():
                tokens += delta.token_ids
        matcher = compile_form(form, tokenizer)
        masks, follows = [], []
        for token in tokens:
            masks.append(timed(matcher.compute_bitmask)[0])
            began = time.perf_counter()
            matcher.consume_token(token)
            matcher.compute_ff_tokens()
            follows.append(time.perf_counter() - began)
        micro = [1e6 * value for value in (median(masks), percentile(masks, 99), max(masks), median(follows))]
        found.add_row(name, f"{1000 * compile_s:.2f} ms", *(f"{value:,.0f} µs" for value in micro))
        results[name] = {"compile_s": compile_s, "mask_us": micro[:3], "follow_us": micro[3]}
    show(f"By themselves; once per engine, the tokenizer takes {load_s:.2f} s", found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="What structured output costs.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=16, help="rows")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of EngineConfig")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    settings = {"model": args.model, "enable_prefix_caching": False, **engine_options(args.options)}
    config = EngineConfig(**settings)
    core = build_engine(config).core
    try:
        results = {"batches": compare(core, args), "forms": forms_alone(core, config, args)}
    finally:
        core.close()
    save("structured", vars(args), results, args.output)


if __name__ == "__main__":
    main()
