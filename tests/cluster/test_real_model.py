"""The whole of it: `octavo serve` with the real model, and the official client asking for 16 things at once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import anthropic
import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from octavo.cluster import machine
from octavo.engine import LLM, SamplingParams

pytestmark = pytest.mark.live

TEXTS = ["The capital of France is", "Water boils at", "Once upon a time", "1, 2, 3, 4,"]
CHATS = ["What is the capital of France?", "Write one sentence about the sea."]
OPTIONS = {"dtype": "float32", "max_model_len": 1024, "num_gpu_blocks_override": 512}


@pytest.fixture(scope="module")
def expected(smollm2: Path):
    """Greedy answers of the engine alone: (completions, chat answers)."""
    llm = LLM(str(smollm2), **OPTIONS)
    greedy = SamplingParams(temperature=0, max_tokens=24)
    texts = [o.outputs[0].text for o in llm.generate(TEXTS, greedy, use_tqdm=False)]
    chats = [llm.chat([{"role": "user", "content": c}], greedy, use_tqdm=False)[0].outputs[0].text for c in CHATS]
    llm.close()
    return texts, chats


@pytest.fixture(scope="module")
def url(smollm2: Path, tmp_path_factory):
    port, log = machine.free_ports(1)[0], tmp_path_factory.mktemp("serve") / "log"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "octavo.cluster.cli", "serve", str(smollm2), f"--port={port}", *flags]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--served-model-name=m"], stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + 120
    while "Ctrl-C stops" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=40) == 0, log.read_text()
    finally:
        if process.poll() is None:
            for pid in (*machine._descendants(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)


async def test_sixteen_mixed_streams_with_cancellations(url, expected):
    texts, chats = expected
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    common = {"model": "m", "temperature": 0, "max_tokens": 24}

    async def completion(i: int, stream: bool) -> str:
        made = await client.completions.create(prompt=TEXTS[i], stream=stream, **common)
        return "".join([c.choices[0].text async for c in made]) if stream else made.choices[0].text

    async def chat(i: int, stream: bool) -> str:
        messages = [{"role": "user", "content": CHATS[i]}]
        made = await client.chat.completions.create(messages=messages, stream=stream, **common)
        if not stream:
            return made.choices[0].message.content
        return "".join([c.choices[0].delta.content or "" async for c in made])

    async def leave(i: int) -> None:
        more = common | {"max_tokens": 900}
        made = await client.completions.create(
            prompt=TEXTS[i % 4], stream=True, extra_body={"ignore_eos": True}, **more
        )
        async for _ in made:
            break
        await made.close()

    answers = await asyncio.gather(
        *(completion(i, stream) for i in range(4) for stream in (True, False)),
        *(chat(i, stream) for i in range(2) for stream in (True, False)),
        *(leave(i) for i in range(4)),
    )
    assert list(answers[:8]) == [text for text in texts for _ in range(2)]
    assert list(answers[8:12]) == [text for text in chats for _ in range(2)]
    for _ in range(100):
        metrics = _metrics(url)
        if "octavo:kv_cache_usage_perc" in metrics and _gauge(metrics, "octavo:kv_cache_usage_perc") == 0:
            break
        await asyncio.sleep(0.1)
    assert _gauge(metrics, "octavo:kv_cache_usage_perc") == 0  # those who left have their blocks given back
    assert _gauge(metrics, "octavo:num_requests_running") == 0


async def test_seeds_samples_and_logprobs(url):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = {"model": "m", "prompt": TEXTS[2], "max_tokens": 12, "seed": 3, "n": 2, "logprobs": 2}
    one, two = await asyncio.gather(client.completions.create(**asked), client.completions.create(**asked))
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    assert one.choices[0].text != one.choices[1].text
    assert len(one.choices[0].logprobs.token_logprobs) == one.usage.completion_tokens // 2 == 12
    with pytest.raises(openai.BadRequestError, match=r"1024"):
        await client.completions.create(model="m", prompt=[5] * 2000)


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=24)
    unit: Literal["celsius", "fahrenheit"]


class Report(BaseModel):
    city: str = Field(max_length=24)
    degrees: int = Field(ge=-60, le=140)
    sky: Literal["clear", "cloudy", "rainy"]


class Sky(BaseModel):
    """Nothing that Anthropic's client would leave out of the schema, as it does bounds."""

    kind: Literal["clear", "cloudy", "rainy"]
    is_bright: bool


async def test_a_small_model_calls_tools_and_keeps_to_a_form_at_temperature_one(url):
    """It could do neither by itself. Conversations of two turns, side by side; half of them are streamed."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = {"model": "m", "temperature": 1.0, "max_tokens": 400}

    async def parsed(streams: bool, **body) -> openai.types.chat.ParsedChatCompletion:
        if not streams:
            return await client.chat.completions.parse(**asked, **body)
        async with client.chat.completions.stream(**asked, **body) as stream:
            return await stream.get_final_completion()

    async def talk(seed: int) -> None:
        messages = [{"role": "user", "content": "What is the weather like in Paris?"}]
        forced = "required" if seed < 2 else {"type": "function", "function": {"name": "Weather"}}
        first = await parsed(
            seed % 2 == 0,
            messages=messages,
            tools=[openai.pydantic_function_tool(Weather)],
            tool_choice=forced,
            parallel_tool_calls=False,
            seed=seed,
        )
        (call,) = first.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather)
        messages.append(first.choices[0].message.to_dict())
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees and some clouds"})
        second = await parsed(seed % 2 == 0, messages=messages, response_format=Report, seed=seed)
        assert isinstance(second.choices[0].message.parsed, Report)

    await asyncio.gather(*(talk(seed) for seed in range(4)))


async def test_other_clients_have_their_calls_and_forms_too(url):
    question = "What is the weather like in Paris?"
    few = {"max_tokens": 400, "temperature": 1.0, "seed": 1}
    anthropics = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=120)
    tool = {"name": "weather", "input_schema": Weather.model_json_schema()}
    chain = ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120, **few)
    called, formed, chained, bound = await asyncio.gather(
        anthropics.messages.create(
            model="m",
            max_tokens=400,
            messages=[{"role": "user", "content": question}],
            tools=[tool],
            tool_choice={"type": "tool", "name": "weather"},
        ),
        anthropics.messages.parse(
            model="m", max_tokens=400, messages=[{"role": "user", "content": question}], output_format=Sky
        ),
        chain.with_structured_output(Report).ainvoke(question),
        chain.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).ainvoke(question),
    )
    assert Weather.model_validate(called.content[0].input)
    assert isinstance(formed.parsed_output, Sky)
    assert isinstance(chained, Report)
    assert Weather.model_validate(bound.tool_calls[0]["args"])


async def test_choices_expressions_and_schemas_that_cannot_be(url):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    async def complete(**form) -> str:
        made = await client.completions.create(
            model="m", prompt="The year is", max_tokens=40, temperature=1.0, extra_body={"structured_outputs": form}
        )
        return made.choices[0].text

    chosen, year, numbers = await asyncio.gather(
        complete(choice=["green", "blue"]),
        complete(regex="(19|20)[0-9]{2}"),
        complete(json={"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 2, "maxItems": 3}),
    )
    assert chosen in ("green", "blue")
    assert 1900 <= int(year) < 2100
    assert 2 <= len(json.loads(numbers)) <= 3
    with pytest.raises(openai.BadRequestError) as refused:
        await complete(regex="(")
    assert refused.value.param == "structured_outputs.regex"


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def _gauge(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name + "{"))
