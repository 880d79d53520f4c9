"""Runs a model of ours over a paged KV pool, packing rows by hand: what a scheduler and a runner do, in the small."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import CausalLM
from octavo.engine.loader.assign import load_weights
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.mesh import Mesh
from octavo.kernels.ops import AttentionBatch, select


def context(max_model_len: int | None = None, kernels: str = "ref", mesh: Mesh | None = None) -> BuildContext:
    device = torch.device("cpu")
    ops = select(device, torch.float32, force=kernels)
    return BuildContext(mesh or Mesh(), ops, torch.float32, device, max_model_len)


def ours(reference: PreTrainedModel, ctx: BuildContext | None = None) -> CausalLM:
    """Our model with the weights of a transformers model."""
    model = build_model(reference.config, ctx or context())
    load_weights(model, reference.state_dict().items())
    return model


class PagedModel:
    """One model, its KV pool and the sequences in it. Unwritten slots hold NaN: reading one shows in the logits."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], block_size: int = 8, room: int = 64) -> None:
        self.model, self.block_size = model, block_size
        self.tokens = [list(prompt) for prompt in prompts]
        self.computed = [0] * len(prompts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in prompts]  # per sequence and position: [V]
        width = -(-(max(map(len, prompts)) + room) // block_size)
        blocks = list(range(width * len(prompts)))
        random.Random(0).shuffle(blocks)
        self.tables = torch.tensor(blocks, dtype=torch.int32).view(len(prompts), width)
        shapes = [(len(blocks), spec.num_kv_heads, block_size, spec.head_size) for spec in model.kv_specs()]
        self.kv = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for shape in shapes]

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, int]]) -> None:
        """Compute the next `n` known tokens of each (sequence, n), in one packed forward."""
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, n in rows:
            at = range(self.computed[sequence], self.computed[sequence] + n)
            ids += [self.tokens[sequence][p] for p in at]
            positions += at
            slots += [
                int(self.tables[sequence, p // self.block_size]) * self.block_size + p % self.block_size for p in at
            ]
            starts.append(len(ids))
            self.computed[sequence] += n
        contexts = [self.computed[sequence] for sequence, _ in rows]
        batch = AttentionBatch(
            block_tables=self.tables[[sequence for sequence, _ in rows]],
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            max_query_len=max(n for _, n in rows),
            max_context_len=max(contexts),
        )
        hidden = self.model(torch.tensor(ids), torch.tensor(positions), self.kv, batch)
        logits = self.model.logits(hidden)
        for (sequence, _), start, end in zip(rows, starts, starts[1:], strict=False):
            self.logits[sequence] += logits[start:end]

    def greedy(self, n: int, chunk: int | None = None) -> list[list[int]]:
        """n tokens after every prompt. Prompts go in whole or by `chunk` a step; rows decode as soon as they can."""
        lengths = [len(tokens) for tokens in self.tokens]
        while True:
            rows = []
            for sequence, tokens in enumerate(self.tokens):
                if self.computed[sequence] == len(tokens) < lengths[sequence] + n:
                    tokens.append(int(self.logits[sequence][-1].argmax()))
                left = min(len(tokens), lengths[sequence] + n - 1) - self.computed[sequence]
                if left > 0:
                    rows.append((sequence, min(left, chunk or left)))
            if not rows:
                return [tokens[length:] for tokens, length in zip(self.tokens, lengths, strict=True)]
            self.step(rows)
