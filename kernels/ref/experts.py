"""Products of experts: rows sorted by expert, each multiplied with its own expert's weight."""

import torch


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows offsets[e] to offsets[e + 1] of x [T, K] @ weights[e] [N, K]ᵀ → [T, N] in x's dtype. Sums in float32.

    offsets: [E + 1] int32, ascending, from 0 to T: rows of the experts one after the other, some perhaps of none.
    """
    ends = offsets.tolist()
    products = [
        torch.nn.functional.linear(x[first:last].float(), weight.float())
        for first, last, weight in zip(ends[:-1], ends[1:], weights, strict=True)
    ]
    return torch.cat(products).to(x.dtype)
