# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on context parallelism, in which ranks share each row of a batch.

What Transformer Engine's attention can share depends on how ranks exchange keys and values. Whether there is such an
attention is asked when the run starts: a plan of a run's memory needs none.
"""

import math

from megatron.bridge.data.config import GPTSFTDatasetConfig
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.parallel_sizes import row_divisor

EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""What `model.cp_comm_type` may say, for all layers or for each."""


def _exchanges(cfg: RunSections) -> list[str]:
    """The ways in which layers exchange keys and values; None is Core's p2p."""
    said = cfg.model.cp_comm_type
    return [one or "p2p" for one in (said if isinstance(said, list | tuple) else [said])]


def check_context_parallel_divides_rows(cfg: RunSections, world_size: int) -> None:
    """Ranks that share a row get two chunks of it each, which with sequence parallelism tensor-parallel ranks share."""
    model, divisor = cfg.model, row_divisor(cfg.model)
    if model.context_parallel_size > 1 and model.seq_length % divisor:
        raise ValueError(
            f"model.seq_length={model.seq_length} with model.context_parallel_size={model.context_parallel_size}: "
            f"expected a multiple of {_product(cfg)} = {divisor}; change model.seq_length and dataset.seq_length"
        )


def check_context_parallel_divides_packed_samples(cfg: RunSections, world_size: int) -> None:
    """So is each sample of a packed row: it must be padded to a multiple."""
    dataset, divisor = cfg.dataset, row_divisor(cfg.model)
    if cfg.model.context_parallel_size == 1 or not isinstance(dataset, GPTSFTDatasetConfig):
        return
    if dataset.pack_size is None or dataset.packing is None or dataset.packing.pad_seq_to_mult % divisor == 0:
        return
    specs = "offline_packing_specs" if dataset.packed_sequence_specs is None else "packed_sequence_specs"
    wanted = math.lcm(dataset.packing.pad_seq_to_mult, divisor)
    raise ValueError(
        f"dataset.{specs}.pad_seq_to_mult={dataset.packing.pad_seq_to_mult} with model.context_parallel_size="
        f"{cfg.model.context_parallel_size}: each packed sample must be a multiple of {_product(cfg)} = {divisor}; set "
        f"dataset.{specs}.pad_seq_to_mult={wanted}"
    )


def _product(cfg: RunSections) -> str:
    tensor = " x tensor_model_parallel_size" if cfg.model.sequence_parallel else ""
    return f"2 x context_parallel_size{tensor}"


def check_exchange_suits_the_attention(cfg: RunSections, world_size: int) -> None:
    """Keys and values are exchanged in a way that the layers' attention knows."""
    model, exchanges = cfg.model, _exchanges(cfg)
    if model.context_parallel_size == 1:
        return
    said = f"model.cp_comm_type={model.cp_comm_type} with model.context_parallel_size={model.context_parallel_size}"
    unknown = [one for one in exchanges if one not in EXCHANGES]
    if unknown:
        raise ValueError(f"{said}: {unknown[0]!r} isn't known; set one of {', '.join(EXCHANGES)}")
    if isinstance(model.cp_comm_type, list | tuple) and len(exchanges) != model.num_layers:
        raise ValueError(f"{said}: expected one for each of model.num_layers={model.num_layers}, or one for all")
    if model.window_size is not None and set(exchanges) - {"a2a", "all_gather"}:
        raise ValueError(
            f"{said} and model.window_size={model.window_size}: Transformer Engine shares rows under a sliding window "
            "by a2a or all_gather alone; set model.cp_comm_type=all_gather"
        )
    if model.softmax_type != "vanilla" and set(exchanges) != {"a2a"}:
        raise ValueError(
            f"{said} and model.softmax_type={model.softmax_type}: Transformer Engine shares rows under attention sinks "
            "by a2a alone; set model.cp_comm_type=a2a"
        )


def check_heads_are_shared_evenly(cfg: RunSections, world_size: int) -> None:
    """An exchange by a2a deals heads to the ranks that share a row, and with p2p inside it to some of them."""
    model, exchanges = cfg.model, _exchanges(cfg)
    if model.context_parallel_size == 1:
        return
    ranks = {"a2a": model.context_parallel_size, "a2a+p2p": (model.hierarchical_context_parallel_sizes or [1])[0]}
    for exchange in (one for one in ranks if one in exchanges):
        for name, number in model.heads_by_field().items():
            if number % (model.tensor_model_parallel_size * ranks[exchange]):
                raise ValueError(
                    f"model.cp_comm_type={exchange} with model.{name}={number}: expected a multiple of model."
                    f"tensor_model_parallel_size={model.tensor_model_parallel_size} x {ranks[exchange]} ranks that "
                    "exchange heads; set model.cp_comm_type=p2p or all_gather, or change the sizes"
                )


def check_hierarchy_makes_up_context_parallelism(cfg: RunSections, world_size: int) -> None:
    """Two levels of ranks belong to a2a+p2p, and multiply to the context parallel size."""
    model, sizes = cfg.model, cfg.model.hierarchical_context_parallel_sizes
    wants_levels = model.context_parallel_size > 1 and "a2a+p2p" in _exchanges(cfg)
    if sizes is None and not wants_levels:
        return
    if sizes is None or len(sizes) != 2 or math.prod(sizes) != model.context_parallel_size or not wants_levels:
        raise ValueError(
            f"model.hierarchical_context_parallel_sizes={sizes} with model.context_parallel_size="
            f"{model.context_parallel_size} and model.cp_comm_type={model.cp_comm_type}: a2a+p2p, and it alone, takes "
            "two sizes that multiply to the context parallel size; set both options, or neither"
        )


CONTEXT_PARALLEL_RULES = (
    check_context_parallel_divides_rows,
    check_context_parallel_divides_packed_samples,
    check_exchange_suits_the_attention,
    check_heads_are_shared_evenly,
    check_hierarchy_makes_up_context_parallelism,
)
"""All of them, in the order in which they speak."""
