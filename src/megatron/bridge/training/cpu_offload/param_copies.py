# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Keep the parameter copies of Megatron-Core's offloaded optimizer equal to the weights that were loaded.

`HybridDeviceOptimizer` (Core 0.16.1 to 0.20, `megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py`) copies the
weights when it is built and steps on these copies. A checkpoint that is loaded later changes the weights only:

    model weight (bf16 or fp16, device)
      | this data-parallel rank's slice
      v
    [1] FP32 shard, device      DistributedOptimizer.shard_fp32_from_float16_groups; None when precision-aware
      v
    [2] CPU copy                HybridDeviceOptimizer.gpu_params_map_cpu_copy, for the offloaded fraction
    [3] FP32 copy               HybridDeviceOptimizer.param_to_fp32_param; empty unless precision-aware, where an
                                offloaded parameter's [3] is the same tensor as its [2]

For this optimizer Core's own `reload_model_params()` refreshes only [3] and returns. The first step then writes the
old copies over the loaded weights (NVIDIA-NeMo/RL #2371, NVIDIA/Megatron-LM PR 5071, NVIDIA-NeMo/Megatron-Bridge
PR 3949).
This module imports only torch and megatron-core, so that it can be used elsewhere unchanged.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import __version__ as core_version
from megatron.core import fp8_utils
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    FP32Optimizer,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)

logger = logging.getLogger(__name__)

SUPPORTED_CORE = "0.16.1 to 0.20"


@dataclass(frozen=True)
class HybridParamSync:
    """What a sync refreshed; false if no optimizer was hybrid."""

    parameters: int = 0
    """Number of copies written, over all levels."""

    num_bytes: int = 0
    """Number of bytes written."""

    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.parameters > 0


def find_hybrid_optimizers(optimizer: MegatronOptimizer | None) -> list[DistributedOptimizer]:
    """The distributed optimizers that wrap a `HybridDeviceOptimizer`, inside any chain and any `MimoOptimizer`.

    Stub optimizers (on a rank without trainable parameters) and optimizers without offload are not included.

    Raises:
        RuntimeError: A `HybridDeviceOptimizer` is wrapped by something other than a distributed optimizer
            (NVIDIA/Megatron-LM #4042), or an optimizer keeps its sub-optimizers where this function can't find them.
    """
    return [found for found, _ in _hybrids(optimizer)]


@torch.no_grad()
def rebuild_param_copies(
    optimizer: MegatronOptimizer | None, state_dict: Mapping[str, object] | None = None
) -> HybridParamSync:
    """Write every copy that an offloaded optimizer steps on, once, from the weights or from a state dict.

    `training.checkpointing.sync_hybrid_optimizer_param_copies` is the public function. It documents when to call it,
    its arguments, result and errors. Copies in pinned host memory are written asynchronously on the current stream,
    which is synchronized once, at the end. Besides the copies, only one parameter's values are in memory at a time.
    """
    started = time.perf_counter()
    num_written = num_bytes = 0
    for distributed_optimizer, root in _hybrids(optimizer):
        sources = _sources(distributed_optimizer, state_dict, root)
        for entry in _entries(distributed_optimizer):
            if not entry.copies:
                continue  # it is its own master
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
def check_hybrid_optimizer_param_copies(
    optimizer: MegatronOptimizer | None, *, exact: bool, sample_size: int = 32
) -> int:
    """Compare a sample of every copy with its weight, and raise if a copy is stale.

    All samples are copied to the host in one transfer. Quantised weights are compared only if `exact`: rounding a
    master doesn't reproduce their bits.

    Args:
        optimizer: A Megatron optimizer of any kind, or None.
        exact: True after a weights-only load: masters must equal the weights. False after a load of optimizer state,
            or of FP32 values into the masters: masters must round to the weights.
        sample_size: Number of evenly spaced elements to compare in each parameter.

    Returns:
        The number of parameters compared; 0 if no optimizer is hybrid.

    Raises:
        RuntimeError: A copy differs. Names the parameter, the rank and both values.
    """
    compared = 0
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        samples: dict[Any, list[_Sample]] = {}
        for entry in _entries(distributed_optimizer):
            is_quantised = _is_quantised(entry.param)
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
                # Samples of one dtype and device are compared at once. A kernel launch and a wait for each parameter
                # would cost far more.
                alike = samples.setdefault((dtype, copy.device), [])
                alike.append(_Sample(entry.param, stride, weight, copy[::stride]))
        for alike in samples.values():
            _compare(distributed_optimizer, alike, exact=exact)
    return compared


