"""transformers as a peer: one static batch through `generate`, float32, no padding: all prompts are equally long."""

from __future__ import annotations

import torch
import transformers
from jobs import Loaded, serve


def load(model: str, max_rows: int) -> Loaded:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[:, ids.shape[1] :].tolist()

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return Loaded(generate, versions, f"{loaded.config._attn_implementation}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    serve(load)
