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
from typing import Any, NamedTuple

import torch
from megatron.core import __version__ as core_version
from megatron.core import fp8_utils
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

logger = logging.getLogger(__name__)

SUPPORTED_CORE = "0.16.1 to 0.19.2"


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


def find_hybrid_optimizers(optimizer: Any) -> list[DistributedOptimizer]:
    """The distributed optimizers that wrap a `HybridDeviceOptimizer`, at any depth of `ChainedOptimizer`.

    Stub optimizers (a rank without trainable parameters) and optimizers without offload are left out.

    Raises:
        RuntimeError: A `HybridDeviceOptimizer` is wrapped by something else, whose parameters it doesn't know
            (NVIDIA/Megatron-LM #4042).
    """
    found = [leaf for leaf in _unchained(optimizer) if isinstance(leaf.optimizer, HybridDeviceOptimizer)]
    for leaf in found:
        if not isinstance(leaf, DistributedOptimizer):
            raise RuntimeError(
                f"HybridDeviceOptimizer inside {type(leaf).__name__}: only the distributed optimizer's copies can be "
                "refreshed; set optimizer.use_distributed_optimizer=True and ddp.use_distributed_optimizer=True"
            )
    return found


@torch.no_grad()
def sync_hybrid_optimizer_param_copies(optimizer: Any, state_dict: dict[str, Any] | None = None) -> HybridParamSync:
    """Rebuild every parameter copy that an offloaded optimizer steps on from the model's weights.

    Call it after a load that brought weights but no optimizer state, never after one that restored the optimizer: its
    FP32 masters hold bits that the weights have lost. Moments, step counters and the loss scale stay as they are, so
    it is also right in the middle of a run. It holds no collective and may be called again at any time.

    Each copy is written once. A copy in pinned host memory is written asynchronously on the current stream, which is
    synchronised once, at the end. Beyond the copies themselves, one parameter's values are held at a time.

    Args:
        optimizer: A Megatron optimizer, a chain of them at any depth, or None.
        state_dict: The loaded model state (`{"model": …}`, or `model0`, `model1`, … per chunk; tensors of this rank's
            model-parallel shapes, on any device). Its tensors, of whatever precision, become the FP32 copies instead
            of the weights' 16-bit values.

    Returns:
        What was refreshed; false where nothing is hybrid.

    Raises:
        RuntimeError: Core's internals are not the ones this function knows; names the attribute or the parameter.
    """
    started = time.perf_counter()
    num_written = num_bytes = 0
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        sources = _sources(distributed_optimizer, state_dict, optimizer)
        for entry in _entries(distributed_optimizer):
            if not entry.copies:
                continue  # stepped on in place
            _write(entry.copies, _values(distributed_optimizer, entry.param, sources))
            num_written += len(entry.copies)
            num_bytes += sum(copy.numel() * copy.element_size() for copy in entry.copies)
    if not num_written:
        return HybridParamSync()
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    done = HybridParamSync(num_written, num_bytes, time.perf_counter() - started)
    if _rank() == 0:
        logger.info(
            "offloaded optimizer: %d parameter copies rebuilt from the loaded weights (%.1f MB in %.2f s)",
            done.parameters,
            done.num_bytes / 1e6,
            done.seconds,
        )
    return done