class _Entry(NamedTuple):
    """One parameter and the optimizer's copies of this rank's slice of it."""

    param: torch.Tensor
    """The model's parameter, not sliced."""

    copies: tuple[torch.Tensor, ...]
    """FP32 copies of the slice, each tensor once, in the order of levels 1, 2 and 3 of the module's diagram. Empty for
    a parameter that is FP32 itself and stays on the device."""

    stepped_on: torch.Tensor
    """The tensor that a sub-optimizer steps on: the last copy, or a view of the weight."""


class _Sample(NamedTuple):
    """Evenly spaced elements of a weight and of one of its copies, each on its own device."""

    param: torch.Tensor
    stride: int
    weight: torch.Tensor
    copy: torch.Tensor


def _leaves(optimizer: Any, root: Any = None) -> Iterator[tuple[Any, Any]]:
    """Each optimizer that contains no other optimizer, with the root over whose chunks a state dict counts.

    A `MimoOptimizer` (Core 0.19 and later, recognised by its `module_infos`) is not a chain. It has an optimizer for
    each of its modules, and each module numbers its own chunks.
    """
    if isinstance(optimizer, ChainedOptimizer):
        for child in _attribute(optimizer, "chained_optimizers"):
            yield from _leaves(child, root or optimizer)
    elif isinstance(getattr(optimizer, "module_infos", None), Mapping):
        for info in optimizer.module_infos.values():
            if _attribute(info, "is_active"):  # otherwise the module is on other ranks
                yield from _leaves(_attribute(info, "optimizer"))
    elif optimizer is not None:
        yield optimizer, root or optimizer


def _hybrids(optimizer: Any) -> list[tuple[DistributedOptimizer, Any]]:
    """The distributed optimizers around a `HybridDeviceOptimizer`, each with its root. Checks all before returning."""
    found = [(leaf, root) for leaf, root in _leaves(optimizer) if isinstance(_wrapped(leaf), HybridDeviceOptimizer)]
    for leaf, _ in found:
        if not isinstance(leaf, DistributedOptimizer):
            raise RuntimeError(
                f"HybridDeviceOptimizer inside {type(leaf).__name__}: only the distributed optimizer's copies can be "
                "refreshed; set optimizer.use_distributed_optimizer=True and ddp.use_distributed_optimizer=True"
            )
    return found


def _wrapped(leaf: Any) -> Any:
    """The torch optimizer that a Megatron optimizer wraps; None for a stub.

    Raises:
        RuntimeError: It wraps none and is not a stub, so it keeps its optimizers in an unknown place.
    """
    if isinstance(leaf, torch.optim.Optimizer):
        return leaf
    inner = _attribute(leaf, "optimizer")
    may_be_a_stub = isinstance(leaf, MixedPrecisionOptimizer | FP32Optimizer)
    if inner is None and not may_be_a_stub and not getattr(leaf, "is_stub_optimizer", False):
        raise RuntimeError(
            f"{type(leaf).__name__} of megatron-core {core_version} keeps its optimizers where they can't be found, "
            f"and one may be offloaded: use megatron-core {SUPPORTED_CORE} or optimizer.optimizer_cpu_offload=False"
        )
    return inner


def _model_chunks(root: Any) -> list[Any]:
    """The chunks of all optimizers of a chain, each once, in the order in which Core numbers them."""
    leaves = [leaf for leaf, _ in _leaves(root) if isinstance(leaf, DistributedOptimizer)]
    return list(dict.fromkeys(chunk for leaf in leaves for chunk in _attribute(leaf, "model_chunks")))


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of one of Core's objects; an error names the attribute and Core's version if it is missing."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(
            f"{type(owner).__name__}.{name} is missing in megatron-core {core_version}: the copies of an offloaded "
            f"optimizer can't be refreshed; use megatron-core {SUPPORTED_CORE} or set "
            "optimizer.optimizer_cpu_offload=False"
        ) from error


