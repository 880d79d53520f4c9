"""The flags of `octavo serve`: one per setting of a DeploymentConfig, with type and default read from its dataclasses.

A flag that is not given leaves the setting to `--config FILE`, and else to its default; so no flag has a default of its
own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from octavo.cluster.config import (
    MODEL_SETTINGS,
    SERVING_DEFAULTS,
    Autoscaling,
    DeploymentConfig,
    Limits,
    ModelConfig,
    Routing,
)
from octavo.cluster.values import optional_of
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

# The dataclasses that hold settings, by their place in the YAML of a deployment of one model.
_CLASSES: Mapping[str, tuple[type[Any], ...]] = {
    "": (DeploymentConfig, ModelConfig),
    "engine": (EngineConfig,),
    "limits": (Limits,),
    "routing": (Routing,),
    "autoscaling": (Autoscaling,),
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting: `section` is its place in the YAML ("" = at the top)."""

    section: str
    name: str
    panel: str
    help: str

    @property
    def key(self) -> str:
        """The command's parameter."""
        return f"{self.section}_{self.name}" if self.section in ("routing", "autoscaling") else self.name


def _panel(section: str, panel: str, **flags: str) -> list[Flag]:
    return [Flag(section, name, panel, text) for name, text in flags.items()]


FLAGS: tuple[Flag, ...] = (
    *_panel(
        "engine",
        "Model",
        tokenizer="Tokenizer source, if not the model's: folder, .gguf file, hub id or preset.",
        revision="Branch, tag or commit on the hub.",
        download_dir="Where downloads go, instead of the hub's cache.",
        dtype="Type to compute in: auto, float32, bfloat16 or float16.",
        quantization="Number format of the weights: as the checkpoint's, none, or made while loading: int8, int4, fp8.",
        quantize_lm_head="Quantize the head too.",
        runner="What to serve the model for: auto, generate, or pooling (embeddings, scores, classes alone).",
        convert="What else to serve a model for that generates: auto or embed (embeddings), none; or classify.",
        pooler_config='How vectors are made, as JSON: {"pooling_type": "MEAN", "normalize": true}.',
        max_model_len="Longest prompt + output, in tokens.",
        load_format="auto, or dummy for random weights (also of the shapes in configs/shapes/).",
        trust_remote_code="Run code that comes with the model.",
        seed="Seed of dummy weights.",
    ),
    *_panel(
        "engine",
        "Parallelism",
        tensor_parallel_size="Ranks that share the work of each layer.",
        pipeline_parallel_size="Stages that the layers are dealt to.",
    ),
    *_panel(
        "engine",
        "Memory",
        kv_cache_memory_bytes="Size of the KV cache, for example 4GiB.",
        kv_cache_dtype="Type of the KV cache: auto, float32, bfloat16, int8 or fp8.",
        gpu_memory_utilization="Part of the GPU's memory to use, 0 to 1.",
        block_size="Tokens per KV block.",
        num_gpu_blocks_override="Exact number of KV blocks.",
        enable_prefix_caching="Keep and find the KV of common prefixes.",
    ),
    *_panel(
        "engine",
        "Scheduling",
        max_num_seqs="The most sequences of a step.",
        max_num_batched_tokens="The most tokens of a step.",
        max_num_queued_reqs="Waiting requests beyond which new ones get 429.",
        scheduling_policy="fcfs or priority.",
        enable_chunked_prefill="Compute long prompts in several steps.",
        long_prefill_token_threshold="The most prompt tokens of one sequence in a step; 0 = the step's limit.",
        async_scheduling="Plan the next step while one runs.",
        enforce_eager="Run every step op by op, without recorded graphs.",
    ),
    *_panel(
        "engine",
        "Device",
        device="auto, cpu or cuda.",
        disable_custom_all_reduce="Add up with NCCL alone, also where GPUs could share memory.",
        batch_invariant="Start only where a request's logits are the same bits in any batch, as on CPU.",
        kernels="Force one body of the kernels: ref or cpu.",
    ),
    *_panel(
        "",
        "Server",
        served_model_name="Name that requests use; may be given several times.",
        api_key="Key that clients must send; may be given several times. Also OCTAVO_API_KEY.",
        allowed_origins="Browser origins that may call; may be given several times.",
        chat_template="Jinja chat template, or a file with it, in place of the model's.",
        tool_call_parser="How the model writes tool calls: hermes, llama3_json, mistral …; none = not at all.",
        reasoning_parser="How the model marks its thoughts: qwen3, deepseek_r1 …; none = not at all.",
        enable_auto_tool_choice="Read the calls that the model makes of its own accord.",
        trust_request_chat_template="Let requests bring their own chat template.",
        num_ingresses="Processes that speak HTTP and gRPC.",
        ingress_drain_timeout_s="Seconds that an ingress which is replaced may go on with its streams.",
        log_level="debug, info, warning or error.",
        otlp_traces_endpoint="OTLP/HTTP receiver to send traces of requests to, for example http://127.0.0.1:4318.",
    ),
    *_panel(
        "limits",
        "Limits",
        max_body_bytes="Longest request body, for example 32MiB.",
        max_prompt_tokens="Longest prompt, in tokens.",
        max_choices="The most answers one request may ask for, prompts times n.",
        max_ongoing_requests="Requests in progress beyond which new ones get 429.",
        max_queue_wait_s="Expected seconds in the queue beyond which new requests get 429.",
        request_timeout_s="Seconds after which a request is ended.",
        max_stored_bytes="Responses kept for previous_response_id at one ingress, for example 64MiB; 0 = none.",
    ),
    *_panel(
        "",
        "Replicas",
        num_replicas="Engines side by side.",
        placement="Where a replica's ranks go: auto (one node, unless there are stages) or Ray's strategies.",
        num_cpus="CPUs that Ray reserves for a rank of a replica.",
        pattern="Topology of the deployment: replicated.",
        drain_timeout_s="Seconds that requests in progress may take when the server stops.",
        max_surge_percent="Replicas beyond num_replicas while a new version is rolled out; 0 = old ones stop first.",
        step_timeout_s="Seconds without a finished step after which a busy replica is replaced.",
        hang_timeout_s="Seconds without a sign of life after which a process of a replica is killed.",
    ),
    *_panel(
        "routing",
        "Routing",
        policy="prefix, least_loaded, round_robin or package.module:Class.",
        session_header="Requests with the same value of this header go to the same replica.",
        max_index_blocks="KV blocks whose whereabouts an ingress remembers.",
        failover_timeout_s="Seconds a request whose replica was lost may wait for another.",
    ),
    *_panel(
        "autoscaling",
        "Autoscaling",
        min_replicas="The fewest replicas; 0 = none while nobody asks.",
        max_replicas="The most replicas. Any of these flags turns autoscaling on.",
        initial_replicas="Replicas at the start.",
        target_queued_tokens="Waiting prompt tokens at which a replica counts as full.",
        target_kv_usage="Part of the KV cache in use at which a replica counts as full.",
        target_ttft_s="Seconds to the first token at which a replica counts as full.",
        upscale_delay_s="Seconds that more replicas must be wanted.",
        downscale_delay_s="Seconds that fewer replicas must be wanted.",
        downscale_to_zero_delay_s="Seconds without a request before the last replica goes.",
        look_back_period_s="Seconds over which the load is averaged.",
        start_timeout_s="Seconds that a request may wait for the first replica.",
    ),
)

