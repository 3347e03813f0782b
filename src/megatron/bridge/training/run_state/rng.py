# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The random states of this rank, as sharded state.

The device's random states, `cuda_rng_state` and `rng_tracker_states`, are restored together or not at all. If the
checkpoint was saved on another kind of device (a GPU's checkpoint on a CPU, or the other way round), this device can't
use them. Then both are reseeded, on all ranks.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron.bridge.utils.device import RNG_STATE_BYTES, device_rng_state, set_device_rng_state
from megatron.bridge.utils.distributed import all_gathered, is_rank_0, raise_on_all_ranks

logger = logging.getLogger(__name__)


HOST_STATES: dict[str, Callable[[Any], None]] = {
    "random_rng_state": random.setstate,
    "np_rng_state": np.random.set_state,
    "torch_rng_state": torch.set_rng_state,
}
"""The function that restores each of the host's random states."""


def get_rng_state(
    data_parallel_random_init: bool = False, ckpt_format: str = "torch_dist", *, pg_collection: Any = None
) -> ShardedObject:
    """This rank's random states: one entry for each tensor- and pipeline-parallel rank.

    If the random states of the data-parallel ranks differ, there is one for each of those, too. They also differ with
    expert parallelism: Core has a generator that each expert-parallel rank seeds differently.

    Args:
        data_parallel_random_init: Whether each data-parallel rank has its own random states; all are saved then.
        ckpt_format: `torch_dist`.
        pg_collection: Not used; Core's global groups are used instead.

    Raises:
        ValueError: Another format is asked for.
    """
    if ckpt_format != "torch_dist":
        raise ValueError(f"ckpt_format={ckpt_format!r}: random states are kept for 'torch_dist' only")
    states: list[Any] = [current_states()]
    if data_parallel_random_init or mpu.get_expert_model_parallel_world_size() > 1:
        group = mpu.get_data_parallel_group(with_context_parallel=True)  # expert-parallel ranks may be of one row
        states = [None] * group.size()
        torch.distributed.all_gather_object(states, current_states(), group=group)
    return ShardedObject(
        "rng_state",
        states,
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )


def current_states() -> dict[str, Any]:
    """The state of each generator, by the key that Megatron-LM uses.

    NumPy's state is a list, because torch doesn't read arrays with `weights_only` unless Core has allowed them.
    """
    of_numpy: Any = np.random.get_state()
    name, keys, *rest = of_numpy
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": (name, keys.tolist(), *rest),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_rng_state(states: list[dict[str, Any]], *, data_parallel_random_init: bool = False) -> None:
    """Restore loaded random states. Collective.

    The host's are always restored. If any rank has device states of another kind of device, no rank restores its
    device states: they keep this run's seed, and a warning says so. (A simulated device draws from the host's
    generator, and so is restored with it.)

    Args:
        states: One entry, or one for each data-parallel rank.
        data_parallel_random_init: Use this data-parallel rank's own entry. The same is done if expert parallelism
            saved one for each.

    Raises:
        ValueError: There is no entry for this rank, or a state in it is damaged.
        RuntimeError: Another rank failed.
    """
    with raise_on_all_ranks("restoring the random states"):
        state = _entry_of_this_rank(states, data_parallel_random_init)
        foreign = _of_another_device(state)
        _restore_host_states(state)
    foreign = next(filter(None, all_gathered(foreign)), None)
    if foreign is None:
        with raise_on_all_ranks("restoring the device's random states"):
            _restore_device_states(state)
    elif is_rank_0():
        logger.warning(
            "random states: the device's generator and tracker, which dropout draws from, start over from rng.seed: "
            "%s; all else is as saved",
            foreign,
        )


def _entry_of_this_rank(states: list[dict[str, Any]], data_parallel_random_init: bool) -> dict[str, Any]:
    spreads_experts = mpu.get_expert_model_parallel_world_size() > 1
    is_of_each = spreads_experts and len(states) == mpu.get_data_parallel_world_size(with_context_parallel=True)
    index = mpu.get_data_parallel_rank(with_context_parallel=True) if data_parallel_random_init or is_of_each else 0
    if index >= len(states):
        raise ValueError(
            f"the checkpoint has random states of {len(states)} data-parallel ranks and this is rank {index}: "
            "set checkpoint.load_rng=false, or resume with the same data-parallel size"
        )
    state = states[index]
    for name in (*HOST_STATES, "cuda_rng_state", "rng_tracker_states"):
        if not isinstance(state, dict) or name not in state:
            raise _damaged(name, "it isn't there")
    if not isinstance(state["rng_tracker_states"], dict):
        raise _damaged("rng_tracker_states", f"{type(state['rng_tracker_states']).__name__}, expected a dict")
    return state


def _of_another_device(state: dict[str, Any]) -> str | None:
    """Which state belongs to another kind of device, as text; None if all fit this device.

    Raises:
        ValueError: A state fits no kind of device.
    """
    own_size = device_rng_state().numel()
    found = {"cuda_rng_state": state["cuda_rng_state"]}
    found |= {f"rng_tracker_states[{name!r}]": of_name for name, of_name in state["rng_tracker_states"].items()}
    sizes = {name: _num_bytes(name, of_name, own_size) for name, of_name in found.items()}
    others = {name: size for name, size in sizes.items() if size != own_size}
    if not others:
        return None
    name, size = next(iter(others.items()))
    own_kind = RNG_STATE_BYTES.get(own_size, "of another kind")
    return f"the checkpoint's {name} has the {size} bytes of {RNG_STATE_BYTES[size]}, and this device is {own_kind}"


def _num_bytes(name: str, state: Any, own_size: int) -> int:
    if isinstance(state, torch.Generator):  # with CUDA graphs Core's tracker holds these
        state = state.get_state()
    is_whole = isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.dim() == 1
    if not is_whole or state.numel() not in (own_size, *RNG_STATE_BYTES):
        found = (
            f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, torch.Tensor) else type(state).__name__
        )
        raise _damaged(name, f"{found}, expected torch.uint8 of shape ({own_size},)")
    return state.numel()


def _restore_host_states(state: dict[str, Any]) -> None:
    for name, restore in HOST_STATES.items():
        _restore(name, restore, state[name])


def _restore_device_states(state: dict[str, Any]) -> None:
    for name, of_name in state["rng_tracker_states"].items():  # checked now; Core would only do so when it uses them
        if isinstance(of_name, torch.Tensor):
            _restore(f"rng_tracker_states[{name!r}]", set_device_rng_state, of_name)
    _restore("cuda_rng_state", set_device_rng_state, state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _restore(name: str, restore: Callable[[Any], None], state: Any) -> None:
    try:
        restore(state)
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise _damaged(name, " ".join(str(error).split())) from error


def _damaged(name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint's {name} is no random state ({reason}): restore the checkpoint from another copy, or set "
        "checkpoint.load_rng=false"
    )
