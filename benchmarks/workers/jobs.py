"""A worker's side of the conversation with benchmarks/peers.py: one JSON object per line in, one per line out.

Standard library only: it runs in every engine's venv. The engine's own printing goes to stderr, so that nothing but
answers is on stdout. Messages: {"op": "load", "model": path, "max_rows": n} → {"versions": …, "notes": …};
{"op": "generate", "prompts": [[ids]], "output_len": n} → {"seconds": …, "token_ids": [[ids]]}; {"op": "quit"}.
An error comes back as {"error": "…"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

MAX_MODEL_LEN = 2048
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Loaded:
    """A ready engine. `generate(prompts, output_len)` is greedy, ignores end tokens, returns the new tokens."""

    generate: Generate
    versions: dict[str, str]
    notes: str = ""


def serve(load: Callable[[str, int], Loaded]) -> None:
    """Answer jobs until "quit" or the end of stdin. `load(path, max_rows)` is called once."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded: Loaded | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["op"] == "quit":
            return
        try:
            if job["op"] == "load":
                begin = time.perf_counter()
                loaded = load(job["model"], job["max_rows"])
                answer = {
                    "versions": loaded.versions,
                    "notes": loaded.notes,
                    "seconds": time.perf_counter() - begin,
                }
            else:
                assert loaded is not None, "generate before load"
                begin = time.perf_counter()
                token_ids = loaded.generate(job["prompts"], job["output_len"])
                answer = {"seconds": time.perf_counter() - begin, "token_ids": token_ids}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
