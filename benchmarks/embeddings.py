"""Embeddings: texts per second of octavo beside sentence-transformers and transformers, and how far they agree.

    python benchmarks/embeddings.py --batch 1 8 32 256

Texts are the sentences of benchmarks/data/alice.txt, from one word to a paragraph, as they come: new ones in every
round. The engines take turns, batch by batch, each in a process of its own; each is counted by its faster rounds.
sentence-transformers gets the whole batch at once, sorts it by length and pads it; transformers pads it as it is and
takes the mean, which is what a program without either does.

Columns: texts/s = of the median of the faster half of the rounds; CPU ms = processor time per text, the median of all
rounds, which other programs disturb less; both ratios are above 1 where octavo (in float32) does better; least cosine
and largest difference = beside sentence-transformers' vectors, over all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from report import save, show, table

from octavo.engine.api import LLM
from octavo.engine.loader.source import resolve_model
from octavo.engine.text.tokenizer import load_tokenizer

Vectors = npt.NDArray[np.float32]
Embed = Callable[[list[str]], Vectors]
ENGINES = ("octavo", "octavo-int8", "octavo-bfloat16", "sentence-transformers", "transformers")


@dataclass(frozen=True, slots=True)
class Result:
    """Of one engine and batch size. agreement: the least cosine with sentence-transformers' vectors; difference: the
    largest of any number."""

    engine: str
    batch: int
    texts_per_s: float
    cpu_s: float  # per text
    agreement: float
    difference: float


def sentences(path: Path) -> list[str]:
    text = " ".join(path.read_text(encoding="utf-8").split())
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]


def octavo(folder: Path, **options: str) -> Embed:
    llm = LLM(str(folder), **options)

    def embed(texts: list[str]) -> Vectors:
        outputs = llm.embed(texts, use_tqdm=False, truncate_prompt_tokens=-1)
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    return embed


def sentence_transformers(folder: Path) -> Embed:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return lambda texts: np.asarray(model.encode(texts, batch_size=max(32, len(texts)), show_progress_bar=False))


def transformers(folder: Path) -> Embed:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> Vectors:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(2)
        states = model(**inputs).last_hidden_state
        means = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means, dim=1).numpy()

    return embed


def make(engine: str, folder: Path) -> Embed:
    if engine == "sentence-transformers":
        return sentence_transformers(folder)
    if engine == "transformers":
        return transformers(folder)
    options = {"octavo-int8": {"quantization": "int8"}, "octavo-bfloat16": {"dtype": "bfloat16"}}
    return octavo(folder, **options.get(engine, {}))


def work(connection: Connection, engine: str, folder: Path, threads: int) -> None:
    """Answers lists of texts with (vectors, seconds, CPU seconds), until there is None."""
    torch.set_num_threads(threads)
    embed = make(engine, folder)
    while (texts := connection.recv()) is not None:
        started, cpu_started = time.perf_counter(), time.process_time()
        vectors = embed(texts)
        connection.send((vectors, time.perf_counter() - started, time.process_time() - cpu_started))


class Worker:
    """An engine in a process of its own: OpenMP workers of one would slow another one down."""

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, engine, folder, threads), daemon=True)
        self._process.start()

    def __call__(self, texts: list[str]) -> tuple[Vectors, float, float]:
        self._connection.send(texts)
        answer: tuple[Vectors, float, float] = self._connection.recv()
        return answer

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def measure(workers: Mapping[str, Worker], batches: Sequence[list[str]], num_tokens: Sequence[int]) -> list[Result]:
    """Batch after batch, every engine in turn on the same texts. Times are per token, since batches differ."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    cpu: dict[str, list[float]] = {name: [] for name in workers}
    agreement, difference = dict.fromkeys(workers, 1.0), dict.fromkeys(workers, 0.0)
    for texts, tokens in zip(batches, num_tokens, strict=True):
        found: dict[str, Vectors] = {}
        for name, worker in workers.items():
            found[name], took_s, cpu_s = worker(texts)
            seconds[name].append(took_s / tokens)
            cpu[name].append(cpu_s / tokens)
        reference = found.get("sentence-transformers", next(iter(found.values())))
        for name, vectors in found.items():
            agreement[name] = min(agreement[name], float((vectors * reference).sum(axis=1).min()))
            difference[name] = max(difference[name], float(np.abs(vectors - reference).max()))
    per_text = sum(num_tokens) / sum(map(len, batches))

    def result(name: str) -> Result:
        fast_s = median(sorted(seconds[name])[: max(1, len(batches) // 2)])
        speed, cpu_s = 1 / (fast_s * per_text), median(cpu[name]) * per_text
        return Result(name, len(batches[0]), speed, cpu_s, agreement[name], difference[name])

    return [result(name) for name in workers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-minilm-l6-v2", help="folder or preset of a sentence-transformers model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256], help="texts per call")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "data" / "alice.txt")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = resolve_model(options.model).path
    texts, tokenizer = sentences(options.text), load_tokenizer(folder)
    lengths = {text: min(256, len(tokenizer.encode(text))) for text in texts}
    workers = {name: Worker(name, folder, options.threads) for name in options.engines}
    for worker in workers.values():
        worker(texts[:64])
    results: list[Result] = []
    endless = itertools.cycle(texts)
    for size in options.batch:
        batches = [list(itertools.islice(endless, size)) for _ in range(max(options.rounds, 64 // size))]
        results += measure(workers, batches, [sum(lengths[text] for text in batch) for batch in batches])
    for worker in workers.values():
        worker.close()
    columns = (
        "batch",
        "engine",
        "texts/s",
        "octavo ÷ it",
        "CPU ms",
        "it ÷ octavo",
        "least cosine",
        "largest difference",
    )
    rows = table(columns, left=2)
    by_name = {(result.engine, result.batch): result for result in results}
    for result in results:
        ours = by_name.get(("octavo", result.batch), result)
        speed = f"{result.texts_per_s:.0f}", f"{ours.texts_per_s / result.texts_per_s:.2f}"
        cpu = f"{result.cpu_s * 1e3:.2f}", f"{result.cpu_s / ours.cpu_s:.2f}"
        near = f"{result.agreement:.6f}", f"{result.difference:.1e}"
        rows.add_row(str(result.batch), result.engine, *speed, *cpu, *near)
    show(f"Embeddings of {len(texts)} sentences, {options.model}", rows)
    save("embeddings", vars(options), [asdict(result) for result in results], options.output)


if __name__ == "__main__":
    main()
