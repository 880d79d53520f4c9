"""Stream an answer in this process: `python examples/streaming.py`."""

import asyncio

from octavo.engine import AsyncLLM, EngineConfig, SamplingParams


async def main() -> None:
    llm = AsyncLLM(EngineConfig(model="smollm2-135m"))
    shown = 0
    async for output in llm.generate("The three primary colours are", SamplingParams(temperature=0, max_tokens=40)):
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    llm.shutdown()


asyncio.run(main())
