# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The names of classes, functions and dtypes that a configuration file may use.

This is an allowlist. Nothing else is imported or called, so that reading the configuration of an untrusted checkpoint
can't run code.
"""

import dataclasses
import enum
import functools
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_OWN_MODULES = re.compile(
    r"megatron\.bridge\.((training|data)\.([a-z_]+\.)*[a-z_]*config[a-z_]*"
    r"|training\.(config\.[a-z_]+|mixed_precision|comm_overlap)|(models|peft)\.[a-z0-9_.]+)"
)
"""Modules of ours whose dataclasses and enums may be named; they are imported when they are."""

_CLASS_PACKAGES = ("megatron.bridge.", "megatron.core.")
"""Packages whose dataclasses and enums may be named where the module is imported already: our own classes import what
they use of Megatron-Core's."""

_ENUMS = ("signal.Signals",)
"""Enums elsewhere that may be named."""

_ACTIVATIONS = (
    "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu softmax "
    "softplus softsign tanh"
).split()
_INITIALISERS = (
    "constant_ kaiming_normal_ kaiming_uniform_ normal_ ones_ orthogonal_ trunc_normal_ uniform_ xavier_normal_ "
    "xavier_uniform_ zeros_"
).split()
_FUNCTIONS = frozenset(
    [f"torch.nn.functional.{name}" for name in _ACTIVATIONS]
    + [f"torch.nn.init.{name}" for name in _INITIALISERS]
    + [f"torch.{name}" for name in ("relu", "sigmoid", "tanh")]
    + [f"megatron.core.activations.{name}" for name in ("fast_gelu", "quick_gelu", "squared_relu")]
    + ["megatron.bridge.models.activations.gelu_tanh", "megatron.bridge.models.activations.quick_gelu"]
    + ["megatron.core.fusions.fused_bias_geglu.quick_gelu", "megatron.core.utils.squared_relu"]
)
_FUNCTION_MODULES = ("megatron.bridge.models.layer_specs", "megatron.bridge.models.gpt_provider")
"""Modules of ours whose public functions may be named: the choices of layer specs."""

_DTYPE_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_public_names: dict[Any, str] = {}


def publish(module: str, *objects: Any) -> None:
    """Say that these classes or functions are named `module.Name` in files, wherever they are defined."""
    for published in objects:
        _public_names[published] = f"{module}.{published.__qualname__}"


def name_of(target: Any) -> str | None:
    """The name by which a class, function or dtype is found again, or None when it has none.

    Lambdas, functions inside functions and bound methods have none.
    """
    if isinstance(target, torch.dtype):
        return str(target)
    if isinstance(target, type | types.FunctionType) and target in _public_names:
        return _public_names[target]
    qualified, module = getattr(target, "__qualname__", None), _module_of(target)
    if qualified is None or module is None or "<" in qualified:
        return None
    name = f"{module}.{qualified}"
    return name if _attribute(name) is target else None


def _module_of(target: Any) -> str | None:
    """The module under which a class or function is public; torch's compiled functions say where they were made."""
    name = getattr(target, "__name__", "")
    for module in ("torch.nn.functional", "torch.nn.init", "torch"):
        if not isinstance(target, type) and getattr(sys.modules.get(module), name, None) is target:
            return module
    return getattr(target, "__module__", None)


def _attribute(name: str) -> Any:
    """What `module.Name` holds in a module that is already imported, else None."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def dtype_named(name: str) -> torch.dtype | None:
    """The torch dtype of that name ("bfloat16", "torch.bfloat16", "bf16"), or None."""
    short = name.removeprefix("torch.")
    found = getattr(torch, _DTYPE_ALIASES.get(short, short), None)
    return found if isinstance(found, torch.dtype) else None


def function_named(name: str) -> Callable[..., Any] | None:
    """The function of that name if it may be named in a file, else None."""
    module, _, attribute = name.rpartition(".")
    if name not in _FUNCTIONS and (module not in _FUNCTION_MODULES or attribute.startswith("_")):
        return None
    found = _imported(module, attribute)
    is_function = callable(found) and not isinstance(found, type)
    own = name in _FUNCTIONS or getattr(found, "__module__", None) in _FUNCTION_MODULES
    return found if is_function and own else None


def class_named(name: str) -> type | None:
    """The dataclass or enum of that name if it may be named in a file, else None.

    Those of Megatron Bridge and Megatron-Core may. A script's own dataclass may when the script is already running
    and the class extends one of them.
    """
    module, _, attribute = name.rpartition(".")
    found = _imported(module, attribute) if _OWN_MODULES.fullmatch(module) else _attribute(name)
    if not isinstance(found, type):
        return None
    if name in _ENUMS or name.startswith(_CLASS_PACKAGES):
        return found if _is_config_type(found) else None
    return found if dataclasses.is_dataclass(found) and _extends_ours(found) else None


def _is_config_type(found: type) -> bool:
    """Whether a class only holds values."""
    return dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)


def _extends_ours(found: type) -> bool:
    """Whether a class extends a dataclass of Megatron Bridge or Megatron-Core."""
    bases = [base for base in found.__mro__[1:] if dataclasses.is_dataclass(base)]
    return any(base.__module__.startswith(_CLASS_PACKAGES) for base in bases)


def _imported(module: str, attribute: str) -> Any:
    """An attribute of a module that may be imported, or None when there is no such module or attribute."""
    if module not in sys.modules and not _module_exists(module):
        return None
    return getattr(importlib.import_module(module), attribute, None)


@functools.cache
def _module_exists(module: str) -> bool:
    """Whether a module can be found (this imports the packages around it, not the module)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
