# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A load that leaves the offloaded optimizer's copies wrong ends before the first step, whatever broke the sync."""

import pytest
import torch

from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import Recorder, make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config


@torch.no_grad()
def _scale_copies(optimizer, factor):
    from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers

    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        for part in distributed_optimizer.optimizer.sub_optimizers:
            for group in part.param_groups:
                for param in group["params"]:
                    param.mul_(factor)


def _load_with(directory, breakage):
    """(error or "", steps taken) of a finetune from weights alone, and of one that resumes, with a broken load."""
    from megatron.bridge.training import checkpointing
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.run_state import planned_load

    our_sync, our_load = checkpointing.sync_hybrid_optimizer_param_copies, planned_load.load_optimizer

    def sync(optimizer, *arguments):
        if breakage != "no sync":
            our_sync(optimizer, *arguments)
        if isinstance(breakage, float):
            _scale_copies(optimizer, breakage)

    def load_optimizer(optimizer, *arguments):
        our_load(optimizer, *arguments)
        if isinstance(breakage, float):
            _scale_copies(optimizer, breakage)

    results = []
    with (
        replaced(checkpointing, sync_hybrid_optimizer_param_copies=sync),
        replaced(planned_load, load_optimizer=load_optimizer),
    ):
        for checkpoint in ({"pretrained_checkpoint": f"{directory}/pretrained"}, {"load": f"{directory}/saved"}):
            cfg = tiny_config(
                directory,
                train_iters=2,
                optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
                checkpoint={"save": None, **checkpoint},
            )
            recorder, error = Recorder(), ""
            try:
                finetune(cfg, forward_step, callbacks=[recorder])
            except RuntimeError as raised:
                error = str(raised)
            results.append((error, len(recorder.losses)))
    return results


def _save_one_step(directory):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    checkpoint = {"save": f"{directory}/saved", "pretrained_checkpoint": f"{directory}/pretrained"}
    finetune(tiny_config(directory, train_iters=1, checkpoint=checkpoint), forward_step)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded")
    run_on_ranks(make_pretrained, 2, path / "pretrained")
    run_on_ranks(_save_one_step, 2, path)
    return path


@pytest.mark.parametrize(
    ("breakage", "weights_alone", "resume"),
    [
        pytest.param("no sync", "ends", "continues", id="copies of random weights"),
        pytest.param(1 + 2.0**-22, "ends", "continues", id="bits that the weights don't have"),
        pytest.param(1.1, "ends", "ends", id="other values"),
        pytest.param(None, "continues", "continues", id="nothing wrong"),
    ],
)
def test_a_load_that_leaves_wrong_copies_ends_before_the_first_step(directory, breakage, weights_alone, resume):
    for results in run_on_ranks(_load_with, 2, directory, breakage):
        for (error, steps), expected, all_steps in zip(results, (weights_alone, resume), (2, 1), strict=True):
            if expected == "ends":
                assert "is not the loaded weight" in error and "\n" not in error
                assert steps == 0
            else:
                assert (error, steps) == ("", all_steps)
