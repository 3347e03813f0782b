# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which device and backend a configuration gives, and what is refused."""

import subprocess
import sys

import pytest

from megatron.bridge.utils.device import choose_device
from tests.rigs.ranks import run_on_ranks

CHOICES = [
    ("auto", "auto", "cpu", "gloo", "torch finds no CUDA device"),
    ("auto", "gloo", "cpu", "gloo", "torch finds no CUDA device"),
    ("cpu", "auto", "cpu", "gloo", "dist.device=cpu"),
    ("cpu", "gloo", "cpu", "gloo", "dist.device=cpu"),
]
ON_CUDA = [
    ("auto", "auto", "cuda", "nccl", "torch finds a CUDA device"),
    ("auto", "gloo", "cuda", "gloo", "torch finds a CUDA device"),
    ("cuda", "auto", "cuda", "nccl", "dist.device=cuda"),
]
REFUSALS = [
    pytest.param("tpu", "auto", "dist.device='tpu': expected 'auto', 'cuda' or 'cpu'"),
    pytest.param("cpu", "mpi", "dist.distributed_backend='mpi': expected 'auto', 'nccl' or 'gloo'"),
    pytest.param("cpu", "nccl", "dist.distributed_backend='nccl' needs CUDA.*dist.distributed_backend=auto or gloo"),
    pytest.param("auto", "nccl", "dist.distributed_backend='nccl' needs CUDA"),
    pytest.param("cuda", "auto", "dist.device='cuda', but torch finds no CUDA device: set dist.device="),
]


@pytest.mark.parametrize(("device", "backend", "kind", "chosen_backend", "reason"), CHOICES)
def test_choose_device(device, backend, kind, chosen_backend, reason):
    choice = choose_device(device, backend)
    assert (choice.type, choice.backend, choice.reason) == (kind, chosen_backend, reason)


def _chosen(device, backend):
    choice = choose_device(device, backend)
    return choice.type, choice.backend, choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize(("device", "backend", "kind", "chosen_backend", "reason"), ON_CUDA)
def test_choose_device_on_a_machine_with_cuda(device, backend, kind, chosen_backend, reason):
    assert run_on_ranks(_chosen, 1, device, backend) == [(kind, chosen_backend, reason)]


@pytest.mark.parametrize(("device", "backend", "message"), REFUSALS)
def test_choose_device_refuses(device, backend, message):
    with pytest.raises(ValueError, match=message):
        choose_device(device, backend)


IN_A_PROCESS_OF_ITS_OWN = """
from megatron.bridge.utils import device
from megatron.bridge.utils.device import DeviceChoice, enter_device

assert not device.is_simulated()
first = enter_device(device.choose_device("cpu"))
assert device.is_simulated() and device.current_device().type == "cuda"
assert enter_device() is first, "the device already entered is kept"
assert enter_device(device.choose_device("cpu")) is first, "entering twice does nothing"
device.synchronize()
assert device.peak_memory_bytes() > 1 << 20
try:
    enter_device(DeviceChoice("cuda", "nccl", "asked for"))
except RuntimeError as error:
    assert "already computes on cpu (dist.device=cpu); cuda (asked for) needs a new process" in str(error), error
else:
    raise SystemExit("a second device was entered")
print("entered", first.backend)
"""


@pytest.mark.any_core
def test_a_process_enters_one_device_once():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "entered gloo"
