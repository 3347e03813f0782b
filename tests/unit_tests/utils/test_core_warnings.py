# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Core's words at its import are left out, its other warnings and a user's own filters are not."""

import os
import subprocess
import sys

import pytest

DOORS = """
import megatron.bridge
import megatron.core.optimizer, megatron.core.models.gpt.gpt_layer_specs
import megatron.bridge.training.finetune, megatron.bridge.convert, megatron.bridge.generate
import megatron.core.rerun_state_machine as state_machine
state_machine.RerunStateMachine()
"""


def said(program, *options):
    command, environment = [sys.executable, *options, "-c", program], {**os.environ, "RANK": "0"}
    environment.pop("PYTHONWARNINGS", None)
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert job.returncode == 0, job.stderr
    return [line for line in job.stderr.splitlines() if "megatron" in line.lower() or "RerunState" in line]


def test_the_doors_open_without_a_word_of_cores():
    assert said(DOORS) == []


def test_what_a_user_asks_to_see_is_seen():
    if not said("import megatron.core.optimizer"):
        pytest.skip("this machine has Transformer Engine or Apex: Core says nothing")
    assert said("import megatron.bridge, megatron.core.optimizer", "-W", "always")


def test_another_warning_of_cores_stays():
    program = "import warnings, megatron.bridge; warnings.warn_explicit({!r}, UserWarning, 'megatron', 1, {!r})"
    assert said(program.format("Apex is not installed: no such thing", "megatron.core.optimizer"))
    assert said(program.format("Apex is not installed. Falling back to Torch Norm", "mine.megatron"))
    assert not said(program.format("Apex is not installed. Falling back to Torch Norm", "megatron.core.optimizer"))


def test_the_collectives_that_core_calls_are_not_deprecated_for_a_user():
    program = (
        "import warnings, megatron.bridge; warnings.warn_explicit('`torch.distributed.{}` is deprecated. Please use',"
        " FutureWarning, 'megatron', 1, 'torch.distributed.c10d_logger')"
    )
    assert not said(program.format("all_gather_into_tensor"))
    assert not said(program.format("reduce_scatter_tensor"))
    assert said(program.format("all_to_all_single"))


def test_the_package_loads_nothing_heavy_for_it():
    program = "import sys, megatron.bridge; assert not {'torch', 'megatron.core'} & set(sys.modules)"
    assert said(program) == []
