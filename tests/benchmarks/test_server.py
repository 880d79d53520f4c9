"""Finding what a process leaves behind, whatever it does to get away."""

import subprocess
import sys
import textwrap
import time

import pytest
from server import Server, ServerError

# Stands in for `octavo`: answers /health, and leaves the process that it is told to leave.
SERVER = textwrap.dedent("""
    import http.server, os, signal, subprocess, sys
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    if "--fails" in sys.argv:
        sys.exit("no such model")
    if "--daemon" in sys.argv:
        subprocess.Popen(["setsid", "-f", *sleeper], close_fds=True)
    if "--child" in sys.argv:
        subprocess.Popen(sleeper, env={})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
""")


@pytest.fixture
def fake_octavo(tmp_path, monkeypatch):
    """Puts the stand-in where `octavo` would be."""
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    program = tmp_path / "octavo"
    program.write_text(f"#!{sys.executable}\n{SERVER}")
    program.chmod(0o755)
    monkeypatch.setattr("server.sys.executable", str(python))
    return tmp_path


def test_a_clean_server(fake_octavo):
    server = Server("m", [], fake_octavo / "log")
    server.wait_until_ready(20)
    assert server.stop() == (0, [])


@pytest.mark.parametrize("way", ["--child", "--daemon"])
def test_a_process_left_behind_is_found_and_killed(fake_octavo, way):
    server = Server("m", [way], fake_octavo / "log")
    server.wait_until_ready(20)
    time.sleep(0.3)
    code, orphans = server.stop(grace_s=0.5)
    assert code == 0
    assert len(orphans) == 1
    assert "time.sleep(60)" in orphans[0]
    pid = int(orphans[0].split()[0])
    time.sleep(0.1)
    alive = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    assert alive[:1] in ("", "Z")


def test_a_server_that_fails_says_why(fake_octavo):
    server = Server("m", ["--fails"], fake_octavo / "log")
    with pytest.raises(ServerError, match="exit code 1:\nno such model"):
        server.wait_until_ready(20)
    assert server.stop() == (1, [])
