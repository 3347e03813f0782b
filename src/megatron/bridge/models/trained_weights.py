# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Check which weights are trained, and that the ranks agree.

Core reduces gradients over the ranks that hold the same weight or parts of it. If one of them has frozen the weight,
they wait forever, or sum gradients of different weights. Ranks with different experts may train different ones, or
none, but must still take part in the backward exchange of tokens.
"""

import hashlib
from collections import defaultdict
from typing import Any

from megatron.core import mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron.bridge.models.input_gradients import enable_input_gradients_always
from megatron.bridge.utils.distributed import all_gathered, format_ranks, raise_on_all_ranks

Holders = tuple[Any, ...]
"""Key of the ranks that hold the same weights or parts of them: a stage, or an expert-parallel rank in a stage."""

_TIED = ("tied embedding",)


def check_trained_weights(model: list[Any]) -> None:
    """Check that some weights are trained, and that all ranks that share a weight train it. Collective.

    Args:
        model: This rank's chunks, wrapped. If only some ranks train experts, all get gradients at their inputs.

    Raises:
        ValueError: All weights are frozen, or a weight is frozen only on some of its ranks, or was frozen after it was
            wrapped.
    """
    check_trained_as_wrapped(model)
    own = _trained_names(model)
    by_rank = all_gathered({holders: (_digest(names), bool(names)) for holders, names in own.items()})
    if not any(is_trained for of_rank in by_rank for _, is_trained in of_rank.values()):
        raise ValueError(
            "there is nothing to train: every weight of the model has requires_grad=False on every rank; let some be "
            "trained, or set validation.skip_train=true to evaluate only"
        )
    digests = defaultdict(set)
    for of_rank in by_rank:
        for holders, (digest, _) in of_rank.items():
            digests[holders].add(digest)
    _check_agreement({holders: own.get(holders) for holders, found in digests.items() if len(found) > 1})
    experts = {holders: found for holders, found in digests.items() if _are_experts_of_this_stage(holders)}
    if len(set().union(*experts.values())) > 1:
        for chunk in map(unwrap_model, model):
            enable_input_gradients_always(chunk)


def check_trained_as_wrapped(model: list[Any]) -> None:
    """Refuse weights that were frozen, or unfrozen, after the data-parallel wrapper had made their buffers. Collective.

    Raises:
        ValueError: Names the first.
    """
    with raise_on_all_ranks("looking for weights frozen too late"):
        for chunk in model:
            if isinstance(chunk, DistributedDataParallel):
                _check_chunk_as_wrapped(chunk)


def _check_chunk_as_wrapped(chunk: DistributedDataParallel) -> None:
    for name, param in unwrap_model(chunk).named_parameters():
        has_buffer = param in chunk.param_to_bucket_group
        if has_buffer != param.requires_grad:
            was, now = ("trained", "False") if has_buffer else ("frozen", "True")
            raise ValueError(
                f"{name} has requires_grad={now}, and was {was} when the data-parallel wrapper made its gradient "
                "buffers: freeze weights before that, in a hook given to cfg.model.register_pre_wrap_hook"
            )


def _trained_names(model: list[Any]) -> dict[Holders, list[str]]:
    """The names of the weights that this rank trains, by the ranks that share them."""
    stage = mpu.get_pipeline_model_parallel_rank()
    names: dict[Holders, list[str]] = {}
    holders: Holders
    for index, chunk in enumerate(map(unwrap_model, model)):
        for name, param in chunk.named_parameters():
            if getattr(param, "shared_embedding", False):  # Core's mark, on the first and the last stage
                holders, name = _TIED, "the tied embedding"
            elif getattr(param, "allreduce", True):  # False: not the same on all data-parallel ranks
                holders = ("weights", stage)
            else:
                holders = ("experts", stage, mpu.get_expert_model_parallel_rank())
            of_holders = names.setdefault(holders, [])
            if param.requires_grad:
                of_holders.append(f"chunk {index}'s {name}" if len(model) > 1 and holders != _TIED else name)
    return names


def _digest(names: list[str]) -> str:
    """A digest of the names, to be compared between ranks: there may be thousands of names and of ranks."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _check_agreement(differing: dict[Holders, list[str] | None]) -> None:
    """Raise for the first weight that is frozen only on some of its ranks. Collective if there is one."""
    if not differing:
        return
    by_rank = all_gathered(differing)
    holders = next(iter(differing))
    names = {rank: found[holders] for rank, found in enumerate(by_rank) if found[holders] is not None}
    all_names = sorted({name for found in names.values() for name in found})
    name = next(name for name in all_names if any(name not in found for found in names.values()))
    trained = [rank for rank, found in names.items() if name in found]
    frozen = [rank for rank in names if rank not in trained]
    raise ValueError(
        f"{name} is trained on {format_ranks(trained)} and frozen on {format_ranks(frozen)}, which hold the same "
        "weight or parts of it: freeze it on all of them or on none"
    )


def _are_experts_of_this_stage(holders: Holders) -> bool:
    return holders[:2] == ("experts", mpu.get_pipeline_model_parallel_rank())
