"""`octavo generate`: a JSONL file of prompts to a JSONL file of answers, with one engine in this process.

The output file is the state: a line is there, whole, or its prompt has not been answered. So a run that ended for
whatever reason goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError, OctavoError, RankLost, RequestError
from octavo.engine.params import SamplingParams

DEFAULT_MAX_TOKENS = 512
SHOWN_FAILURES = 20
ANSWER_STARTS = b'{"id": '
SAMPLING_FIELDS = frozenset(f.name for f in dataclasses.fields(SamplingParams)) - {"detokenize"}
OTHER_FIELDS = frozenset(
    {"id", "prompt", "messages", "chat_template_kwargs", "max_completion_tokens", "priority", "cache_salt"}
)


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the input. `key`: its id, or its line number (from 1)."""

    line: int
    key: str | int
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Tally:
    """What came of a run."""

    done: int = 0
    skipped: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


class LineError(Exception):
    """A line of the input cannot be used. The message does not name the line."""


def generate(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT.jsonl", help="A JSON object per line, with prompt or messages.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUTPUT.jsonl", help="Answers are appended; those there are not redone.")
    ],
    model: Annotated[str, typer.Option(help="Folder, .gguf file, hub id or preset.")] = "smollm2-135m",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help=f"Longest answer, in tokens [default: {DEFAULT_MAX_TOKENS}].")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Answers per line.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an answer; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Always generate max_tokens.")] = False,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="The most sequences computed at once.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="Size of the KV cache on CPU.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Part of the GPU's memory to use.")] = 0.92,
) -> None:
    """Answer the prompts of a JSONL file, offline. Sampling fields in a line come before the flags.

    Answers are written as they finish, in any order, each with its line's id (or its line number). Run it again after
    an interruption, or after lines have failed: only what is missing is done.
    """
    console = Console(stderr=True)
    flags: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "n": n,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
    }
    try:
        config = EngineConfig(
            model=model,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(2048, max_num_seqs),
            dtype=dtype,  # type: ignore[arg-type]  # EngineConfig checks it
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        given = {name: value for name, value in flags.items() if value is not None}
        SamplingParams(**given)  # a wrong flag must not wait for the model to load
        tally = run(source, target, config, given, console)
    except KeyboardInterrupt:
        console.print("Interrupted. The answers so far are kept; the same command goes on from here.")
        raise typer.Exit(130) from None
    except (OctavoError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    _report(tally, target, console)
    if tally.failures:
        raise typer.Exit(1)


def run(source: Path, target: Path, config: EngineConfig, flags: Mapping[str, Any], console: Console) -> Tally:
    """Do all that is missing in `target`. Raises ConfigError if it cannot start, RankLost if the engine dies."""
    if not source.is_file():
        raise ConfigError(f"The input file {source} does not exist.")
    if target.exists() and target.samefile(source):
        raise ConfigError("The input and the output must not be the same file.")
    done = repair(target)
    with source.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    return asyncio.run(_run(source, target, config, flags, done, total, console))


def repair(target: Path) -> set[str]:
    """The keys (as JSON) of the answers in `target`; a last line that a crash has cut short is taken away.

    Raises ConfigError if the file holds something else than answers, which is not ours to change.
    """
    if not target.exists():
        return set()
    done: set[str] = set()
    with target.open("rb+") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            key = _key_of_answer(line)
            if key is not None:
                done.add(key)
                whole += len(line)
            elif not line.endswith(b"\n") and ANSWER_STARTS.startswith(line[: len(ANSWER_STARTS)]):
                file.truncate(whole)
                break
            else:
                raise ConfigError(
                    f"{target}, line {number}, is not an answer of this command; use another output file."
                )
    return done


def _key_of_answer(line: bytes) -> str | None:
    if not line.endswith(b"\n"):
        return None
    try:
        answer = json.loads(line)
        return json.dumps(answer["id"]) if "outputs" in answer else None
    except (ValueError, KeyError, TypeError):
        return None


def read_tasks(source: Path, tally: Tally, done: set[str]) -> Iterator[Task]:
    """The lines that are still to do. What is wrong with the others goes to `tally`."""
    seen: set[str] = set()
    unknown: set[str] = set()
    with source.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                task = parse_line(number, raw)
                key = json.dumps(task.key)
                if key in seen:
                    raise LineError(f"the id {key} was used by an earlier line")
            except LineError as error:
                tally.failures.append(f"line {number}: {error}")
                continue
            seen.add(key)
            unknown |= task.fields.keys() - SAMPLING_FIELDS - OTHER_FIELDS
            if key in done:
                tally.skipped += 1
            else:
                yield task
    if unknown:
        print(f"note: fields without effect: {', '.join(sorted(unknown))}", file=sys.stderr)


def parse_line(number: int, raw: bytes) -> Task:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise LineError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError("not a JSON object")
    if ("prompt" in fields) == ("messages" in fields):
        raise LineError("either prompt or messages must be there")
    key = fields.get("id", number)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise LineError("id must be a string or an integer")
    return Task(number, key, fields)


async def _run(
    source: Path,
    target: Path,
    config: EngineConfig,
    flags: Mapping[str, Any],
    done: set[str],
    total: int,
    console: Console,
) -> Tally:
    tally = Tally()
    tasks = read_tasks(source, tally, done)
    first = next(tasks, None)
    if first is None:
        return tally  # nothing to do: no reason to load a model
    from octavo.engine import AsyncLLM  # imports torch

    llm = await asyncio.to_thread(AsyncLLM, config)
    # Enough waiting requests that the engine never lacks one, and no more: the input may be of any length.
    places = asyncio.Semaphore(2 * config.max_num_seqs)
    try:
        with (
            target.open("a", encoding="utf-8") as answers,
            _progress(console) as progress,
        ):
            bar = progress.add_task("Generating", total=total, rate="")

            def show() -> None:
                progress.update(
                    bar, completed=tally.done + tally.skipped + len(tally.failures), rate=f"{tally.tokens:,} tokens"
                )

            async def work(task: Task) -> None:
                try:
                    answer = await _answer(llm, task, flags)
                    _append(answers, answer)
                    tally.done += 1
                    tally.tokens += answer["completion_tokens"]
                except RankLost:
                    raise
                except (OctavoError, LineError) as error:
                    tally.failures.append(f"line {task.line}: {error}")
                finally:
                    places.release()
                    show()

            async with asyncio.TaskGroup() as group:
                task: Task | None = first
                while task is not None:
                    await places.acquire()
                    group.create_task(work(task))
                    task = next(tasks, None)
    except* (RankLost, OSError) as lost:
        raise lost.exceptions[0] from None
    finally:
        await asyncio.to_thread(llm.shutdown)
    return tally


async def _answer(llm: Any, task: Task, flags: Mapping[str, Any]) -> dict[str, Any]:
    fields = task.fields
    params = sampling(llm.get_default_sampling_params(), flags, fields)
    prompt = _prompt(llm.get_tokenizer(), fields)
    output = None
    stream = llm.generate(
        prompt, params, priority=_typed(fields, "priority", int, 0), cache_salt=_typed(fields, "cache_salt", str, None)
    )
    async with aclosing(stream) as outputs:
        async for newest in outputs:
            output = newest
    assert output is not None, task
    return {
        "id": task.key,
        "text": output.outputs[0].text,
        "finish_reason": output.outputs[0].finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        "outputs": [_output(completion) for completion in output.outputs],
    }


def _output(completion: Any) -> dict[str, Any]:
    result = {"text": completion.text, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
    if completion.logprobs is not None:
        result["token_ids"] = completion.token_ids
        result["logprobs"] = [
            {str(token): dataclasses.asdict(entry) for token, entry in step.items()} for step in completion.logprobs
        ]
    return result


def sampling(defaults: SamplingParams, flags: Mapping[str, Any], fields: Mapping[str, Any]) -> SamplingParams:
    """The line's own fields before the flags before the model's defaults. Raises RequestError."""
    own = {name: value for name, value in fields.items() if name in SAMPLING_FIELDS and value is not None}
    if fields.get("max_completion_tokens") is not None:
        own["max_tokens"] = fields["max_completion_tokens"]
    try:
        return defaults.replace(**{"max_tokens": DEFAULT_MAX_TOKENS, **flags, **own})
    except TypeError as error:
        raise RequestError(f"a sampling field has a wrong type: {error}") from None


def _prompt(tokenizer: Any, fields: Mapping[str, Any]) -> str | Sequence[int]:
    if "messages" in fields:
        kwargs = _typed(fields, "chat_template_kwargs", dict, {})
        text = tokenizer.apply_chat_template(fields["messages"], **kwargs)
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
        return ids
    prompt = fields["prompt"]
    if not isinstance(prompt, str | list):
        raise LineError("prompt must be a string or a list of token ids")
    return prompt


def _typed(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise LineError(f"{name} has the wrong type")
    return value


def _append(file: IO[str], answer: Mapping[str, Any]) -> None:
    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    file.flush()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
    )


def _report(tally: Tally, target: Path, console: Console) -> None:
    for failure in tally.failures[:SHOWN_FAILURES]:
        console.print(failure, style="red", markup=False)
    if len(tally.failures) > SHOWN_FAILURES:
        console.print(f"… and {len(tally.failures) - SHOWN_FAILURES} more")
    console.print(
        f"{tally.done} answered ({tally.tokens:,} tokens), {tally.skipped} were there already, "
        f"{len(tally.failures)} failed → {target}",
        markup=False,
    )
