# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Models named on the Hugging Face hub: the one place that looks into the hub's cache, and fetches.

The cache, the token and the offline mode are `huggingface_hub`'s: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Configuration, tokenizer and licence."""
WEIGHTS = ("*.safetensors",)
_SECOND_COPY = ("consolidated*",)
"""The weights again, under other names, which some models have beside those that transformers reads."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_found: dict[str, Path] = {}
"""What this process has found, by what was asked for: the hub is asked once."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_commits: dict[str, set[str]] = {}
"""At which commits this process has found what it took from the hub, by name."""


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a text can be a name on the hub, such as `Qwen/Qwen3-0.6B`. A path that exists is none."""
    name = os.fspath(path)
    is_name = _NAME.fullmatch(name) is not None and len(name) <= 96 and not any(pair in name for pair in ("--", ".."))
    return is_name and not os.path.lexists(name)


def find_hf_directory(path: str | os.PathLike[str], *, with_weights: bool = True, **download_options: Any) -> Path:
    """The local directory of a Hugging Face model, fetched from the hub where `path` is a hub name.

    A directory of that name goes first. Not collective: of several processes on a machine one fetches, the others wait
    for it. What was fetched is compared with the hub's checksums.

    Args:
        path: A directory, or a name such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        with_weights: Fetch the weights too, not only the configuration and the tokenizer.
        download_options: For `huggingface_hub.snapshot_download`: `revision`, `token`, `local_files_only`, …

    Raises:
        FileNotFoundError: No such directory, and no such model that can be fetched.
        ValueError: A fetched file is damaged.
    """
    name = os.path.expanduser(path)
    if os.path.isdir(name):
        return Path(name)
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"{name!r} is no directory: expected a Hugging Face model's, or a name on the hub (organization/model)"
        )
    from huggingface_hub import constants

    cache = Path(download_options.get("cache_dir") or constants.HF_HUB_CACHE).expanduser()
    asked = [f"{(name, str(cache), constants.ENDPOINT, sorted(download_options.items()), whole)}" for whole in (0, 1)]
    known = _found.get(asked[1]) or (None if with_weights else _found.get(asked[0]))
    if known is not None and known.is_dir() and not download_options.get("force_download"):
        return known
    found = _Model(name, cache, with_weights, download_options).find()
    _found[asked[with_weights]] = found
    note_commit(name, found.name)
    return found


def note_commit(name: str, commit: str) -> bool:
    """Keep at which commit something of the hub was found, for `commits_of`.

    Args:
        name: Its name on the hub; of a dataset, with `datasets/` before it.
        commit: What its snapshot is called.

    Returns:
        Whether that is a commit. What is none isn't kept.
    """
    is_commit = _COMMIT.fullmatch(commit) is not None
    if is_commit:
        _commits.setdefault(name, set()).add(commit)
    return is_commit


def commits_of(names: Iterable[str]) -> dict[str, str]:
    """The commits at which this process has found what it took from the hub; several of one name with commas between.

    Args:
        names: As of `note_commit`; those that nothing was taken from are left out.
    """
    return {name: ", ".join(sorted(_commits[name])) for name in sorted(names) if name in _commits}


class _Model:
    """A model of the hub that is looked for."""

    def __init__(self, name: str, cache: Path, with_weights: bool, options: dict[str, Any]) -> None:
        self.name, self.cache, self.with_weights, self.options = name, cache, with_weights, options
        parent = name.rpartition("/")[0]
        self.why_offline = _why_offline(options) or (
            f"the directory {parent!r} here makes it a path, which isn't looked up on the hub"
            if parent and os.path.isdir(parent)
            else None
        )

    @property
    def folder(self) -> Path:
        """Its part of the cache."""
        return self.cache / f"models--{self.name.replace('/', '--')}"

    def find(self) -> Path:
        """The snapshot's directory, complete."""
        if self.why_offline is not None:
            return self._checked(self._from_cache())
        with _turn(self.cache, self.folder.name) as has_waited:
            if has_waited:  # the process before has just fetched it
                with contextlib.suppress(FileNotFoundError):
                    return self._checked(self._from_cache())
            before = set(self._blobs())
            directory = self._download()
            for blob in sorted(set(self._blobs()) - before):
                _verify(blob, self.name)
        return self._checked(directory)

    def _blobs(self) -> list[Path]:
        return [path for path in self.folder.glob("blobs/*") if _SHA256.fullmatch(path.name)]

    def _from_cache(self) -> Path:
        return self._download(local_files_only=True)

    def _download(self, **options: Any) -> Path:
        from huggingface_hub import snapshot_download

        wanted = [*SMALL_FILES, *(WEIGHTS if self.with_weights else ())]
        try:
            options = {"ignore_patterns": list(_SECOND_COPY), **self.options, **options}
            return Path(snapshot_download(self.name, allow_patterns=wanted, **options))
        except Exception as error:  # OSError, and whatever the HTTP library of the installed version raises
            partial = getattr(error, "snapshot_path", None)
            if partial is not None:
                return Path(partial)  # it lacks something, perhaps nothing that is needed
            raise FileNotFoundError(f"{self.name!r} is no directory, and {self._reason(error)}") from error

    def _checked(self, directory: Path) -> Path:
        """The directory, if it has what is needed.

        Raises:
            FileNotFoundError: It hasn't.
        """
        missing = _missing_file(directory, with_weights=self.with_weights)
        if missing is None:
            return directory
        without = f" ({self.why_offline})" if self.why_offline else ""
        raise FileNotFoundError(
            f"{directory}, the cached copy of {self.name!r}, lacks {missing}{without}: run `hf download {self.name}` "
            "where there is a network, or name a local directory; weights are read from safetensors only"
        )

    def _reason(self, error: Exception) -> str:
        """Why there is no such model, and what to do."""
        from huggingface_hub import constants

        kinds = {kind.__name__ for kind in type(error).__mro__}
        revision = self.options.get("revision")
        page = f"{constants.ENDPOINT}/{self.name}"
        if "GatedRepoError" in kinds:
            return (
                f"the hub gives it only to those who have accepted its terms: accept them at {page}, then set HF_TOKEN "
                "or run `hf auth login`; or name a local directory"
            )
        if "RepositoryNotFoundError" in kinds:
            return (
                f"{page} isn't there, or is private: correct the name (organization/model){self._similar()}, or set "
                "HF_TOKEN or run `hf auth login`; or name a local directory"
            )
        if "RevisionNotFoundError" in kinds:
            return f"{page} has no revision {revision!r}: name a branch, a tag or a commit of it"
        if self.why_offline is None:
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            return (
                f"fetching it from the hub failed ({reason[:300]}); nor does {self.cache} have it: run `hf download "
                f"{self.name}` where there is a network, or name a local directory"
            )
        at = f" at revision {revision!r}" if revision else ""
        return (
            f"the hub's cache in {self.cache} doesn't have it{at} ({self.why_offline}): run `hf download {self.name}` "
            f"where there is a network, or name a local directory{self._similar()}"
        )

    def _similar(self) -> str:
        """A cached model with nearly this name, as a question."""
        cached = [path.name[len("models--") :].replace("--", "/", 1) for path in self.cache.glob("models--*")]
        close = difflib.get_close_matches(self.name, [name for name in cached if name != self.name], n=1, cutoff=0.8)
        return f"; did you mean {close[0]!r}, which is cached?" if close else ""


