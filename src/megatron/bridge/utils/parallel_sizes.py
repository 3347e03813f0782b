# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How many ranks share a model, in which ways: the fields that say so, and what multiplies with what."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParallelSize:
    """A field of a model that says how many ranks share a part of it."""

    short: str
    """As in `TP 2`."""

    axis: str
    """Core's name of it."""

    meaning: str
    """What it counts, in words."""

    default: int | None = 1
    """Its value where nothing is shared so."""

    @property
    def field(self) -> str:
        """The field's name, which is also that of Core's argument."""
        return f"{self.axis}_parallel_size"

    @property
    def word(self) -> str:
        """As in `tensor 2`."""
        return self.axis.removesuffix("_model").replace("_", " ")


PARALLEL_SIZES = {
    size.short: size
    for size in (
        ParallelSize("TP", "tensor_model", "processes that share each matrix"),
        ParallelSize("PP", "pipeline_model", "processes that share the layers"),
        ParallelSize("VP", "virtual_pipeline_model", "parts of each process's layers", default=None),
        ParallelSize("CP", "context", "processes that share each sequence"),
        ParallelSize("EP", "expert_model", "processes that share the experts"),
        ParallelSize("ETP", "expert_tensor", "processes that share each expert's matrices (default: TP)", default=None),
    )
}
"""All of them, by their short names. VP and ETP may be None: no virtual stages, and as many as TP."""

SHARE_A_COPY = ("TP", "PP", "CP")
"""Those that multiply to the ranks that hold one copy of the model."""


def parallel_sizes(model: Any) -> dict[str, Any]:
    """A model's parallel sizes, by field, as Core's `initialize_model_parallel` takes them."""
    return {size.field: getattr(model, size.field) for size in PARALLEL_SIZES.values()}


def dense_factors(sizes: Mapping[str, int | None]) -> dict[str, int]:
    """What multiplies to the ranks that hold one copy of the model; a size left out is 1."""
    names = [PARALLEL_SIZES[short].field for short in SHARE_A_COPY]
    return {name: sizes.get(name) or 1 for name in names}


def expert_factors(sizes: Mapping[str, int | None]) -> dict[str, int]:
    """What multiplies to the ranks that hold one copy of all experts; a size left out is 1, and ETP is then TP."""
    tensor, pipeline, expert, expert_tensor = (PARALLEL_SIZES[short].field for short in ("TP", "PP", "EP", "ETP"))
    return {
        expert: sizes.get(expert) or 1,
        expert_tensor: sizes.get(expert_tensor) or sizes.get(tensor) or 1,
        pipeline: sizes.get(pipeline) or 1,
    }


def row_divisor(model: Any) -> int:
    """What the length of each row, and with context parallelism of each sample packed in it, is a multiple of."""
    tensor = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return tensor * (2 * model.context_parallel_size if model.context_parallel_size > 1 else 1)


def ranks_of_one_copy(sizes: Mapping[str, int | None]) -> int:
    """The fewest ranks that one copy of a model takes, by its sizes."""
    return math.lcm(math.prod(dense_factors(sizes).values()), math.prod(expert_factors(sizes).values()))


def in_words(factors: Mapping[str, int]) -> str:
    """Such as `tensor_model_parallel_size=2 x pipeline_model_parallel_size=1 = 2`."""
    return " x ".join(f"{name}={size}" for name, size in factors.items()) + f" = {math.prod(factors.values())}"


def sizes_of_groups() -> dict[str, int | None]:
    """The sizes that Core's process groups were built for, by field."""
    from megatron.core import parallel_state

    return {
        size.field: getattr(parallel_state, f"get_{size.axis}_parallel_world_size")()
        for size in PARALLEL_SIZES.values()
    }
