# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where the rows of each split come from, and what holds out a validation set where there is none."""

import logging
from pathlib import Path

from megatron.bridge.data.config import GPTSFTDatasetConfig
from megatron.bridge.data.preprocessing_config import ChatSFTPreprocessingConfig
from megatron.bridge.data.sft_options import read_shares
from megatron.bridge.data.sources import JsonlSource, Source
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig
from megatron.bridge.data.sources.hf_splits import AdaptedSource, find_split, open_hf_source
from megatron.bridge.data.sources.renamed import RenamedSource
from megatron.bridge.data.tokenizer import Tokenizer
from megatron.bridge.utils.distributed import (
    all_gathered,
    is_rank_0,
    local_rank,
    raise_on_all_ranks,
    run_while_others_wait,
)

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
Shares = tuple[float, float, float]


def find_sources(
    config: GPTSFTDatasetConfig, tokenizer: Tokenizer, *, packed: tuple[str, ...] = ()
) -> tuple[dict[str, Source], Shares | None]:
    """Finds the rows of each split that is wanted. Call on all ranks; an error ends all of them.

    Args:
        config: Where the data lies.
        tokenizer: For functions that make rows of a dataset's rows.
        packed: Splits whose rows were packed beforehand; nothing else of them is looked for.

    Returns:
        The rows by split, and the shares that training is to be cut into; None: it isn't cut.

    Raises:
        FileNotFoundError: The directory, the dataset, or a split that must be there, is missing.
        ValueError: `split` is set, and there are separate splits.
        RuntimeError: Another rank failed; its error's text.
    """
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    is_elsewhere = config.dataset_root is None and config.hf_dataset is None
    if "training" in packed and (is_elsewhere or all(split in packed for split in SPLITS if wanted[split])):
        return {}, None
    with raise_on_all_ranks("finding the data"):
        found = files_in_root(config) if config.source is None else None
    if found is None:
        found = splits_of_hf_dataset(config, tokenizer)
    with raise_on_all_ranks("finding the data"):
        sources, shares = choose_splits(config, found, packed=packed)
    chat = config.preprocessing
    if isinstance(chat, ChatSFTPreprocessingConfig) and chat.renames:
        sources = {split: RenamedSource(source, chat) for split, source in sources.items()}
    seen = all_gathered(sorted(sources))
    if any(names != seen[0] for names in seen):
        raise ValueError(f"the ranks see different files ({seen}): give every machine the same data")
    return sources, shares


def files_in_root(config: GPTSFTDatasetConfig) -> dict[str, Source]:
    """The JSONL files of each split that there are.

    Raises:
        FileNotFoundError: The directory is missing.
    """
    root = config.root
    if not root.exists():
        raise FileNotFoundError(f"dataset.dataset_root={str(root)!r} is no directory: expected training.jsonl in it")
    if config.hf_dataset is not None:
        logger.info("dataset.hf_dataset isn't read: dataset.dataset_root=%s is set", root)
    if root.is_file():
        return {"training": JsonlSource(root)}
    files = {split: root / f"{split}.jsonl" for split in SPLITS}
    return {split: JsonlSource(path) for split, path in files.items() if path.exists()}


def splits_of_hf_dataset(config: GPTSFTDatasetConfig, tokenizer: Tokenizer) -> dict[str, Source]:
    """The rows of each split that is wanted and that a dataset has. Call on all ranks.

    The first process of each machine fetches and opens it, and the others only if they need its rows.

    Raises:
        FileNotFoundError: The dataset, or a split that is named, is missing.
        ValueError: It can't be read.
    """
    source = config.source
    assert source is not None

    def open_and_find() -> tuple[dict[str, Source], dict[str, str]]:
        opened = open_hf_source(source)
        wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
        found = {split: find_split(opened, source, split) for split in SPLITS if wanted[split]}
        return opened, {split: said for split, said in found.items() if said is not None}

    opens = local_rank() == 0 or is_rank_0()
    own = run_while_others_wait(open_and_find if opens else None, doing=f"opening {source.title}")
    splits = next(found for found in all_gathered(own and own[1]) if found is not None)
    opened = own and own[0]
    return {split: AdaptedSource(source, said, opened=opened, tokenizer=tokenizer) for split, said in splits.items()}


def choose_splits(
    config: GPTSFTDatasetConfig, found: dict[str, Source], *, packed: tuple[str, ...] = ()
) -> tuple[dict[str, Source], Shares | None]:
    """The splits that are wanted, and the shares that training is to be cut into; None: it isn't cut.

    Raises:
        FileNotFoundError: A split that must be there is missing.
        ValueError: `split` is set, and there are separate splits.
    """
    source = config.source
    where = str(beside(config.root)) if source is None else source.title
    if "training" not in (*found, *packed):
        missing = f"{where}/training.jsonl does not exist: expected the training data"
        if source is not None:
            missing = f"{where} has no training split: expected 'train', or the name of another in hf_dataset.split"
        raise FileNotFoundError(missing)
    found = {split: rows for split, rows in found.items() if split not in packed}
    if config.split is not None:
        separate = [found[split].label for split in SPLITS[1:] if split in found]
        if separate:
            raise ValueError(
                f"dataset.split={config.split!r} cuts {found['training']}, but {where} has {separate[0]} too: remove "
                "it, or unset dataset.split"
            )
        return found, read_shares(config.split)
    shares = None
    if config.do_validation and "validation" not in (*found, *packed):
        shares = None if "training" in packed else _held_out(source)
        if shares is None:
            missing = f"{where}/validation.jsonl" if source is None else f"{where}/validation"
            raise FileNotFoundError(
                f"{missing} does not exist: add it, cut it off with dataset.split, or set dataset.do_validation=false"
            )
    if config.do_test and "test" not in found:
        missing = f"{where}/test.jsonl" if source is None else f"{where}/test"
        logger.warning("%s does not exist: there is no test set (dataset.do_test=false says so too)", missing)
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    return {split: rows for split, rows in found.items() if wanted[split]}, shares


def beside(root: Path) -> Path:
    """The directory of the data, which may be a single file."""
    return root.parent if root.is_file() else root


def _held_out(source: HFDatasetSourceConfig | None) -> Shares | None:
    """The shares that `val_proportion` asks for, if it does."""
    if source is None or not source.val_proportion:
        return None
    return 1 - source.val_proportion, source.val_proportion, 0.0
