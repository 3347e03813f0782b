# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Functions and number formats by name."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu

from megatron.bridge.utils.activation_map import callable_to_str, dtype_to_str, str_to_callable, str_to_dtype


@pytest.mark.parametrize(
    ("name", "function"), [("silu", F.silu), ("SwiGLU", F.silu), ("gelu", F.gelu), ("relu2", squared_relu)]
)
def test_a_function_has_a_name_and_comes_back_by_it(name, function):
    assert str_to_callable(name) is function
    assert str_to_callable(callable_to_str(function)) is function


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_a_dtype_has_several_names(name):
    assert str_to_dtype(name) is torch.bfloat16
    assert dtype_to_str(str_to_dtype(name)) == "bfloat16"


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("half", torch.float16), ("int8", torch.int8)])
def test_other_dtypes(name, dtype):
    assert str_to_dtype(name) is dtype


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'slu' is unknown: expected one of elu"):
        str_to_callable("slu")
    with pytest.raises(ValueError, match="'nn' is unknown: expected bf16"):
        str_to_dtype("nn")
    with pytest.raises(ValueError, match="has no name here"):
        callable_to_str(len)
