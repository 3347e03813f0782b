# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which options of a `GPTSFTDatasetConfig` go together. A rule raises ValueError and changes nothing."""

from typing import Any

from megatron.bridge.data.sft_options import PackedSequenceSpecs, check_blend, check_blends_per_split


def check_packing(config: Any) -> None:
    """Packing is set in one place and right, and there is data to pack, or packs."""
    for name in ("packed_sequence_specs", "offline_packing_specs"):
        specs = getattr(config, name)
        if specs is None:
            continue
        if not isinstance(specs, PackedSequenceSpecs):
            raise ValueError(f"dataset.{name}={specs!r}: expected PackedSequenceSpecs(packed_sequence_size=...)")
        specs.check(f"dataset.{name}", seq_length=config.seq_length)
    if config.offline_packing_specs is not None and not config.enable_offline_packing:
        raise ValueError("dataset.offline_packing_specs is set: set dataset.enable_offline_packing=true with it")
    if config.packed_sequence_specs is not None and config.enable_offline_packing:
        raise ValueError(
            "dataset.packed_sequence_specs and dataset.enable_offline_packing are both set: set one of them"
        )
    if config.blend is not None or config.blend_per_split is not None:
        return
    if config.packing is None or config.packing.packed_train_data_path is None:
        _ = config.source or config.dataset_root is not None or config.root
    else:
        _check_packed_training_data(config)


def check_blends(config: Any) -> None:
    """A blend is the only place that is named, and what counts samples counts those of one place."""
    blends = [name for name in ("blend", "blend_per_split") if getattr(config, name) is not None]
    if not blends:
        return
    others = ("dataset_root", "max_train_samples", *(("split",) if config.blend is None else ()))
    if clash := [name for name in (*blends, *others) if getattr(config, name) not in (None, "")][1:]:
        raise ValueError(f"dataset.{blends[0]} and dataset.{clash[0]} are both set: set one of them")
    if config.packing is not None and config.packing.are_read:
        raise ValueError(f"dataset.{blends[0]} with packs in files: name several files by a pattern instead")
    if config.blend is not None:
        check_blend("dataset.blend", config.blend)
        return
    check_blends_per_split(config.blend_per_split)
    training, *held_out = config.blend_per_split or []
    if training is None:
        raise ValueError("dataset.blend_per_split names no training data: expected it in the first place")
    if weighted := next((blend for blend in held_out if blend and blend[1] is not None), None):
        raise ValueError(
            f"dataset.blend_per_split has weights for held-out data ({weighted[1]}): an evaluation takes each sample "
            "once; leave these weights out"
        )


def _check_packed_training_data(config: Any) -> None:
    """Rows in files can't be cut into samples, and what isn't in them is read from the directory of the data."""
    assert config.packing is not None
    for name in ("split", "max_train_samples"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"dataset.{name}={getattr(config, name)!r} with packed_train_data_path="
                f"{config.packing.packed_train_data_path!r}: rows that are packed can't be cut; unset one of them"
            )
    has_root = config.dataset_root is not None or config.hf_dataset is not None
    if config.do_validation and config.packing.packed_val_data_path is None and not has_root:
        raise ValueError(
            f"packed_train_data_path={config.packing.packed_train_data_path!r} without validation data: set "
            "packed_val_data_path, or dataset.dataset_root, or dataset.do_validation=false"
        )
