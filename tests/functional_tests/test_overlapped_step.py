# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs whose steps return early: the same bits, whoever reads a weight waits, and no error on the host is lost."""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from megatron.core.utils import unwrap_model

from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import HOST_FIRST
from tests.rigs.late_worker import LateWorker
from tests.rigs.on_ranks import Recorder, differing, weights_of
from tests.rigs.ranks import run_on_ranks
from tests.rigs.resume import BF16_STATE
from tests.rigs.tiny import tiny_config

SMALL_BUCKETS = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}
BF16_MOMENTS = {**BF16_STATE, "main_grads_dtype": torch.float32}


class Case(NamedTuple):
    """How weights come back, and what a layer waits for."""

    precision_aware: bool
    fraction: float
    model: dict[str, Any] = {}
    ddp: dict[str, Any] = {}
    occasions: dict[str, dict[str, Any]] = {}
    """Evaluations and saves."""
    swaps: bool = False
    """Take all weights after the second step, and load them back into the model after the third."""
    formats: dict[str, Any] = {}
    """Of the state on the host."""
    splits: bool = False
    """Store masters as rests."""
    precision: str = "bf16_mixed"
    skips: bool = False
    """The second step's gradients are NaN."""


CASES = {
    "in one gather": Case(
        False,
        1.0,
        occasions={"validation": {"eval_interval": 2, "eval_iters": 1}, "checkpoint": {"save_interval": 2}},
    ),
    "in a gather for each bucket": Case(True, 0.5, ddp=SMALL_BUCKETS, swaps=True, formats=BF16_MOMENTS),
    "by layer": Case(False, 0.5, model={"tensor_model_parallel_size": 2}, precision="fp16_mixed", skips=True),
    "in 2 bytes": Case(
        True,
        1.0,
        model={"calculate_per_token_loss": False},
        ddp={"grad_reduce_in_fp32": False, "overlap_grad_reduce": True, "bucket_size": 3000},
        formats=BF16_STATE,
        splits=True,
    ),
    "after sums": Case(False, 1.0, model={"tensor_model_parallel_size": 2, "sequence_parallel": True}, skips=True),
}


CROSS_EARLY = {
    "in one gather": "all in float32",
    "in a gather for each bucket": "all in float32",
    "by layer": "all in float32",
    "in 2 bytes": "all in bfloat16",
    "after sums": "some in float32",
}
"""Of the last step's buckets, those whose gradients crossed as they were reduced, and their format."""


class OnlyRecords(Recorder):
    """It reads weights at the end alone."""

    reads_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[bool] = []

    def on_train_step_end(self, context: Any) -> None:
        super().on_train_step_end(context)
        self.skipped.append(context.skipped_iter)


class Swaps(OnlyRecords):
    """It takes and loads weights without waiting for them."""

    def on_train_step_end(self, context: Any) -> None:
        super().on_train_step_end(context)
        step = len(self.losses)
        if step == 2:
            state, names = context.model[0].state_dict(), dict(unwrap_model(context.model[0]).named_parameters())
            self.weights_before = {name: torch.clone(state[name]) for name in names}
        if step == 3:
            context.model[0].load_state_dict(self.weights_before, strict=False)


class ReadsEachStep(Recorder):
    """It reads the weights of each step, and keeps those of the last one."""

    def on_train_step_end(self, context: Any) -> None:
        super().on_train_step_end(context)
        self.weights_before = weights_of(context.model)


