# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Packed samples don't see each other, and a packed run learns what an unpacked one learns, on any layout."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.data.config import GPTSFTDatasetConfig, PackedSequenceSpecs
from tests.rigs.on_ranks import Recorder, make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import VOCAB_SIZE, tiny_config

SEQ_LENGTH = 32
MODEL = {"num_layers": 4, "init_method_std": 0.1, "seq_length": SEQ_LENGTH}
LAYOUTS = {
    "data parallel": {},
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "virtual pipeline": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class Tokens(Recorder):
    def __init__(self):
        super().__init__()
        self.counts, self.evaluated = [], []

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.counts.append(context.num_tokens)

    def on_eval_end(self, context):
        super().on_eval_end(context)
        self.evaluated.append(context.num_tokens)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Samples that count up by a step of their own, and weights so large that an attention amiss shows."""
    path = tmp_path_factory.mktemp("packing")
    for split, size in (("training", 90), ("validation", 21)):
        rows = []
        for index in range(size):
            numbers = [str((index + position * (1 + index % 7)) % (VOCAB_SIZE - 1)) for position in range(20)]
            rows.append({"input": " ".join(numbers[: 2 + index % 5]), "output": " ".join(numbers[6 : 8 + index % 9])})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_on_ranks(make_pretrained, 1, path / "pretrained", model=MODEL)
    return path


def _config(directory, *, packed=True, model=None, train=None, checkpoint=None, **sections):
    specs = PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH) if packed else None
    cfg = tiny_config(
        directory,
        train_iters=4,
        model={**MODEL, **(model or {})},
        train={"micro_batch_size": 1, "global_batch_size": 4, **(train or {})},
        checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained", **(checkpoint or {})},
        validation={"eval_iters": None},
        **{"optimizer": {"lr": 2e-3}, **sections},
    )
    cfg.dataset = GPTSFTDatasetConfig(
        SEQ_LENGTH, dataset_root=str(directory), packed_sequence_specs=specs, do_test=False
    )
    return cfg


def _run(directory, **options):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    recorder = Tokens()
    finetune(_config(directory, **options), forward_step, callbacks=[recorder])
    return {
        "losses": recorder.losses,
        "tokens": recorder.counts,
        "validation": recorder.validation,
        "evaluated": recorder.evaluated,
        "weights": recorder.weights_after,
        "consumed": recorder.train_state.get("consumed_train_samples"),
    }


def _model_and_pack(directory):
    """The model in FP32 with its weights, a full pack, and the samples that are in it."""
    from megatron.bridge.data.packing import PackedDataset
    from megatron.bridge.data.sft import load_sft_dataset
    from megatron.bridge.data.sft_options import SFTOptions
    from megatron.bridge.data.tokenizer import NullTokenizer
    from megatron.bridge.training.config import runtime_config_update

    cfg = tiny_config(directory, model=MODEL)
    cfg.mixed_precision = None
    runtime_config_update(cfg)
    cfg.model.initialize_model_parallel(seed=5)
    [chunk] = cfg.model.provide_distributed_model(wrap_with_ddp=False)
    samples = load_sft_dataset(
        directory / "training.jsonl",
        tokenizer=NullTokenizer(VOCAB_SIZE),
        seq_length=SEQ_LENGTH,
        options=SFTOptions(),
    )
    packed = PackedDataset(samples, size=SEQ_LENGTH, seed=1)
    index = next(i for i, pack in enumerate(packed.packs) if len(pack) >= 3)
    return chunk.eval(), packed[index], [samples[sample] for sample in packed.packs[index]]


@torch.no_grad()
def _losses(chunk, row):
    """The loss of each position of one row, [S]."""
    from megatron.core.timers import Timers

    from megatron.bridge.data.padded_rows import pad_sample, stack_rows
    from megatron.bridge.training.gpt_step import forward_step

    batch = stack_rows([pad_sample(row, SEQ_LENGTH, pad_id=0)])
    unchecked = SimpleNamespace(check_for_nan_in_loss=False, check_for_spiky_loss=False)
    state = SimpleNamespace(cfg=SimpleNamespace(rerun_state_machine=unchecked), timers=Timers(0, "minmax"))
    return forward_step(state, iter([batch]), chunk)[0][0]


def _look_across(directory):
    """What perturbing each sample of a pack moves, with and without its boundaries; packed and unpacked losses."""
    chunk, pack, samples = _model_and_pack(directory)
    ends = pack["cu_seqlens"].tolist()
    spans = list(zip(ends[:-1], ends[1:], strict=True))
    moved = {}
    for name, names in (("packed", None), ("leaking", ("tokens", "labels", "loss_mask", "position_ids"))):
        row = pack if names is None else {key: pack[key] for key in names}
        before, moved[name] = _losses(chunk, row), []
        for start, end in spans:
            changed = {**row, "tokens": row["tokens"].clone()}
            changed["tokens"][start:end] = (changed["tokens"][start:end] + 1) % VOCAB_SIZE
            after = _losses(chunk, changed)
            moved[name].append([not torch.equal(before[a:b], after[a:b]) for a, b in spans])
    packed = _losses(chunk, pack)
    alone = [_losses(chunk, sample)[: len(sample["tokens"])] for sample in samples]
    return moved, torch.cat(alone), packed[: ends[-1]]


def test_a_sample_moves_no_other_and_costs_what_it_costs_alone(directory):
    [(moved, alone, packed)] = run_on_ranks(_look_across, 1, directory)
    size = len(moved["packed"])
    assert moved["packed"] == [[row == column for column in range(size)] for row in range(size)]
    assert moved["leaking"] == [[row <= column for column in range(size)] for row in range(size)], "the test can fail"
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


STILL = {"lr": 0.0, "min_lr": 0.0}


def _run_each(directory, world_size):
    if world_size == 2:
        return {name: _run(directory, model=model) for name, model in LAYOUTS.items()}
    return {
        "packed": _run(directory),
        "two rows": _run(directory, train={"micro_batch_size": 2}),
        "evaluated packed": _run(directory, train={"train_iters": 1}, optimizer=STILL),
        "evaluated alone": _run(directory, packed=False, train={"train_iters": 1}, optimizer=STILL),
    }


@pytest.fixture(scope="module")
def alone(directory):
    return run_on_ranks(_run_each, 1, directory, 1)[0]


def test_a_packed_evaluation_is_the_unpacked_one(alone):
    packed, unpacked = alone["evaluated packed"], alone["evaluated alone"]
    assert packed["evaluated"] == unpacked["evaluated"] and packed["evaluated"][0] > 100
    assert packed["validation"] == pytest.approx(unpacked["validation"], abs=2e-3)


def test_packed_runs_agree_on_every_layout(directory, alone):
    reference = alone["packed"]
    assert len(reference["losses"]) == 4 and reference["losses"][0] - reference["losses"][-1] > 0.1
    assert alone["two rows"]["losses"] == pytest.approx(reference["losses"], abs=1e-2)
    for runs in run_on_ranks(_run_each, 2, directory, 2):
        for layout, run in runs.items():
            assert run["tokens"] == reference["tokens"], layout
            assert run["losses"] == pytest.approx(reference["losses"], abs=1e-2), layout
            assert run["validation"] == pytest.approx(reference["validation"], abs=1e-2), layout


def _stop_and_resume(directory, save):
    checkpoint = {"save": str(save), "load": str(save), "save_interval": 2}
    first = _run(directory, train={"exit_interval": 2}, checkpoint=checkpoint)
    return first, _run(directory, checkpoint=checkpoint)


def test_a_packed_run_resumes_to_the_bit(directory, alone, tmp_path):
    [(first, second)] = run_on_ranks(_stop_and_resume, 1, directory, tmp_path / "save")
    whole = alone["packed"]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["consumed"] == 16
    assert all(torch.equal(second["weights"][name], weight) for name, weight in whole["weights"].items())


def _refusals(directory):
    from megatron.bridge.models.packed_attention import check_samples_are_kept_apart

    refused = []
    for model in ({"window_size": (3, 0)}, {}):
        try:
            _run(directory, model=model)
        except ValueError as error:
            refused.append(str(error))
    chunk, _, _ = _model_and_pack(directory)
    softmax = chunk.decoder.layers[1].self_attention.core_attention.scale_mask_softmax
    softmax.scaled_masked_softmax_fusion = softmax.input_in_float16 = True
    foreign, none = (  # Transformer Engine's, and a stage on which something else stands in for attention
        SimpleNamespace(decoder=SimpleNamespace(layers=[SimpleNamespace(self_attention=attention)]))
        for attention in (SimpleNamespace(core_attention=torch.nn.Identity()), torch.nn.Identity())
    )
    for chunks, rows in (([chunk], 1), ([foreign], 2), ([foreign], 1), ([none], 2)):
        try:
            check_samples_are_kept_apart(chunks, micro_batch_size=rows)
        except ValueError as error:
            refused.append(str(error))
    return refused


def test_what_would_look_across_is_refused(directory):
    [[window, fused, rows]] = run_on_ranks(_refusals, 1, directory)
    assert "model.window_size=(3, 0) with packed samples" in window
    assert "model.masked_softmax_fusion=True with packed samples" in fused
    assert "train.micro_batch_size=2 with packed samples: Transformer Engine" in rows


def test_transformer_engine_gets_the_boundaries():
    from megatron.bridge.models.packed_attention import packed_seq_params

    params = packed_seq_params(torch.tensor([0, 3, 5, 8], dtype=torch.int32), seq_length=8)
    assert params.qkv_format == "thd" and (params.max_seqlen_q, params.max_seqlen_kv) == (3, 3)
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 3, 5, 8]
    padded = packed_seq_params(torch.tensor([0, 3, 3], dtype=torch.int32), seq_length=8)
    assert padded.cu_seqlens_q.tolist() == [0, 3, 8] and padded.max_seqlen_q == 5
