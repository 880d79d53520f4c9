"""Service: one model, from a parsed request body to the generation that answers it. What all transports share.

Knows neither HTTP nor gRPC: those read bodies, and write what a Generation brings.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from octavo.cluster.ingress.admission import Admission
from octavo.cluster.ingress.client import EngineClient, ReplicaLost
from octavo.cluster.ingress.form_checks import FormChecks
from octavo.cluster.ingress.generation import Generation
from octavo.cluster.ingress.logprobs import TokenNames
from octavo.cluster.ingress.pooling.bodies import PoolingBody
from octavo.cluster.ingress.prompts import Prompt, PromptMaker
from octavo.cluster.ingress.protocol import Body, ChatBody, CompletionBody, GenerationBody, TokenizeBody
from octavo.cluster.ingress.reading.reading import Reading
from octavo.cluster.ingress.sampling import num_sequences, only_scores, sampling_params
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.ingress.speech import Speech
from octavo.cluster.ingress.structured import structured_of
from octavo.cluster.ingress.tools import tools_of
from octavo.cluster.ingress.visit import Places, Visit
from octavo.cluster.observability.metrics import IngressMetrics
from octavo.cluster.observability.traces import NO_TRACER, Asked, Operation, Tracer
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.bad_words import bad_words_token_ids
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import EngineInfo, EngineStats, Request

logger = logging.getLogger(__name__)
T = TypeVar("T")

ENGINE_ANSWER_S = 10.0  # how long an engine may take to say what it is or how it does
MAX_PRIORITY = 2**31 - 1
MAX_NAME_CHARS = 256
_KNOWN_UNKNOWN_FIELDS = 1000  # names remembered, so that a client which invents names cannot fill memory


class Service:
    """One model behind one ingress. Lives on one event loop.

    registries: what else its metrics show. expected_wait_s: of a request that comes now, for its turn at a replica.
    tracer: is told of the requests that generate.
    """

    def __init__(
        self,
        settings: IngressSettings,
        client: EngineClient,
        tokenizer: Tokenizer,
        registries: Sequence[CollectorRegistry] = (),
        expected_wait_s: Callable[[], float] = lambda: 0.0,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.settings = settings
        self.client = client
        self.tokenizer = tokenizer
        self.names = TokenNames(tokenizer)
        self.speech = Speech(settings, tokenizer)
        self.prompts = PromptMaker(settings, tokenizer, self.speech.tool_prompt)
        self.form_checks = FormChecks(tokenizer)
        self.places = Places(settings.max_ongoing_requests)
        self._admission = Admission(settings.max_queue_wait_s, expected_wait_s)
        self._has_been_here = False
        self._registries = registries
        self._tracer = tracer
        self._metrics: IngressMetrics | None = None
        self._reported: set[str] = set()

    async def info(self) -> EngineInfo:
        """Of one of the engines; all are equal but while a new version is rolled out. Waits for one that has to start
        first, if the model may be away.
        """
        within_s = self.settings.start_timeout_s if self.settings.may_be_away else ENGINE_ANSWER_S
        info = await self._soon(self.client.info(), within_s)
        self._has_been_here = True
        return info

    @property
    def is_unknown(self) -> bool:
        """Whether nobody has asked for the model yet: to ask what it is would bring it here."""
        return self.settings.may_be_away and not self._has_been_here

    async def metrics(self) -> IngressMetrics:
        info = await self.info()
        if self._metrics is None:
            self._metrics = IngressMetrics(self.settings.served_model_names[0], info.max_model_len, self._registries)
        return self._metrics

    @property
    def metrics_so_far(self) -> IngressMetrics | None:
        """None until somebody has asked what the model is."""
        return self._metrics

    async def stats(self) -> Mapping[str, EngineStats]:
        """A snapshot of each replica, by its id.

        Raises ReplicaLost if none answers in time, unless the model may be away.
        """
        try:
            engines = await self._soon(self.client.stats())
        except ReplicaLost:
            engines = {}
            if not self.settings.may_be_away:
                raise
        if not engines and not self.settings.may_be_away:
            raise ReplicaLost("No engine is running.")
        return engines

    async def check_ready(self) -> None:
        """Raises ReplicaLost unless a replica that is there now has generated a token since it started."""
        engines = await self.stats()
        if engines and not any(engine.generation_tokens or engine.first_tokens for engine in engines.values()):
            raise ReplicaLost(f"No replica of {self.name} has generated a token yet.")

    def check(self, body: Body) -> None:
        """What holds for every body: fields that nobody knows are counted, and each reported once."""
        unknown = body.unknown_fields()
        if unknown and self._metrics is not None:
            self._metrics.ignored_fields(len(unknown))
        for name in unknown:
            if name not in self._reported and len(self._reported) < _KNOWN_UNKNOWN_FIELDS:
                self._reported.add(name)
                logger.warning("requests have an unknown field %r: it has no effect", name[:MAX_NAME_CHARS])

    async def complete(self, body: CompletionBody, visit: Visit, answer_id: str) -> Generation:
        """What continues the prompts, not begun yet. `answer_id`: what the client will know the answer by."""
        self.trace(visit, "text_completion", body.model)
        info = await self._admit(body)
        if body.suffix:
            raise RequestError("suffix is not supported: the models served here cannot fill in the middle.", "suffix")
        if body.best_of is not None and body.best_of != (body.n or 1) and not body.use_beam_search:
            raise RequestError("best_of other than n is not supported.", "best_of")
        self._check_choices(len(body.prompt) * num_sequences(body))
        prompts = await self.prompts.of_completion(body, info.max_model_len, info.vocab_size)
        return await self._generation(body, prompts, answer_id, visit, info, structured=structured_of(body))

    async def chat(self, body: ChatBody, visit: Visit, answer_id: str) -> Generation:
        """What answers the conversation, not begun yet."""
        self.trace(visit, "chat", body.model)
        info = await self._admit(body)
        self._check_choices(num_sequences(body))
        prompt = await self.prompts.of_chat(body, body, info.max_model_len)
        tools = tools_of(body)
        form = self.speech.form(body, tools, prompt, structured_of(body))
        reading = self.speech.reading(body, tools, prompt)
        return await self._generation(body, [prompt], answer_id, visit, info, structured=form, reading=reading)

    async def num_prompt_tokens(self, body: ChatBody) -> int:
        """How long the prompt is that the model would get of the conversation."""
        ids = await self.prompts.encode(await self.prompts.render(body), bool(body.add_special_tokens))
        return len(ids)

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        info = await self.info()
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Either prompt or messages must be given.", "prompt")
        if body.prompt is not None:
            ids = await self.prompts.encode(body.prompt, body.add_special_tokens is not False)
        else:
            ids = await self.prompts.encode(await self.prompts.render(body), bool(body.add_special_tokens))
        strings = [self.names.text(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": list(ids), "token_strs": strings}

    async def model(self, name: str) -> dict[str, Any]:
        """The entry of /v1/models for `name`."""
        info = None if self.is_unknown else await self.info()
        return {
            "id": name,
            "object": "model",
            "created": self.settings.created,
            "owned_by": "octavo",
            "root": self.settings.model_source or (info.model if info else name),
            "parent": None,
            "max_model_len": info.max_model_len if info else None,
        }

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.settings.served_model_names[0]

    def trace(self, visit: Visit, operation: Operation, model: str | None) -> None:
        """The visit is a request for the model: its picture begins here."""
        asked = Asked(operation, model or self.name, visit.request_id, visit.arrival_time, visit.headers)
        visit.trace = self._tracer.begin(asked)

    async def admit(self, body: GenerationBody | PoolingBody) -> EngineInfo:
        """Let a request in that will keep an engine busy. Raises CapacityError, RequestError."""
        metrics = await self.metrics()
        self.check(body)
        try:
            self.places.check()
        except CapacityError:
            metrics.rejected("max_ongoing_requests")
            raise
        try:
            self._admission.check()
        except CapacityError:
            metrics.rejected("max_queue_wait_s")
            raise
        for name in ("cache_salt", "request_id", "session_id"):
            value = getattr(body, name)
            if value is not None and not 0 < len(value) <= MAX_NAME_CHARS:
                raise RequestError(f"{name} must be a string of 1 to {MAX_NAME_CHARS} characters.", name)
        if body.priority is not None and abs(body.priority) > MAX_PRIORITY:
            raise RequestError(f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}.", "priority")
        return await self.info()

    async def _admit(self, body: GenerationBody) -> EngineInfo:
        info = await self.admit(body)
        if not info.pooling.generates:
            raise RequestError(
                f"The model {self.name!r} generates no text: it is served for embeddings, scores or classes.", "model"
            )
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream to be true.", "stream_options")
        return info

    @staticmethod
    def _stream_interval(body: GenerationBody) -> int:
        if body.stream_interval is not None and body.stream_interval < 1:
            raise RequestError(
                f"stream_interval must be an integer of at least 1, got {body.stream_interval}.", "stream_interval"
            )
        return (body.stream_interval or 1) if body.stream else 1

    def _check_choices(self, choices: int) -> None:
        if choices > self.settings.max_choices:
            raise RequestError(
                f"{choices} sequences (prompts × n) are asked for; at most {self.settings.max_choices} are allowed.",
                "n",
            )

    async def _generation(
        self,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        answer_id: str,
        visit: Visit,
        info: EngineInfo,
        *,
        structured: StructuredOutputs | None = None,
        reading: Reading | None = None,
    ) -> Generation:
        """structured: the form that the outputs are to have. reading: how they are read; None = as mere text."""
        if structured is not None:
            await self.form_checks.check(body, structured)
        defaults = self.settings.defaults or info.generation_defaults
        requests = []
        for number, prompt in enumerate(prompts):
            params = sampling_params(body, defaults, len(prompt.token_ids), info.max_model_len, structured)
            params.check_vocab(info.vocab_size)
            requests.append(
                Request(
                    # Clients may repeat their ids; the engine's must be unique.
                    request_id=f"{answer_id}-{number}-{secrets.token_hex(4)}",
                    prompt_token_ids=prompt.token_ids,
                    params=params,
                    priority=body.priority or 0,
                    cache_salt=body.cache_salt,
                    arrival_time=visit.arrival_time,
                    session_id=visit.session_id or body.session_id or visit.headers.get(self.settings.session_header),
                    bad_words_token_ids=bad_words_token_ids(self.tokenizer, params.bad_words)
                    if params.bad_words
                    else (),
                )
            )
        metrics = await self.metrics()
        visit.trace.understood(requests[0].params, answer_id, bool(body.stream))
        return Generation(
            self.client,
            self.tokenizer,
            metrics,
            prompts,
            requests,
            visit.arrival_time,
            only_scores=only_scores(body),
            reading=reading,
            stream_interval=self._stream_interval(body),
            trace=visit.trace,
        )

    async def _soon(self, answer: Awaitable[T], within_s: float = ENGINE_ANSWER_S) -> T:
        try:
            async with asyncio.timeout(within_s):
                return await answer
        except TimeoutError:
            raise ReplicaLost(f"No engine has answered for {within_s:g} s.") from None

    async def text(self, prompt: Prompt) -> str:
        """What the prompt says."""
        if prompt.text is not None:
            return prompt.text
        return await asyncio.to_thread(self.tokenizer.decode, prompt.token_ids, skip_special_tokens=False)
