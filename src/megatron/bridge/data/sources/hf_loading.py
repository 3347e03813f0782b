# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Opens datasets where they are: a directory, a file, the hub, or what was fetched from the hub before."""

import logging
import os
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from megatron.bridge.data.sources import JsonlSource, Source
from megatron.bridge.data.sources.arrow import ArrowSource
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig
from megatron.bridge.utils.hf_hub import note_commit

logger = logging.getLogger(__name__)

_BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_SHARD = re.compile(r"^(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\..+)$")


def load_local(source: HFDatasetSourceConfig, path: Path, *, alone: str) -> dict[str, Source]:
    """Opens a file of rows, a directory that `save_to_disk` wrote, or one laid out as on the hub.

    Args:
        source: What to open.
        path: Where it is.
        alone: The name for what has no splits.

    Returns:
        The splits by name.

    Raises:
        ValueError: It holds something else, or the `datasets` library is needed and isn't installed.
    """
    if path.is_file():
        if path.suffix in (".jsonl", ".ndjson"):
            return {alone: JsonlSource(path)}
        if path.suffix not in _BUILDERS:
            raise ValueError(f"dataset.hf_dataset={str(path)!r}: expected a file that ends in .jsonl, .parquet or .csv")
        more = {"sep": "\t"} if path.suffix == ".tsv" else {}
        load = {"path": _BUILDERS[path.suffix], "data_files": str(path), "split": "train", **more}
        return {alone: _opened(_loaded(source, str(path), **load), str(path), path.stem)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, alone=alone)
    lines = sorted(path.glob("*.jsonl"))
    if lines and not _has_other_data(path):
        return {line.stem: JsonlSource(line) for line in lines}
    _check_shards(path)
    return _by_split(_loaded(source, str(path), path=str(path), name=source.subset), str(path), alone=alone)


def load_from_hub(source: HFDatasetSourceConfig) -> dict[str, Source]:
    """Fetches a dataset, or takes it from where it was fetched to before.

    Raises:
        FileNotFoundError: It is neither on the hub nor here.
        ValueError: It can't be read, or the `datasets` library isn't installed.
    """
    name = str(source.dataset_name)
    if source.trust_remote_code:
        logger.warning("hf_dataset.trust_remote_code=True has no effect: code of a dataset is never run")
    try:
        found = _loaded(source, name, path=name, name=source.subset, revision=source.revision)
    except _NotThereError as reason:
        snapshot = _snapshot(source)
        if snapshot is None:
            raise FileNotFoundError(_how_to_fetch(source, str(reason))) from reason
        logger.info("%s: the hub can't be asked; taken from %s", source.title, snapshot)
        _check_shards(snapshot)
        found = _loaded(source, name, path=str(snapshot), name=source.subset)
        note_commit(f"datasets/{name}", snapshot.name)
    else:
        _record_commit(source, _folder_of_tables(found))
    return _by_split(found, source.title, alone="train")


def _folder_of_tables(found: Any) -> str:
    """The folder that the library made a dataset's tables in, which has the commit's name; empty if there is none."""
    splits = found.values() if isinstance(found, Mapping) else [found]
    files = [file["filename"] for split in splits for file in getattr(split, "cache_files", None) or []]
    return Path(files[0]).parent.name if files else ""


def _record_commit(source: HFDatasetSourceConfig, folder: str) -> None:
    """Keep the commit that the folder of a dataset's tables is called; of one in memory, the hub is asked once more.

    What can't be recorded is said in one line.
    """
    try:
        commit = folder or _hash_of_builder(source)
    except Exception as error:  # as of `_loaded`; the rows are there
        reason = f"the hub didn't tell: {_one_line(error)}"
    else:
        if note_commit(f"datasets/{source.dataset_name}", commit):
            return
        reason = f"it was found as {commit!r}, which is no commit"
    logger.warning(
        "%s: its commit isn't recorded, so a resume can't say whether the data is another (%s); give the dataset's "
        "revision as a commit",
        source.title,
        reason,
    )


def _hash_of_builder(source: HFDatasetSourceConfig) -> str:
    """What the library calls the state of a dataset on the hub: the commit, as a rule."""
    library = _library(str(source.dataset_name))
    of_rows, of_builders = (
        set(signature(load).parameters) for load in (library.load_dataset, library.load_dataset_builder)
    )
    asked = {name: value for name, value in (source.hf_kwargs or {}).items() if name not in of_rows - of_builders}
    wanted = {"path": source.dataset_name, "name": source.subset, "revision": source.revision, **asked}
    return str(library.load_dataset_builder(**wanted, cache_dir=source.cache_dir or _datasets_cache()).hash)


class _NotThereError(Exception):
    """The hub can't be reached, or has no such dataset for us."""


