"""Talk to a running server (`octavo serve`) with the official client: `python examples/openai_client.py`."""

from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model="smollm2-135m",
    messages=[{"role": "user", "content": "Name the capital of France."}],
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
