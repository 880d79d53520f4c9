"""`octavo batch`: a file of requests in OpenAI's batch format to a file of answers.

The output is the state: a line is there, whole, or its request has not been answered. So a run that ended for whatever
reason goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from octavo.cluster.batch import answerers
from octavo.cluster.batch.items import Item, count_lines, read_items
from octavo.cluster.batch.journal import Journal
from octavo.cluster.batch.progress import Progress, summary
from octavo.cluster.batch.run import Run, Tally
from octavo.cluster.config import DeploymentConfig, read_yaml
from octavo.cluster.flags import Flag, merge
from octavo.engine import env
from octavo.engine.errors import ConfigError, OctavoError

INTERRUPTED = 130
_PANELS = ("Model", "Memory", "Scheduling", "Device")
_OF_THE_SERVER = (
    *("served_model_name", "chat_template", "trust_request_chat_template"),
    *("tool_call_parser", "reasoning_parser"),
)


def is_for_batches(flag: Flag) -> bool:
    """Whether a flag of `octavo serve` says something of one engine without a server around it."""
    return (flag.panel in _PANELS and flag.name != "max_num_queued_reqs") or flag.name in _OF_THE_SERVER


def batch(
    source: Annotated[Path, typer.Argument(metavar="INPUT.jsonl", help="One request per line.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUTPUT.jsonl", help="Answers are appended; those there are not redone.")
    ],
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file, hub id or preset (smollm2-135m).")] = None,
    url: Annotated[str | None, typer.Option(help="Ask this server instead, for example http://host:8000/v1.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key for the server. Also OCTAVO_API_KEY.")] = None,
    errors: Annotated[
        Path | None, typer.Option(help="File for lines that failed; without it they go to OUTPUT too.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests on their way at a time (twice max-num-seqs; 64 with --url).")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a server that is busy or away is asked again for a request.")
    ] = 8,
    config: Annotated[Path | None, typer.Option(help="Deployment YAML of one model; flags go before it.")] = None,
    **settings: Any,
) -> None:
    """Answer a file of requests in OpenAI's batch format, with an engine in this process or a server.

    A line: [bold]{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}[/bold]

    Every path of the server can be asked. Answers are written as they come, in any order.

    Run it again after an interruption: only what is missing is done.

    Exit code 0: every line has an answer; 1: some have an error, or none yet; 2: it cannot start; 130: interrupted.
    """
    console = Console(stderr=True)
    tally = Tally()
    try:
        plan = _answerer(model, url, api_key, retries, concurrency, config, settings)
        code = _run(source, target, errors, plan, tally, console)
    except (OctavoError, OSError) as error:
        console.print(f"octavo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if tally.answered or tally.errors:
            console.print(summary(tally, target, errors), markup=False, highlight=False, soft_wrap=True)
        code = 2 if isinstance(error, ConfigError) else 1
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who answers, and how many requests it is asked at a time."""

    answerer: AbstractAsyncContextManager[answerers.Answerer]
    concurrency: int


def _answerer(
    model: str | None,
    url: str | None,
    api_key: str | None,
    retries: int,
    concurrency: int | None,
    config: Path | None,
    settings: Mapping[str, Any],
) -> _Plan:
    """Raises ConfigError."""
    if url is not None:
        given = [name for name, value in settings.items() if value not in (None, [])]
        if model is not None or config is not None or given:
            raise ConfigError(
                "--url asks a server that runs already: --model and the engine's flags say nothing to it."
            )
        wanted = concurrency or 64
        return _Plan(answerers.server(url, api_key or env.api_key(), retries, wanted), wanted)
    values = merge(read_yaml(config) if config is not None else {}, settings)
    if model is not None:
        values["model"] = model
    deployment = DeploymentConfig.from_mapping(values)
    if len(deployment.models) != 1:
        raise ConfigError("A batch is answered by one model, and the file lists several.")
    return _Plan(answerers.engine(deployment), concurrency or 2 * deployment.models[0].engine.max_num_seqs)


def _run(source: Path, target: Path, errors: Path | None, plan: _Plan, tally: Tally, console: Console) -> int:
    if not source.is_file():
        raise ConfigError(f"The input file {source} does not exist.")
    files = [source.resolve(), target.resolve(), *([errors.resolve()] if errors else [])]
    if len(set(files)) < len(files):
        raise ConfigError("Input, output and the file for errors must be different files.")
    with ExitStack() as stack:
        outputs = stack.enter_context(Journal(target))
        problems = stack.enter_context(Journal(errors)) if errors else outputs
        with Progress(console, tally, count_lines(source)) as progress:
            run = Run(outputs, problems, tally, progress.show)
            interrupted = asyncio.run(_all(run, source, plan, outputs.done | problems.done, progress))
    for problem in tally.first_problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(summary(tally, target, errors), markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted. What is answered is kept; the same command goes on from here.")
        return INTERRUPTED
    if tally.left:
        console.print(f"{tally.left} requests got no answer; the same command tries them again.")
    return 1 if tally.errors or tally.left else 0


async def _all(run: Run, source: Path, plan: _Plan, done: set[bytes], progress: Progress) -> bool:
    """Returns whether it was interrupted."""
    if not any(isinstance(item, Item) and item.key not in done for item in read_items(source)):
        await run.all(source, None, plan.concurrency)  # there is nobody to be asked: no reason to load a model
        return False
    here = asyncio.current_task()
    assert here is not None
    loop = asyncio.get_running_loop()
    progress.say("Starting …")
    try:
        async with plan.answerer as answerer:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, here.cancel)
            try:
                await run.all(source, answerer, plan.concurrency)
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)
    except (asyncio.CancelledError, KeyboardInterrupt):
        here.uncancel()
        return True
    return False
