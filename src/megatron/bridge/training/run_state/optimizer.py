# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Check that a checkpoint's optimizer state is of the kind that this run has."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model

from megatron.bridge.checkpoint.sharded_state import Advice, default_advice
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.targets import dtype_named

_WEIGHTS_ALONE = "load its weights alone with checkpoint.load_optim=false"
_MOMENT = re.compile(r"^optimizer\.(.*\.)?(exp_avg|exp_avg_sq|momentum_buffer)(\.|$)")
"""Keys of what an optimizer has from its first step on, in every format."""


def check_kind_of_optimizer(
    cfg: ConfigContainer, saved: dict[str, Any], directory: Path, content_metadata: dict[str, Any]
) -> None:
    """Check that the checkpoint was saved by the same kind of optimizer, which alone can load its state.

    Args:
        cfg: A checked configuration.
        saved: The checkpoint's `run_config.yaml`; missing options count as equal to this run's.
        directory: The checkpoint, for errors.
        content_metadata: The checkpoint's description of its format.

    Raises:
        ValueError: The kinds differ: distributed or not, Adam or SGD, or the precision of the weights.
    """
    was, now = "distrib_optim_sharding_type" in content_metadata, bool(cfg.ddp.use_distributed_optimizer)
    if content_metadata and was != now:
        kinds = {True: "the distributed optimizer", False: "an optimizer that is not distributed"}
        value = str(was).lower()
        raise ValueError(
            f"{directory} (checkpoint.load) holds the state of {kinds[was]}, and this run has {kinds[now]}: set "
            f"optimizer.use_distributed_optimizer={value} and ddp.use_distributed_optimizer={value}, or "
            f"{_WEIGHTS_ALONE}"
        )
    saved_kind = _section(saved, "optimizer").get("optimizer", cfg.optimizer.optimizer)
    if saved_kind != cfg.optimizer.optimizer:
        raise ValueError(
            f"{directory} (checkpoint.load) holds the state of optimizer.optimizer={saved_kind}, and this run has "
            f"{cfg.optimizer.optimizer}: set it to {saved_kind}, or {_WEIGHTS_ALONE}"
        )
    _check_precision(cfg, saved, directory, content_metadata.get("distrib_optim_sharding_type", "none"))


def _check_precision(cfg: ConfigContainer, saved: dict[str, Any], directory: Path, sharding_type: str) -> None:
    """Compare the precision of the weights: 16-bit weights have masters, and buckets are named after their dtypes."""
    model, ddp = _section(saved, "model"), _section(saved, "ddp")
    if sharding_type == "fully_reshardable" or not {"bf16", "fp16"} <= model.keys():
        return
    was, now = _weights(model), _weights(vars(cfg.model))
    by_bucket = sharding_type == "dp_reshardable"
    if was != now if by_bucket else (was == "FP32") != (now == "FP32"):
        raise ValueError(
            f"{directory} (checkpoint.load) holds optimizer state of {was} weights, and this run's are {now}: set "
            f"mixed_precision as it was (model.bf16={bool(model['bf16'])}, model.fp16={bool(model['fp16'])}), or "
            f"{_WEIGHTS_ALONE}"
        )
    reduced = ddp.get("grad_reduce_in_fp32", cfg.ddp.grad_reduce_in_fp32)
    if by_bucket and now != "FP32" and bool(reduced) != bool(cfg.ddp.grad_reduce_in_fp32):
        raise ValueError(
            f"{directory} (checkpoint.load) holds optimizer state by buckets of ddp.grad_reduce_in_fp32={reduced}, and "
            f"this run has {cfg.ddp.grad_reduce_in_fp32}: set it to {reduced} (in mixed_precision, where that is set), "
            f"or {_WEIGHTS_ALONE}"
        )


def changed_moments(cfg: ConfigContainer, saved: dict[str, Any]) -> Iterator[str]:
    """A note for each moment that was stored in another format than this run stores it in.

    Args:
        cfg: A checked configuration.
        saved: The checkpoint's `run_config.yaml`; missing options count as equal to this run's.
    """
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        stored = _section(saved, "optimizer").get(name)
        was = dtype_named(stored["_target_"] if isinstance(stored, dict) else str(stored))
        now = getattr(cfg.optimizer, name)
        if was is not None and was != now:
            how = "rounded to" if now.itemsize < was.itemsize else "widened to"
            yield f"{name.removesuffix('_dtype')} is {how} optimizer.{name}={now} from {was}"


def advice_on(model: Sequence[Any]) -> Advice:
    """A function that advises what to do if a checkpoint lacks tensors that a run of this model needs.

    Args:
        model: This rank's chunks.
    """
    named = (pair for chunk in model for pair in unwrap_model(chunk).named_parameters())
    frozen = [name for name, param in named if not param.requires_grad]

    def advice(keys: list[str], stored: Collection[str]) -> str:
        if not all(key.startswith("optimizer.") for key in keys):
            return default_advice(keys, stored)
        if all(map(_MOMENT.search, keys)) and not any(map(_MOMENT.search, stored)):
            return (
                "its weights fit, and it holds no moments: its optimizer keeps none, or took no step before it was "
                f"saved (in FP16, all may have overflowed); {_WEIGHTS_ALONE}"
            )
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        found = f"this run has frozen {frozen[0]}{more}" if frozen else "this run has frozen nothing"
        by_bucket = any(key.startswith("optimizer.distributed.") for key in keys)
        buckets = " (or ddp.bucket_size or ddp.overlap_grad_reduce is another)" if by_bucket else ""
        return (
            f"its weights fit, and its optimizer state is of other weights than are trained here: {found}; freeze what "
            f"was frozen when it was saved{buckets}, or {_WEIGHTS_ALONE}"
        )

    return advice


def _weights(model: Mapping[str, Any]) -> str:
    """The format of a model's weights."""
    return "BF16" if model["bf16"] else "FP16" if model["fp16"] else "FP32"


def _section(saved: dict[str, Any], name: str) -> dict[str, Any]:
    return saved.get(name) or {}
