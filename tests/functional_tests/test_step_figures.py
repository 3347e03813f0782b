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
    "log_l2_norm_grad_to_tensorboard": True,
    "log_num_zeros_in_grad": True,
    "log_memory_to_tensorboard": True,
    "log_memory_interval": 2,
    "log_device_memory_used": True,
    "log_timers_to_tensorboard": True,
    "timing_log_level": 2,
}
MODEL = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
LAYOUTS = {
    "one rank": (1, {}, {}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}, {}),
    "experts, half offloaded": (2, {"expert_model_parallel_size": 2}, {"offload": 0.5}),
    "data, no shards": (2, {}, {"use_distributed_optimizer": False}),
}
"""Ranks, and what the model and the optimizer are told."""


def _pretrained(directory):
    from tests.rigs.on_ranks import make_pretrained

    make_pretrained(directory, model=MODEL)


def _figures(directory, pretrained, layout, optimizer):
    """The metrics, TensorBoard's curves, the progress file, the log, and what this rank's own tensors say."""
    import logging
    from pathlib import Path

    from megatron.core.utils import unwrap_model
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.monitoring.metrics import read_metrics
    from tests.rigs.on_ranks import forget_last_forward

    class Watch(Callback):
        def on_train_start(self, context):
            step, self.gradients = context.optimizer.step, []

            def look_and_step():
                named = [pair for chunk in context.model for pair in unwrap_model(chunk).named_parameters()]
                self.gradients.append({name: param.main_grad.double() for name, param in named})
                return step()

            context.optimizer.step = look_and_step

        def on_train_end(self, context):
            del context.optimizer.step
            params = [param for chunk in context.model for param in chunk.parameters()]
            self.norm = math.sqrt(sum(param.double().square().sum().item() for param in params))
            forget_last_forward(context.model)

    class Lines(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, lines, watch = [], Lines(), Watch()
    logs = f"{directory}/logs"
    is_distributed, offload = optimizer.get("use_distributed_optimizer", True), optimizer.get("offload")
    offloaded = {} if offload is None else {"optimizer_cpu_offload": True, "optimizer_offload_fraction": offload}
    cfg = tiny_config(
        directory,
        train_iters=3,
        model={**MODEL, **layout},
        optimizer={"lr": 0.0, "min_lr": 0.0, "use_distributed_optimizer": is_distributed, **offloaded},
        ddp={"use_distributed_optimizer": is_distributed},
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
    own = [
        ({name: grad.norm().item() for name, grad in step.items()}, sum(int((g == 0).sum()) for g in step.values()))
        for step in watch.gradients
    ]
    return read_metrics(f"{directory}/metrics.jsonl"), points, progress, said, own, watch.norm


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What rank 0 found, by layout; no weight moves, so all train the same model."""
    directory = tmp_path_factory.mktemp("figures")
    pretrained = str(directory / "pretrained")
    run_on_ranks(_pretrained, 1, pretrained)
    return {
        name: run_on_ranks(_figures, num_ranks, directory / name.replace(" ", "_"), pretrained, *options)[0]
        for name, (num_ranks, *options) in LAYOUTS.items()
    }


def test_the_norm_is_that_of_the_whole_model_whatever_the_layout(found):
    expected = found["one rank"][-1]
    for name, (metrics, *_) in found.items():
        norms = [line["params_norm"] for line in metrics if line["split"] == "train"]
        assert norms == pytest.approx([expected] * 3, rel=1e-6), name


def test_figures_go_where_they_are_asked_to(found):
    for name, (metrics, points, _, said, *_) in found.items():
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
    for _, _, progress, *_ in found.values():
        kinds = [line.split("\t")[3] for line in progress.splitlines()]
        assert kinds == ["Starting job", "Saved checkpoint", "Saved checkpoint"]
        assert "Step: 2" in progress and "Step: 3" in progress


def test_norms_and_zeros_of_gradients_are_those_of_the_whole_model_whatever_the_layout(found):
    *_, expected, _ = found["one rank"]
    for layout, (metrics, points, *_) in found.items():
        steps = [line for line in metrics if line["split"] == "train"]
        for at, (line, (norms, zeros)) in enumerate(zip(steps, expected, strict=True)):
            own = {
                name.removeprefix("l2_norm/grad/"): value
                for name, value in line.items()
                if name.startswith("l2_norm/grad/")
            }
            rounded = 5e-3 if "tensor" in layout else 1e-3 if "experts" in layout else 1e-6
            assert own == pytest.approx(norms, rel=rounded), layout
            assert math.hypot(*own.values()) == pytest.approx(line["grad_norm"], rel=1e-6), layout
            assert line["num_zeros"] == pytest.approx(zeros, rel=0.02 if rounded > 1e-6 else 0), layout
            assert points["num-zeros"][at] == line["num_zeros"]
            name = "l2_norm/grad/decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
            assert points[name][at] == pytest.approx(line[name], rel=1e-6)


def test_phases_are_timed_and_memory_is_shown(found):
    for layout, (metrics, points, _, said, *_) in found.items():
        for line in (line for line in metrics if line["split"] == "train"):
            parts = line["timers/forward-backward"] + line["timers/optimizer"]
            assert 0 < parts < line["timers/interval"] * 1.05 + 0.05, layout
            assert line["timers/forward-compute"] > 0 and line["timers/data-iterator"] > 0
            offload = [name for name in line if name.startswith("timers/offload")]
            assert sorted(offload) == (
                ["timers/offload-gradients-to-host", "timers/offload-weights-to-device"] if "offl" in layout else []
            )
            assert line["memory/mem-max-allocated-bytes"] >= line["memory/mem-allocated-bytes"] > 2**20
            assert line["memory/mem-device-used-bytes"] > 2**20
        assert points["forward-backward-time"] and len(points["memory/mem-allocated-bytes"]) == 3
        assert points["save-checkpoint-time"]  # of the save at step 2, in step 3
        times = [line for line in said if line.startswith("times up to step")]
        assert len(times) == 3 and "fastest to slowest rank: interval " in times[0], times
        assert "save-checkpoint" in times[2]
        assert [line[:19] for line in said if line.startswith("memory after")] == ["memory after step 2"]
