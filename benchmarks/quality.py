"""What each number format costs in quality: perplexity of a fixed text and agreement of greedy answers.

    python benchmarks/quality.py

Perplexity: data/alice.txt (Carroll, 1865) in windows of --window tokens, each computed from nothing; all tokens but the
first of each window count. Answers: data/questions.txt, each as a conversation of its own, --answer-len tokens, end
tokens ignored. Both are compared with those of another format, the reference: the same weights as floats in float32.

float formats and those made on load read a Hugging Face folder with bfloat16 weights, as the hubs hold them; gguf runs
the GGUF file as it is, beside the same file dequantized to float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import gguf_file, model_folder
from comparison import agreement
from drive import weight_bytes
from options import engine_options
from report import console, save, show, table

from octavo.engine import LLM, SamplingParams
from octavo.engine.errors import ConfigError
from octavo.engine.types import Logprob

DATA = Path(__file__).parent / "data"
GOAL_FORMAT, GOAL_RATIO = "int8", 1.01


@dataclass(frozen=True, slots=True)
class Format:
    """A way to keep weights or KV. against: the format it is compared with. gguf: of the GGUF file, not the folder."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    against: str = "float32"
    gguf: bool = False


FORMATS = {
    made.name: made
    for made in (
        Format("float32"),
        Format("bfloat16", {"dtype": "bfloat16"}),
        Format("int8", {"quantization": "int8"}),
        Format("fp8", {"quantization": "fp8"}),
        Format("int4", {"quantization": "int4"}),
        Format("kv-bfloat16", {"kv_cache_dtype": "bfloat16"}),
        Format("kv-int8", {"kv_cache_dtype": "int8"}),
        Format("int8+kv-int8", {"quantization": "int8", "kv_cache_dtype": "int8"}),
        Format("gguf-float32", {"quantization": "none"}, "gguf-float32", gguf=True),
        Format("gguf", {}, "gguf-float32", gguf=True),
    )
}


@dataclass(frozen=True, slots=True)
class Quality:
    """What a format did. scored: tokens that the perplexity counts."""

    weight_bytes: int | None
    perplexity: float
    scored: int
    answers: tuple[tuple[int, ...], ...]


def windows(token_ids: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive pieces of `size` tokens; the last may be shorter, and is left out if nothing of it would count."""
    pieces = [list(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    return [piece for piece in pieces if len(piece) > 1]


def own_logprobs(prompt: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None]) -> list[float]:
    """Of each token of a prompt but the first, which nothing precedes."""
    return [found[token].logprob for token, found in zip(prompt, logprobs, strict=True) if found is not None]


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def assess(made: Format, model: Path, args: argparse.Namespace) -> Quality:
    """Raises ConfigError if octavo cannot do it with this model."""
    settings = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2**30,
        **made.options,
        **engine_options(args.options),
    }
    llm = LLM(str(model), **settings)
    try:
        tokenizer = llm.get_tokenizer()
        text = windows(tokenizer.encode((DATA / "alice.txt").read_text(), add_special_tokens=False), args.window)
        scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found: list[float] = []
        for output in llm.generate(text, scoring, use_tqdm=False):
            assert output.prompt_logprobs is not None
            found += own_logprobs(output.prompt_token_ids, output.prompt_logprobs)
        greedy = SamplingParams(temperature=0.0, max_tokens=args.answer_len, ignore_eos=True, detokenize=False)
        chats = [[{"role": "user", "content": question}] for question in questions()[: args.num_questions]]
        answers = [tuple(output.outputs[0].token_ids) for output in llm.chat(chats, greedy, use_tqdm=False)]
        return Quality(weight_bytes(llm._engine), perplexity(found), len(found), tuple(answers))
    finally:
        llm.close()


def questions() -> list[str]:
    return (DATA / "questions.txt").read_text().splitlines()


def show_results(results: Mapping[str, Quality], args: argparse.Namespace) -> None:
    columns = ("format", "÷ and beside", "weights", "perplexity", "ratio", "equal answers", "tokens before they part")
    shown = table(columns, left=2)
    for name, quality in results.items():
        against = FORMATS[name].against
        row = [name, "–" if against == name else against]
        row += ["–" if quality.weight_bytes is None else f"{quality.weight_bytes / 1e6:,.1f} MB"]
        row += [f"{quality.perplexity:.4f}"]
        if against != name and against in results:
            same, length = agreement(results[against].answers, quality.answers, args.answer_len)
            row += [f"{quality.perplexity / results[against].perplexity:.4f}", f"{same:.0%}", f"{length:.1f}"]
        shown.add_row(*row)
    some = next(iter(results.values()))
    show(
        f"{args.model}: perplexity of {some.scored} tokens in windows of {args.window}, "
        f"{len(some.answers)} greedy answers of {args.answer_len} tokens",
        shown,
    )
    ratio = goal_ratio(results)
    if ratio is not None:
        verdict = "[green]met[/green]" if ratio <= GOAL_RATIO else "[red]missed[/red]"
        console.print(f"{GOAL_FORMAT} within {GOAL_RATIO - 1:.0%} of float32's perplexity: {ratio:.4f}, {verdict}")


def goal_ratio(results: Mapping[str, Quality]) -> float | None:
    """int8's perplexity ÷ float32's; None if one is not there."""
    if GOAL_FORMAT not in results or "float32" not in results:
        return None
    return results[GOAL_FORMAT].perplexity / results["float32"].perplexity


def as_json(results: Mapping[str, Quality], args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, quality in results.items():
        found[name] = asdict(quality)
        against = FORMATS[name].against
        if against in results:
            same, length = agreement(results[against].answers, quality.answers, args.answer_len)
            found[name] |= {"against": against, "answers_equal": same, "mean_common_tokens": length}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity and greedy agreement of each number format.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id; must know chat")
    parser.add_argument("--gguf", type=Path, help="file of the gguf formats (default: the model's own, if any)")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--num-questions", type=int, default=50)
    parser.add_argument("--answer-len", type=int, default=32, help="tokens")
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="further EngineConfig fields")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        folder, gguf = model_folder(args.model, "bfloat16"), args.gguf or gguf_file(args.model)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    results: dict[str, Quality] = {}
    for made in map(FORMATS.__getitem__, args.formats):
        model = gguf if made.gguf else folder
        if model is None:
            console.print(f"[yellow]{made.name} is left out: no GGUF of {args.model} (--gguf).[/yellow]")
            continue
        try:
            with console.status(made.name):
                results[made.name] = assess(made, model, args)
        except (ConfigError, TypeError) as error:  # TypeError: no such field in this version's EngineConfig
            console.print(f"[yellow]{made.name} is left out: {error}[/yellow]")
    if not results:
        raise SystemExit("error: no format could be measured.")
    show_results(results, args)
    save("quality", vars(args), {"goal_ratio": goal_ratio(results), "formats": as_json(results, args)}, args.output)


if __name__ == "__main__":
    main()
