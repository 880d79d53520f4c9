"""Dockerfiles without Docker: stages and copied files exist, the context holds what the build needs, nobody is root."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from deployfiles import DEPLOY, ROOT

FILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
KNOWN = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, rest), lines that go on joined, comments gone."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def in_context(name: str) -> bool:
    """Whether .dockerignore lets a file through: the last rule that matches it, or a folder above it, decides."""
    kept = True
    path = Path(name)
    candidates = [str(path), *(str(parent) for parent in path.parents if str(parent) != ".")]
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        tail = pattern.removeprefix("**/")
        for candidate in candidates:
            name = Path(candidate).name if pattern.startswith("**/") else candidate
            if fnmatch.fnmatchcase(name, tail):
                kept = rule.startswith("!")
    return kept


def test_there_is_one_for_the_cpu_and_one_for_cuda():
    assert [path.name for path in FILES] == ["Dockerfile", "Dockerfile.cuda"]


@each_file
def test_instructions(path):
    found = instructions(path)
    assert {word for word, _ in found} <= KNOWN
    assert found[0][0] == "FROM"
    images = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert len(images) == 2
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+", image) and not image.endswith(":latest") for image in images)


@each_file
def test_what_is_copied_exists(path):
    stages = {rest.split()[2] for word, rest in instructions(path) if word == "FROM" and " AS " in rest}
    for word, rest in instructions(path):
        if word != "COPY":
            continue
        options = [part for part in shlex.split(rest) if part.startswith("--")]
        *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
        if options:
            assert {option.removeprefix("--from=") for option in options} <= stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source == "." or in_context(source), source


def test_the_context_holds_the_packages_and_nothing_secret():
    setup = PROJECT["tool"]["setuptools"]
    folders = {root: Path(folder) for root, folder in setup["package-dir"].items()}
    for package in setup["packages"]:
        root = ".".join(package.split(".")[:2])
        folder = folders.get(root, Path(package.removeprefix("octavo.").split(".")[0]))
        inner = folder.joinpath(*package.split(".")[2:])
        assert in_context(str(inner)), package
    for module in setup["ext-modules"]:
        assert all(in_context(file) for file in [*module["sources"], *module["depends"]])
    for name in (".git/config", ".venv/bin/python", ".env", "tests/conftest.py", "build/x", "secret.pem"):
        assert not in_context(name), name


@each_file
def test_the_last_stage_is_small_and_not_root(path):
    found = instructions(path)
    last = found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]
    users = [rest for word, rest in last if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    after_user = last[[word for word, _ in last].index("USER") :]
    assert "RUN" not in {word for word, _ in after_user}
    # Everything that is fetched is fetched by apt and pip.
    assert not any(
        re.search(r"\b(curl|wget|git clone)\b|https?://(?!download\.pytorch\.org)", rest) for _, rest in found
    )
    assert not any("pip install" in rest for word, rest in last if word == "RUN")


@each_file
def test_the_command_exists(path):
    import typer

    from octavo.cluster.cli import app

    found = dict(instructions(path))
    (entry,) = re.findall(r'"([^"]+)"', found["ENTRYPOINT"])
    assert entry in PROJECT["project"]["scripts"]
    command, *options = re.findall(r'"([^"]+)"', found["CMD"])
    parsed = typer.main.get_command(app).commands[command]
    known = {option for parameter in parsed.params for option in parameter.opts}
    assert {option for option in options if option.startswith("-")} <= known


def test_only_torch_differs_on_cuda():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == [pin for pin in pins if "+cpu" in pin]
