"""The load generator against a server that streams, refuses, breaks off and stalls on request."""

import contextlib
import http.server
import json
import threading
import time
from itertools import pairwise
from statistics import fmean

import pytest
from load import Job, Target, arrival_times_s, most_at_once, run_load
from metrics import Timing, itl_s, summarize


class Handler(http.server.BaseHTTPRequestHandler):
    """The first id of the prompt says what happens."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with contextlib.suppress(BrokenPipeError):
            self.answer(body, body["prompt"][0])

    def answer(self, body, case):
        if case == 429:
            self.send_response(429)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"busy")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if case == 4:
            self.event({"error": {"message": "the engine has failed"}})
            return
        for number in range(0, body["max_tokens"], 2):
            choice = {"index": 0, "text": "ab"}
            if case == 2:
                choice["token_ids"] = [1, 2]
            self.event({"choices": [choice]})
            time.sleep(60 if case == 5 else 0.02)
            if case == 3 and number:
                return
        self.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


async def one(url, case, timeout_s=20.0):
    [timing], _ = await run_load(Target(url, "m", timeout_s=timeout_s), [Job((case, 0, 0), 8)], [0.0])
    return timing


async def test_tokens_are_counted_by_their_ids_where_the_server_tells_them(url):
    timing = await one(url, 2)
    assert timing.error is None
    assert timing.num_output_tokens == len(timing.token_times_s) == 8
    gaps = itl_s(timing)
    assert gaps[0] == 0, "two tokens in one chunk came at once"
    assert gaps[1] > 0.01


async def test_otherwise_a_chunk_is_a_token_and_the_server_counts(url):
    timing = await one(url, 1)
    assert (timing.num_output_tokens, len(timing.token_times_s)) == (8, 4)


@pytest.mark.parametrize(
    ("case", "words"), [(429, "HTTP 429: busy"), (3, "broke off"), (4, "the engine has failed"), (5, "no end within")]
)
async def test_what_goes_wrong_is_a_failed_request_with_a_reason(url, case, words):
    timing = await one(url, case, timeout_s=1.0)
    assert timing.failed
    assert words in timing.error


async def test_nobody_there():
    timing = await one("http://127.0.0.1:9", 1)
    assert "ConnectError" in timing.error


async def test_failures_do_not_stop_the_load_and_the_limit_holds(url):
    jobs = [Job((429 if i % 4 == 0 else 2, 0), 6) for i in range(12)]
    timings, duration_s = await run_load(Target(url, "m"), jobs, [0.0] * 12, max_concurrency=3)
    summary = summarize(timings, duration_s)
    assert (summary.completed, summary.failed) == (9, 3)
    assert summary.total_output_tokens == 54
    assert most_at_once(timings) <= 3


async def test_requests_are_sent_at_their_times(url):
    timings, _ = await run_load(Target(url, "m"), [Job((2, 0), 2)] * 3, [0.0, 0.1, 0.3])
    starts = [timing.start_s - timings[0].start_s for timing in timings]
    assert starts == pytest.approx([0.0, 0.1, 0.3], abs=0.08)


def test_arrivals_are_poisson():
    times = arrival_times_s(4000, rate_rps=20.0, seed=3)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert fmean(gaps) == pytest.approx(1 / 20, rel=0.06)
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert arrival_times_s(3, float("inf")) == [0.0, 0.0, 0.0]
    assert arrival_times_s(5, 1.0, seed=1) == arrival_times_s(5, 1.0, seed=1)


def test_most_at_once():
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (5.0, 6.0)]
    assert most_at_once([Timing(begin, end, 1, 1) for begin, end in spans]) == 2
