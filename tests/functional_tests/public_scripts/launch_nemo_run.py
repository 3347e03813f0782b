# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Launch a recipe with NeMo-Run, with plugins; only shows what it would start."""

import sys

import nemo_run as run

from megatron.bridge.recipes.run_plugins import (
    FaultTolerancePlugin,
    NsysPlugin,
    PreemptionPlugin,
    PyTorchProfilerPlugin,
    WandbPlugin,
)

if __name__ == "__main__":
    script = sys.argv[1]
    task = run.Script(
        path=script,
        entrypoint="python",
        args=["--recipe", "llama32_1b_sft_config", "train.train_iters=10"],
    )
    executor = run.LocalExecutor(ntasks_per_node=2, launcher="torchrun", env_vars={"NCCL_DEBUG": "WARN"})
    plugins = [
        PreemptionPlugin(preempt_time=120, enable_exit_handler=True),
        PyTorchProfilerPlugin(profile_step_start=1, profile_step_end=2),
    ]
    with run.Experiment("finetune") as exp:
        exp.add(task, executor=executor, name="training", plugins=plugins)
        exp.dryrun()
    assert FaultTolerancePlugin and NsysPlugin and WandbPlugin
