# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The steps that were asked for are recorded, on the ranks that were asked for; the run's bits stay what they are."""

import json

import pytest

from megatron.bridge.training.config import ProfilingConfig
from megatron.bridge.training.monitoring.profiling import build_profilers
from tests.rigs.config_examples import make_config
from tests.rigs.on_ranks import make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

STEPS = 4


def _finetune(directory, name, profiling):
    cfg = tiny_config(
        directory,
        train_iters=STEPS,
        logger={"tensorboard_dir": f"{directory}/{name}"},
        checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained"},
    )
    cfg.profiling = ProfilingConfig(use_pytorch_profiler=True, **profiling) if profiling else None
    return run_finetune(cfg).losses


def _finetune_twice(directory):
    make_pretrained(f"{directory}/pretrained")
    options = {"profile_step_start": 1, "profile_step_end": 3, "profile_ranks": [1], "record_shapes": True}
    options["pytorch_profiler_collect_chakra"] = True
    return [_finetune(directory, "plain", {}), _finetune(directory, "profiled", options)]


def test_two_steps_of_one_rank(tmp_path):
    for plain, profiled in run_on_ranks(_finetune_twice, 2, tmp_path):
        assert plain == profiled and len(plain) == STEPS
    assert not (tmp_path / "plain" / "profile").exists()
    trace, chakra = sorted((tmp_path / "profiled" / "profile").iterdir())
    assert chakra.name == "rank_00001.execution_trace.json" and json.loads(chakra.read_text())["nodes"]
    assert trace.name.startswith("rank_00001.") and trace.name.endswith(".pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == 2
    assert any(event.get("args", {}).get("Input Dims") for event in events)


@pytest.mark.parametrize("name", ["use_nsys_profiler", "record_memory_history", "nvtx_ranges"])
def test_what_records_a_gpu_is_refused_without_one(name):
    cfg = make_config(f"profiling.{name}=true")
    with pytest.raises(ValueError, match=f"^profiling.{name}=true needs a GPU, and this process has none: set prof"):
        build_profilers(cfg)
