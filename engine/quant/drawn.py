"""Random tensors of a quantized module, as a checkpoint of that format would hold them: for measuring without one.

Knows the formats' tensors, not what they mean (that is in the formats' own files), nor who wants them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octavo.engine.quant.scheme import AWQ, GPTQ, Floats, Ints, Packed, WeightFormat

STD = 0.02  # of the weights, about
# Words of codes in the middle, and of ones.
_HALF_OF, _ONES = {4: 0x88888888, 8: 0x80808080}, {4: 0x11111111, 8: 0x01010101}
# Standard deviations of what is drawn: codes all alike likely, float8 with all exponents below 2 alike likely.
_CODES = {4: 4.6, 8: 73.9}
_FLOAT8 = 0.6


@dataclass(frozen=True, slots=True)
class Dice:
    """Draws that depend on `key` and a name alone, on one kind of device."""

    key: str
    device: torch.device

    def numbers(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """All between two ends alike likely, which a CPU draws six times faster than normal ones; of STD."""
        return self.bits(name, shape, torch.int16).to(dtype).mul_(STD * 3**0.5 / (1 << 15))

    def scales(self, name: str, shape: tuple[int, ...], middle: float, dtype: torch.dtype) -> torch.Tensor:
        """No two alike: neighbours of the same scale might be stored as one."""
        drawn = torch.empty(shape, dtype=torch.float32, device=self.device)
        return drawn.uniform_(0.75 * middle, 1.25 * middle, generator=self._generator(name)).to(dtype)

    def bits(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Of an integer type, every bit by itself."""
        count = math.prod(shape) * dtype.itemsize
        words = torch.empty(-(-count // 8), dtype=torch.int64, device=self.device)
        words.random_(-(1 << 63), None, generator=self._generator(name))
        return words.view(torch.uint8)[:count].view(dtype).view(shape)

    def order(self, name: str, count: int) -> torch.Tensor:
        """[count] int64 on the host: 0 … count - 1 in any order."""
        generator = torch.Generator()
        generator.manual_seed(self._seed(name))
        return torch.randperm(count, generator=generator)

    def _generator(self, name: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.manual_seed(self._seed(name))
        return generator

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.key} {name}".encode())


def draw(form: WeightFormat, outputs: int, inputs: int, dice: Dice, order: Dice) -> Mapping[str, torch.Tensor]:
    """The pieces of a module [outputs, inputs] in that format (see `gather`), of weights with about STD.

    order: draws the groups of inputs where they are reordered; modules of the same inputs have them in common.
    """
    group = getattr(form, "group_size", 0) or inputs
    groups = -(-inputs // group)
    match form:
        case GPTQ(bits=bits):
            per_word = 32 // bits
            zeros = _HALF_OF[bits] - (_ONES[bits] if form.one_less else 0)
            pieces = {
                "qweight": dice.bits("qweight", (inputs // per_word, outputs), torch.int32),
                "qzeros": dice.bits("qzeros", (groups, outputs // per_word), torch.int32).fill_(_word(zeros)),
                "scales": dice.scales("scales", (groups, outputs), STD / _CODES[bits], torch.float16),
            }
            return pieces | ({"g_idx": _groups(order, inputs, group)} if form.reordered else {})
        case AWQ():
            zeros = {"qzeros": dice.bits("qzeros", (groups, outputs // 8), torch.int32)} if form.zero_point else {}
            return zeros | {
                "qweight": dice.bits("qweight", (inputs, outputs // 8), torch.int32),
                "scales": dice.scales("scales", (groups, outputs), STD / _CODES[4], torch.float16),
            }
        case Packed(bits=bits):
            per_word = 32 // bits
            pieces = {
                "weight_packed": dice.bits("weight_packed", (outputs, -(-inputs // per_word)), torch.int32),
                "weight_shape": torch.tensor([outputs, inputs]),
                "weight_scale": dice.scales("weight_scale", (outputs, groups), STD / _CODES[bits], torch.bfloat16),
            }
            if form.zero_point:
                shape = (-(-outputs // per_word), groups)
                pieces["weight_zero_point"] = dice.bits("weight_zero_point", shape, torch.int32)
            return pieces | ({"weight_g_idx": _groups(order, inputs, group)} if form.reordered else {})
        case Ints(bits=bits):
            weight = dice.bits("weight", (outputs, inputs), torch.int8)
            zeros = {}
            if form.zero_point:
                zeros["weight_zero_point"] = _narrow(
                    dice.bits("weight_zero_point", (outputs, groups), torch.int8), bits
                )
            return zeros | {
                "weight": _narrow(weight, bits),
                "weight_scale": dice.scales("weight_scale", (outputs, groups), STD / _CODES[bits], torch.float32),
            }
        case Floats(block=block):
            rows, columns = (1, inputs) if block is None else (block[0] or outputs, block[1] or inputs)
            shape = (-(-outputs // rows), -(-inputs // columns))
            weight = dice.bits("weight", (outputs, inputs), torch.uint8)
            weight &= 0xBF  # exponents below that of 2, which are no NaN
            return {
                "weight": weight.view(torch.float8_e4m3fn),
                "weight_scale": dice.scales("weight_scale", shape, STD / _FLOAT8, torch.float32),
            }


def _word(bits: int) -> int:
    """32 bits as the int32 that has them."""
    return bits - (1 << 32) if bits >> 31 else bits


def _groups(order: Dice, inputs: int, group: int) -> torch.Tensor:
    """[inputs] int32: the group of each, all groups full but the last."""
    return (order.order("groups", inputs) // group).int()


def _narrow(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 → numbers of so many bits, in int8."""
    return numbers if bits == 8 else numbers >> 4
