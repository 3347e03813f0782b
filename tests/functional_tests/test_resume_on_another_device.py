# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A run that resumes on another kind of device: from a GPU to a machine without one, and back, on two ranks."""

import contextlib
import logging
import random
import types
from unittest import mock

import numpy as np
import pytest
import torch

from tests.rigs.on_ranks import make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

STEPS, STOPS_AT = 4, 2
GPU_BYTES = 16


class _GpuGenerator:
    """The state of a CUDA generator, and its refusal of all others; what is drawn comes from the host all the same."""

    def __init__(self):
        self.state = torch.arange(GPU_BYTES, dtype=torch.uint8)

    def get(self, *_, **__):
        return self.state.clone()

    def put(self, state, *_, **__):
        if state.numel() != GPU_BYTES:
            raise RuntimeError("RNG state is wrong size")
        self.state = state.clone()

    def seed(self, seed):
        torch.default_generator.manual_seed(seed)
        self.state = torch.tensor([*seed.to_bytes(8, "little"), *bytes(8)], dtype=torch.uint8)


@contextlib.contextmanager
def on_a_gpu():
    """Inside, the simulated device's random state is a GPU's."""
    made = _GpuGenerator()
    stands = types.SimpleNamespace(get_state=made.get, set_state=made.put, manual_seed=made.seed)
    with contextlib.ExitStack() as stack:
        for place in (torch.cuda, torch.cuda.random):
            stack.enter_context(mock.patch.object(place, "get_rng_state", made.get))
            stack.enter_context(mock.patch.object(place, "set_rng_state", made.put))
        stack.enter_context(mock.patch.object(torch.cuda, "manual_seed", made.seed))
        stack.enter_context(mock.patch.object(torch.cuda, "default_generators", (stands,)))
        yield


DEVICES = {"gpu": on_a_gpu, "simulated": contextlib.nullcontext}


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        if "random" in record.getMessage():
            self.lines.append(record.getMessage())


def _run(directory, device, **train):
    """Losses, final weights, what the host's generators give next, and the warnings of a run that resumes if it can."""
    heard = _Heard()
    logging.getLogger("megatron.bridge").addHandler(heard)
    save = str(directory / "checkpoints")
    cfg = tiny_config(directory, train_iters=STEPS, train=train, checkpoint={"save": save, "load": save})
    cfg.checkpoint.pretrained_checkpoint = str(directory.parent / "pretrained")
    try:
        with DEVICES[device]():
            recorder = run_finetune(cfg)
    finally:
        logging.getLogger("megatron.bridge").removeHandler(heard)
    return {
        "losses": recorder.losses,
        "weights": recorder.weights_after,
        "drawn": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        "warnings": heard.lines,
    }


def _stopped_and_resumed(directory, first, second):
    make_pretrained(directory / "pretrained")
    whole = _run(directory / "whole", first)
    _run(directory / "run", first, exit_interval=STOPS_AT)
    return whole, _run(directory / "run", second)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("gpu", "simulated", "cuda_rng_state has the 16 bytes of a GPU, and this device is a simulated accelerator"),
        ("simulated", "gpu", "cuda_rng_state has the 5056 bytes of a simulated accelerator, and this device is a GPU"),
        ("gpu", "gpu", None),
        ("simulated", "simulated", None),
    ],
)
def test_a_run_goes_on_on_another_device(tmp_path, first, second, told):
    for rank, (whole, resumed) in enumerate(run_on_ranks(_stopped_and_resumed, 2, tmp_path, first, second)):
        assert len(resumed["losses"]) == STEPS - STOPS_AT
        assert resumed["losses"] == whole["losses"][STOPS_AT:]
        assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in whole["weights"].items())
        assert resumed["drawn"] == whole["drawn"]
        if told is None or rank > 0:
            assert resumed["warnings"] == []
        else:
            assert [told in line and "\n" not in line for line in resumed["warnings"]] == [True], resumed["warnings"]
