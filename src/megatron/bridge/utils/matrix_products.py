# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Compute products of 16-bit matrices in FP32 and round once, on CPUs without 16-bit arithmetic.

Without AVX-512 or AMX, torch multiplies bf16 matrices 10 to 30 times slower than FP32 ones; FP16 is slow on almost all
CPUs. Here torch's CPU kernels of `mm`, `bmm`, `addmm` and `baddbmm` convert their arguments, multiply in FP32 and round
the result. All other products (`linear`, `matmul`, `einsum`, and their backward passes) end in these four. The
overrides are below autograd, so the backward pass uses them too.

The result has the same error as that of a 16-bit unit, which also accumulates in FP32, but not always the same bits:
the order of the sums differs. A run is bit-exact only with runs that make the same choice, so all ranks, and every
resume, must make it alike.

The simulated accelerator installs the overrides. They don't affect CUDA tensors.
"""

import functools
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
SLOW = 3.0
"""A 16-bit product that takes more than this many times as long as in FP32 is slow. In 1,800 measurements on a busy
machine (load 16), CPUs with 16-bit arithmetic took 0.5 to 1.1 times as long, one without it 10 to 22 times. All ranks
and all starts must choose alike: with two choices on two ranks all losses were equal, but the moments were not."""

FORMS = ("mm", "bmm", "addmm", "baddbmm")
OTHER_OVERLOADS = ("mm.out", "bmm.out", "addmm.out", "baddbmm.out", "addmm_", "baddbmm_")

_library: torch.library.Library | None = None


def install(slowdown_of: Callable[[torch.dtype], float] | None = None) -> tuple[torch.dtype, ...]:
    """Compute products of slow 16-bit types in FP32 from now on in this process. Idempotent.

    Args:
        slowdown_of: Returns how many times slower than FP32 a type's products are. None: measure it.

    Returns:
        The types whose products this call has replaced.
    """
    if _library is not None:
        return ()
    slow = {dtype: times for dtype in SIXTEEN_BIT if (times := (slowdown_of or slowdown)(dtype)) > SLOW}
    if slow:
        told = ", ".join(f"{str(dtype).removeprefix('torch.')} ({times:.0f}x)" for dtype, times in slow.items())
        logger.info(
            "matrix products in FP32, rounded once, where this CPU's own are slower than FP32's: %s%s",
            told,
            ""
            if _hands_kernels_out()
            else f"; with torch {torch.__version__} (2.9 or newer is needed) not the forms out= and in place",
        )
        override(slow)
    return tuple(slow)


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times slower than in FP32 this CPU multiplies, over all memory layouts of the factors. Takes 0.1 s."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    total = 0.0
    for left_is_transposed, right_is_transposed in itertools.product((False, True), repeat=2):
        left = torch.ones(256, 64, dtype=dtype).t() if left_is_transposed else torch.ones(64, 256, dtype=dtype)
        right = torch.ones(256, 256, dtype=dtype)
        right = right.t() if right_is_transposed else right
        total += min(_timed(left, right) for _ in range(4))
    return total


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.thread_time()
    torch.mm(left, right)
    return time.thread_time() - began


def override(dtypes: Iterable[torch.dtype]) -> None:
    """Replace torch's CPU kernels of matrix products by ones that compute these types in FP32.

    Args:
        dtypes: Some of `SIXTEEN_BIT`. Products of other types still use torch's kernels.
    """
    global _library
    restore()
    _library = torch.library.Library("aten", "IMPL")
    converted = frozenset(dtypes)
    originals = _originals()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[\s\S]*[Oo]verriding a previously registered kernel")
        for name, original in originals.items():
            _library.impl(name, _product(name, original, converted), "CPU", with_keyset=True)


def restore() -> None:
    """Restore torch's own kernels."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _originals() -> dict[str, Callable[..., Any]]:
    """Torch's kernels by name. Each takes a dispatch key set as its first argument."""
    if _hands_kernels_out():
        kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (*FORMS, *OTHER_OVERLOADS)}
        return {name: kernel.call_boxed for name, kernel in kernels.items()}
    # The out= overloads are not overridden, so the others can be computed with them.
    return {name: functools.partial(_by_out, getattr(torch.ops.aten, name).out) for name in FORMS}


def _hands_kernels_out() -> bool:
    """Whether torch can return the kernel that an override replaces: from 2.9 on."""
    return hasattr(torch.library, "get_kernel")


def _by_out(overload: Any, keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return overload(*args, **kwargs, out=next(arg for arg in args if isinstance(arg, torch.Tensor)).new_empty(0))


def _product(name: str, original: Callable[..., Any], converted: frozenset[torch.dtype]) -> Callable[..., Any]:
    functional = getattr(torch.ops.aten, name.removesuffix(".out").removesuffix("_")).default
    is_in_place = name.endswith("_")

    def product(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = args[0].dtype
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        # The original refuses mixed types.
        if dtype not in converted or any(tensor.dtype != dtype for tensor in tensors):
            return original(keys, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            out = args[0] if is_in_place else kwargs.pop("out", None)
            result = functional(*(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)
            if out is None:
                return result.to(dtype)
            if out.shape != result.shape and not is_in_place:
                out.resize_(result.shape)
            return out.copy_(result)

    return product
