# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whether a resumed run continues with the samples of the run that saved: by the `dataset` section of its file."""

import logging
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.yaml_io import to_yaml_dict

logger = logging.getLogger(__name__)

_DECIDE = (
    "dataset_root",
    "hf_dataset",
    "blend",
    "blend_per_split",
    "data_path",
    "split",
    "max_train_samples",
    "random_seed",
    "seed",
    "dataloader_type",
)
"""Options of `dataset` that decide which sample has which place in the order."""


def warn_of_other_data(cfg: ConfigContainer, run_config: dict[str, Any], path: Path) -> None:
    """Log a warning if a resumed run has other data, or takes it in another order.

    Args:
        cfg: The run's configuration.
        run_config: The checkpoint's configuration, as plain data.
        path: The checkpoint.
    """
    saved, now = run_config.get("dataset") or {}, _plain(to_yaml_dict(cfg.dataset))
    changed = [
        f"dataset.{name} {_short(saved[name])} -> {_short(now[name])}"
        for name in _DECIDE
        if name in saved and name in now and _plain(saved[name]) != now[name]
    ]
    if changed:
        logger.warning(
            "%s was saved by a run on other data, or in another order: %s; this run continues at the number of samples "
            "consumed, and may see some again and others not at all",
            path,
            ", ".join(changed),
        )


def _plain(value: Any) -> Any:
    """With lists for tuples, which a file doesn't tell apart."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = str(value.get("dataset_name", value) if isinstance(value, dict) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
