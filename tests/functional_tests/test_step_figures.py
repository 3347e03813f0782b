# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Figures that `logger` asks for: the norm of all weights whatever the layout, throughput, and the progress file."""

import math
import re

import pytest

from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

LOGGER = {
    "log_params_norm": True,
    "log_throughput": True,
    "log_throughput_to_tensorboard": True,
    "throughput_window_size": 2,
    "log_progress": True,
    "log_runtime_to_tensorboard": True,
    "runtime_time_unit": "seconds",
    "log_world_size_to_tensorboard": True,
    "log_validation_ppl_to_tensorboard": True,
}
MODEL = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
LAYOUTS = {
    "one rank": (1, {}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "experts": (2, {"expert_model_parallel_size": 2}),
}


def _pretrained(directory):
    from tests.rigs.on_ranks import make_pretrained

    make_pretrained(directory, model=MODEL)


def _figures(directory, pretrained, layout):
    """The metrics, TensorBoard's curves, the progress file, the log, and the norm of what this rank holds."""
    import logging
    from pathlib import Path

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.monitoring.metrics import read_metrics
    from tests.rigs.on_ranks import forget_last_forward

    class Watch(Callback):
        def on_train_end(self, context):
            params = [param for chunk in context.model for param in chunk.parameters()]
            self.norm = math.sqrt(sum(param.double().square().sum().item() for param in params))
            forget_last_forward(context.model)

    class Lines(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, lines, watch = [], Lines(), Watch()
    logs = f"{directory}/logs"
    cfg = tiny_config(
        directory,
        train_iters=3,
        model={**MODEL, **layout},
        optimizer={"lr": 0.0, "min_lr": 0.0},
        validation={"eval_iters": 1},
        logger={**LOGGER, "log_interval": 1, "tensorboard_dir": logs, "metrics_file": f"{directory}/metrics.jsonl"},
        checkpoint={"pretrained_checkpoint": pretrained, "save_interval": 2},
    )
    logging.getLogger("megatron.bridge").addHandler(lines)
    try:
        finetune(cfg, forward_step, [watch])
    finally:
        logging.getLogger("megatron.bridge").removeHandler(lines)
    curves = EventAccumulator(logs).Reload()
    points = {tag: [event.value for event in curves.Scalars(tag)] for tag in curves.Tags()["scalars"]}
    progress = Path(cfg.checkpoint.save, "progress.txt").read_text()
    return read_metrics(f"{directory}/metrics.jsonl"), points, progress, said, watch.norm


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What rank 0 found, by layout; no weight moves, so all train the same model."""
    directory = tmp_path_factory.mktemp("figures")
    pretrained = str(directory / "pretrained")
    run_on_ranks(_pretrained, 1, pretrained)
    return {
        name: run_on_ranks(_figures, num_ranks, directory / name.replace(" ", "_"), pretrained, layout)[0]
        for name, (num_ranks, layout) in LAYOUTS.items()
    }


def test_the_norm_is_that_of_the_whole_model_whatever_the_layout(found):
    expected = found["one rank"][-1]
    for name, (metrics, *_) in found.items():
        norms = [line["params_norm"] for line in metrics if line["split"] == "train"]
        assert norms == pytest.approx([expected] * 3, rel=1e-6), name


def test_figures_go_where_they_are_asked_to(found):
    for name, (metrics, points, _, said, _) in found.items():
        steps = [line for line in metrics if line["split"] == "train"]
        assert all(line["throughput"] > 0 and line["runtime"] > 0 for line in steps)
        assert points["throughput"] == pytest.approx([line["throughput"] for line in steps], rel=1e-5)
        assert points["world-size"] == [LAYOUTS[name][0]] * 3 == [line["world_size"] for line in steps]
        assert [points["runtime"][at] < points["runtime"][at + 1] for at in range(2)] == [True, True]
        (loss,) = points["lm loss validation"]
        assert points["lm loss ppl validation"] == pytest.approx([math.exp(loss)], rel=1e-5)
        (line, *_) = [line for line in said if line.startswith("step 1/3")]
        assert re.search(r"TFLOP/s/device [\d.]+, params norm [\d.]+", line), line


def test_progress_is_kept_beside_the_checkpoints(found):
    for _, _, progress, _, _ in found.values():
        kinds = [line.split("\t")[3] for line in progress.splitlines()]
        assert kinds == ["Starting job", "Saved checkpoint", "Saved checkpoint"]
        assert "Step: 2" in progress and "Step: 3" in progress
