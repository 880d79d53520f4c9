"""The bodies of /v1/embeddings, /score, /rerank, /classify and /pooling: OpenAI's, Jina's and Cohere's fields, and
vLLM's additions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from octavo.cluster.ingress.protocol import Body, Message, Prompts

EncodingFormat = Literal["float", "base64"]


def _texts(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts; a text may be an object that has it under `text`, as rerankers' clients send it."""
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("must not be empty")
    texts = tuple(item.get("text") if isinstance(item, dict) else item for item in listed)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts, each a string or an object with a string text")
    return texts  # type: ignore[return-value]  # all are strings


Texts = Annotated[
    tuple[str, ...],
    PlainValidator(_texts, json_schema_input_type=str | list[str | dict[str, Any]]),
]


class PoolingBody(Body):
    """What all of them have in common."""

    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    session_id: str | None = None


class InputBody(PoolingBody):
    """Inputs, or a conversation that the model's chat template makes one input of; never both."""

    input: Prompts | None = None
    add_special_tokens: bool | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingBody(InputBody):
    """normalize: vectors of length 1; use_activation is vLLM's name for it. prompt_name: one of the model's own
    prompts, put before every text."""

    dimensions: int | None = None
    encoding_format: EncodingFormat | None = None
    normalize: bool | None = None
    prompt_name: str | None = None


class PoolBody(EmbeddingBody):
    task: str | None = None


class ClassifyBody(InputBody):
    pass


class ScoreBody(PoolingBody):
    """One text, or as many, on the one side; texts on the other. Each side has several names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None


class RerankBody(PoolingBody):
    """return_documents: absent = true, as in Jina's API and vLLM's."""

    query: str
    documents: Texts
    top_n: int | None = None
    return_documents: bool | None = None
