# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The memory of a run while it runs: figures of rank 0, and lines with the rank that holds most."""

import logging

from megatron.bridge.training.config import LoggerConfig
from megatron.bridge.utils.device import device_memory_used_bytes, memory_stats
from megatron.bridge.utils.distributed import all_gathered, is_rank_0

logger = logging.getLogger(__name__)

PREFIX = "memory/"
"""What the names of these figures begin with."""

DEFAULT_KEYS = {
    "reserved_bytes.all.current": "mem-reserved-bytes",
    "allocated_bytes.all.current": "mem-allocated-bytes",
    "allocated_bytes.all.peak": "mem-max-allocated-bytes",
    "allocation.all.current": "mem-allocated-count",
}
"""Torch's statistics that are shown if `memory_keys` names none, under Megatron-LM's names; those that there are."""

DEVICE_USED = "mem-device-used-bytes"


def check_memory_keys(config: LoggerConfig) -> None:
    """`memory_keys` names statistics that there are.

    Raises:
        ValueError: It doesn't.
    """
    known = memory_stats()
    for key in config.memory_keys or {}:
        if key not in known:
            some = ", ".join(
                sorted(key for key in known if key.startswith(("allocated_bytes.all", "reserved_bytes.all")))
            )
            raise ValueError(
                f"logger.memory_keys names {key!r}, which torch's memory statistics don't have here: expected names "
                f"such as {some}"
            )


def memory_values(config: LoggerConfig) -> dict[str, int]:
    """This rank's memory, by the names under which it is shown."""
    found = memory_stats()
    keys = DEFAULT_KEYS if config.memory_keys is None else config.memory_keys
    values = {shown: found[key] for key, shown in keys.items() if key in found}
    if config.log_device_memory_used:
        values[DEVICE_USED] = device_memory_used_bytes()
    return values


def log_memory(config: LoggerConfig, step: int) -> None:
    """Log each value of the rank where it is largest. Collective."""
    by_rank = all_gathered(memory_values(config))
    if is_rank_0():
        parts = []
        for name in by_rank[0]:
            of_ranks = [values[name] for values in by_rank]
            largest = max(of_ranks)
            shown = f"{largest / 2**20:,.1f} MiB" if "bytes" in name else f"{largest:,}"
            parts.append(f"{name} {shown} (rank {of_ranks.index(largest)})")
        logger.info("memory after step %d, where it is most: %s", step, ", ".join(parts))
