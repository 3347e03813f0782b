# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The configuration that stock Core gets silently wrong: weights loaded after an offloaded optimizer was built.

On a machine without CUDA the offloaded run must be bit-exact with the same run without offload. With CUDA the CPU's
Adam rounds otherwise than the GPU's, so there the reference is the offloaded run whose weights were in place when its
optimizer was built.
"""

import pytest

from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import Recorder, differing, make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

WORLD_SIZES = [pytest.param(2, id="2 ranks")]
OFFLOADS = [(fraction, overlap) for fraction in (0.5, 1.0) for overlap in (False, True)]


def _offloaded(directory, fraction, overlap, **sections):
    sections["optimizer"] = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": overlap,
        **sections.get("optimizer", {}),
    }
    sections["checkpoint"] = {"save": None, "pretrained_checkpoint": f"{directory}/pretrained"}
    return tiny_config(directory, train_iters=5, **sections)


def _reference(directory, fraction, overlap) -> Recorder:
    from megatron.bridge.utils import device

    cfg = _offloaded(directory, fraction, overlap)
    if device.is_simulated():
        cfg.optimizer.optimizer_cpu_offload = False
        return run_finetune(cfg)
    from megatron.bridge.checkpoint.model_checkpoint import load_model_weights

    def load(chunks):
        load_model_weights(chunks, f"{directory}/pretrained")

    cfg.model.register_pre_wrap_hook(load)
    return run_finetune(cfg)


def _equals_reference(directory, fraction, overlap):
    reference = _reference(directory, fraction, overlap)
    offloaded = run_finetune(_offloaded(directory, fraction, overlap))
    return offloaded.losses, reference.losses, differing(offloaded.weights_after, reference.weights_after)


def _drift_of_one_step_at_learning_rate_zero(directory, fraction, overlap, with_sync):
    from megatron.bridge.training import checkpointing

    still = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    cfg = _offloaded(directory, fraction, overlap, optimizer=still)
    cfg.train.train_iters = 1
    names = () if with_sync else ("sync_hybrid_optimizer_param_copies", "check_hybrid_optimizer_param_copies")
    with replaced(checkpointing, **{name: lambda *args, **kwargs: None for name in names}):
        run = run_finetune(cfg)
    return differing(run.weights_before, run.weights_after)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload")
    run_on_ranks(make_pretrained, 2, path / "pretrained")
    return path


@pytest.mark.parametrize(("fraction", "overlap"), OFFLOADS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_offloaded_finetune_equals_the_reference_to_the_bit(directory, world_size, fraction, overlap):
    for losses, expected, drift in run_on_ranks(_equals_reference, world_size, directory, fraction, overlap):
        assert losses == expected
        assert drift == {}
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(("fraction", "overlap"), OFFLOADS)
def test_a_step_at_learning_rate_zero_leaves_the_weights(directory, fraction, overlap):
    for drift in run_on_ranks(_drift_of_one_step_at_learning_rate_zero, 2, directory, fraction, overlap, True):
        assert drift == {}


def test_without_the_sync_the_first_step_writes_other_weights(directory):
    """The detector detects: stock Core's copies, made of random weights, end up in the model."""
    for drift in run_on_ranks(_drift_of_one_step_at_learning_rate_zero, 2, directory, 1.0, False, False):
        assert drift and max(drift.values()) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("fraction", "overlap"), OFFLOADS)
def test_offloaded_finetune_equals_the_reference_on_one_gpu(directory, fraction, overlap):
    for losses, expected, drift in run_on_ranks(_equals_reference, 1, directory, fraction, overlap):
        assert losses == expected
        assert drift == {}


def _resumed_equals_uninterrupted(pretrained, directory, fraction):
    """Losses and weights of a run stopped after two of four steps and started again, and of one that was not."""
    runs = []
    for name, stops in (("whole", ()), ("resumed", (2, None))):
        for stop in stops or (None,):
            cfg = tiny_config(
                f"{directory}/{name}",
                train_iters=4,
                optimizer={"optimizer_cpu_offload": fraction > 0, "optimizer_offload_fraction": fraction},
                train={"exit_interval": stop},
                checkpoint={
                    "load": f"{directory}/{name}/checkpoints",
                    "save_interval": 2,
                    "pretrained_checkpoint": pretrained,
                },
            )
            runs.append(run_finetune(cfg))
    whole, _, resumed = runs
    return resumed.losses, whole.losses[2:], differing(resumed.weights_after, whole.weights_after)


def _expect_equal_runs(seen):
    for losses, expected, drift in seen:
        assert losses == expected and len(losses) == 2
        assert drift == {}


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_resume_equals_the_uninterrupted_run(directory, tmp_path, fraction):
    _expect_equal_runs(run_on_ranks(_resumed_equals_uninterrupted, 1, f"{directory}/pretrained", tmp_path, fraction))


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_resume_equals_the_uninterrupted_run_on_one_gpu(directory, tmp_path, fraction):
    """Torch's fused kernel keeps its counter on the device, where the loop's lies on the host."""
    _expect_equal_runs(run_on_ranks(_resumed_equals_uninterrupted, 1, f"{directory}/pretrained", tmp_path, fraction))
