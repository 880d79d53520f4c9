"""The rules of the house: who may import whom, and which folders are packages."""

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "kernels", "cluster", "protos", "configs")


def python_files(folder: str) -> list[Path]:
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if "/protos/octavo/" not in str(p)]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def offenders(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(folder)
        for name in sorted(imports(path))
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", ("octavo.engine", "octavo.cluster", "octavo.protos", "ray")),
        ("engine", ("octavo.cluster", "octavo.protos", "fastapi", "grpc")),
        ("engine/core", ("torch", "ray", "numpy", "octavo.kernels", "octavo.engine.runner", "octavo.engine.models")),
        ("engine/models", ("octavo.engine.core", "octavo.engine.runner", "octavo.kernels.ref", "octavo.kernels.cpu")),
        ("engine/layers", ("octavo.engine.core", "octavo.engine.runner", "octavo.engine.models", "torch.distributed")),
        ("engine/text", ("torch", "octavo.engine.runner", "octavo.engine.models", "octavo.kernels")),
        ("cluster/ingress", ("ray", "torch")),
    ],
)
def test_imports_run_one_way(folder, forbidden):
    assert offenders(folder, forbidden) == []


def test_ray_is_imported_in_engine_only_under_process():
    assert [o for o in offenders("engine", ("ray",)) if not o.startswith("engine/process/")] == []


def test_nobody_imports_by_folder_name():
    for room in ROOMS:
        assert offenders(room, ROOMS) == []


def test_the_environment_is_read_in_one_file_per_import_root():
    readers = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in python_files(room)
        if any(word in path.read_text() for word in ("os.environ", "os.getenv", "environ.get"))
    ]
    # cluster/serve.py hands settings to Ray's own processes, which take them from the environment alone.
    assert set(readers) <= {"engine/env.py", "cluster/serve.py", "cluster/ray_env.py"}


def test_every_folder_with_python_files_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tracked = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {str(Path(line).parent) for line in tracked.splitlines() if line.endswith((".py", ".cpp"))}
    wanted = {f"octavo.{folder.replace('/', '.')}" for folder in folders if not folder.startswith("protos/")}
    assert wanted <= listed
    assert listed - wanted <= {"octavo.configs", "octavo.protos"}


def test_the_project_speaks_of_itself_alone():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.suffix in (".png", ".gguf"):
            continue
        text = path.read_text(errors="ignore")
        for word in ("/work/" + "main", "/work/" + "peers", "/work/" + "shared", "../sha" + "red", "/opt/" + "wheels"):
            assert word not in text, f"{name} mentions {word}"
