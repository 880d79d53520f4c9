"""Every snippet of docs/clients.md runs, and comes to what it should."""

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import installs
import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs/clients.md").read_text()
RUN_S = 60


def snippets(client: str) -> list[str]:
    """The code under the heading `client`."""
    (section,) = re.findall(rf"^## {client}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(?:python|js)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def at(server: str, code: str) -> str:
    return re.sub(r"http://localhost:800\d", server, code)


def said_here(server: str, code: str) -> str:
    """What the Python code prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(at(server, code), "docs/clients.md", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def said_by(command: list[str | Path], folder: Path) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_S)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_openai(server):
    (code,) = snippets("OpenAI")
    assert said_here(server, code) == "city='Paris' celsius=21\n"


def test_anthropic(server):
    (code,) = snippets("Anthropic")
    kinds = [line.split()[0] for line in said_here(server, code).splitlines()]
    assert kinds == ["thinking", "tool_use", "thinking", "text"]
    assert said_here(server, code).endswith("text The tools say: 21 °C in Paris.\n")


def test_langchain(server):
    chat, embeddings = snippets("LangChain")
    assert said_here(server, chat) == "city='Paris' celsius=21\n"
    assert said_here(server, embeddings) == "8\n"


def test_llamaindex(server, tmp_path):
    (code,) = snippets("LlamaIndex")
    python = installs.virtual_environment(HERE / "llamaindex") / "bin/python"
    said = said_by([python, "-c", at(server, code)], tmp_path)
    assert said == "The tools say: 21 °C in Paris.\ncity='Paris' celsius=21\n"


@pytest.mark.skipif(shutil.which("npm") is None, reason="the Vercel AI SDK needs Node 18 and npm")
def test_vercel(server):
    (code,) = snippets("Vercel AI SDK")
    folder = installs.node_modules(HERE / "vercel")
    (folder / "snippet.mjs").write_text(at(server, code))  # packages are looked for beside it
    assert said_by(["node", "snippet.mjs"], folder) == "{ city: 'Paris', celsius: 21 }\n"


def test_what_the_page_names_exists():
    root = HERE.parents[1]
    named = re.findall(r"`((?:docs|tests|examples)/[\w./-]+)`", TEXT)
    assert len(named) > 2
    assert [name for name in named if not (root / name).exists()] == []
    presets = {path.stem for path in (root / "configs/models").glob("*.yaml")}
    assert set(re.findall(r"octavo serve (\S+)", TEXT)) <= presets
