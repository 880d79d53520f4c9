"""llama.cpp (llama-cpp-python's low-level calls) as a peer: a GGUF file as it is, all sequences in one context.

The prompts are decoded together, N_BATCH tokens a call; then each step is one call with the newest token of every
sequence. Python only picks the greatest logits, with numpy, on llama.cpp's own memory. The argument, if there is one,
is a JSON object: "threads", and fields of llama_context_params. The defaults were the fastest of those tried: a KV
buffer for each sequence (kv_unified false), flash attention, keys and values in float16.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys

import llama_cpp
import numpy as np
from jobs import MAX_MODEL_LEN, Loaded, serve

N_BATCH = 2048


class Context:
    """A model with one context for `rows` sequences of up to MAX_MODEL_LEN tokens. Lives as long as the process."""

    def __init__(self, path: str, rows: int, options: dict[str, int]) -> None:
        threads = options.pop("threads", len(os.sched_getaffinity(0)))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}.")
        self.params = llama_cpp.llama_context_default_params()
        settings = {
            "n_ctx": rows * MAX_MODEL_LEN,
            "n_seq_max": rows,
            "n_batch": N_BATCH,
            "n_threads": threads,
            "n_threads_batch": threads,
            "kv_unified": False,
            "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            **options,
        }
        for name, value in settings.items():
            setattr(self.params, name, value)
        self._context = llama_cpp.llama_init_from_model(self._model, self.params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context with {settings}.")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (N_BATCH,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (N_BATCH,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (N_BATCH,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (N_BATCH,))[:] = 1
        # One sequence id per token: its address is written once, afterwards the ids are one array.
        self._sequences = np.zeros(N_BATCH, np.int32)
        for i in range(N_BATCH):
            address = self._sequences.ctypes.data + i * self._sequences.itemsize
            self._batch.seq_id[i] = ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """Greedy, `output_len` tokens for each prompt, whatever they are."""
        rows = len(prompts)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        output = np.empty((output_len, rows), np.int32)
        output[0] = self._prefill(prompts)
        self._sequences[:rows] = np.arange(rows)
        self._positions[:rows] = [len(prompt) for prompt in prompts]
        self._wanted[:rows] = 1
        for step in range(1, output_len):
            self._tokens[:rows] = output[step - 1]
            output[step] = self._decode(rows, rows)
            self._positions[:rows] += 1
        return output.T.tolist()

    def _prefill(self, prompts: list[list[int]]) -> np.ndarray:
        """The first token of each sequence."""
        tokens = np.concatenate([np.array(prompt, np.int32) for prompt in prompts])
        positions = np.concatenate([np.arange(len(prompt), dtype=np.int32) for prompt in prompts])
        sequences = np.repeat(np.arange(len(prompts), dtype=np.int32), [len(prompt) for prompt in prompts])
        wanted = np.zeros(len(tokens), np.int8)
        wanted[np.cumsum([len(prompt) for prompt in prompts]) - 1] = 1
        found = []
        for start in range(0, len(tokens), N_BATCH):
            part = slice(start, start + N_BATCH)
            count = len(tokens[part])
            self._tokens[:count] = tokens[part]
            self._positions[:count] = positions[part]
            self._sequences[:count] = sequences[part]
            self._wanted[:count] = wanted[part]
            found.append(self._decode(count, int(wanted[part].sum())))
        return np.concatenate(found)

    def _decode(self, count: int, num_wanted: int) -> np.ndarray:
        """Compute the batch's first `count` tokens: the likeliest next token at each place where one is wanted."""
        self._batch.n_tokens = count
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        if num_wanted == 0:
            return np.empty(0, np.int32)
        logits = llama_cpp.llama_get_logits(self._context)  # [num_wanted, V], in the order of the batch
        return np.ctypeslib.as_array(logits, (num_wanted, self._vocab_size)).argmax(axis=1)


def load(model: str, max_rows: int) -> Loaded:
    context = Context(model, max_rows, json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))
    version = importlib.metadata.version("llama-cpp-python")
    notes = f"{context.params.n_threads} threads, {'one KV buffer' if context.params.kv_unified else 'KV per sequence'}"
    return Loaded(context.generate, {"llama-cpp-python": version}, notes)


if __name__ == "__main__":
    serve(load)
