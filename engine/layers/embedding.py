"""Token embeddings, learned positions and the head that turns hidden states into logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.weight import Layer, Part, ShardRule, Weight, whole_part
from octavo.engine.parallel.mesh import Group


def vocab_part(vocab_size: int, group: Group) -> tuple[Part, int]:
    """The rank's range of token ids, and the rows it stores: equal on all ranks, so the last ones may hold padding."""
    rows = -(-vocab_size // group.size)
    first = min(group.rank * rows, vocab_size)
    return Part("", 0, min(rows, vocab_size - first), first, vocab_size), rows


class VocabParallelEmbedding(Layer):
    """[T] token ids → [T, M]. The table is cut over tp by token id. `scale` multiplies in the table's dtype (Gemma)."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int, scale: float | None = None) -> None:
        super().__init__()
        self.group, self.vocab_size = ctx.mesh.tp, vocab_size
        self.part, rows = vocab_part(vocab_size, self.group)
        self.weight = Weight((rows, width), ShardRule(0, (self.part,)), ctx.dtype, ctx.device)
        # Rounded to the dtype before multiplying, as the family was trained.
        self.scale = None if scale is None else torch.tensor(scale, dtype=ctx.dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            hidden = F.embedding(input_ids, self.weight)
        else:
            local = input_ids - self.part.source
            foreign = (local < 0) | (local >= self.part.size)
            hidden = F.embedding(local.masked_fill(foreign, 0), self.weight)
            hidden = self.group.all_reduce(hidden.masked_fill(foreign.unsqueeze(1), 0))
        return hidden if self.scale is None else hidden * self.scale


class LearnedPositions(Layer):
    """[T] positions → [T, M]. `offset`: rows of the table before the one of position 0."""

    def __init__(self, ctx: BuildContext, num_positions: int, width: int, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        rows = num_positions + offset
        self.weight = Weight((rows, width), ShardRule(0, (whole_part(rows),)), ctx.dtype, ctx.device)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions + self.offset if self.offset else positions, self.weight)


class LMHead(Layer):
    """[R, M] → [R, V] float32. The vocabulary is cut over tp. Tied: it reads the embedding's table.

    `soft_cap` c: logits become c * tanh(logit / c).

    On a CPU in bfloat16 the head keeps a float32 copy of its table: a product rounded to bfloat16 has steps of 1/8
    between logits of 16, so that likely tokens tie and the greedy choice among them is an accident.
    """

    def __init__(
        self,
        ctx: BuildContext,
        vocab_size: int,
        width: int,
        tied_to: VocabParallelEmbedding | None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.group, self.vocab_size, self.soft_cap = ctx.mesh.tp, vocab_size, soft_cap
        self.project = ctx.linear_method.project
        self.exact: torch.Tensor | None = None
        # In a list, so that a tied table is found once, under the embedding's name.
        self.tied = [] if tied_to is None else [tied_to]
        if tied_to is None:
            part, rows = vocab_part(vocab_size, self.group)
            self.weight = Weight((rows, width), ShardRule(0, (part,)), ctx.dtype, ctx.device)

    @property
    def table(self) -> torch.Tensor:
        return self.tied[0].weight if self.tied else self.weight

    def finish(self) -> None:
        if self.table.device.type == "cpu" and self.table.dtype == torch.bfloat16:
            self.exact = self.table.float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        table = self.table if self.exact is None else self.exact
        logits = self.group.all_gather(self.project(hidden.to(table.dtype), table)).float()[:, : self.vocab_size]
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap
