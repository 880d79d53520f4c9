"""Prompts of exact length that no cache has seen."""

from __future__ import annotations

import random


def random_prompts(count: int, length: int, vocab: int, key: object) -> list[list[int]]:
    """Token ids, the same for the same key. The lowest ids are left out: control tokens, in most vocabularies."""
    draw = random.Random(repr(key))
    return [[draw.randrange(min(100, vocab // 2), vocab) for _ in range(length)] for _ in range(count)]
