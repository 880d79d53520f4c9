"""octavo's engine as a peer: LLM.generate, computing in float32, prefix caching off, 1 GiB of KV as vllm has.

The argument, if there is one, is a JSON object of further EngineConfig fields.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

from jobs import MAX_MODEL_LEN, Loaded, serve

from octavo.engine import LLM, SamplingParams


def load(model: str, max_rows: int) -> Loaded:
    options: dict[str, object] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(max_rows, 8),
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2**30,
        **json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"),
    }
    llm = LLM(model, **options)

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    versions = {name: importlib.metadata.version(name) for name in ("octavo", "torch")}
    return Loaded(generate, versions, f"{llm.info.dtype}, {llm.info.num_blocks} KV blocks")


if __name__ == "__main__":
    serve(load)
