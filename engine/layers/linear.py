"""Linear layers that own their shards. Shapes are per rank; `tp` is the size of the mesh's tensor group."""

from __future__ import annotations

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.weight import Layer, Part, ShardRule, Weight, split_part, whole_part
from octavo.engine.parallel.mesh import Group
from octavo.kernels.matrix import Matrix


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

    def expects(self) -> dict[str, Weight]:
        return self.method.expects(self) | ({} if self.bias is None else {"bias": self.bias})

    def load(self, name: str, part: str | None, tensor: torch.Tensor | Matrix) -> None:
        if name == "bias" and self.bias is not None:
            super().load(name, part, tensor)
        else:
            self.method.load(self, name, part, tensor)

    def finish(self) -> None:
        self.method.finish(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, x, self.bias)


class ReplicatedLinear(Linear):
    """Every rank holds and computes all of it."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(ctx, (whole_part(outputs),), whole_part(inputs), bias)


class ColumnParallelLinear(Linear):
    """Outputs are cut over tp. x: [T, in] → [T, out/tp].

    `outputs` names checkpoint tensors that are merged into one product, with their full sizes; each is cut by itself,
    so that every rank holds its share of all: (("gate", F), ("up", F)). One unnamed output: (("", out),).
    """

    def __init__(self, ctx: BuildContext, inputs: int, outputs: tuple[tuple[str, int], ...], bias: bool) -> None:
        parts: tuple[Part, ...] = ()
        for name, size in outputs:
            start = sum(part.size for part in parts)
            parts += (split_part(size, ctx.mesh.tp, f"Output size of {name or 'a linear layer'}", name, start),)
        super().__init__(ctx, parts, whole_part(inputs), bias)


class QKVLinear(Linear):
    """Query, key and value in one product, heads cut over tp. x: [T, M] → [T, (Hq + 2 Hkv) D], all per rank."""

    def __init__(
        self, ctx: BuildContext, inputs: int, num_heads: int, num_kv_heads: int, head_size: int, bias: bool
    ) -> None:
        query = split_part(num_heads * head_size, ctx.mesh.tp, "Size of all query heads", "q")
        first, count = kv_head_range(ctx.mesh.tp, num_kv_heads)
        size, whole = count * head_size, num_kv_heads * head_size
        key = Part("k", query.size, size, first * head_size, whole)
        value = Part("v", query.size + size, size, first * head_size, whole)
        super().__init__(ctx, (query, key, value), whole_part(inputs), bias)


def kv_head_range(group: Group, num_kv_heads: int) -> tuple[int, int]:
    """(first, count) of this rank's KV heads. Fewer heads than ranks: neighbouring ranks hold copies of one head."""
    if num_kv_heads >= group.size:
        count = group.share(num_kv_heads, "Number of KV heads")
        return group.rank * count, count
    if group.size % num_kv_heads:
        raise ConfigError(f"{num_kv_heads} KV heads cannot be copied evenly to {group.size} {group.name} ranks.")
    return group.rank * num_kv_heads // group.size, 1


class RowParallelLinear(Linear):
    """Inputs are cut over tp, the partial products summed. x: [T, in/tp] → [T, out], the same on every rank."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, bias: bool) -> None:
        mine = split_part(inputs, ctx.mesh.tp, "Input size of a row-parallel layer")
        super().__init__(ctx, (whole_part(outputs),), mine, bias)
        self.group = ctx.mesh.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.group.rank == 0 else None  # the sum must contain it once
        return self.group.all_reduce(self.method.apply(self, x, bias))
