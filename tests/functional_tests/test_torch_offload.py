# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Torch's own offload beside ours: FSDP2's takes the steps of our run, and a loop that steps otherwise is found."""

import logging

import pytest

from tests.rigs.ranks import run_on_ranks

SIZES = ["--num-layers", "2", "--hidden-size", "64", "--seq-length", "32", "--steps", "2", "--micro-batches", "2"]


def _run():
    from benchmarks import offloaded_run, torch_offload
    from megatron.bridge.utils.device import enter_device

    class Idle(torch_offload.Fsdp2):
        def adam_options(self):
            return {**super().adam_options(), "lr": 0.0}

    enter_device()
    logging.disable(logging.INFO)
    arguments = offloaded_run.build_parser().parse_args(SIZES)
    with pytest.raises(ValueError, match="needs CUDA"):
        torch_offload.others(with_torchao=True)
    try:
        with pytest.raises(RuntimeError, match=r"step \d: idle has loss"):  # FSDP2's loop has met all losses before
            torch_offload.seconds_of_others(arguments, {**torch_offload.others(), "idle": Idle})
    finally:
        logging.disable(logging.NOTSET)
    return True


@pytest.mark.timeout(300)
def test_fsdp2_takes_the_steps_of_our_run_and_a_loop_that_steps_otherwise_is_found():
    assert run_on_ranks(_run, 1) == [True]
