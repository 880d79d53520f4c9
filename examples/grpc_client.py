"""Talk to `octavo serve --grpc-port 9000` over gRPC: `python examples/grpc_client.py`."""

import sys

from octavo.cluster.client import Client
from octavo.engine.errors import CapacityError, OctavoError

with Client("localhost:9000", timeout_s=60) as client:
    model = client.models()[0]
    print(f"{model.name}, context {model.max_model_len}")

    answer = client.generate("The capital of France is", temperature=0, max_tokens=8, logprobs=0)
    for entry in answer.outputs[0].logprobs:
        print(f"{entry.token.text!r} {entry.token.logprob:.2f}", end="  ")
    print()

    conversation = [{"role": "user", "content": "Name three primary colours."}]
    try:
        for chunk in client.stream(conversation, max_tokens=60):
            print(chunk.text, end="", flush=True)
            if chunk.usage is not None:
                print(f"\n{chunk.usage.completion_tokens} tokens")
    except CapacityError as error:
        sys.exit(f"busy; try again in {error.retry_after_s} s")
    except OctavoError as error:
        sys.exit(str(error))
