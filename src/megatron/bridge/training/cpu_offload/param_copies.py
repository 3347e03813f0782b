# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Keep the parameter copies of Megatron-Core's offloaded optimizer equal to the weights that were loaded.

`HybridDeviceOptimizer` (Core 0.16.1 to 0.19.2, `megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py`) steps on
copies that it makes of the weights when it is built. A checkpoint loaded after that changes the weights only:

    model weight (bf16 or fp16, device)
      | this data-parallel rank's slice
      v
    [1] FP32 shard, device      DistributedOptimizer.shard_fp32_from_float16_groups; None when precision-aware
      v
    [2] CPU clone               HybridDeviceOptimizer.gpu_params_map_cpu_copy, for the offloaded fraction
    [3] FP32 copy               HybridDeviceOptimizer.param_to_fp32_param; empty unless precision-aware, where an
                                offloaded parameter's [3] is the same tensor as its [2]

Core's own `reload_model_params()` returns early for this optimizer after refreshing [3] alone, so the first step writes
the old copies over the loaded weights (NVIDIA-NeMo/RL #2371, NVIDIA/Megatron-LM PR 5071, NVIDIA-NeMo/Megatron-Bridge
PR 3949). This module imports only torch, megatron-core and logging, so that it can be lifted as it stands.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import __version__ as core_version
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

logger = logging.getLogger(__name__)

SUPPORTED_CORE = ">=0.16.1,<0.20"


@dataclass(frozen=True)
class HybridParamSync:
    """What a sync refreshed; false where no optimizer was hybrid."""

    parameters: int = 0
    """Copies that were written, over all levels."""

    num_bytes: int = 0
    """Bytes written into them."""

    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.parameters > 0


