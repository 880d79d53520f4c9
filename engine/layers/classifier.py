"""Heads that turn one pooled vector into the scores of classes. On every rank of the last stage, never cut.

They are small and see one row per prompt, so they stay floats whatever becomes of the other matrices, and compute in
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.weight import Layer, ShardRule, Weight, whole_part


class PlainLinear(Layer):
    """x: [R, in] → [R, out] float32."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        rule = ShardRule(0, (whole_part(outputs),))
        self.weight = Weight((outputs, inputs), rule, ctx.dtype, ctx.device)
        self.bias = Weight((outputs,), rule, ctx.dtype, ctx.device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Classifier(nn.Module):
    """out(act(dense(x))), as BERT's family has it. x: [R, M] pooled → [R, C] float32 logits."""

    def __init__(
        self, ctx: BuildContext, width: int, classes: int, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.dense = PlainLinear(ctx, width, width, bias=True)
        self.activation = activation
        self.out = PlainLinear(ctx, width, classes, bias=True)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.out(self.activation(self.dense(pooled)))
