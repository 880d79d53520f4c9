"""Linear layers that own their shards. Shapes are per rank; `tp` is the size of the mesh's tensor group."""

from __future__ import annotations

from typing import Protocol

import torch

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.weight import Cut, Layer, Part, ShardRule, Source, Weight, whole_part
from octavo.engine.parallel.mesh import Unsummed
from octavo.kernels.rounded import Rounded, Rounding


class Producer(Protocol):
    """What makes the rows that a Linear takes in, and may round them as it does."""

    rounding: Rounding | None


class Linear(Layer):
    """y = x Wᵀ + b with whatever LinearMethod the build chose. W: [out, in], cut as the rule says.

    `parts` lie along the output axis; a bias is cut with them. `input` is the input axis' part, cut or whole; only one
    axis may be cut.
    """

    def __init__(self, ctx: BuildContext, parts: tuple[Part, ...], input: Part, bias: bool) -> None:
        super().__init__()
        self.dtype, self.device, self.method = ctx.dtype, ctx.device, ctx.linear_method
        out = sum(part.size for part in parts)
        cut_input = input.size != input.whole
        rule = ShardRule(axis=1, parts=(input,)) if cut_input else ShardRule(axis=0, parts=parts)
        self.method.create(self, (out, input.size), rule)
        self.bias = Weight((out,), ShardRule(axis=0, parts=parts), ctx.dtype, ctx.device) if bias else None
        self.producers: list[Producer] = []

    def fed_by(self, producer: Producer) -> None:
        """All that the producer makes comes here and goes nowhere else. Once the weight is loaded, and so its form
        known, the producer is told what to round its rows to; till then, and for most weights, nothing."""
        self.producers.append(producer)

    def expects(self) -> dict[str, Weight]:
        return self.method.expects(self) | ({} if self.bias is None else {"bias": self.bias})

    def load(self, name: str, part: str | None, tensor: Source) -> None:
        if name == "bias" and self.bias is not None:
            super().load(name, part, tensor)
        else:
            self.method.load(self, name, part, tensor)

    def finish(self) -> None:
        self.method.finish(self)
        for producer in self.producers:
            producer.rounding = self.method.rounding(self)

    def forward(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        return self.method.apply(self, x, self.bias)


class ReplicatedLinear(Linear):
    """Every rank holds and computes all of it."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(ctx, (whole_part(outputs),), whole_part(inputs), bias)


class ColumnParallelLinear(Linear):
    """Outputs are cut over tp. x: [T, in] → [T, out/tp].

    `names` are checkpoint tensors that are merged into one product; each is cut alike, so that every rank holds its
    share of all: ("gate", "up"). One tensor has no name.
    """

    def __init__(self, ctx: BuildContext, inputs: int, cut: Cut, bias: bool, names: tuple[str, ...] = ("",)) -> None:
        parts = tuple(cut.part(name, i * len(cut.share)) for i, name in enumerate(names))
        super().__init__(ctx, parts, whole_part(inputs), bias)


class QKVLinear(Linear):
    """Query, key and value in one product, heads cut over tp. x: [T, M] → [T, (Hq + 2 Hkv) D], all per rank.

    query, kv: the rank's heads of each kind.
    """

    def __init__(self, ctx: BuildContext, inputs: int, query: Cut, kv: Cut, head_size: int, bias: bool) -> None:
        query, kv = query.times(head_size), kv.times(head_size)
        after_query, after_key = len(query.share), len(query.share) + len(kv.share)
        parts = (query.part("q"), kv.part("k", after_query), kv.part("v", after_key))
        super().__init__(ctx, parts, whole_part(inputs), bias)


class RowParallelLinear(Linear):
    """Inputs are cut over tp, the partial products summed. x: [T, in/tp] → [T, out], the same on every rank."""

    def __init__(self, ctx: BuildContext, cut: Cut, outputs: int, bias: bool) -> None:
        super().__init__(ctx, (whole_part(outputs),), cut.part(), bias)
        self.group, self.leaves_sum = ctx.mesh.tp, False

    def leave_sum(self) -> None:
        """All that comes from here goes to RMSNorm.add, which may add up in the same launch, where the group can."""
        self.leaves_sum = self.group.fuses_norm

    def forward(self, x: torch.Tensor | Rounded) -> torch.Tensor | Unsummed:
        bias = self.bias if self.group.is_first else None  # the sum must contain it once
        part = self.method.apply(self, x, bias)
        return Unsummed(part, self.group) if self.leaves_sum else self.group.all_reduce(part)


class GatheredLinear(Linear):
    """RowParallelLinear's place, computed another way: x [T, in/tp] is gathered, the outputs are cut over tp and
    gathered in turn → [T, out]. Every product is summed whole by one rank, so the result has the same bits in any
    layout; more is sent.
    """

    def __init__(self, ctx: BuildContext, cut: Cut, outputs: int, bias: bool) -> None:
        self.group, self.shares = ctx.mesh.tp, cut.shares
        self.out_shares = self.group.shares(outputs, ctx.linear_method.cut_unit)
        out = Cut(self.out_shares, self.group.rank, outputs)
        super().__init__(ctx, (out.part(),), whole_part(cut.whole), bias)

    def fed_by(self, producer: Producer) -> None:
        """Rows are gathered as they are: a scale is of all inputs of a group, also of those that other ranks have."""

    def leave_sum(self) -> None:
        """There is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.group.gather_shares(x, self.shares)
        return self.group.gather_shares(self.method.apply(self, whole, self.bias), self.out_shares)


def row_parallel(ctx: BuildContext, cut: Cut, outputs: int, bias: bool) -> RowParallelLinear | GatheredLinear:
    """The layer after one whose outputs are cut: inputs as `cut` says, outputs on every rank."""
    gathered = ctx.whole_products and ctx.mesh.tp.size > 1
    return (GatheredLinear if gathered else RowParallelLinear)(ctx, cut, outputs, bias)
