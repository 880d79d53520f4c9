"""Feed-forward blocks. x: [T, M] → [T, M], F cut over tp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.linear import ColumnParallelLinear, Producer, row_parallel
from octavo.engine.layers.weight import Cut
from octavo.kernels.rounded import Rounded, Rounding

T = TypeVar("T")

# Names as in Hugging Face configs. gelu_new is the tanh approximation written out.
GATED = {"silu": "silu_and_mul", "swish": "silu_and_mul"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh_and_mul"
)
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor] | str] = {  # torch's, or the name of an op
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
} | dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        cut = _cut(ctx, inner)
        self.gate_up_proj = ColumnParallelLinear(ctx, width, cut, bias, names=("gate", "up"))
        self.down_proj = row_parallel(ctx, cut, width, bias)
        self.activation = getattr(ctx.ops, _lookup(GATED, activation))
        self.rounding: Rounding | None = None  # of what goes into down_proj
        self.down_proj.fed_by(self)

    def fed_by(self, producer: Producer) -> None:
        """See Linear.fed_by."""
        self.gate_up_proj.fed_by(producer)

    def leave_sum(self) -> None:
        """See RowParallelLinear.leave_sum."""
        self.down_proj.leave_sum()

    def forward(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x), self.rounding))


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        cut = _cut(ctx, inner)
        self.up_proj = ColumnParallelLinear(ctx, width, cut, bias)
        self.down_proj = row_parallel(ctx, cut, width, bias)
        act = _lookup(PLAIN, activation)
        self.activation = getattr(ctx.ops, act) if isinstance(act, str) else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def _cut(ctx: BuildContext, inner: int) -> Cut:
    """The rank's channels, cut where the linear method likes it best."""
    return Cut(ctx.mesh.tp.shares(inner, ctx.linear_method.cut_unit), ctx.mesh.tp.rank, inner)


def _lookup(table: dict[str, T], name: str) -> T:
    if name not in table:
        raise ConfigError(f"Activation {name!r} is not supported here; supported are {', '.join(table)}.")
    return table[name]
