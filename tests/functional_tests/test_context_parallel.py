# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Ranks that share rows train as one rank does, packed rows too; what they save, others resume, optimizer included.

Transformer Engine's attention needs a GPU, so `tests/rigs/gathered_attention.py` stands in for it. In FP32 the sums of
several ranks differ from those of one in the last bits alone.
"""

import inspect
import json

import pytest
import torch

from megatron.bridge.data.config import GPTSFTDatasetConfig, PackedSequenceSpecs
from megatron.bridge.models.layer_specs import has_transformer_engine, transformer_engine_layer_spec
from tests.rigs.gathered_attention import gathered_layer_spec
from tests.rigs.on_ranks import Recorder, differing, make_pretrained
from tests.rigs.optimizer_state import slices_of, whole_state
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, VOCAB_SIZE, tiny_config

SIZES = {"init_method_std": 0.1, "seq_length": SEQ_LENGTH}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_aux_loss_coeff": 0.05,
    "calculate_per_token_loss": False,
}
SHARED = {"context_parallel_size": 2}
LAYOUTS = {
    "tensor and context": {**SHARED, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline and context": {**SHARED, "pipeline_model_parallel_size": 2},
    "data and context": SHARED,
}
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
STEPS = 3


class Watch(Recorder):
    """Keeps also what this rank stepped on, before the first step and after the second."""

    def __init__(self):
        super().__init__()
        self.norms, self.counts, self.states = [], [], {}

    def on_train_start(self, context):
        super().on_train_start(context)
        step = context.state.train_state.step
        if step:
            self.states[step] = slices_of(context.model, context.optimizer)

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.norms.append(context.grad_norm)
        self.counts.append(context.num_tokens)
        if context.state.train_state.step == 2:
            self.states[2] = slices_of(context.model, context.optimizer)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("context")
    for split, size in (("training", 60), ("validation", 9)):
        rows = []
        for index in range(size):
            numbers = [str((index + position * (1 + index % 7)) % (VOCAB_SIZE - 1)) for position in range(12)]
            rows.append({"input": " ".join(numbers[: 1 + index % 3]), "output": " ".join(numbers[3 : 5 + index % 4])})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_on_ranks(_make_all, 1, path)
    return path


def _make_all(path):
    make_pretrained(path / "dense", model=SIZES)
    make_pretrained(path / "experts", model={**SIZES, **EXPERTS})


def _train(
    path,
    *,
    weights="dense",
    packed=False,
    precision=None,
    steps=STEPS,
    validation=None,
    model=None,
    checkpoint=None,
    **sections,
):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    cfg = tiny_config(
        path,
        train_iters=steps,
        model={**SIZES, "transformer_layer_spec": gathered_layer_spec, **(model or {})},
        checkpoint={"save": None, "pretrained_checkpoint": f"{path}/{weights}", **(checkpoint or {})},
        train={"micro_batch_size": 1, "global_batch_size": 4},
        validation={"eval_iters": validation},
        optimizer={"lr": 2e-3, **sections.pop("optimizer", {})},
        **sections,
    )
    cfg.mixed_precision = precision
    if packed:
        specs = PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH, pad_seq_to_mult=4)
        cfg.dataset = GPTSFTDatasetConfig(
            SEQ_LENGTH, dataset_root=str(path), packed_sequence_specs=specs, do_test=False
        )
    watch = Watch()
    finetune(cfg, forward_step, callbacks=[watch])
    return watch


def _packed_with_experts(path, **model):
    return _train(path, weights="experts", packed=True, model={**EXPERTS, **model})


def _offloaded(path, *, model=None, **checkpoint):
    return _train(path, precision="bf16_mixed", optimizer=OFFLOAD, validation=0, model=model, checkpoint=checkpoint)


def _alone(path):
    return {"packed": _packed_with_experts(path), "rows": _train(path, validation=0)}


def _two_share_rows(path):
    saved = f"{path}/saved"
    again = {"load": saved, "ckpt_step": 2}
    return {
        "cut": _cut_as_core_does(),
        "random": _own_random_states(),
        "packed": _packed_with_experts(path, expert_model_parallel_size=2, **SHARED),
        "whole": _offloaded(path, model=SHARED, save=saved, save_interval=2),
        "resumed": _offloaded(path, model=SHARED, **again),
        "by data": _offloaded(path, **again),
        "uncut": _refusal_of_whole_rows(path),
        "mean": _refusal_of_a_mean(path),
    }


def _cut_as_core_does():
    """Whether a rank's part of plain rows is that of Core's function."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron.bridge.models.context_parallel import cut_for_this_rank
    from megatron.bridge.utils.distributed import model_parallel_groups

    generator = torch.Generator().manual_seed(1)
    batch = {
        name: torch.randint(VOCAB_SIZE, (3, 24), generator=generator) for name in ("tokens", "labels", "position_ids")
    }
    batch |= {"loss_mask": torch.rand(3, 24, generator=generator), "attention_mask": None}
    with model_parallel_groups(context_parallel_size=2):
        ours = cut_for_this_rank(dict(batch))
        mode = (
            {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
        )
        from megatron.core import parallel_state

        cores = get_batch_on_this_cp_rank(dict(batch), cp_group=parallel_state.get_context_parallel_group(), **mode)
    return all(torch.equal(ours[name], cores[name]) for name in batch if batch[name] is not None)


def _own_random_states():
    """How many random states are saved, and whether this rank's is that which it resumes with."""
    from megatron.bridge.training.run_state.rng import _entry_of_this_rank, current_states, get_rng_state
    from megatron.bridge.utils.distributed import destroy_model_parallel, model_parallel_groups

    destroy_model_parallel()
    with model_parallel_groups(context_parallel_size=2, expert_model_parallel_size=2):
        saved = get_rng_state().data
        mine, own = _entry_of_this_rank(saved, False)["rng_tracker_states"], current_states()["rng_tracker_states"]
        return len(saved), all(torch.equal(mine[name], own[name]) for name in own)


def _refusal_of_whole_rows(path):
    """The error of a script's own forward step, which cuts no rows."""
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.finetune import finetune

    def forward_step(data_iterator, model):
        batch = gpt_step.get_batch_from_iterator(data_iterator)
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), None

    model = {**SIZES, **SHARED, "transformer_layer_spec": gathered_layer_spec}
    cfg = tiny_config(path, model=model, checkpoint={"save": None, "pretrained_checkpoint": f"{path}/dense"})
    with pytest.raises(ValueError, match="gave the model") as caught:
        finetune(cfg, forward_step)
    return str(caught.value)