def find_hybrid_optimizers(optimizer: Any) -> list[Any]:
    """The distributed optimizers that wrap a `HybridDeviceOptimizer`, at any depth of `ChainedOptimizer`.

    Stub optimizers (a rank without trainable parameters) and optimizers without offload are left out.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, ChainedOptimizer):
        return [found for child in optimizer.chained_optimizers for found in find_hybrid_optimizers(child)]
    return [optimizer] if isinstance(optimizer.optimizer, HybridDeviceOptimizer) else []


@torch.no_grad()
def sync_hybrid_optimizer_param_copies(optimizer: Any, state_dict: dict[str, Any] | None = None) -> HybridParamSync:
    """Rebuild every parameter copy that an offloaded optimizer steps on from the model's weights.

    Call it after a load that brought weights but no optimizer state, never after one that restored the optimizer: its
    FP32 masters hold bits that the weights have lost. Moments, step counters and the loss scale stay as they are, so
    it is also right in the middle of a run. It holds no collective and may be called again at any time.

    Args:
        optimizer: A Megatron optimizer, a chain of them at any depth, or None.
        state_dict: The loaded model state (`{"model": …}`, or `model0`, `model1`, … per chunk; tensors of this rank's
            model-parallel shapes). Its tensors, of whatever precision, become the FP32 copies instead of the weights'
            16-bit values.

    Returns:
        What was refreshed.

    Raises:
        RuntimeError: Core's internals are not the ones this function knows; names the attribute or the parameter.
    """
    started = time.perf_counter()
    written: list[torch.Tensor] = []
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        hybrid = distributed_optimizer.optimizer
        sources = {}
        if state_dict is not None:
            sources = _attribute(distributed_optimizer, "_build_model_param_to_state_dict_param_map")(state_dict)
        written += _refresh_device_shards(distributed_optimizer, sources)
        written += _refresh_cpu_clones(hybrid)
        _attribute(hybrid, "update_fp32_param_by_new_param")()
        written += _attribute(hybrid, "param_to_fp32_param").values()
        if sources:
            written += _refresh_masters_without_shard(distributed_optimizer, sources)
    if not written:
        return HybridParamSync()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    num_bytes = sum(copy.numel() * copy.element_size() for copy in written)
    done = HybridParamSync(len(written), num_bytes, time.perf_counter() - started)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(
            "offloaded optimizer: %d parameter copies rebuilt from the loaded weights (%.1f MB in %.2f s)",
            done.parameters,
            done.num_bytes / 1e6,
            done.seconds,
        )
    return done


@torch.no_grad()
def check_hybrid_optimizer_param_copies(optimizer: Any, *, exact: bool, sample_size: int = 32) -> int:
    """Compare a sample of every master with its weight, so that stale copies can't go unnoticed.

    Args:
        optimizer: A Megatron optimizer, a chain of them, or None.
        exact: True after a weights-only load: masters equal the weights. False after optimizer state was restored
            (or FP32 weights became the masters): masters round to the weights.
        sample_size: Elements compared in each parameter, evenly spaced.

    Returns:
        The number of parameters compared; 0 where nothing is hybrid.

    Raises:
        RuntimeError: A master differs; names the parameter, the rank and both values.
    """
    compared = 0
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        inner_of = _attribute(distributed_optimizer.optimizer, "param_to_inner_param")
        for model_param, shard, weight in _weights_and_shards(distributed_optimizer):
            if weight is None or weight.numel() == 0:
                continue
            stride = max(1, weight.numel() // sample_size)
            expected = weight[::stride]
            master = _lookup(inner_of, shard, distributed_optimizer, model_param)[::stride].to(expected.device)
            found = master.float() if exact else master.to(expected.dtype).float()
            expected = expected.float()
            differs = (found != expected) & ~(found.isnan() & expected.isnan())
            compared += 1
            if differs.any():
                at = int(differs.nonzero()[0])
                raise RuntimeError(
                    f"the offloaded optimizer's copy of {_name_of(distributed_optimizer, model_param)} on rank "
                    f"{_rank()} is not the loaded weight: element {at * stride} of its slice is {master[at].item()!r} "
                    f"in the copy and {expected[at].item()!r} in the weight; the first step would overwrite the model "
                    f"(megatron-core {core_version}); call sync_hybrid_optimizer_param_copies after the load"
                )
    return compared


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of Core's, or an error that says which one is gone from which version."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(
            f"{type(owner).__name__}.{name} is missing in megatron-core {core_version}: the copies of an offloaded "
            f"optimizer can't be refreshed; use megatron-core {SUPPORTED_CORE} or optimizer.optimizer_cpu_offload=False"
        ) from error


def _weights_and_shards(distributed_optimizer: Any) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor | None]]:
    """(model parameter, the shard that HDO is given, this rank's slice of the weight) for each parameter.

    The weight's slice is None for a quantised parameter, whose values only Core's dequantiser can give.
    """
    groups = zip(
        _attribute(distributed_optimizer, "model_float16_groups"),
        _attribute(distributed_optimizer, "shard_float16_groups"),
        _attribute(distributed_optimizer, "shard_fp32_from_float16_groups"),
        strict=True,
    )
    for models, weights, mains in groups:
        for model_param, weight, main in zip(models, weights, mains, strict=True):
            yield model_param, (weight if main is None else main), (None if _is_quantised(model_param) else weight)
    groups = zip(
        _attribute(distributed_optimizer, "model_fp32_groups"),
        _attribute(distributed_optimizer, "shard_fp32_groups"),
        strict=True,
    )
    for models, weights in groups:
        for model_param, weight in zip(models, weights, strict=True):
            yield model_param, weight, weight


def _is_quantised(param: torch.Tensor) -> bool:
    from megatron.core.fp8_utils import is_float8tensor

    return is_float8tensor(param)


def _slice_of(distributed_optimizer: Any, model_param: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter's (flattened) values; `source` is the parameter or a tensor of its shape."""
    if _is_quantised(source):
        from megatron.core.fp8_utils import dequantize_fp8_tensor

        source = dequantize_fp8_tensor(source)
    if source.shape != model_param.shape:
        raise RuntimeError(
            f"{_name_of(distributed_optimizer, model_param)} has shape {tuple(model_param.shape)} in the model and "
            f"{tuple(source.shape)} in the state dict: pass the state dict that was loaded into this model"
        )
    part = _attribute(distributed_optimizer, "_get_model_param_range_map")(model_param)["param"]
    return source.detach().reshape(-1)[part.start : part.end]


def _refresh_device_shards(distributed_optimizer: Any, sources: dict[Any, torch.Tensor]) -> list[torch.Tensor]:
    """Level 1: the FP32 shards on the device. There are none when precision-aware."""
    written = []
    groups = zip(
        _attribute(distributed_optimizer, "model_float16_groups"),
        _attribute(distributed_optimizer, "shard_fp32_from_float16_groups"),
        strict=True,
    )
    for model_params, shards in groups:
        for model_param, shard in zip(model_params, shards, strict=True):
            if shard is not None:
                shard.data.copy_(_slice_of(distributed_optimizer, model_param, sources.get(model_param, model_param)))
                written.append(shard)
    return written


def _refresh_cpu_clones(hybrid: Any) -> list[torch.Tensor]:
    """Level 2: the CPU clones of the offloaded part, except those that level 3 writes as the same tensor."""
    fp32_copies = _attribute(hybrid, "param_to_fp32_param")
    written = []
    for param, clone in _attribute(hybrid, "gpu_params_map_cpu_copy").items():
        if fp32_copies.get(param) is not clone:
            clone.data.copy_(param.data, non_blocking=True)
            written.append(clone)
    return written


def _refresh_masters_without_shard(distributed_optimizer: Any, sources: dict[Any, torch.Tensor]) -> list[torch.Tensor]:
    """Precision-aware, with a state dict: its values, rather than the 16-bit weights, into the FP32 copies."""
    inner_of = _attribute(distributed_optimizer.optimizer, "param_to_inner_param")
    written = []
    for model_param, shard, _ in _weights_and_shards(distributed_optimizer):
        if shard.dtype != torch.float32:
            master = _lookup(inner_of, shard, distributed_optimizer, model_param)
            master.data.copy_(_slice_of(distributed_optimizer, model_param, sources[model_param]))
            written.append(master)
    return written


def _lookup(inner_of: Any, shard: torch.Tensor, distributed_optimizer: Any, model_param: torch.Tensor) -> torch.Tensor:
    if shard not in inner_of:
        raise RuntimeError(
            f"HybridDeviceOptimizer.param_to_inner_param of megatron-core {core_version} has no entry for "
            f"{_name_of(distributed_optimizer, model_param)}: use megatron-core {SUPPORTED_CORE}"
        )
    return inner_of[shard]


def _name_of(distributed_optimizer: Any, model_param: torch.Tensor) -> str:
    for chunk in _attribute(distributed_optimizer, "model_chunks"):
        for name, param in chunk.named_parameters():
            if param is model_param:
                return name
    return f"a parameter of shape {tuple(model_param.shape)}"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