def _entries(distributed_optimizer: DistributedOptimizer) -> Iterator[_Entry]:
    """Every parameter of a distributed optimizer with its copies.

    Raises:
        RuntimeError: A parameter has no tensor in a sub-optimizer, or a sub-optimizer's tensor has no parameter.
    """
    hybrid = distributed_optimizer.optimizer
    clones, fp32_copies = _attribute(hybrid, "gpu_params_map_cpu_copy"), _attribute(hybrid, "param_to_fp32_param")
    inner_of = _attribute(hybrid, "param_to_inner_param")
    known = 0
    for param, weight, main in _params_and_shards(distributed_optimizer):
        given = weight if main is None else main  # the tensor that the hybrid optimizer was built with
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
    """(parameter, view of this rank's slice, FP32 shard) triples; in precision-aware mode the FP32 shard is None."""
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
    distributed_optimizer: DistributedOptimizer, state_dict: Mapping[str, object] | None, root: Any
) -> dict[torch.Tensor, torch.Tensor] | None:
    """The state dict's tensor for each parameter, matched by name as Core does it."""
    if state_dict is None:
        return None
    chunks = _model_chunks(root)
    if len(chunks) > 1:
        # Core numbers the chunks of each optimizer from 0. The state dict numbers those of the whole model.
        prefix = "model" if "model0" in state_dict else "model_"
        numbers = [chunks.index(chunk) for chunk in _attribute(distributed_optimizer, "model_chunks")]
        for number in numbers:
            if f"{prefix}{number}" not in state_dict:
                raise RuntimeError(
                    f"the state dict has no {prefix}{number}, and the model has {len(chunks)} chunks: pass the state "
                    "dict that was loaded into this model"
                )
        state_dict = {f"{prefix}{at}": state_dict[f"{prefix}{number}"] for at, number in enumerate(numbers)}
    return _attribute(distributed_optimizer, "_build_model_param_to_state_dict_param_map")(state_dict)


def _values(
    distributed_optimizer: DistributedOptimizer, param: torch.Tensor, sources: dict[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """This rank's slice of a parameter's values, flat: from the state dict if there is one, else from the weight."""
    source = param if sources is None else sources[param]
    if source.shape != param.shape:
        raise RuntimeError(
            f"{_name_of(distributed_optimizer, param)} has shape {tuple(param.shape)} in the model and "
            f"{tuple(source.shape)} in the state dict: pass the state dict that was loaded into this model"
        )
    if _is_quantised(source):
        source = _dequantised(source)
    owned = _owned(distributed_optimizer, param)
    return source.detach().reshape(-1)[owned.start : owned.end]


def _owned(distributed_optimizer: DistributedOptimizer, param: torch.Tensor) -> Any:
    """The range (`start`, `end`, `size`) of a parameter's flat elements that this data-parallel rank owns."""
    return _attribute(distributed_optimizer, "_get_model_param_range_map")(param)["param"]


def _is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a weight is quantised. Uses Core's predicate, which from 0.19 on includes grouped weights."""
    return getattr(DistributedOptimizer, "_is_distopt_quantized_param", fp8_utils.is_float8tensor)(tensor)


def _dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """A quantised tensor's values, as Core's distributed optimizer reads them."""
    is_grouped = getattr(DistributedOptimizer, "_is_grouped_quantized_tensor", None)
    if is_grouped is not None and is_grouped(tensor):
        return tensor.float()
    return fp8_utils.dequantize_fp8_tensor(tensor)


def _write(copies: tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
    """Write each copy once, if possible from a tensor on the same device that already has the values."""
    written = [values]
    for copy in copies:
        nearest = next((tensor for tensor in written if tensor.device == copy.device), written[-1])
        copy.data.copy_(nearest, non_blocking=copy.is_pinned())
        written.append(copy)


def _compare(distributed_optimizer: DistributedOptimizer, alike: list[_Sample], *, exact: bool) -> None:
    """Compare samples of one dtype whose copies are on one device."""
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
