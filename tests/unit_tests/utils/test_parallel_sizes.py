# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The table of parallel sizes names Core's fields, arguments and groups, all of them, and multiplies the right ones."""

import inspect

import pytest
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, dense_factors, expert_factors, in_words, parallel_sizes


def test_every_size_is_a_field_of_cores_models_and_no_other_is():
    fields = {name for name in inspect.signature(ModelParallelConfig).parameters if name.endswith("_parallel_size")}
    assert {size.field for size in PARALLEL_SIZES.values()} == fields - {"hierarchical_context_parallel_size"}


@pytest.mark.parametrize("short", PARALLEL_SIZES)
def test_every_size_is_an_argument_of_cores_groups_and_has_a_getter(short):
    size = PARALLEL_SIZES[short]
    defaults = inspect.signature(parallel_state.initialize_model_parallel).parameters
    assert defaults[size.field].default == size.default
    assert callable(getattr(parallel_state, f"get_{size.axis}_parallel_world_size"))
    assert getattr(ModelParallelConfig(), size.field) in (size.default, 1)


def test_what_multiplies_with_what():
    model = ModelParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=5,
        context_parallel_size=7,
        expert_model_parallel_size=11,
        expert_tensor_parallel_size=13,
        pipeline_dtype="bf16",
    )
    sizes = parallel_sizes(model)
    assert sorted(sizes.values()) == [2, 3, 5, 7, 11, 13]
    assert sorted(dense_factors(sizes).values()) == [2, 3, 7]
    assert sorted(expert_factors(sizes).values()) == [3, 11, 13]
    assert expert_factors({**sizes, "expert_tensor_parallel_size": None})["expert_tensor_parallel_size"] == 2
    assert (set(dense_factors({}).values()), set(expert_factors({}).values())) == ({1}, {1})
    assert in_words({"a": 2, "b": 3}) == "a=2 x b=3 = 6"