def _run(
    directory: str,
    case: Case,
    *,
    overlapped: bool,
    late: bool = False,
    reads: bool = False,
    splits: bool = False,
    **checkpoint: Any,
) -> Recorder:
    from megatron.bridge.offload_engine import step
    from megatron.bridge.offload_engine.overlap import early_gradients, worker
    from megatron.bridge.training.config.mixed_precision import get_mixed_precision_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    sections = {name: dict(fields) for name, fields in case.occasions.items()}
    sections["checkpoint"] = {"save": None, **sections.get("checkpoint", {}), **checkpoint}
    cfg = tiny_config(
        directory,
        train_iters=4,
        model={"hidden_size": 32, "ffn_hidden_size": 64, **case.model},
        ddp=case.ddp,
        scheduler={"lr_warmup_iters": 1, "lr_decay_iters": 10},
        optimizer={
            "clip_grad": 0.1,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": case.fraction,
            "use_precision_aware_optimizer": case.precision_aware,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "overlap_cpu_optimizer_step": overlapped,
            "optimizer_split_masters": splits,
            **case.formats,
        },
        **sections,
    )
    cfg.mixed_precision = get_mixed_precision_config(case.precision)
    cfg.mixed_precision.initial_loss_scale = 2.0**8  # no step overflows
    cfg.mixed_precision.grad_reduce_in_fp32 = cfg.ddp.grad_reduce_in_fp32
    cfg.train.max_nonfinite_steps = 1

    def gpt_step(state: Any, batches: Any, model: Any) -> Any:
        output, loss = forward_step(state, batches, model)
        if case.skips and model.training and state.train_state.step == 1:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output, loss

    recorder = ReadsEachStep() if reads else Swaps() if case.swaps else OnlyRecords()
    new_worker = (lambda *_: LateWorker(HOST_FIRST)) if late else worker.HostWorker
    norm_is_taken = early_gradients.EarlyGradients.norm_is_taken

    def recorded(early: Any, norm: Any) -> None:
        norm_is_taken(early, norm)
        formats = {str(crossed.unfinished.slab.dtype) for crossed in early._crossed.values()}
        num_buckets = len(early._planned_for) - 1
        how_many = "all" if len(early._crossed) == num_buckets else "some"
        recorder.crossed_early = f"{how_many} in {' '.join(formats).removeprefix('torch.')}"

    with (
        mock.patch.object(step, "BUCKET_ELEMENTS", 2000),
        mock.patch.object(worker, "HostWorker", new_worker),
        mock.patch.object(early_gradients.EarlyGradients, "norm_is_taken", recorded),
        mock.patch.object(early_gradients, "NUM_CHECKED_STEPS", 0 if late else 2),  # it would hide a missing wait
    ):
        pretrain(cfg, gpt_step, callbacks=[recorder])
    return recorder


