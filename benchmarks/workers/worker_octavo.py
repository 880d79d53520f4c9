"""octavo's engine as a peer: LLM.generate, float32, prefix caching off.

Arguments set further fields of EngineConfig, as in kernels=ref block_size=32.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import fields

from jobs import MAX_MODEL_LEN, Loaded, serve

from octavo.engine import LLM, SamplingParams
from octavo.engine.config import EngineConfig


def load(model: str, max_rows: int) -> Loaded:
    options: dict[str, object] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(max_rows, 8),
        "enable_prefix_caching": False,
        **_options(sys.argv[1:]),
    }
    llm = LLM(model, **options)

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    versions = {name: importlib.metadata.version(name) for name in ("octavo", "torch")}
    return Loaded(generate, versions, f"{llm.info.dtype}, {llm.info.num_blocks} KV blocks")


def _options(arguments: list[str]) -> dict[str, object]:
    """["block_size=32"] → {"block_size": 32}"""
    known = {field.name for field in fields(EngineConfig)}
    found: dict[str, object] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in known:
            raise SystemExit(f"EngineConfig has no field {name!r}.")
        found[name] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return found


if __name__ == "__main__":
    serve(load)
