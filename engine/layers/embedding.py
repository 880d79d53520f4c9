"""Token embeddings, learned positions and the head that turns hidden states into logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.linear_method import LinearMethod
from octavo.engine.layers.weight import Layer, Part, ShardRule, Weight, whole_part
from octavo.engine.parallel.mesh import Group
from octavo.kernels.matrix import Matrix


def vocab_part(vocab_size: int, group: Group) -> tuple[Part, int]:
    """The rank's range of token ids, and the rows it stores: equal on all ranks, so the last ones may hold padding."""
    rows = -(-vocab_size // group.size)
    first = min(group.rank * rows, vocab_size)
    return Part("", 0, min(rows, vocab_size - first), first, vocab_size), rows


class VocabTable(Layer):
    """A matrix [V, M], cut over tp by token id: an embedding, a head, or both at once. method None: it has none."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int, method: LinearMethod | None) -> None:
        super().__init__()
        self.group, self.vocab_size, self.dtype, self.device = ctx.mesh.tp, vocab_size, ctx.dtype, ctx.device
        self.part, rows = vocab_part(vocab_size, self.group)
        self.method: LinearMethod | None = method
        if method is not None:
            method.create(self, (rows, width), ShardRule(0, (self.part,)))

    def expects(self) -> dict[str, Weight]:
        return {} if self.method is None else self.method.expects(self)

    def load(self, name: str, part: str | None, tensor: torch.Tensor | Matrix) -> None:
        assert self.method is not None
        self.method.load(self, name, part, tensor)

    def finish(self) -> None:
        if self.method is not None:
            self.method.finish(self)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, M] → [R, V], in the dtype of hidden."""
        assert self.method is not None
        return self.group.all_gather(self.method.apply(self, hidden, None))[:, : self.vocab_size]


class VocabParallelEmbedding(VocabTable):
    """[T] token ids → [T, M]. `scale` multiplies in the model's dtype (Gemma). tied: the head reads this table too."""

    def __init__(
        self, ctx: BuildContext, vocab_size: int, width: int, scale: float | None = None, tied: bool = False
    ) -> None:
        super().__init__(ctx, vocab_size, width, ctx.head_method if tied else ctx.table_method)
        # Rounded to the dtype before multiplying, as the family was trained.
        self.scale = None if scale is None else torch.tensor(scale, dtype=ctx.dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self.method is not None
        if self.group.size == 1:
            hidden = self.method.rows(self, input_ids, self.dtype)
        else:
            local = input_ids - self.part.source
            foreign = (local < 0) | (local >= self.part.size)
            hidden = self.method.rows(self, local.masked_fill(foreign, 0), self.dtype)
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


class LMHead(VocabTable):
    """[R, M] → [R, V] float32. Tied: it reads the embedding's table.

    `soft_cap` c: logits become c * tanh(logit / c).

    On a CPU logits are computed in float32 whatever the model's dtype: a product rounded to bfloat16 has steps of 1/8
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
        super().__init__(ctx, vocab_size, width, ctx.head_method if tied_to is None else None)
        self.soft_cap = soft_cap
        self.logits_dtype = torch.float32 if ctx.device.type == "cpu" else ctx.dtype
        # In a list, so that a tied table is found once, under the embedding's name.
        self.tied = [] if tied_to is None else [tied_to]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        table = self.tied[0] if self.tied else self
        logits = table.project(hidden.to(self.logits_dtype)).float()
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap
