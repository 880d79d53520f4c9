"""The bodies of answers: OpenAI's embeddings, vLLM's scores, classes and pooling, Jina's and Cohere's rankings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.cluster.ingress.pooling.bodies import EncodingFormat
from octavo.engine.pooling.outputs import floats


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer begins with. num_tokens: of all prompts."""

    answer_id: str
    model: str
    created: int
    num_tokens: int

    def listed(self, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": "list",
            "created": self.created,
            "model": self.model,
            "data": list(data),
            "usage": {
                "prompt_tokens": self.num_tokens,
                "total_tokens": self.num_tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }


def vectors(head: Head, kind: str, key: str, found: Sequence[bytes], form: EncodingFormat) -> dict[str, Any]:
    """Embeddings (kind and key `embedding`), or what /pooling gives (kind `pooling`, key `data`). base64: of float32
    values, little-endian."""
    if form == "base64":
        encoded: list[Any] = [base64.b64encode(pooled).decode() for pooled in found]
    else:
        encoded = [floats(pooled) for pooled in found]
    return head.listed([{"index": i, "object": kind, key: each} for i, each in enumerate(encoded)])


def scores(head: Head, found: Sequence[float]) -> dict[str, Any]:
    return head.listed([{"index": i, "object": "score", "score": score} for i, score in enumerate(found)])


def classes(head: Head, labels: Sequence[str], found: Sequence[bytes]) -> dict[str, Any]:
    return head.listed([_class(i, labels, floats(pooled)) for i, pooled in enumerate(found)])


def _class(index: int, labels: Sequence[str], probs: list[float]) -> dict[str, Any]:
    best = max(range(len(probs)), key=probs.__getitem__)
    return {"index": index, "label": labels[best], "probs": probs, "num_classes": len(probs)}


def ranking(head: Head, found: Sequence[float], documents: Sequence[str] | None, top_n: int | None) -> dict[str, Any]:
    """The best first; equal ones in the order they came. documents: to be sent back; None = they are not."""
    order = sorted(range(len(found)), key=lambda i: -found[i])[:top_n]
    results: list[dict[str, Any]] = []
    for i in order:
        document = {} if documents is None else {"document": {"text": documents[i]}}
        results.append({"index": i, **document, "relevance_score": found[i]})
    return {
        "id": head.answer_id,
        "model": head.model,
        "usage": {"prompt_tokens": head.num_tokens, "total_tokens": head.num_tokens},
        "results": results,
    }
