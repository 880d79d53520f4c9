"""Token embeddings, learned positions and the head that turns hidden states into logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.linear_method import LinearMethod
from octavo.engine.layers.weight import Cut, Layer, ShardRule, Source, Weight, whole_part
from octavo.engine.parallel.mesh import Group


class VocabTable(Layer):
    """A matrix [V, M], cut over tp by token id: an embedding, a head, or both at once. method None: it has none."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int, method: LinearMethod | None) -> None:
        super().__init__()
        self.group, self.vocab_size, self.dtype, self.device = ctx.mesh.tp, vocab_size, ctx.dtype, ctx.device
        self.shares = vocab_shares(self.group, vocab_size)
        self.part = Cut(self.shares, self.group.rank, vocab_size).part()
        self.method: LinearMethod | None = method
        if method is not None:
            method.create(self, (self.part.size, width), ShardRule(0, (self.part,)))

    def expects(self) -> dict[str, Weight]:
        return {} if self.method is None else self.method.expects(self)

    def load(self, name: str, part: str | None, tensor: Source) -> None:
        assert self.method is not None
        self.method.load(self, name, part, tensor)

    def finish(self) -> None:
        if self.method is not None:
            self.method.finish(self)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, M] → [R, V of this rank], in the dtype of hidden."""
        assert self.method is not None
        return self.method.apply(self, hidden, None)


def vocab_shares(group: Group, vocab_size: int) -> tuple[range, ...]:
    """Every rank's token ids."""
    return group.shares(vocab_size, _VOCAB_UNIT)


_VOCAB_UNIT = 64  # whole panels and vectors of the ops


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
    """[R, M] → [R, V of this rank] float32: `shares` says which rank has which. Tied: it reads the embedding's table.

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


def embedding_and_head(
    ctx: BuildContext,
    vocab_size: int,
    width: int,
    *,
    tied: bool,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[VocabParallelEmbedding | None, LMHead | None]:
    """What this stage has: the first embeds, the last has the head, and a tied table is on both."""
    pp = ctx.mesh.pp
    needs_table = pp.is_first or (tied and pp.is_last and ctx.lm_head)
    embed = VocabParallelEmbedding(ctx, vocab_size, width, scale, tied) if needs_table else None
    if not (pp.is_last and ctx.lm_head):
        return embed, None
    return embed, LMHead(ctx, vocab_size, width, embed if tied else None, soft_cap)
