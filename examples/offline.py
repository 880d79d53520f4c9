"""Complete a few prompts without a server: `python examples/offline.py`."""

from octavo.engine import LLM, SamplingParams

llm = LLM("smollm2-135m")
conversations = [
    [{"role": "user", "content": "Name the capital of France."}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
]
for output in llm.chat(conversations, SamplingParams(temperature=0, max_tokens=60)):
    answer = output.outputs[0]
    print(f"{answer.text.strip()!r}  ({len(answer.token_ids)} tokens, ended by {answer.finish_reason})")
llm.close()
