"""Forms over every kind of tokenizer: any walk among the allowed tokens decodes to a text of that form."""

import json
import random

import jsonschema
import numpy as np
import pytest

from octavo.engine.errors import RequestError
from octavo.engine.grammar.grammars import CompiledGrammars
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "how many": {"type": "integer", "minimum": 1, "maximum": 40},
        "kind": {"enum": ["small one", "größe!", "日本"]},
    },
    "required": ["name", "how many", "kind"],
    "additionalProperties": False,
}
KINDS = ("byte-level", "sentencepiece", "metaspace", "bytes")


def bits(mask: bytes) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_walks(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    ends = tokenizer.eos_token_ids or (1,)
    more = tokenizer.vocab_size + 100  # of the model
    grammars = CompiledGrammars(lambda: tokenizer, more, ends)
    for form in (StructuredOutputs(json=SCHEMA), StructuredOutputs(json=SCHEMA, disable_any_whitespace=True)):
        grammar = grammars.compile(form).result(timeout=20)
        num_forced = 0
        for seed in range(10):
            matcher, draw, out = grammar.matcher(), random.Random(seed), []
            while not matcher.ended:
                forced = matcher.forced()
                allowed = bits(matcher.mask())
                assert set(forced[:1]) <= set(allowed)
                assert max(allowed) < tokenizer.vocab_size
                assert not set(allowed) & set(ends)
                num_forced += len(forced)
                for token in forced or [draw.choice(allowed)]:
                    matcher.take(token)
                    out.append(token)
                assert matcher.error is None
                assert len(out) < 500
            text = b"".join(map(tokenizer.token_bytes, out)).decode()
            jsonschema.validate(json.loads(text), SCHEMA)
        assert num_forced > 50 or not form.disable_any_whitespace
    grammars.close()


def test_texts_are_spelled_as_the_tokenizer_would(kinds: dict[str, Tokenizer]) -> None:
    """What is forced is what the model has been trained on."""
    tokenizer = kinds["byte-level"]
    grammars = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    matcher = grammars.compile(StructuredOutputs(regex="The quick brown fox jumps!")).result(timeout=20).matcher()
    assert list(matcher.forced()) == tokenizer.encode("The quick brown fox jumps!", add_special_tokens=False)
    grammars.close()


def test_special_tokens_are_no_text(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    grammars = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    free = grammars.compile(StructuredOutputs(regex="(?s:.*)")).result(timeout=20).matcher()
    special = [token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)]
    assert set(special) & set(bits(free.mask())) == set(tokenizer.eos_token_ids)
    assert len(special) > len(tokenizer.eos_token_ids)
    (name,) = tokenizer.convert_ids_to_tokens(special[:1])
    tag = {
        "type": "structural_tag",
        "format": {"type": "sequence", "elements": [{"type": "const_string", "value": f"a{name}b"}]},
    }
    named = grammars.compile(StructuredOutputs(structural_tag=tag)).result(timeout=20).matcher()
    assert special[0] in named.forced()
    grammars.close()


@pytest.mark.parametrize("kind", ["slow", "wordpiece"])
def test_where_text_is_not_the_tokens_bytes_nothing_is_promised(kinds: dict[str, Tokenizer], kind: str) -> None:
    grammars = CompiledGrammars(lambda: kinds[kind], kinds[kind].vocab_size, (1,))
    with pytest.raises(RequestError, match="no structured output"):
        grammars.compile(StructuredOutputs(json_object=True)).result(timeout=20)
    grammars.close()
