# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Describe and verify a checkpoint, as lines of text. No model is built, and nothing in the checkpoint is executed."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.manifest import ALGORITHM, MANIFEST_FILE, damage_of, read_manifest
from megatron.bridge.checkpoint.model_checkpoint import read_run_config
from megatron.bridge.checkpoint.safe_pickle import read_blob, read_dcp_metadata
from megatron.bridge.checkpoint.sharded_state import stored_content_metadata
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES


def inspect(path: str | Path, ckpt_step: int | None = None) -> list[str]:
    """Describe one iteration, and name the others beside it.

    Args:
        path: A root, or an iteration's directory.
        ckpt_step: This iteration instead of the latest.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is incomplete or damaged.
    """
    directory = iterations.resolve_checkpoint(path, ckpt_step)
    files = [file for file in directory.rglob("*") if file.is_file()]
    manifest = "with checksums" if read_manifest(directory) is not None else f"no {MANIFEST_FILE}: can't be verified"
    sharding = stored_content_metadata(directory).get("distrib_optim_sharding_type")
    lines = [
        str(directory),
        f"  {len(files)} files, {_megabytes(sum(file.stat().st_size for file in files))}, {manifest}",
        f"  format torch_dist{f', optimizer state {sharding}' if sharding else ''}",
        *_stored(directory),
        *_train_state(directory),
        *_run(directory),
    ]
    others = [str(iteration) for iteration, other in iterations.iterations(directory.parent) if other != directory]
    return [*lines, f"  beside it: {', '.join(others)}"] if others else lines


def _stored(directory: Path) -> list[str]:
    """Numbers and sizes of the tensors, by kind (weights, masters, moments), and the number of objects."""
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    counts: dict[str, int] = defaultdict(int)
    for key, stored in read_dcp_metadata(directory / iterations.DCP_METADATA_FILE).state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            counts["objects"] += 1
            continue
        kind = "optimizer state" if iterations.OPTIMIZER_KEY.match(key) else "weights"
        counts[kind] += 1
        dtype = stored.properties.dtype
        sizes[kind][str(dtype).removeprefix("torch.")] += stored.size.numel() * dtype.itemsize
    return [
        f"  {kind}: {counts[kind]} tensors, "
        + ", ".join(f"{_megabytes(size)} {dtype}" for dtype, size in sizes[kind].items())
        for kind in ("weights", "optimizer state")
        if counts[kind]
    ] + [f"  and {counts['objects']} objects (random states, schedule, what is common to all ranks)"]


def _train_state(directory: Path) -> list[str]:
    path = directory / iterations.TRAIN_STATE_FILE
    if not path.is_file():
        return ["  no train state: weights alone"]
    state = read_blob(path)
    try:
        return [f"  step {int(state['step'])}, {int(state['consumed_train_samples'])} samples consumed"]
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} doesn't say the step and the samples: restore it from another copy") from error


def _run(directory: Path) -> list[str]:
    """The run as described by `run_config.yaml`. The file may be someone else's, so anything may be missing."""
    if not (directory / iterations.CONFIG_FILE).is_file():
        return [f"  no {iterations.CONFIG_FILE}"]
    model = _mapping(read_run_config(directory).get("model"))
    kind = str(model.get("_target_", "a model")).rpartition(".")[2]
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_moe_experts")
    shape = ", ".join(f"{name} {model[name]}" for name in sizes if model.get(name) is not None)
    parallel = [(size.word, model.get(size.field)) for size in PARALLEL_SIZES.values()]
    layout_text = ", ".join(f"{word} {size}" for word, size in parallel if size is not None)
    return [f"  {kind}: {shape}", f"  saved at parallel sizes {layout_text}; loads at others too"]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def verify(path: str | Path, ckpt_step: int | None = None) -> tuple[list[str], int]:
    """Compare every file with its checksum, under a progress bar.

    Args:
        path: A root, or an iteration's directory.
        ckpt_step: This iteration instead of the latest.

    Returns:
        A line for each damaged file and one in sum; the number of damaged files.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is incomplete, or has no manifest.
    """
    directory = iterations.find_checkpoint(path, ckpt_step)
    listed = read_manifest(directory)
    if listed is None:
        raise ValueError(
            f"{directory} has no {MANIFEST_FILE}, so there is nothing to compare its files with: another program or an "
            "earlier version saved it"
        )
    damaged = []
    with tqdm(total=sum(size for size, _ in listed.values()), unit="B", unit_scale=True, desc="verify") as bar:
        for name, entry in sorted(listed.items()):
            found = damage_of(directory / name, entry, progress=bar.update)
            if found is not None:
                damaged.append(f"{directory / name} {found}")
    whole = f"{directory}: {len(listed) - len(damaged)} of {len(listed)} files are what their {ALGORITHM} says"
    return [*damaged, whole], len(damaged)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
