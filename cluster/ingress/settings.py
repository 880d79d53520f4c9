"""IngressSettings: what an operator may set about the HTTP side. Frozen; resolved by who builds the application."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from octavo.engine.errors import ConfigError
from octavo.engine.types import GenerationDefaults

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """One ingress.

    served_model_names: names requests may use; answers carry the first one. model_source: where the model comes from,
        shown as `root` in /v1/models. created: Unix seconds, shown there.
    api_keys: keys of which a client must send one; empty = open to all.
    max_body_bytes: longest request body (413). max_prompt_tokens: longest prompt; None = the model's context.
    max_choices: the most sequences one request may ask for, prompts × n.
    max_ongoing_requests: requests in progress here beyond which new ones get 429; None = the engines' limits alone.
    max_queue_wait_s: expected wait for a replica's turn beyond which new requests get 429; None = no limit.
    may_be_away: there may be no replica while nobody asks for the model; a request then waits up to start_timeout_s for
        one, and whoever only looks is told that all is well.
    request_timeout_s: a request older than this ends with an error; None = no limit.
    early_errors_s: how long a stream's status line waits for the first token, so that a refusal can still be a 4xx.
    max_stored_bytes: of responses kept for previous_response_id; 0 = none are.
    defaults: sampling values for requests that name none; None = what the model's authors recommend.
    chat_template: Jinja source in place of the model's own. trust_request_chat_template: requests may bring their own;
        off by default, as in vLLM, since a template is a program that can take any time.
    tool_call_parser: how the model writes tool calls; reasoning_parser: how it marks its thoughts. vLLM's names (see
        reading/formats.py), or "none"; None = what the chat template shows. enable_auto_tool_choice: calls that are not
        enforced are read.
    allowed_origins: browser origins that may call (CORS); empty = none.
    session_header: requests with the same value of this header should stay on one replica; empty = none does that.
    tokenize_in_thread_chars: texts longer than this are tokenized beside the event loop, not on it.
    """

    served_model_names: tuple[str, ...]
    model_source: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 * MIB
    max_prompt_tokens: int | None = None
    max_choices: int = 2048
    max_ongoing_requests: int | None = None
    max_queue_wait_s: float | None = None
    may_be_away: bool = False
    start_timeout_s: float = 600.0
    request_timeout_s: float | None = None
    early_errors_s: float = 5.0
    max_stored_bytes: int = 64 * MIB
    defaults: GenerationDefaults | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = True
    allowed_origins: tuple[str, ...] = ("*",)
    session_header: str = "x-session-id"
    tokenize_in_thread_chars: int = 8192

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("At least one non-empty served model name is needed.")
        if not all(self.api_keys):
            raise ConfigError("An API key must not be empty.")
        for name in ("max_body_bytes", "max_prompt_tokens", "max_choices", "max_ongoing_requests", "request_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}.")
