"""Which attention heads each tensor-parallel rank computes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.errors import ConfigError
from octavo.engine.parallel.layout import deal


@dataclass(frozen=True, slots=True)
class HeadShare:
    """One rank's heads. Its query head i reads its KV head i // (query heads / KV heads), as in the whole model."""

    query: range
    kv: range


def share_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """Every rank's heads: contiguous, each query head with the KV head it reads.

    KV heads are dealt as evenly as they go. Fewer of them than ranks: neighbouring ranks hold copies of one KV head and
    share its query heads. Raises ConfigError if there are more ranks than query heads.
    """
    if ranks > num_heads:
        raise ConfigError(
            f"tensor_parallel_size is {ranks}, but the model has {num_heads} attention heads: set it to at most "
            f"{num_heads}, and use pipeline_parallel_size for more ranks."
        )
    if num_heads % num_kv_heads:
        raise ConfigError(f"{num_heads} attention heads cannot share {num_kv_heads} KV heads evenly.")
    group = num_heads // num_kv_heads
    if num_kv_heads >= ranks:
        return tuple(HeadShare(range(kv.start * group, kv.stop * group), kv) for kv in deal(num_kv_heads, ranks))
    return tuple(
        HeadShare(range(head * group + queries.start, head * group + queries.stop), range(head, head + 1))
        for head, owners in enumerate(deal(ranks, num_kv_heads))
        for queries in deal(group, len(owners))
    )