def _apart(found: list[Recorder], expected: list[Recorder], *, steps: int = 0) -> list[str]:
    """In what runs differ, from a step on."""
    return [
        what
        for one, other in zip(found, expected, strict=True)
        for what, is_equal in {
            "losses": one.losses == other.losses[steps:],
            "validation": one.validation == other.validation[steps // 2 :],
            "weights": not differing(one.weights_after, other.weights_after),
        }.items()
        if not is_equal
    ]


def _gathered_at_once(case: Case) -> Case:
    return case._replace(ddp={name: value for name, value in case.ddp.items() if name != "overlap_param_gather"})


@pytest.mark.parametrize("name", CASES)
def test_weights_are_there_when_they_are_read(tmp_path, name):
    case, saves = CASES[name], f"{tmp_path}/saved" if CASES[name].occasions else None
    expected = run_on_ranks(_run, 2, str(tmp_path), _gathered_at_once(case), overlapped=False)
    found = run_on_ranks(_run, 2, str(tmp_path), case, overlapped=True, late=True, splits=case.splits, save=saves)
    assert _apart(found, expected) == []
    assert {run.crossed_early for run in found} == {CROSS_EARLY[name]}
    assert all(run.skipped == [False, case.skips, False, False] for run in found)
    for one, other in zip(found, expected, strict=True):
        assert not case.swaps or differing(one.weights_before, other.weights_before) == {}
    if saves:  # and by the thread itself
        resumed = run_on_ranks(_run, 2, str(tmp_path), case, overlapped=True, load=saves, ckpt_step=2)
        assert _apart(resumed, expected, steps=2) == []


def test_weights_that_ranks_gather_in_the_next_forward_pass_are_there_before(tmp_path):
    saves = f"{tmp_path}/saved"
    case = CASES["in a gather for each bucket"]._replace(occasions={"checkpoint": {"save_interval": 2}}, swaps=False)
    expected = run_on_ranks(_run, 2, str(tmp_path), _gathered_at_once(case), overlapped=False)
    found = run_on_ranks(_run, 2, str(tmp_path), case, overlapped=False, reads=True, splits=True, save=saves)
    assert _apart(found, expected) == []
    for run in found:
        assert differing(run.weights_before, run.weights_after) == {}
    resumed = run_on_ranks(_run, 2, str(tmp_path), case, overlapped=False, load=saves, ckpt_step=2)
    assert _apart(resumed, expected, steps=2) == []


def _apart_by_streams(directory: str) -> list[str]:
    case = Case(True, 0.5, occasions={"validation": {"eval_interval": 2, "eval_iters": 1}})
    expected = _run(directory, case, overlapped=False)
    with adversarial_streams(HOST_FIRST):
        found = [_run(directory, case, overlapped=True, late=True, splits=splits) for splits in (False, True)]
    return _apart(found, [expected, expected])


def test_a_whole_run_waits_for_all_it_needs(tmp_path):
    assert run_on_ranks(_apart_by_streams, 1, str(tmp_path)) == [[]]


def _error_of_run(directory: str, fault: str, first_step: int = 1) -> str:
    """The error of a run in which the second rank's host can't take a step, or a weight doesn't follow it."""
    from megatron.bridge.offload_engine.bucket import Bucket
    from megatron.bridge.offload_engine.overlap.arrivals import ShardsArriveLater

    copy = Bucket.copy_weights_to_device
    num_taken: dict[int, int] = {}

    def fail(bucket: Bucket) -> None:
        step = num_taken[id(bucket)] = num_taken.get(id(bucket), 0) + 1
        if torch.distributed.get_rank() == 1 and step >= first_step:
            raise MemoryError("none left")
        copy(bucket)

    faults = {
        "an error": mock.patch.object(Bucket, "copy_weights_to_device", fail),
        "a weight": mock.patch.object(ShardsArriveLater, "copy_to_weights", lambda *_: None),
    }
    with faults[fault]:
        try:
            _run(directory, CASES["in one gather"]._replace(occasions={}), overlapped=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("step", [1, 3, 4])  # the second is after the guard's last look, the last ends the run
def test_an_error_on_one_host_ends_all_ranks(tmp_path, step):
    error = "MemoryError: none left"
    of_others = f"RuntimeError: the optimizer's step on the host failed on rank 1: {error}"
    assert run_on_ranks(_error_of_run, 2, str(tmp_path), "an error", step) == [of_others, error]


def _error_after_a_change(directory: str) -> str:
    """The error of a run with split masters in which the second rank's weights change after a step."""

    def change_after_the_second_step(recorder: OnlyRecords, context: Any) -> None:
        Recorder.on_train_step_end(recorder, context)
        if len(recorder.losses) == 2 and torch.distributed.get_rank() == 1:
            for param in context.model[0].parameters():
                param.data.add_(1.0)

    case = Case(True, 1.0)
    with mock.patch.object(OnlyRecords, "on_train_step_end", change_after_the_second_step):
        try:
            _run(directory, case, overlapped=False, splits=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_weights_that_changed_on_one_rank_end_all_ranks_in_a_step_that_does_not_overlap(tmp_path):
    of_others, own = run_on_ranks(_error_after_a_change, 2, str(tmp_path))
    assert own.startswith("RuntimeError: weights of the model aren't those that the last step left")
    assert of_others == f"RuntimeError: the optimizer's step on the host failed on rank 1: {own}"


def test_a_weight_left_behind_ends_all_ranks(tmp_path):
    for error in run_on_ranks(_error_of_run, 2, str(tmp_path), "a weight"):
        assert error.startswith("RuntimeError: an overlapped step left a weight behind: the offloaded optimizer's copy")
