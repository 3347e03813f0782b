# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The same training on one rank and on two, cut in every way: the losses, gradient norms and evaluations agree.

Weights are bf16, so sums in another order differ in the last bits: the tolerance is a few of those, far below what a
step changes.
"""

import pytest

from tests.rigs.on_ranks import Recorder, make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import TinyDataset, tiny_config

STEPS = 4
LAYERS = {"num_layers": 4, "init_method_std": 0.1}
"""Weights so large that each layer's place shows in the loss: with 0.02, swapped layers would pass."""
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
LAYOUTS = {
    "data parallel": {},
    "tensor parallel": {"tensor_model_parallel_size": 2},
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "virtual pipeline": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
}
LOSS_TOLERANCE = 1e-2
NORM_TOLERANCE = 2e-2
"""Relative."""


class Norms(Recorder):
    def __init__(self):
        super().__init__()
        self.norms, self.token_counts, self.evaluated_tokens = [], [], []

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.norms.append(context.grad_norm)
        self.token_counts.append(context.num_tokens)

    def on_eval_end(self, context):
        super().on_eval_end(context)
        self.evaluated_tokens.append(context.num_tokens)


def _config(directory, *, train_iters=STEPS, model=None, checkpoint=None, **sections):
    checkpoint = {"save": None, "pretrained_checkpoint": f"{directory}/pretrained", **(checkpoint or {})}
    sections.setdefault("optimizer", {"lr": 2e-3})
    return tiny_config(
        directory, train_iters=train_iters, model={**LAYERS, **(model or {})}, checkpoint=checkpoint, **sections
    )


def _watching(evaluated):
    """A forward step that notes the first token, which names the sample, of each row that counts in an evaluation."""
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.state import GlobalState

    def forward_step(state: GlobalState, data_iterator, model):
        batches = []

        def noted():
            for batch in data_iterator:
                batches.append(batch)
                yield batch

        output, loss_function = gpt_step.forward_step(state, noted(), model)
        if not model.training:
            rows = batches[0]["loss_mask"].sum(dim=1) > 0
            evaluated.extend(batches[0]["tokens"][rows, 0].tolist())
        return output, loss_function

    return forward_step


def _run(directory, **options):
    """Losses, norms and evaluations of a run, and the validation samples that this rank was given."""
    from megatron.bridge.training.finetune import finetune

    recorder, evaluated = Norms(), []
    finetune(_config(directory, **options), _watching(evaluated), callbacks=[recorder])
    return {
        "losses": recorder.losses,
        "norms": recorder.norms,
        "tokens": recorder.token_counts,
        "rates": recorder.learning_rates,
        "validation": recorder.validation,
        "evaluated tokens": recorder.evaluated_tokens,
        "evaluated": evaluated,
        "moved": any((recorder.weights_before[name] != after).any() for name, after in recorder.weights_after.items()),
    }


def _run_each_layout(directory, optimizer):
    return {name: _run(directory, model=model, optimizer=optimizer) for name, model in LAYOUTS.items()}


def close(losses, expected):
    return losses == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    run_on_ranks(make_pretrained, 1, path / "pretrained", model=LAYERS)
    return path


@pytest.fixture(scope="module")
def reference(directory):
    """One rank, without offload."""
    return run_on_ranks(_run, 1, directory, validation={"eval_iters": None, "eval_interval": 2})[0]


def test_the_reference_moves_in_strides_far_above_the_tolerance(reference):
    losses = reference["losses"]
    assert len(losses) == STEPS and reference["moved"]
    strides = [abs(after - before) for before, after in zip(losses, losses[1:], strict=False)]
    assert min(strides) > 4 * LOSS_TOLERANCE, losses
    assert min(reference["norms"]) > 0.1


@pytest.mark.parametrize("optimizer", [{"lr": 2e-3}, {"lr": 2e-3, **OFFLOAD}], ids=["on the device", "offloaded"])
def test_two_ranks_train_as_one_does(directory, reference, optimizer):
    for rank, runs in enumerate(run_on_ranks(_run_each_layout, 2, directory, optimizer)):
        for layout, run in runs.items():
            assert close(run["losses"], reference["losses"]), (layout, rank)
            assert run["norms"] == pytest.approx(reference["norms"], rel=NORM_TOLERANCE), (layout, rank)
            assert run["tokens"] == reference["tokens"], (layout, rank)


def _accumulate(directory):
    return {size: _run(directory, train={"micro_batch_size": size}) for size in (1, 4, 8)}


def test_gradient_accumulation_changes_nothing(directory, reference):
    """Samples have different lengths, so a mean of micro-batches' means would be another loss."""
    for size, run in run_on_ranks(_accumulate, 1, directory)[0].items():
        assert close(run["losses"], reference["losses"]), size
        assert run["norms"] == pytest.approx(reference["norms"], rel=NORM_TOLERANCE), size
        assert run["tokens"] == reference["tokens"]


EVALUATED = {
    "data parallel": {},
    "tensor parallel": {"model": LAYOUTS["tensor parallel"]},
    "pipeline": {"model": LAYOUTS["pipeline"]},
    "batches of its own": {"eval_global_batch_size": 4, "eval_micro_batch_size": 1},
}


