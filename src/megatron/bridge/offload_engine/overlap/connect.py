# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Switch an offloaded optimizer to the overlapped step, and wait for its weights."""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import unwrap_model

from megatron.bridge.offload_engine.host_threads import HostThreads
from megatron.bridge.offload_engine.mixins import mix_in
from megatron.bridge.offload_engine.overlap import worker
from megatron.bridge.offload_engine.overlap.arrivals import Arrivals, ShardsArriveLater, weights_of_shards
from megatron.bridge.offload_engine.overlap.early_gradients import EarlyGradients, NormIsShared
from megatron.bridge.offload_engine.overlap.hybrid import OverlappedStep
from megatron.bridge.offload_engine.step import BucketedStep
from megatron.bridge.utils.distributed import any_rank, raise_on_all_ranks

logger = logging.getLogger(__name__)


def overlap_steps(
    chain: Any, optimizers: list[DistributedOptimizer], model: list[Any], threads: HostThreads | None
) -> None:
    """Let offloaded optimizers step while the next forward pass runs.

    Args:
        chain: What holds them all, from Core.
        optimizers: All that wrap a hybrid optimizer, already built and repaired.
        model: This rank's chunks, wrapped in DDP.
        threads: Of the host's step, from `plan_host_threads`.

    Raises:
        RuntimeError: A hybrid optimizer doesn't step in buckets.
    """
    arrivals = Arrivals(model)
    modules = [stage for chunk in model for stage in _stages(unwrap_model(chunk))]
    place = {param: at for at, (_, params) in reversed(list(enumerate(modules))) for param in params}
    stepper = worker.HostWorker(threads)
    for optimizer in optimizers:
        hybrid: Any = optimizer.optimizer
        if not isinstance(hybrid, BucketedStep):
            raise RuntimeError(
                f"optimizer.overlap_cpu_optimizer_step=true, but {type(hybrid).__name__} of this megatron-core doesn't "
                "step in buckets: set optimizer.overlap_cpu_optimizer_step=false"
            )
        part: Any = optimizer
        mix_in(part, ShardsArriveLater)
        mix_in(hybrid, OverlappedStep)
        part.arrivals, part.weight_of, hybrid.worker = arrivals, weights_of_shards(optimizer), stepper
        hybrid.place_in_forward = {shard: place.get(param, 0) for shard, param in part.weight_of.items()}
    if isinstance(chain, ChainedOptimizer):
        _cross_early(chain, arrivals, optimizers, model)
    if not any(chunk.ddp_config.overlap_param_gather for chunk in model):  # else Core's own hooks ask
        for module, params in modules:
            module.register_forward_pre_hook(_WaitFor(arrivals, params))
    for chunk in model:
        for module in unwrap_model(chunk).modules():
            module.register_state_dict_pre_hook(_WaitFor(arrivals, None))
            module.register_load_state_dict_pre_hook(_WaitFor(arrivals, None))  # else the step would overwrite them
    num_buckets = sum(len(part.optimizer.cpu_optimizers) for part in optimizers)
    logger.info(
        "the host's optimizer steps while the next forward pass runs: %d buckets, awaited at %d places of the model "
        "(optimizer.overlap_cpu_optimizer_step)",
        num_buckets,
        len(modules),
    )


def _cross_early(chain: Any, arrivals: Arrivals, parts: list[Any], model: list[Any]) -> None:
    """Let gradients cross as they are reduced."""
    mix_in(chain, NormIsShared)
    chain.early = EarlyGradients(arrivals, parts, model)
    for part in parts:
        part.early = part.optimizer.early = chain.early


@contextlib.contextmanager
def gradients_cross_early(optimizer: Any) -> Iterator[None]:
    """Within the context, which holds backward passes and the step, gradients cross to the host as they are reduced.

    Outside of it they cross in the step. Within it, change gradients in `finalize_model_grads_func` alone.

    Args:
        optimizer: What `setup_optimizer` returned; one whose steps don't overlap is left as it is.
    """
    early = getattr(optimizer, "early", None)
    if not isinstance(early, EarlyGradients):
        yield
        return
    early.is_wanted = True
    try:
        yield
    finally:
        early.is_wanted = False


def wait_for_overlapped_step(optimizer: Any) -> None:
    """Wait until the last step's weights are there. Collective: for runs with overlapped steps, on all ranks.

    Args:
        optimizer: What `setup_optimizer` returned.

    Raises:
        Exception: The step on the host failed, here or on another rank. Raised on all ranks.
    """
    for arrivals in _arrivals_of(optimizer):
        arrivals.wait_for_all()
    raise_failures(optimizer)


def raise_failures(optimizer: Any) -> None:
    """Wait for the step on the host, and raise on all ranks what it raised on one. Collective; gathers no weights."""
    for arrivals in _arrivals_of(optimizer):
        arrivals.wait_for_host()
    failure = next((arrivals.failure for arrivals in _arrivals_of(optimizer) if arrivals.failure is not None), None)
    if any_rank(failure is not None):
        with raise_on_all_ranks("the optimizer's step on the host"):
            if failure is not None:
                raise failure


def _arrivals_of(optimizer: Any) -> Iterator[Arrivals]:
    if isinstance(optimizer, ChainedOptimizer):
        for child in optimizer.chained_optimizers:
            yield from _arrivals_of(child)
    elif isinstance(optimizer, ShardsArriveLater):
        yield optimizer.arrivals


class _WaitFor:
    """A hook that waits for some of a model's parameters, or for all. It doesn't keep their optimizer alive."""

    def __init__(self, arrivals: Arrivals, params: list[torch.Tensor] | None) -> None:
        self._arrivals, self._params = weakref.ref(arrivals), params

    def __call__(self, *_: Any) -> None:
        arrivals = self._arrivals()
        if arrivals is None:
            return
        if self._params is None:
            arrivals.wait_for_all()
        else:
            arrivals.wait_for(self._params)


def _stages(chunk: torch.nn.Module) -> list[tuple[torch.nn.Module, list[torch.Tensor]]]:
    """(module, parameters that it waits for): the chunk with all that is in no list of layers, then each layer.

    A layer waits for all of its parameters, because modules in it may read those of others.
    """
    stages: list[tuple[torch.nn.Module, list[torch.Tensor]]]
    stages = [(layer, [*layer.parameters()]) for layer in _layers(chunk)]
    of_layers = {param for _, params in stages for param in params}
    return [(chunk, [param for param in chunk.parameters() if param not in of_layers]), *stages]


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _layers(child)
