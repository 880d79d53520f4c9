"""Which bundle of a placement group each rank of a replica gets. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.parallel.layout import Layout


def order_bundles(nodes: Sequence[str], layout: Layout, first: str) -> list[int]:
    """The bundle of each rank, such that the ranks of a stage share a node where that is possible.

    nodes: of each bundle; Ray deals bundles to nodes in no particular order. first: the node to begin with, that of the
    driver. A stage goes to the node where it fits most tightly; one that fits nowhere takes what is left, node by node.
    """
    free: dict[str, list[int]] = {first: []}
    for bundle, node in enumerate(nodes):
        free.setdefault(node, []).append(bundle)
    order: list[int] = []
    split = 0
    for _ in range(layout.pp):
        fitting = [bundles for bundles in free.values() if len(bundles) >= layout.tp]
        if not fitting:
            split += 1
            continue
        chosen = min(fitting, key=lambda bundles: (bundles is not free[first], len(bundles)))
        order += chosen[: layout.tp]
        del chosen[: layout.tp]
    left = [bundle for bundles in free.values() for bundle in bundles]
    return order + left[: split * layout.tp]
