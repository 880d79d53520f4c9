"""Models on the Hugging Face hub: found in its local cache, or downloaded into it.

Knows the hub's cache and API through huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
huggingface_hub is imported on first use. It retries an unreachable hub for minutes; here, one question with a short
deadline decides whether the hub is there at all.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.engine.errors import ConfigError
from octavo.engine.loader.presets import HubRepo
from octavo.engine.loader.progress import Progress
from octavo.engine.loader.weight_files import find_weights

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PROBE_DEADLINE_S = 2.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What a model needs besides its weights: configs, tokenizers, chat templates, code for trust_remote_code, and how
# sentence-transformers pools.
_COMPANIONS = re.compile(
    r"[^/]+\.(json|model|txt|jinja|py|tiktoken)|additional_chat_templates/[^/]+\.jinja|\d+_Pooling/config\.json"
)
_POLL_S = 0.5


class HubUnreachable(ConfigError):
    """The hub did not answer, or may not be asked (HF_HUB_OFFLINE)."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit: (file name, bytes) of each file."""

    commit: str
    files: tuple[tuple[str, int], ...]


def cached(source: HubRepo, cache_dir: str | None) -> Path | None:
    """The complete model in the local cache: its folder, or its file if `source` names one. Asks no network."""
    found = _has(source.repo, source.file or "config.json", source.revision, cache_dir)
    if found is None or source.file is not None:
        return found
    try:
        find_weights(found.parent)
    except ConfigError:  # a download that was broken off, or one of another program that wanted no weights
        return None
    return found.parent


def fetch(source: HubRepo, cache_dir: str | None, progress: Progress) -> Path:
    """The newest state of the revision: from the cache if it is there, else downloaded.

    Raises HubUnreachable within two seconds if the hub does not answer, ConfigError if it has no such model for us.
    """
    if source.revision is not None and _COMMIT.fullmatch(source.revision) and (found := cached(source, cache_dir)):
        return found  # a commit never changes
    listing = _ask(source)
    wanted = _choose(source, listing)
    missing = [(name, size) for name, size in wanted if not _has(source.repo, name, listing.commit, cache_dir)]
    if missing:
        _download(source.repo, listing.commit, wanted, missing, cache_dir, progress)
    first = wanted[0][0]
    found = _has(source.repo, first, listing.commit, cache_dir)
    if found is None:
        raise ConfigError(f"Downloading {source.repo} brought no {first}.")
    folder = found.parents[first.count("/")]
    _remember(source, listing.commit, folder)
    return found if source.file else folder


def _has(repo: str, name: str, commit: str | None, cache_dir: str | None) -> Path | None:
    """A file in the local cache. commit: or the name of a revision; None = main."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _ask(source: HubRepo) -> Listing:
    """What the hub has, or that it is not there. Name resolution knows no timeout, hence the thread."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    answer: list[ModelInfo | Exception] = []

    def ask() -> None:
        try:
            api = HfApi()
            answer.append(
                api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=PROBE_DEADLINE_S)
            )
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(PROBE_DEADLINE_S)
    if not answer:
        raise HubUnreachable(f"the hub did not answer within {PROBE_DEADLINE_S:.0f} s")
    got = answer[0]
    if isinstance(got, GatedRepoError):
        raise ConfigError(
            f"{source.repo} is gated: accept its terms at {constants.ENDPOINT}/{source.repo} and set HF_TOKEN."
        )
    if isinstance(got, RevisionNotFoundError):
        raise ConfigError(f"{source.repo} has no revision {source.revision!r}.")
    if isinstance(got, RepositoryNotFoundError):
        raise ConfigError(f"The hub has no model {source.repo}, or it is private: check the name, or set HF_TOKEN.")
    if isinstance(got, Exception):
        raise HubUnreachable(_sentence(got))
    if not got.sha or not got.siblings:
        raise ConfigError(f"{source.repo} is empty.")
    return Listing(got.sha, tuple((file.rfilename, file.size or 0) for file in got.siblings))


def _choose(source: HubRepo, listing: Listing) -> list[tuple[str, int]]:
    """The files to download: weights as safetensors if there are any, else as pickles, and their companions."""
    if source.file is not None:
        chosen = [(name, size) for name, size in listing.files if name == source.file]
        if not chosen:
            raise ConfigError(f"{source.repo} has no file {source.file!r}.")
        return chosen
    top = [(name, size) for name, size in listing.files if "/" not in name]
    weights = [(name, size) for name, size in top if name.endswith(".safetensors")]
    weights = [(name, size) for name, size in weights if not name.startswith("consolidated")] or weights
    weights = weights or [(n, size) for n, size in top if n.startswith("pytorch_model") and n.endswith(".bin")]
    if not weights:
        ggufs = [name for name, _ in listing.files if name.endswith(".gguf")]
        hint = f" It has GGUF files: name one, as in {source.repo}/{ggufs[0]}." if ggufs else ""
        raise ConfigError(f"{source.repo} holds neither *.safetensors nor pytorch_model*.bin.{hint}")
    return weights + [(name, size) for name, size in listing.files if _COMPANIONS.fullmatch(name)]


def _download(
    repo: str,
    commit: str,
    wanted: list[tuple[str, int]],
    missing: list[tuple[str, int]],
    cache_dir: str | None,
    progress: Progress,
) -> None:
    from huggingface_hub import snapshot_download

    try:
        with _watched(repo, missing, cache_dir, progress):
            snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=[name for name, _ in wanted])
    except Exception as error:  # of HTTP libraries that change from version to version, of the disk, of the hub
        raise ConfigError(f"Downloading {repo} failed: {_sentence(error)}") from error


@contextmanager
def _watched(repo: str, wanted: list[tuple[str, int]], cache_dir: str | None, progress: Progress) -> Iterator[None]:
    """Reports progress while a download runs, by the growth of the cache: how huggingface_hub itself reports differs
    from version to version. Its own bars are off meanwhile."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    blobs = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    before = _size(blobs)
    total = sum(size for _, size in wanted)
    stop = threading.Event()
    seen = 0

    def advance() -> None:
        nonlocal seen
        now = max(seen, min(total, _size(blobs) - before))
        if now > seen:
            progress.advance(now - seen)
            seen = now

    def watch() -> None:
        while not stop.wait(_POLL_S):
            advance()

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    progress.start(total, f"Downloading {repo}")
    thread = threading.Thread(target=watch, name="hub-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        advance()
        progress.done()
        if not were_off:
            enable_progress_bars()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed meanwhile
            continue
    return total


def _remember(source: HubRepo, commit: str, folder: Path) -> None:
    """Note which commit the revision's name stands for, where huggingface_hub looks for it: we downloaded by commit."""
    name = source.revision or "main"
    if name == commit:
        return
    ref = folder.parent.parent / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    if not ref.is_file() or ref.read_text(encoding="utf-8") != commit:
        ref.write_text(commit, encoding="utf-8")


def _sentence(error: Any) -> str:
    text = " ".join(str(error).split())
    return f"{text[:200] or type(error).__name__}".rstrip(".") + "."
