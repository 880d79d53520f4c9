"""Root mean square norms, one program per few rows. Shapes and contracts: `octavo.kernels.ops`."""

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.rows import rows_of

# Elements of a program's tile: rows shorter than this share a program.
TILE = 2048
# (longest row, warps)
WARPS = ((2048, 4), (8192, 8), (1 << 30, 16))


@triton.jit(do_not_specialize=["count"])
def _rms_norm(
    out,  # [count, width], contiguous
    x,  # row r at r // inner * x_outer + r % inner * x_inner
    weight,  # [width]
    count,
    inner,
    x_outer,
    x_inner,
    eps,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    held = (row < count)[:, None] & (column < width)[None, :]
    start = row // inner * x_outer + row % inner * x_inner
    value = tl.load(x + start[:, None] + column[None, :], mask=held, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = value * scale[:, None] * weights[None, :]
    tl.store(out + row[:, None] * width + column[None, :], result.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["count"])
def _add_rms_norm(
    x,  # [count, width]: becomes the norm
    residual,  # [count, width]: becomes the sum
    weight,  # [width]
    count,
    x_stride,
    residual_stride,
    eps,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    held = (row < count)[:, None] & (column < width)[None, :]
    into = x + row[:, None] * x_stride + column[None, :]
    kept = residual + row[:, None] * residual_stride + column[None, :]
    total = tl.load(into, mask=held, other=0.0).to(tl.float32) + tl.load(kept, mask=held, other=0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)  # the norm is of what the next layer will read
    tl.store(kept, total, mask=held)
    value = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(into, (value * scale[:, None] * weights[None, :]).to(x.dtype.element_ty), mask=held)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows, (width, padded, at_once, warps) = rows_of(x), _tile(x.shape[-1])
    _rms_norm[(triton.cdiv(rows.count, at_once),)](
        out,
        rows.x,
        weight,
        rows.count,
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        eps,
        width,
        ROWS=at_once,
        WIDTH=padded,
        num_warps=warps,
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place where the last dimension is contiguous and there are two."""
    if x.numel() == 0:
        return x, residual
    shape, (width, padded, at_once, warps) = x.shape, _tile(x.shape[-1])
    x, residual = (part if _plain(part) else part.contiguous().view(-1, width) for part in (x, residual))
    _add_rms_norm[(triton.cdiv(len(x), at_once),)](
        x,
        residual,
        weight,
        len(x),
        x.stride(0),
        residual.stride(0),
        eps,
        width,
        ROWS=at_once,
        WIDTH=padded,
        num_warps=warps,
    )
    return x.view(shape), residual.view(shape)


def _plain(x: torch.Tensor) -> bool:
    return x.dim() == 2 and x.stride(1) == 1


def _tile(width: int) -> tuple[int, int, int, int]:
    """(width, padded width, rows per program, warps)."""
    padded = triton.next_power_of_2(width)
    warps = next(warps for longest, warps in WARPS if padded <= longest)
    return width, padded, max(1, TILE // padded), warps
