# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that stock Megatron Bridge and Megatron-LM wrote load; hostile ones: `test_hostile_checkpoints.py`.

They are written here by stock Core from a run of ours, whose end the resumed run must reach, bit-exact.
"""

import argparse
import pathlib
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.enums import ModelType
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.rerun_state_machine import RerunMode, RerunState
from megatron.core.transformer.enums import AttnBackend

from tests.rigs.on_ranks import Recorder, differing, make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

STEPS, SPLIT = 4, 2
ITERATION = f"iter_{SPLIT:07d}"
FORMATS = ("dp_reshardable", "fully_reshardable")
FUSED_ADAM = "transformer_engine.pytorch.optimizers.fused_adam"
HALF = {"optimizer_offload_fraction": 0.5}
ALL_PRECISION_AWARE = {"optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}


def _config(directory, optimizer, **checkpoint):
    return tiny_config(
        directory,
        train_iters=STEPS,
        model={"hidden_dropout": 0.1},
        optimizer={"optimizer_cpu_offload": True, **optimizer},
        scheduler={"lr_warmup_iters": 2, "lr_decay_iters": 10},
        dataset={"dataloader_type": "cyclic"},
        checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained", **checkpoint},
    )


class _WriteAsUpstream(Recorder):
    """Writes the state after `SPLIT` steps with Core's own classes and Core's own save, in both formats."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        if context.state.train_state.step == SPLIT:
            for sharding in FORMATS:
                _write_as_upstream(self.directory / sharding, sharding, context)


def _write_as_upstream(root, sharding, context):
    from megatron.bridge.checkpoint.model_checkpoint import model_sharded_state_dict
    from megatron.bridge.training.run_state.rng import get_rng_state

    directory = root / ITERATION
    metadata = {
        "distrib_optim_sharding_type": sharding,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    weights = model_sharded_state_dict(context.model, metadata)
    content = {
        "checkpoint_version": 3.0,
        "iteration": SPLIT,
        **weights,
        "optimizer": _stock_state(context.optimizer, weights, metadata),
        "opt_param_scheduler": context.scheduler.state_dict(),
        "rng_state": get_rng_state(),
        "rerun_state_machine": {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET},
        "args": argparse.Namespace(
            model_type=ModelType.encoder_or_decoder,
            attention_backend=AttnBackend.auto,
            params_dtype=torch.bfloat16,
            exit_signal=signal.SIGTERM,
            save=pathlib.PosixPath("/there"),
            lr=np.float64(1e-3),
        ),
    }
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with _transformer_engine_of_another_machine():
        dist_checkpointing.save(content, str(directory), content_metadata=metadata)
    if dist.get_rank() == 0:
        train_state = context.state.train_state
        counts = {name: torch.tensor(value, dtype=torch.int32) for name, value in vars(train_state).items()}
        flops = torch.tensor(train_state.floating_point_operations_so_far, dtype=torch.float32)
        torch.save({**counts, "floating_point_operations_so_far": flops}, directory / "train_state.pt")
        (directory / "run_config.yaml").write_text(yaml.safe_dump(UPSTREAM_CONFIG))
        (root / "latest_checkpointed_iteration.txt").write_text(str(SPLIT))
    dist.barrier()


UPSTREAM_CONFIG = {
    "_target_": "megatron.bridge.training.config.ConfigContainer",
    "model": {
        "_target_": "megatron.bridge.models.somewhere_else.OtherModelProvider",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_partial_": True, "_call_": False},
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "vocab_size": 128,
    },
    "checkpoint": {
        "_target_": "megatron.bridge.training.config.CheckpointConfig",
        "finetune": True,
        "save_optim": True,
        "save_rng": True,
        "a_field_of_another_version": "yes",
    },
    "ft": {"_target_": "megatron.bridge.training.config.FaultToleranceConfig", "enable_ft_package": False},
}
"""In parts, what Megatron Bridge records of a finetune."""


def _stock_state(optimizer, weights, metadata):
    """What the optimizer's classes in Core say is to be saved, on the state of ours."""
    objects = [part for child in optimizer.chained_optimizers for part in (child, child.optimizer)]
    ours = [type(part) for part in objects]
    fused_adam = sys_modules_entry().FusedAdam
    try:
        for part in objects:
            part.__class__ = DistributedOptimizer if isinstance(part, DistributedOptimizer) else HybridDeviceOptimizer
            for group in part.param_groups if isinstance(part, HybridDeviceOptimizer) else ():
                group["cpu_optimizer_cls"], group["gpu_optimizer_cls"] = torch.optim.AdamW, fused_adam
        return optimizer.sharded_state_dict(weights, metadata=metadata)
    finally:
        for part, cls in zip(objects, ours, strict=True):
            part.__class__ = cls


def sys_modules_entry():
    """A module as a machine with Transformer Engine has it, not imported here."""
    module = types.ModuleType(FUSED_ADAM)
    module.FusedAdam = type("FusedAdam", (), {"__module__": FUSED_ADAM})
    return _ENTRY.setdefault(FUSED_ADAM, module)


_ENTRY: dict[str, types.ModuleType] = {}


class _transformer_engine_of_another_machine:
    """Inside, classes of Transformer Engine can be pickled."""

    def __enter__(self):
        names = FUSED_ADAM.split(".")
        for count in range(1, len(names)):
            sys.modules[".".join(names[:count])] = types.ModuleType(".".join(names[:count]))
        sys.modules[FUSED_ADAM] = sys_modules_entry()

    def __exit__(self, *_):
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]


def _train_through(directory, optimizer):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    recorder = _WriteAsUpstream(directory)
    finetune(_config(directory, optimizer), forward_step, callbacks=[recorder])
    return recorder


def _resume(directory, optimizer, root):
    recorder = run_finetune(_config(directory, optimizer, load=str(root)))
    assert "transformer_engine" not in sys.modules
    return recorder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign")
    run_on_ranks(make_pretrained, 2, path / "pretrained")
    return path


OPTIMIZERS = {"half": HALF, "all, precision-aware": ALL_PRECISION_AWARE}
_runs: dict[str, tuple] = {}


def _written_by_stock_core(directory, name):
    """(a directory for each format, the uninterrupted run on each rank)."""
    if name not in _runs:
        path = directory / name.replace(", ", "-")
        path.mkdir()
        (path / "pretrained").symlink_to(directory / "pretrained")
        _runs[name] = path, run_on_ranks(_train_through, 2, path, OPTIMIZERS[name])
    return _runs[name]


@pytest.mark.parametrize("sharding", FORMATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_that_stock_core_wrote_resumes_to_the_bit(directory, name, sharding):
    path, whole = _written_by_stock_core(directory, name)
    files = (file for file in (path / sharding / ITERATION).iterdir() if file.is_file())
    assert any(FUSED_ADAM.encode() in file.read_bytes() for file in files), "it holds no class: nothing is tested"
    resumed = run_on_ranks(_resume, 2, path, OPTIMIZERS[name], path / sharding)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[SPLIT:]
        assert continued.learning_rates == uninterrupted.learning_rates[SPLIT:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
        assert differing(continued.weights_before, continued.weights_after) != {}
