"""PoolingInfo: what a served model can do with prompts besides going on with them. Plain values, sent to every ingress.

Two texts as one prompt: a cross-encoder reads a pair. Where its checkpoint marks the second text by a token type, the
tokens of it are named id + vocab_size; a prompt is a sequence of ints to everybody but the ingress and the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.errors import RequestError
from octavo.engine.pooling.params import PoolingParams, PoolingType


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """generates: whether it continues prompts. is_causal: a token sees those before it alone; else all of its prompt,
    which is then computed in one step and has no KV.

    embedding_size: of an embedding; 0 = the model gives none. pooling_type, normalize: its own way to make one vector.
    dimensions: shorter sizes it was trained for; is_matryoshka: whether it was trained for any.
    labels: of its classes; empty = it has none. pair_types: token types that tell the texts of a pair apart.
    prompts: (name, text) to put before a text, by what it is for; default_prompt: the name of one that always is.
    """

    generates: bool = True
    is_causal: bool = True
    embedding_size: int = 0
    pooling_type: PoolingType = "last"
    normalize: bool = True
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    pair_types: int = 1
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None

    @property
    def embeds(self) -> bool:
        return self.embedding_size > 0

    @property
    def classifies(self) -> bool:
        return bool(self.labels)

    @property
    def scores_pairs(self) -> bool:
        """Whether it reads two texts together and says with one number how well they fit (a cross-encoder)."""
        return len(self.labels) == 1

    def usual(self) -> PoolingParams:
        """What it is most likely asked for, of those things that pool; resolved."""
        return self.resolve(PoolingParams(task="classify" if self.classifies else "embed"))

    def resolve(self, params: PoolingParams) -> PoolingParams:
        """`params` with the model's own way in place of what they leave open. Raises RequestError, naming the field,
        for what the model cannot do."""
        pooling_type = params.pooling_type or self.pooling_type
        if params.task == "classify":
            self._check_classify(params)
            return params.replace(pooling_type=pooling_type, use_activation=params.use_activation is not False)
        self._check_embed(params)
        told = params.use_activation if params.normalize is None else params.normalize
        normalize = self.normalize if told is None else told
        return params.replace(pooling_type=pooling_type, normalize=normalize, use_activation=None)

    def _check_classify(self, params: PoolingParams) -> None:
        if not self.classifies:
            raise RequestError("This model has no classes: it cannot classify.", "model")
        for name in ("dimensions", "normalize"):
            if getattr(params, name) is not None:
                raise RequestError(f"{name} is for embeddings, not for classes.", name)
        if params.pooling_type not in (None, self.pooling_type):
            raise RequestError(f"The classes of this model are read off its {self.pooling_type} token.", "pooling_type")

    def _check_embed(self, params: PoolingParams) -> None:
        if not self.embeds:
            raise RequestError("This model gives no embeddings: it is served for something else.", "model")
        size = params.dimensions
        if size is None or size == self.embedding_size:
            return
        if not self.is_matryoshka:
            raise RequestError(
                f"This model's embeddings have {self.embedding_size} dimensions and were not trained to be shortened "
                f"(Matryoshka): dimensions must be left out.",
                "dimensions",
            )
        if size > self.embedding_size:
            raise RequestError(f"dimensions must be at most {self.embedding_size}, got {size}.", "dimensions")
        if self.dimensions and size not in self.dimensions:
            known = ", ".join(map(str, self.dimensions))
            raise RequestError(f"dimensions must be one of {known}, got {size}.", "dimensions")


GENERATES_ONLY = PoolingInfo()