def _evaluate_each(directory):
    runs = {}
    for name, options in EVALUATED.items():
        options = dict(options)
        model = options.pop("model", {})
        validation = {"eval_iters": None, "eval_interval": 2, **options}
        runs[name] = _run(directory, model=model, validation=validation)
    return runs


def validation_set():
    """(names, number of tokens that count) of the validation samples."""
    _, samples, _ = TinyDataset().build_datasets(None)
    return [int(sample["tokens"][0]) for sample in samples], int(sum(sample["loss_mask"].sum() for sample in samples))


def test_evaluation_covers_each_sample_once(directory, reference):
    names, num_tokens = validation_set()
    assert len(set(names)) == len(names) == 11, "no multiple of a batch"
    num_evaluations = len(reference["validation"])
    assert num_evaluations == 2, "after steps 2 and 4, the last"
    assert reference["evaluated"] == names * num_evaluations
    on_0, on_1 = run_on_ranks(_evaluate_each, 2, directory)
    for layout in EVALUATED:
        shared = sorted(on_0[layout]["evaluated"] + on_1[layout]["evaluated"])
        copies = num_evaluations if layout in ("data parallel", "batches of its own") else 2 * num_evaluations
        assert shared == sorted(names * copies), layout
        for run in (on_0[layout], on_1[layout]):
            assert run["evaluated tokens"] == [num_tokens] * num_evaluations, layout
            assert close(run["validation"], reference["validation"]), layout


def test_evaluation_takes_no_part_in_training(directory, reference):
    without = run_on_ranks(_run, 1, directory)[0]
    assert without["validation"] == []
    assert without["losses"] == reference["losses"]


SCHEDULES = {
    "linear": dict(lr_decay_style="linear", lr_warmup_iters=2, lr_decay_iters=6),
    "cosine": dict(lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=6),
    "constant": dict(lr_decay_style="constant", lr_warmup_iters=3, lr_decay_iters=6),
    "fraction": dict(lr_decay_style="linear", lr_warmup_fraction=0.5, lr_decay_iters=6),
}
RATES = {
    "linear": [0.5, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1],
    "cosine": [0.5, 1.0, 0.1 + 0.9 * 0.5 * (1 + 0.5**0.5), 0.55, 0.1 + 0.9 * 0.5 * (1 - 0.5**0.5), 0.1, 0.1],
    "constant": [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0],
    "fraction": [1 / 3, 2 / 3, 1.0, 0.7, 0.4, 0.1, 0.1],
}
"""Of the peak, after each step; the floor is a tenth of it."""


def _run_each_schedule(directory):
    optimizer = {"lr": 1e-3, "min_lr": 1e-4, **OFFLOAD}
    runs = {
        name: _run(directory, train_iters=7, optimizer=optimizer, scheduler=scheduler)
        for name, scheduler in SCHEDULES.items()
    }
    runs["first step"] = _run(directory, train_iters=1, optimizer=optimizer, scheduler=SCHEDULES["linear"])
    return runs


def test_learning_rates_with_warm_up(directory):
    runs = run_on_ranks(_run_each_schedule, 1, directory)[0]
    for name, expected in RATES.items():
        assert runs[name]["rates"] == pytest.approx([1e-3 * factor for factor in expected]), name
        assert runs[name]["moved"]
    assert not runs["first step"]["moved"], "the first step of a warm-up from 0 changes nothing"


def _save_and_go_on(directory, optimizer):
    """Checkpoints after step 2 of two layouts; returns the losses of the whole runs."""
    losses = {}
    for name in ("data parallel", "tensor parallel"):
        checkpoint = {"save": f"{directory}/{name}", "save_interval": 2}
        losses[name] = _run(directory, model=LAYOUTS[name], optimizer=optimizer, checkpoint=checkpoint)["losses"]
    return losses


def _resume_on_one(directory, optimizer):
    losses = {}
    for name, load_optim in (("data parallel", True), ("tensor parallel", False)):
        checkpoint = {"load": f"{directory}/{name}", "ckpt_step": 2, "load_optim": load_optim}
        losses[name] = _run(directory, optimizer=optimizer, checkpoint=checkpoint)["losses"]
    return losses


@pytest.mark.parametrize("offload", [{}, {**OFFLOAD, "optimizer_offload_fraction": 1.0}], ids=["device", "offloaded"])
def test_a_run_goes_on_with_other_ranks(directory, tmp_path, offload):
    """The optimizer's state may be spread over other data-parallel ranks; weights may be cut in any way."""
    (tmp_path / "pretrained").symlink_to(directory / "pretrained")
    optimizer = {"lr": 2e-3, **offload}
    before = run_on_ranks(_save_and_go_on, 2, tmp_path, optimizer)[0]
    after = run_on_ranks(_resume_on_one, 1, tmp_path, optimizer)[0]
    assert close(after["data parallel"], before["data parallel"][2:])
    assert close(after["tensor parallel"][:1], before["tensor parallel"][2:3])
    assert len(after["tensor parallel"]) == 2
