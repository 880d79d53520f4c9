"""A real embedding model, all-MiniLM-L6-v2, against sentence-transformers; and whether it finds what it should."""

import numpy as np
import pytest

from octavo.engine.api import LLM
from octavo.engine.errors import RequestError

# (question, the sentence that answers it)
FACTS = [
    ("Which gas do plants take in?", "Photosynthesis turns carbon dioxide and water into sugar and oxygen."),
    ("When did the Berlin Wall come down?", "In November 1989 the border between East and West Berlin was opened."),
    ("How do I undo my last commit?", "git reset --soft HEAD~1 takes the newest commit back and keeps the changes."),
    ("What is the capital of Australia?", "Canberra, not Sydney, is the seat of the Australian government."),
    ("Why is the sky blue?", "Air molecules scatter short wavelengths of sunlight more than long ones."),
    ("How long should I boil an egg?", "Six minutes in boiling water leave the yolk soft, ten make it firm."),
    ("Who wrote Hamlet?", "The tragedy of the Prince of Denmark is a play by William Shakespeare."),
    ("What does TCP guarantee?", "Segments arrive in order and without gaps, or the connection fails."),
    ("How do vaccines work?", "They show the immune system a harmless piece of a germ, so that it remembers it."),
    ("What is a black hole?", "Its gravity is so strong that not even light escapes from within the horizon."),
    ("How many players are in a football team?", "Eleven people of each side are on the pitch, one of them in goal."),
    ("What is inflation?", "Prices in general rise, and a unit of money buys less than before."),
]
TEXTS = [
    *(text for fact in FACTS for text in fact),
    "",
    "a",
    "Straße, 中文, café ☕, 🙂",
    "UPPER and lower",
    "word " * 180,
    "A sentence that is longer than the model takes. " * 60,
    "tab\tand\nnew line",
]
LONGER = len(TEXTS) - 2  # its place


@pytest.fixture(scope="module")
def llm(minilm):
    made = LLM(str(minilm))
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(minilm):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm), device="cpu", local_files_only=True)


def embed(llm: LLM, texts: list[str]) -> np.ndarray:
    return np.array([o.outputs.embedding for o in llm.embed(texts, use_tqdm=False, truncate_prompt_tokens=-1)])


def test_embeddings_equal_sentence_transformers(llm, reference):
    wanted = reference.encode(TEXTS)
    found = embed(llm, TEXTS)
    assert found.shape == wanted.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_what_the_folder_says_is_what_holds(llm):
    info = llm.info
    assert (info.max_model_len, info.dtype, info.pooling.pooling_type) == (256, "float32", "mean")
    assert not info.pooling.generates
    with pytest.raises(RequestError, match=r"prompts\[1\] is .* at most 256"):
        llm.embed(["short", TEXTS[LONGER]], use_tqdm=False)


def test_questions_find_their_answers(llm):
    questions, answers = (embed(llm, list(texts)) for texts in zip(*FACTS, strict=True))
    found = (questions @ answers.T).argmax(axis=1)
    assert list(found) == list(range(len(FACTS)))


def test_scores_are_cosines(llm):
    query, texts = FACTS[3][0], [answer for _, answer in FACTS]
    vectors = embed(llm, [query, *texts])
    scores = [each.outputs.score for each in llm.score(query, texts, use_tqdm=False)]
    np.testing.assert_allclose(scores, vectors[1:] @ vectors[0], atol=1e-6)


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_a_cross_encoder_scores_like_sentence_transformers(minilm, tmp_path, activation):
    """Random weights behind the real tokenizer: pairs, their token types, cutting of the longer text, activation."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=1)
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape)
    if activation is not None:
        model.config.sentence_transformers = {"activation_fn": activation}
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    query, texts = FACTS[0][0] * 3, [*(answer for _, answer in FACTS), "long " * 600, "", "🙂"]
    wanted = CrossEncoder(str(tmp_path), device="cpu", max_length=512).predict([(query, text) for text in texts])
    llm = LLM(str(tmp_path), max_model_len=512)
    try:
        found = [each.outputs.score for each in llm.score(query, texts, use_tqdm=False, truncate_prompt_tokens=-1)]
    finally:
        llm.close()
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_int8_weights_stay_close(minilm, llm):
    texts = [text for fact in FACTS for text in fact]
    small = LLM(str(minilm), quantization="int8")
    try:
        assert small.info.quantization == "int8"
        assert (embed(small, texts) * embed(llm, texts)).sum(axis=1).min() > 0.98
    finally:
        small.close()
