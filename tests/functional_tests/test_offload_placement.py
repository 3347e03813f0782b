# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`optimizer_offload_fraction="auto"` in a run: settled once for all ranks, recorded, kept by a resume, reported."""

import logging
from unittest import mock

import pytest

from megatron.bridge.checkpoint.model_checkpoint import read_run_config
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

STEPS, SPLIT = 12, 2
GIB = 1 << 30


def _run(directory, gib, **checkpoint):
    """Train, with the fractions that were settled, what the ranks' demands were, and what the log says of it."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.run_state import offload_placement

    said, demands, choose = [], [], offload_placement.choose
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron.bridge").addHandler(handler)
    optimizer = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": "auto",
        "optimizer_device_memory_gib": gib,
    }
    cfg = tiny_config(directory, train_iters=STEPS, optimizer=optimizer, checkpoint=checkpoint)
    recorder = Recorder()

    def noting(ceilings, of_ranks, *rest, **options):
        demands.append(of_ranks)
        return choose(ceilings, of_ranks, *rest, **options)

    try:
        with mock.patch.object(offload_placement, "choose", noting):
            pretrain(cfg, forward_step, callbacks=[recorder])
    finally:
        logging.getLogger("megatron.bridge").removeHandler(handler)
    settled = cfg.optimizer.optimizer_offload_fraction, cfg.optimizer.optimizer_streamed_fraction
    return settled, demands[0], [line for line in said if line.startswith("optimizer placement")], recorder


@pytest.mark.timeout(300)
def test_it_is_settled_once_recorded_kept_and_reported(tmp_path):
    [(settled, demands, said, _)] = run_on_ranks(_run, 1, tmp_path / "tight", 1e-6, save=None)
    assert settled[0] == 1.0 and "may need more memory" in said[1]  # less than the weights take

    used = 1e-6 * GIB - demands[0].free_bytes
    half = (used + 8 * demands[0].elements) / GIB  # the masters, and half of the moments
    options = {"save": str(tmp_path / "checkpoints"), "save_interval": SPLIT, "most_recent_k": -1}
    [(settled, _, said, whole)] = run_on_ranks(_run, 1, tmp_path, half, **options)
    assert 0.4 < settled[0] < 0.7
    assert "assumed, since the accelerator is simulated" in said[0] and "met" in said[1] and len(said) == 2
    recorded = read_run_config(tmp_path / "checkpoints" / f"iter_{SPLIT:07d}")["optimizer"]
    assert (recorded["optimizer_offload_fraction"], recorded["optimizer_streamed_fraction"]) == settled

    resuming = {"save": None, "load": str(tmp_path / "checkpoints"), "ckpt_step": SPLIT}
    [(kept, _, said, resumed)] = run_on_ranks(_run, 1, tmp_path, None, **resuming)
    assert kept == settled and "as the run that saved" in said[0]
    assert resumed.losses == whole.losses[SPLIT:]
    assert differing(resumed.weights_after, whole.weights_after) == {}
    [(fresh, _, said, _)] = run_on_ranks(_run, 1, tmp_path, used / 2 / GIB, **resuming)
    assert fresh[0] == 1.0 and "which doesn't fit here" in said[0]
