# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The states of all random generators of this rank, as sharded state."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron.bridge.utils.device import device_rng_state, set_device_rng_state


def get_rng_state(
    data_parallel_random_init: bool = False, ckpt_format: str = "torch_dist", *, pg_collection: Any = None
) -> ShardedObject:
    """This rank's random states: an entry for each tensor and pipeline position, and data rank if they differ.

    They differ with expert parallelism too: Core has a generator that each expert-parallel rank seeds for itself.

    Args:
        data_parallel_random_init: Data-parallel ranks have states of their own: keep them all.
        ckpt_format: `torch_dist`.
        pg_collection: Not used; Core's global groups are.

    Raises:
        ValueError: Another format is asked for.
    """
    if ckpt_format != "torch_dist":
        raise ValueError(f"ckpt_format={ckpt_format!r}: random states are kept for 'torch_dist' only")
    states = [current_states()]
    if data_parallel_random_init or mpu.get_expert_model_parallel_world_size() > 1:
        states = [None] * mpu.get_data_parallel_world_size()
        torch.distributed.all_gather_object(states, current_states(), group=mpu.get_data_parallel_group())
    return ShardedObject(
        "rng_state",
        states,
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )


def current_states() -> dict[str, Any]:
    """Each generator's state, by the key that Megatron-LM uses.

    NumPy's as a list: torch reads no array unless Core has told it to.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": (name, keys.tolist(), *rest),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_rng_state(states: list[dict[str, Any]], *, data_parallel_random_init: bool = False) -> None:
    """Put loaded states into the generators.

    Args:
        states: One entry, or one per data-parallel rank.
        data_parallel_random_init: Take this data-parallel rank's own entry; with expert parallelism too, where there
            is one for each.

    Raises:
        ValueError: There is no entry for this rank.
    """
    spreads_experts = mpu.get_expert_model_parallel_world_size() > 1
    is_of_each = spreads_experts and len(states) == mpu.get_data_parallel_world_size()
    index = mpu.get_data_parallel_rank() if data_parallel_random_init or is_of_each else 0
    if index >= len(states):
        raise ValueError(
            f"the checkpoint has random states of {len(states)} data-parallel ranks and this is rank {index}: "
            "set checkpoint.load_rng=false, or resume with the same data-parallel size"
        )
    state = states[index]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    set_device_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
