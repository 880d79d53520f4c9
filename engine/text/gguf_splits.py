"""How each byte-level vocabulary cuts text into words before merging: the meaning of `tokenizer.ggml.pre`.

A GGUF file names the rule; the rule itself was published in the tokenizer.json of the model that the name comes from.
Each rule is a list of steps; every step cuts what the step before left over, and each match stands alone. The byte
alphabet comes after the last step. A vocabulary that is cut otherwise than it was trained still decodes, but encodes to
token ids that the model has rarely seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


def _word_rule(digits: str, letters: str = r"\p{L}", contractions: str = _CONTRACTIONS + "|") -> str:
    """The cl100k shape: a contraction, a word with one leading sign, digits, a run of signs, or white space."""
    marks = r"\p{M}" if r"\p{M}" in letters else ""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{letters if not marks else f'[{letters}]'}+"
    return rf"{contractions}{word}|{digits}| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_rule(digits: str, contractions: str = "") -> str:
    """The o200k shape: words are cut where lower case turns into upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = _word_rule(r"\p{N}{1,3}")
_DEEPSEEK_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{_DEEPSEEK_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


@dataclass(frozen=True, slots=True)
class Split:
    """steps: regular expressions, applied in order. whole_words: a word that is itself a token is not merged up to.

    add_bos: whether a file that does not say so wants the beginning-of-sequence token.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """The rule as tokenizer.json writes it."""
        cuts = [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in self.steps]
        alphabet = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*cuts, alphabet]}


_RULES: tuple[tuple[Split, tuple[str, ...]], ...] = (
    (
        Split((_GPT2,)),
        ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "roberta-bpe", "gigachat", "exaone4"),
    ),
    (
        Split((_DIGIT, _GPT2)),
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum"),
    ),
    (
        Split((_LLAMA3,), whole_words=True, add_bos=True),
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    (Split((_LLAMA3,)), ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
    (
        Split((_word_rule(_DIGIT),)),
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    ),
    (Split((_word_rule(_DIGIT, r"\p{L}\p{M}"),)), ("qwen35",)),
    (Split((_cased_rule(_DIGIT),), whole_words=True, add_bos=True), ("tekken",)),
    (
        Split((_cased_rule(r"\p{N}{1,3}", _CONTRACTIONS + "?"),)),
        ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    ),
    (Split(_DEEPSEEK3), ("deepseek-v3", "hunyuan-dense", "joyai-llm")),
    (
        Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)),
        ("deepseek-coder",),
    ),
    (
        Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        ("falcon",),
    ),
    # Files from before the rule had a name. Cutting as llama.cpp does is the best that can be done.
    (Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), ("default", "")),
)

SPLITS: dict[str, Split] = {name: split for split, names in _RULES for name in names}