@torch.no_grad()
def check_hybrid_optimizer_param_copies(optimizer: Any, *, exact: bool, sample_size: int = 32) -> int:
    """Compare a sample of every copy with its weight, so that stale copies can't go unnoticed.

    The samples cross the host link together, once. A quantised weight is compared only where `exact`: no rounding of
    ours gives back its bits.

    Args:
        optimizer: A Megatron optimizer, a chain of them, or None.
        exact: True after a weights-only load: masters equal the weights. False after optimizer state was restored
            (or FP32 weights became the masters): masters round to the weights.
        sample_size: Elements compared in each parameter, evenly spaced.

    Returns:
        The number of parameters compared; 0 where nothing is hybrid.

    Raises:
        RuntimeError: A copy differs; names the parameter, the rank and both values.
    """
    compared = 0
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        samples: dict[Any, list[_Sample]] = {}
        for entry in _entries(distributed_optimizer):
            is_quantised = fp8_utils.is_float8tensor(entry.param)
            if is_quantised and not exact:
                continue
            whole = _dequantised(entry.param) if is_quantised else entry.param
            owned = _owned(distributed_optimizer, entry.param)
            if owned.size == 0:
                continue
            compared += 1
            stride = max(1, owned.size // sample_size)
            weight = whole.view(-1)[owned.start : owned.end : stride]
            dtype = weight.dtype
            for copy in entry.copies or (entry.stepped_on,):
                # One comparison for all that are alike: a launch and a wait for each parameter would cost far more.
                alike = samples.setdefault((dtype, copy.device), [])
                alike.append(_Sample(entry.param, stride, weight, copy[::stride]))
        for alike in samples.values():
            _compare(distributed_optimizer, alike, exact=exact)
    return compared


class _Entry(NamedTuple):
    """One parameter, and what the optimizer keeps of this rank's slice of it."""

    param: torch.Tensor
    """The model's parameter, whole."""

    copies: tuple[torch.Tensor, ...]
    """FP32 copies of the slice, each tensor once, from the weight downward: levels 1, 2 and 3 of the module's drawing.
    None for a parameter that is FP32 itself and stays on the device."""

    stepped_on: torch.Tensor
    """What a sub-optimizer steps on: the last copy, or a view of the weight."""


class _Sample(NamedTuple):
    """Evenly spaced elements of a weight and of one of its copies, each on its own device."""

    param: torch.Tensor
    stride: int
    weight: torch.Tensor
    copy: torch.Tensor


def _unchained(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, at any depth."""
    if optimizer is None:
        return []
    if isinstance(optimizer, ChainedOptimizer):
        return [leaf for child in _attribute(optimizer, "chained_optimizers") for leaf in _unchained(child)]
    return [optimizer]


def _model_chunks(optimizer: Any) -> list[Any]:
    """The model's chunks in order: those of the chain's optimizers, each once, as Core numbers them."""
    leaves = [leaf for leaf in _unchained(optimizer) if isinstance(leaf, DistributedOptimizer)]
    return list(dict.fromkeys(chunk for leaf in leaves for chunk in _attribute(leaf, "model_chunks")))


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of Core's, or an error that says which one is gone from which version."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(
            f"{type(owner).__name__}.{name} is missing in megatron-core {core_version}: the copies of an offloaded "
            f"optimizer can't be refreshed; use megatron-core {SUPPORTED_CORE} or optimizer.optimizer_cpu_offload=False"
        ) from error


def _entries(distributed_optimizer: DistributedOptimizer) -> Iterator[_Entry]:
    """Every parameter of a distributed optimizer with its copies.

    Raises:
        RuntimeError: A parameter without a sub-optimizer's tensor, or a sub-optimizer's tensor without a parameter.
    """
    hybrid = distributed_optimizer.optimizer
    clones, fp32_copies = _attribute(hybrid, "gpu_params_map_cpu_copy"), _attribute(hybrid, "param_to_fp32_param")
    inner_of = _attribute(hybrid, "param_to_inner_param")
    known = 0
    for param, weight, main in _params_and_shards(distributed_optimizer):
        given = weight if main is None else main  # what the hybrid optimizer was built with
        if given is None or given not in inner_of:
            raise _unknown(distributed_optimizer, param, "no entry in HybridDeviceOptimizer.param_to_inner_param")
        levels = (main, clones.get(given), fp32_copies.get(given))
        copies = tuple({id(level): level for level in levels if level is not None}.values())
        stepped_on = inner_of[given]
        if stepped_on is not (copies[-1] if copies else given):
            raise _unknown(distributed_optimizer, param, "a sub-optimizer's tensor that is none of its known copies")
        known += 1
        yield _Entry(param, copies, stepped_on)
    stepped = sum(len(group["params"]) for part in _attribute(hybrid, "sub_optimizers") for group in part.param_groups)
    if stepped != known:
        raise RuntimeError(
            f"HybridDeviceOptimizer of megatron-core {core_version} steps on {stepped} tensors, of which "
            f"{known} belong to known parameters: use megatron-core {SUPPORTED_CORE}"
        )


def _params_and_shards(
    distributed_optimizer: DistributedOptimizer,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """(parameter, view of this rank's slice, FP32 shard) for each; the FP32 shard is None when precision-aware."""
    for models, weights, mains in zip(
        _attribute(distributed_optimizer, "model_float16_groups"),
        _attribute(distributed_optimizer, "shard_float16_groups"),
        _attribute(distributed_optimizer, "shard_fp32_from_float16_groups"),
        strict=True,
    ):
        yield from zip(models, weights, mains, strict=True)
    for models, weights in zip(
        _attribute(distributed_optimizer, "model_fp32_groups"),
        _attribute(distributed_optimizer, "shard_fp32_groups"),
        strict=True,
    ):
        yield from ((param, weight, None) for param, weight in zip(models, weights, strict=True))


def _sources(
    distributed_optimizer: DistributedOptimizer, state_dict: dict[str, Any] | None, optimizer: Any
) -> dict[torch.Tensor, torch.Tensor] | None:
    """The state dict's tensor for each parameter, found by Core's own matching of names."""
    if state_dict is None:
        return None
    chunks = _model_chunks(optimizer)
    if len(chunks) > 1:
        # Core numbers the chunks of one optimizer from 0; the state dict numbers those of the model.
        prefix = "model" if "model0" in state_dict else "model_"
        own = _attribute(distributed_optimizer, "model_chunks")
        state_dict = {f"{prefix}{at}": state_dict[f"{prefix}{chunks.index(chunk)}"] for at, chunk in enumerate(own)}
    return _attribute(distributed_optimizer, "_build_model_param_to_state_dict_param_map")(state_dict)


def _values(
    distributed_optimizer: DistributedOptimizer, param: torch.Tensor, sources: dict[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """This rank's slice of a parameter's values, flat: the state dict's, or those of the weight itself."""
    source = param if sources is None else sources[param]
    if fp8_utils.is_float8tensor(source):
        source = _dequantised(source)
    if source.shape != param.shape:
        raise RuntimeError(
            f"{_name_of(distributed_optimizer, param)} has shape {tuple(param.shape)} in the model and "
            f"{tuple(source.shape)} in the state dict: pass the state dict that was loaded into this model"
        )
    owned = _owned(distributed_optimizer, param)
    return source.detach().reshape(-1)[owned.start : owned.end]


def _owned(distributed_optimizer: DistributedOptimizer, param: torch.Tensor) -> Any:
    """Core's range (`start`, `end`, `size`) of a parameter's flat elements that this data-parallel rank owns."""
    return _attribute(distributed_optimizer, "_get_model_param_range_map")(param)["param"]


def _dequantised(param: torch.Tensor) -> torch.Tensor:
    return fp8_utils.dequantize_fp8_tensor(param)


def _write(copies: tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
    """Write each copy once, from where the values already are on its side of the host link, if they are."""
    written = [values]
    for copy in copies:
        nearest = next((tensor for tensor in written if tensor.device == copy.device), written[-1])
        copy.data.copy_(nearest, non_blocking=copy.is_pinned())
        written.append(copy)


def _compare(distributed_optimizer: DistributedOptimizer, alike: list[_Sample], *, exact: bool) -> None:
    """Compare samples of one number format whose copies lie on one device."""
    weights, copies = torch.cat([one.weight for one in alike]), torch.cat([one.copy for one in alike])
    found = (copies if exact else copies.to(weights.dtype)).float().cpu()
    expected = weights.float().cpu()
    differs = (found != expected) & ~(found.isnan() & expected.isnan())
    if not differs.any():
        return
    at = int(differs.nonzero()[0])
    ends = torch.tensor([one.copy.numel() for one in alike]).cumsum(0)
    index = int(torch.searchsorted(ends, at, right=True))
    sample = alike[index]
    element = (at - int(ends[index]) + sample.copy.numel()) * sample.stride
    raise RuntimeError(
        f"the offloaded optimizer's copy of {_name_of(distributed_optimizer, sample.param)} on rank {_rank()} is not "
        f"the loaded weight: element {element} of its slice is {found[at].item()!r} in the copy and "
        f"{expected[at].item()!r} in the weight; the first step would overwrite the model (megatron-core "
        f"{core_version}); call sync_hybrid_optimizer_param_copies after the load"
    )


def _unknown(distributed_optimizer: DistributedOptimizer, param: torch.Tensor, what: str) -> RuntimeError:
    return RuntimeError(
        f"{_name_of(distributed_optimizer, param)} has {what} in megatron-core {core_version}: its copies can't be "
        f"refreshed; use megatron-core {SUPPORTED_CORE} or optimizer.optimizer_cpu_offload=False"
    )


def _name_of(distributed_optimizer: DistributedOptimizer, param: torch.Tensor) -> str:
    for chunk in _attribute(distributed_optimizer, "model_chunks"):
        for name, candidate in chunk.named_parameters():
            if candidate is param:
                return name
    return f"a parameter of shape {tuple(param.shape)}"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
