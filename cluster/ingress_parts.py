"""What an ingress is made of, from a DeploymentConfig: its settings, its tokenizer. No Ray, no torch.

Whoever has a front for a model needs these: the ingress of a cluster, and a batch without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cluster.config import DeploymentConfig, ModelConfig
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine.text.tokenizer import Tokenizer


def ingress_settings(config: DeploymentConfig, model: ModelConfig, name: str) -> IngressSettings:
    """`name`: what the model is called unless the configuration says otherwise. Raises ConfigError."""
    from octavo.engine.loader.presets import load_presets

    limits, preset = config.limits, load_presets().get(model.engine.model)
    return IngressSettings(
        served_model_names=model.served_model_name or (name,),
        model_source=model.engine.model,
        api_keys=config.api_key,
        max_body_bytes=limits.max_body_bytes,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_choices=limits.max_choices,
        max_ongoing_requests=limits.max_ongoing_requests,
        max_queue_wait_s=limits.max_queue_wait_s,
        may_be_away=model.may_be_away,
        start_timeout_s=model.autoscaling.start_timeout_s if model.autoscaling else 0.0,
        request_timeout_s=limits.request_timeout_s,
        max_stored_bytes=limits.max_stored_bytes,
        chat_template=_chat_template(model.chat_template),
        tool_call_parser=model.tool_call_parser or (preset.tool_call_parser if preset else None),
        reasoning_parser=model.reasoning_parser or (preset.reasoning_parser if preset else None),
        enable_auto_tool_choice=model.enable_auto_tool_choice,
        trust_request_chat_template=config.trust_request_chat_template,
        allowed_origins=config.allowed_origins,
        session_header=model.routing.session_header,
    )


def load_text(config: EngineConfig) -> tuple[str, Tokenizer]:
    """(the model's name for clients, its tokenizer). Downloads what is not here. Raises ConfigError."""
    if config.is_fake:
        from octavo.engine.text.byte_tokenizer import ByteTokenizer

        return "fake", ByteTokenizer()
    from octavo.engine.loader.source import resolve_model
    from octavo.engine.text.tokenizer import load_tokenizer

    model = resolve_model(config.model, revision=config.revision, download_dir=config.download_dir)
    source = model if config.tokenizer is None else resolve_model(config.tokenizer, download_dir=config.download_dir)
    return model.served_model_name, load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)


def _chat_template(given: str | None) -> str | None:
    """A Jinja source has braces or line ends; anything else is a file's name."""
    if given is None or any(mark in given for mark in "{}\n"):
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {given!r} cannot be read: {error}.") from None