def _loaded(source: HFDatasetSourceConfig, where: str, **arguments: Any) -> Any:
    """What `datasets.load_dataset` returns; ValueError in one line for what it raises."""
    load_dataset = _library(where).load_dataset
    arguments |= source.hf_kwargs or {}
    try:
        return load_dataset(**arguments, cache_dir=source.cache_dir or _datasets_cache())
    except Exception as error:  # the library and those below it raise all kinds
        reason = _one_line(error)
        if not Path(arguments["path"]).exists() and _is_about_the_hub(error):
            raise _NotThereError(reason) from error
        raise ValueError(
            f"dataset.hf_dataset={where!r} can't be opened ({reason}): expected what datasets' save_to_disk wrote, or "
            "files laid out as on the hub"
        ) from error


def _is_about_the_hub(error: BaseException | None) -> bool:
    """Whether a dataset isn't there, as opposed to being there and unreadable."""
    while error is not None:
        name = type(error).__name__
        if isinstance(error, ConnectionError | FileNotFoundError) or "NotFound" in name or "Offline" in name:
            return True
        error = error.__cause__
    return False


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"dataset.hf_dataset={where!r} needs the datasets library, which can't be imported ({error}): pip install "
            "'megatron-bridge[datasets]', or write JSONL files and set dataset.dataset_root"
        ) from error
    return datasets


def _saved(path: Path, *, alone: str) -> dict[str, Source]:
    datasets = _library(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:  # the library's IndexError: it holds no row
        where = f"dataset.hf_dataset={str(path)!r}"
        raise ValueError(
            f"{where} can't be opened ({_one_line(error)}): expected what datasets' save_to_disk wrote"
        ) from error
    splits = dict(found) if isinstance(found, Mapping) else {alone: found}
    opened: dict[str, Source] = {}
    for split, dataset in splits.items():
        directory = path if split == alone else path / split
        files = [*sorted(directory.glob("*.arrow")), directory / "state.json"]
        label = directory.name
        opened[split] = ArrowSource(dataset, where=str(directory), label=label, files=files)
    return opened


def _by_split(found: Any, where: str, *, alone: str) -> dict[str, Source]:
    splits = dict(found) if isinstance(found, Mapping) else {alone: found}
    return {split: _opened(dataset, f"{where} ({split})", split) for split, dataset in splits.items()}


def _opened(dataset: Any, where: str, label: str) -> ArrowSource:
    files = [Path(file["filename"]) for file in dataset.cache_files]
    return ArrowSource(dataset, where=where, label=label, files=files)


def _hub_cache() -> Path:
    """Where `hf download` and the libraries keep what they fetch, as the environment says now."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _datasets_cache() -> str:
    """Where the library keeps the tables that it makes of what was fetched."""
    return str(Path(os.environ.get("HF_DATASETS_CACHE") or _hub_cache().parent / "datasets").expanduser())


def token_directory(source: HFDatasetSourceConfig, name: str) -> Path | None:
    """Where a dataset's tokens are kept: a folder `name` beside a local copy, or in the hub's cache; None: nowhere.

    Rows that a script made have no place.
    """
    if source.dataset_name is None:
        return None
    local = Path(source.dataset_name).expanduser()
    if local.exists():
        return (local.parent if local.is_file() else local) / name
    return Path(_datasets_cache()) / "megatron_bridge" / source.title.replace("/", "--") / name


def _snapshot(source: HFDatasetSourceConfig) -> Path | None:
    """A fetched copy of the dataset's repository; None: there is none."""
    folder = f"datasets--{str(source.dataset_name).replace('/', '--')}"
    caches = [Path(source.cache_dir)] if source.cache_dir else []
    for cache in (*caches, _hub_cache()):
        repository = cache / folder
        revision = source.revision or "main"
        reference = repository / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        if (repository / "snapshots" / commit).is_dir():
            return repository / "snapshots" / commit
    return None


def _has_other_data(path: Path) -> bool:
    return any(found.suffix in _BUILDERS or found.name == "README.md" for found in path.rglob("*"))


def _check_shards(path: Path) -> None:
    """Refuses a directory in which a file of several is missing: a split would be shorter than it says."""
    shards: dict[tuple[Path, str, str], set[str]] = {}
    for file in path.rglob("*"):
        match = _SHARD.match(file.name)
        if match:
            shards.setdefault((file.parent, match["stem"], match["count"]), set()).add(file.name)
    for (parent, stem, count), names in shards.items():
        if len(names) < int(count):
            raise ValueError(f"{parent}/{stem}-*: {len(names)} of {int(count)} files are there: fetch the others")


def _how_to_fetch(source: HFDatasetSourceConfig, reason: str) -> str:
    name = source.dataset_name
    revision = f" --revision {source.revision}" if source.revision else ""
    return (
        f"dataset.hf_dataset={name!r} can't be fetched from the hub ({reason}) and isn't in {_hub_cache()} "
        f"(HF_HUB_CACHE or HF_HOME) or {_datasets_cache()} (HF_DATASETS_CACHE): run "
        f"`hf download --repo-type dataset {name}{revision}` where there is a network and bring the cache here, or set "
        "dataset.hf_dataset.dataset_name to a local copy (a directory that save_to_disk wrote, or a JSONL file), or "
        "dataset.dataset_root to your own data"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
