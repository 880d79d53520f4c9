"""Texts and pairs that are too long are cut as transformers cuts them."""

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from octavo.engine.text.byte_tokenizer import BOS, ByteTokenizer
from octavo.engine.text.chat import ChatTemplates
from octavo.engine.text.fast_tokenizer import FastTokenizer

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """[CLS] first [SEP] second [SEP], types 0 and 1."""
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["[CLS]", "[SEP]", *WORDS])}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    return made


def test_cut_like_transformers(backend):
    ours = FastTokenizer(Tokenizer.from_str(backend.to_str()), ChatTemplates({}, {}))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend)
    draw = random.Random(0)
    for _ in range(300):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(1, 15))) for _ in range(2))
        longest, theirs.truncation_side = draw.randint(4, 24), draw.choice(["left", "right"])
        for text in ((first,), (first, second)):
            found = ours.mark_batch([text])[0].fit(longest, theirs.truncation_side)
            wanted = theirs(*text, truncation=True, max_length=longest, return_token_type_ids=True)
            assert list(found.ids) == wanted["input_ids"]
            assert list(found.types) == wanted["token_type_ids"]


def test_without_special_tokens_and_in_bytes(backend):
    ours = FastTokenizer(Tokenizer.from_str(backend.to_str()), ChatTemplates({}, {}))
    (marked,) = ours.mark_batch([("w1 w2", "w3")], add_special_tokens=False)
    assert (list(marked.ids), list(marked.sources)) == ([3, 4, 5], [0, 0, 1])
    (marked,) = ByteTokenizer().mark_batch([("ab", "cde")])
    assert (list(marked.ids), list(marked.sources)) == ([BOS, *b"abcde"], [None, 0, 0, 1, 1, 1])
    assert bytes(marked.fit(4).ids[1:]) == b"acd"
    assert marked.fit(99) is marked