def _refusal_of_a_mean(path):
    """The error of a loss that each rank divides by the tokens of its own part of the rows."""
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.finetune import finetune

    def forward_step(data_iterator, model):
        batch = gpt_step.get_batch(data_iterator)
        mask = batch["loss_mask"]

        def mean(output):
            loss = (output.float() * mask).sum() / mask.sum()
            return loss, {"my loss": loss.detach()}

        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), mean

    model = {**SIZES, **SHARED, "transformer_layer_spec": gathered_layer_spec, "calculate_per_token_loss": False}
    cfg = tiny_config(path, model=model, checkpoint={"save": None, "pretrained_checkpoint": f"{path}/dense"})
    with pytest.raises(ValueError, match="mean over the tokens of this rank") as caught:
        finetune(cfg, forward_step)
    return str(caught.value)


def _four_share_rows(path):
    return {name: _train(path, steps=2, validation=0, model=model) for name, model in LAYOUTS.items()}


@pytest.fixture(scope="module")
def alone(directory):
    return run_on_ranks(_alone, 1, directory)[0]


@pytest.fixture(scope="module")
def two(directory):
    return run_on_ranks(_two_share_rows, 2, directory)


def check_trains_alike(shared, alone):
    steps = len(shared.losses)
    assert shared.losses == pytest.approx(alone.losses[:steps], abs=1e-5)
    assert shared.norms == pytest.approx(alone.norms[:steps], rel=1e-4)
    assert shared.counts == alone.counts[:steps]


def test_the_runs_move(alone):
    for run in alone.values():
        assert (
            len(run.losses) == STEPS
            and min(abs(a - b) for a, b in zip(run.losses, run.losses[1:], strict=False)) > 1e-3
        )


def test_rows_are_cut_as_core_cuts_them(two):
    assert all(rank["cut"] for rank in two)


def test_each_expert_parallel_rank_keeps_its_random_states(two):
    assert [rank["random"] for rank in two] == [(2, True)] * 2


def test_packed_rows_and_experts_on_two_ranks(two, alone):
    """The data-parallel size is 1, and expert-parallel ranks are those of one row."""
    for rank in two:
        check_trains_alike(rank["packed"], alone["packed"])
        assert rank["packed"].validation == pytest.approx(alone["packed"].validation, abs=1e-5)


def test_rows_on_four_ranks(directory, alone):
    for rank in run_on_ranks(_four_share_rows, 4, directory):
        for run in rank.values():
            assert len(run.losses) == 2
            check_trains_alike(run, alone["rows"])


def test_what_they_save_is_resumed_to_the_bit(two, directory):
    """By the same ranks in every bit of the steps that follow; by others in every bit of what they start from."""
    for rank in two:
        assert rank["resumed"].losses == rank["whole"].losses[2:]
        assert differing(rank["resumed"].weights_after, rank["whole"].weights_after) == {}
        assert differing(rank["resumed"].weights_before, rank["by data"].weights_before) == {}
    one = run_on_ranks(_offloaded, 1, directory, load=f"{directory}/saved", ckpt_step=2)
    states = {
        name: whole_state([run.states[2] for run in runs], vocab_size=VOCAB_SIZE)
        for name, runs in {
            "saved": [rank["whole"] for rank in two],
            "resumed": [rank["resumed"] for rank in two],
            "by data": [rank["by data"] for rank in two],
            "alone": one,
        }.items()
    }
    assert float(states["saved"]["step"]) == 2
    for name in ("resumed", "by data", "alone"):
        assert differing(states[name], states["saved"]) == {}, name
    assert one[0].losses == pytest.approx(two[0]["whole"].losses[2:], abs=1e-2)


def test_a_forward_step_that_cuts_no_rows_is_named(two):
    for rank in two:
        assert (
            "gave the model 16 positions of a row of 16, with model.context_parallel_size=2: expected 8"
            in rank["uncut"]
        )


def test_a_mean_over_a_part_of_the_rows_is_refused(two):
    for rank in two:
        assert "adds up the gradients of 2 ranks" in rank["mean"] and "calculate_per_token_loss" not in rank["mean"]


def _with_transformer_engine(path, packed, **model):
    return _train(
        path,
        packed=packed,
        precision="bf16_mixed",
        model={"transformer_layer_spec": transformer_engine_layer_spec, **model},
    )


@pytest.mark.gpu
@pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exchange", ["p2p", "a2a", "all_gather"])
def test_transformer_engine_shares_rows_of_two_gpus(directory, packed, exchange):
    alone = run_on_ranks(_with_transformer_engine, 1, directory, packed)[0]
    for rank in run_on_ranks(_with_transformer_engine, 2, directory, packed, cp_comm_type=exchange, **SHARED):
        assert rank.losses == pytest.approx(alone.losses, abs=2e-2)
        assert rank.validation == pytest.approx(alone.validation, abs=2e-2)
