# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Check that a checkpoint's adapters are those of this run, by the `peft` section of its `run_config.yaml`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.bridge.checkpoint import iterations
from megatron.bridge.peft.matcher import ModuleMatcher
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.distributed import is_rank_0

logger = logging.getLogger(__name__)


def check_adapters(cfg: ConfigContainer, run_config: dict[str, Any], path: Path) -> None:
    """Check that a run with adapters resumes from the same adapters, and one without from a whole model.

    Call it before the model is built; `check_adapted_layers` compares the rest once the model has its adapters.

    Args:
        cfg: The run's configuration.
        run_config: The checkpoint's configuration, as plain data.
        path: The checkpoint, for errors.

    Raises:
        ValueError: The checkpoint holds a whole model and the run has adapters, or the other way round; or the
            adapters have another kind, rank or scale.
    """
    saved = run_config.get("peft")
    if saved is None and cfg.peft is None:
        return
    if saved is None:
        raise ValueError(
            f"{path} (checkpoint.load) holds a whole model, and peft is set: expected adapters; to adapt this model, "
            "name it in checkpoint.pretrained_checkpoint and give the adapters a checkpoint.load of their own"
        )
    if cfg.peft is None:
        raise ValueError(
            f"{path} (checkpoint.load) holds adapters only, and peft is not set: set peft as in its "
            f"{iterations.CONFIG_FILE}, and checkpoint.pretrained_checkpoint to the weights that they adapt"
        )
    _check_kind(cfg.peft, saved, path)


def check_adapted_layers(cfg: ConfigContainer, run_config: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint's adapters are on the layers that this run adapts. Call it once the model is adapted.

    Before that nobody knows the layers: a target may be a pattern.

    Args:
        cfg: The run's configuration, with `peft`.
        run_config: The checkpoint's configuration, as plain data, which `check_adapters` has passed.
        path: The checkpoint, for errors.

    Raises:
        ValueError: They are on other layers; it names one.
    """
    peft: Any = cfg.peft
    saved = run_config["peft"]
    if isinstance(peft, ModuleMatcher) and saved.get("target_modules") is not None:
        _check_targets(peft, saved, path)
    _warn_of_another_base(cfg, run_config, path)


def _check_kind(peft: Any, saved: dict[str, Any], path: Path) -> None:
    kind, target = type(peft), saved.get("_target_")
    if target is not None and target.rpartition(".")[2] != kind.__name__:
        raise ValueError(
            f"{path} (checkpoint.load) holds adapters of the kind {target}, and peft is a {kind.__name__}: "
            f"set peft to a {target.rpartition('.')[2]}, or give the new adapters a checkpoint.load of their own"
        )
    for name in ("dim", "alpha", "normalize_moe_lora", "share_expert_adapters"):
        was, now = saved.get(name), getattr(peft, name, None)
        if was is not None and now is not None and was != now:
            raise ValueError(
                f"{path} (checkpoint.load) holds adapters of peft.{name}={was}, not {now}: set it to {was}"
            )


def _check_targets(peft: Any, saved: dict[str, Any], path: Path) -> None:
    """Compare the adapted layers. Targets may have another order, or be a pattern that matches the same layers."""
    was = ModuleMatcher(saved["target_modules"], saved.get("exclude_modules") or [])
    for name in sorted(peft.module_names):
        is_there, is_here = (matcher.target_of(name) is not None for matcher in (was, peft))
        if is_there != is_here:
            changes = [
                f"peft.{option}={getattr(was, option)}, not {getattr(peft, option)}"
                for option in ("target_modules", "exclude_modules")
                if sorted(getattr(was, option)) != sorted(getattr(peft, option))
            ]
            where = "there and not here" if is_there else "here and not there"
            raise ValueError(
                f"{path} (checkpoint.load) holds adapters of {' and '.join(changes)} ({name} has one {where}): set "
                "them as they were, or give the new adapters a checkpoint.load of their own"
            )


def _warn_of_another_base(cfg: ConfigContainer, run_config: Mapping[str, Any], path: Path) -> None:
    was, now = (run_config.get("checkpoint") or {}).get("pretrained_checkpoint"), cfg.checkpoint.pretrained_checkpoint
    if was is not None and now is not None and Path(was).resolve() != Path(now).resolve() and is_rank_0():
        logger.warning(
            "%s holds adapters of the weights in %s, and checkpoint.pretrained_checkpoint=%s: they resume beside other "
            "weights than they were trained with, unless these are the same",
            path,
            was,
            now,
        )
