"""Run on the head of `hosts.Hosts`: two replicas on two other hosts, streams on both, then one host is cut off.

    python scenario_cut_off.py HEAD_ADDRESS DEPLOYMENT_JSON

Speaks on standard output, a line each: `ingress` when that runs here, before there are other hosts; `streaming` when
all streams have begun and a host may be cut off; at the end a JSON object: per stream its longest pause and its end.
"""

import asyncio
import json
import sys
import time

import httpx
import ray
from ray import serve

from octavo.cluster.app import APP, build_app

STREAMS = 6
BODY = {"model": "fake", "max_tokens": 600, "ignore_eos": True, "stream": True, "return_token_ids": True}


async def stream(http, url, number, begun):
    """(token ids, longest pause in s, finish reason)."""
    body = BODY | {"prompt": f"stream {number}", "temperature": 1.0, "seed": number}
    tokens, pause, reason, last = [], 0.0, None, time.monotonic()
    async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return tokens, pause, event["error"]["message"]
            now = time.monotonic()
            if tokens:
                pause = max(pause, now - last)
            last = now
            tokens += event["choices"][0].get("token_ids") or ()
            reason = event["choices"][0].get("finish_reason") or reason
            if len(tokens) > 20:
                begun.set()
    return tokens, pause, reason


async def run(url):
    async with httpx.AsyncClient(timeout=60) as http:
        undisturbed = await asyncio.gather(*(stream(http, url, i, asyncio.Event()) for i in range(STREAMS)))
        begun = [asyncio.Event() for _ in range(STREAMS)]
        again = asyncio.gather(*(stream(http, url, i, event) for i, event in enumerate(begun)))
        await asyncio.gather(*(event.wait() for event in begun))
        print("streaming", flush=True)
        disturbed = await again
    return {
        "equal": [a[0] == b[0] and a[2] == b[2] for a, b in zip(undisturbed, disturbed, strict=True)],
        "pauses": [pause for _, pause, _ in disturbed],
        "ends": [end for _, _, end in disturbed],
        "lengths": [len(tokens) for tokens, _, _ in disturbed],
    }


def wait(condition):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        app = serve.status().applications.get(APP)
        if app is not None and "ingress" in app.deployments and condition(app):
            return
        time.sleep(0.1)
    raise TimeoutError(serve.status())


def main():
    address, deployment = sys.argv[1:]
    ray.init(address=f"{address}:6379", logging_level="ERROR", log_to_driver=False)
    serve.start(http_options={"host": address, "port": 8000, "location": "HeadOnly"})
    target = serve.RunTarget(build_app(json.loads(deployment)), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    wait(lambda app: app.deployments["ingress"].status == "HEALTHY")
    print("ingress", flush=True)
    wait(lambda app: app.status == "RUNNING")
    print(json.dumps(asyncio.run(run(f"http://{address}:8000"))), flush=True)


if __name__ == "__main__":
    main()