# What reads better on a command line than the setting's name.
_SPELLINGS = {
    "policy": "--routing-policy",
    "drain_timeout_s": "--drain-timeout",
    "request_timeout_s": "--request-timeout",
    "step_timeout_s": "--step-timeout",
    "ingress_drain_timeout_s": "--ingress-drain-timeout",
    "hang_timeout_s": "--hang-timeout",
    "failover_timeout_s": "--failover-timeout",
    "target_ttft_s": "--target-ttft",
    "upscale_delay_s": "--upscale-delay",
    "downscale_delay_s": "--downscale-delay",
    "downscale_to_zero_delay_s": "--downscale-to-zero-delay",
    "look_back_period_s": "--look-back-period",
    "start_timeout_s": "--start-timeout",
    "max_queue_wait_s": "--max-queue-wait",
}


def with_flags(command: Callable[..., None], wanted: Callable[[Flag], bool] = lambda flag: True) -> Callable[..., None]:
    """`command(…, **settings)` with every flag as a parameter that is wanted, for typer to read."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [
        inspect.Parameter(flag.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(flag))
        for flag in FLAGS
        if wanted(flag)
    ]
    parameters = [*own, *flags]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def merge(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's mapping with the flags that were given laid over it; for DeploymentConfig.from_mapping.

    Raises ConfigError for a flag of one model where the file lists several.
    """
    values = dict(file)
    for flag in FLAGS:
        value = given.get(flag.key)
        if value is None or value == []:
            continue
        place = flag.section or flag.name
        if "models" in file and place in MODEL_SETTINGS:
            raise ConfigError(f"{_spelling(flag)} is a setting of one model, and the file lists models: set it there.")
        if not flag.section:
            values[flag.name] = value
            continue
        section = values.get(flag.section) or {}
        values[flag.section] = {**section, flag.name: value} if isinstance(section, Mapping) else section
    return values


def _field(flag: Flag) -> tuple[Any, dataclasses.Field[Any]]:
    """(type, dataclass field) of the setting."""
    for cls in _CLASSES[flag.section]:
        for item in dataclasses.fields(cls):
            if item.name == flag.name:
                return optional_of(get_type_hints(cls)[flag.name])[0], item
    raise AssertionError(f"no setting {flag.section}.{flag.name}")


def _spelling(flag: Flag) -> str:
    return _SPELLINGS.get(flag.name, "--" + flag.name.replace("_", "-"))


def _annotation(flag: Flag) -> Any:
    kind, _ = _field(flag)
    spelling = _spelling(flag)
    if kind is bool:
        spelling = f"{spelling}/--no-{spelling.removeprefix('--')}"
    metavar = None
    if flag.name.endswith("_bytes"):
        kind, metavar = str, "SIZE"
    elif get_origin(kind) is tuple:
        kind, metavar = list[str], "TEXT"
    elif get_origin(kind) is Literal:
        kind, metavar = str, "|".join(get_args(kind))
    text = flag.help + _default(flag)
    return Annotated[kind | None, typer.Option(spelling, help=text, rich_help_panel=flag.panel, metavar=metavar)]


def _default(flag: Flag) -> str:
    _, item = _field(flag)
    value = SERVING_DEFAULTS.get(flag.name, item.default) if flag.section == "engine" else item.default
    match value:
        case None | ():
            return ""
        case bool():
            return " (on)" if value else " (off)"
        case tuple():
            return f" ({', '.join(value)})"
        case int() if flag.name.endswith("_bytes"):
            return f" ({value >> 20}MiB)"
        case float():
            return f" ({value:g})"
        case _:
            return f" ({value})"