def _why_offline(options: dict[str, Any]) -> str | None:
    from huggingface_hub import constants

    if options.get("local_files_only"):
        return "local_files_only forbids fetching it"
    return "HF_HUB_OFFLINE forbids fetching it" if constants.HF_HUB_OFFLINE else None


def _missing_file(directory: Path, *, with_weights: bool) -> str | None:
    """The name of a file that a model needs and a snapshot lacks; None if it is complete."""
    patterns = (*SMALL_FILES, *(WEIGHTS if with_weights else ()))
    links = {path for pattern in patterns for path in directory.glob(pattern) if not path.exists()}
    if links:
        return min(path.name for path in links)  # the blob was removed
    if not any(directory.glob("*.json")):
        return "config.json"
    if not with_weights or (directory / _SINGLE).exists():
        return None
    try:
        shards = sorted(
            {str(file) for file in json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"].values()}
        )
    except FileNotFoundError:
        return None if any(directory.glob("*.safetensors")) else _SINGLE
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged: whoever reads it says so
    return next((file for file in shards if not (directory / file).exists()), None)


def _verify(blob: Path, name: str) -> None:
    """Compare a large file with its checksum, which is its name in the cache.

    Raises:
        ValueError: It differs. The file is removed.
    """
    checksum = hashlib.sha256()
    with open(blob, "rb") as file:
        while piece := file.read(1 << 24):
            checksum.update(piece)
    if checksum.hexdigest() != blob.name:
        blob.unlink()
        raise ValueError(
            f"a file of {name!r} was damaged on its way (SHA-256 {checksum.hexdigest()[:12]}…, the hub says "
            f"{blob.name[:12]}…), and is removed: start again to fetch it again"
        )


@contextlib.contextmanager
def _turn(cache: Path, folder: str) -> Iterator[bool]:
    """Take turns with the machine's other processes; yields whether this one had to wait for another."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache / ".locks" / f"{folder}.turn.lock")
    has_waited = False
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            has_waited = True
            logger.info("waiting for another process that fetches %s", folder)
            lock.acquire()
    except (OSError, NotImplementedError):  # nothing can be written there, or locked: the hub has locks of its own
        logger.debug("no lock in %s", cache)
    try:
        yield has_waited
    finally:
        lock.release()
