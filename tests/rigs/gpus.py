# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which tests see CUDA: those marked gpu. All others run on the simulated accelerator, on every machine.

A process asks the driver once which devices there are, so they are hidden from the tests' own process before anything
is imported, and from all that it starts. A test marked gpu sees them in its ranks and in what else it starts; its own
code in pytest's process must not ask for them.

The simulated accelerator compiles nothing, but Core asks torch to as it is imported, which imports the compiler: a
fifth of the time that a process takes to start. Where devices are hidden, torch is told not to.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

VARIABLE = "CUDA_VISIBLE_DEVICES"
GIVEN = "CUDA_VISIBLE_DEVICES_OF_GPU_TESTS"
"""The first one's value as pytest was started, where it had one; pytest-xdist's workers find it here."""
UNSET = "unset"
NO_COMPILER = "TORCHDYNAMO_DISABLE"
_is_gpu_test = False


def hide() -> None:
    """From this process, which has not asked for them yet, and those that it starts."""
    os.environ[VARIABLE] = ""
    os.environ[NO_COMPILER] = "1"


def hide_from_tests() -> None:
    """As pytest or a worker of it starts: remember what the machine shows, and hide it."""
    os.environ.setdefault(GIVEN, os.environ.get(VARIABLE, UNSET))
    hide()


@contextlib.contextmanager
def gpu_test() -> Iterator[None]:
    """Inside, ranks and other processes that are started see the devices."""
    global _is_gpu_test
    _is_gpu_test = True
    show()
    try:
        yield
    finally:
        _is_gpu_test = False
        hide()


@contextlib.contextmanager
def shared_fixture() -> Iterator[None]:
    """Inside, what several tests share is made: on the simulated accelerator, whichever of them is the first."""
    global _is_gpu_test
    before, _is_gpu_test = _is_gpu_test, False
    hide()
    try:
        yield
    finally:
        _is_gpu_test = before
        if before:
            show()


def show() -> None:
    """To processes that this one starts."""
    os.environ.pop(NO_COMPILER, None)
    if os.environ[GIVEN] == UNSET:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = os.environ[GIVEN]


def device_of_ranks(world_size: int) -> str:
    """Where the ranks of the running test compute: "cuda" or "cpu". The test is skipped where it lacks devices."""
    return choose(world_size, is_gpu_test=_is_gpu_test, count=count() if _is_gpu_test else 0)


def choose(world_size: int, *, is_gpu_test: bool, count: int) -> str:
    """Never two ranks on one GPU, and no GPU for a test that doesn't ask for one."""
    if not is_gpu_test:
        return "cpu"
    if count < world_size:
        pytest.skip(f"needs {world_size} CUDA device(s), one a rank; this machine has {count}")
    return "cuda"


@functools.cache
def count() -> int:
    """How many devices a test marked gpu sees, asked in such a test, by a process of its own: this one never asks."""
    import torch

    if not torch.backends.cuda.is_built():
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    return int(shown.stdout.split()[-1])
