# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, PackedSequenceSpecs
from megatron.bridge.data.loaders import Padding, build_datasets, build_evaluation_steps, build_step_iterator
from megatron.bridge.data.packing import PackedDataset, pack_by_length, pack_in_order

LENGTHS = np.random.RandomState(0).randint(1, 41, 300)


class Samples:
    """Sample i is `lengths[i]` times the token i."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __getitem__(self, index):
        tokens = torch.full((int(self.lengths[index]),), index, dtype=torch.int64)
        return {"tokens": tokens, "labels": tokens + 1000, "loss_mask": torch.ones(len(tokens))}


@pytest.mark.parametrize(
    "pack", [lambda: pack_by_length(LENGTHS, size=64, seed=3), lambda: pack_in_order(LENGTHS, size=64)]
)
def test_every_sample_is_in_one_pack_and_no_pack_overflows(pack):
    packs = pack()
    assert sorted(sample for samples in packs for sample in samples) == list(range(300))
    assert max(LENGTHS[samples].sum() for samples in packs) <= 64


def test_packs_by_length_are_nearly_full():
    fewest = -(-LENGTHS.sum() // 64)
    assert len(pack_by_length(LENGTHS, size=64, seed=3)) <= fewest + 1 < len(pack_in_order(LENGTHS, size=64))


def test_packs_follow_from_lengths_and_seed():
    first, again, other = (pack_by_length(LENGTHS, size=64, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_packs_in_order_keep_the_order():
    assert pack_in_order(np.array([5, 3, 3, 8, 1]), size=8) == [[0, 1], [2], [3], [4]]


def test_a_pack_is_its_samples_with_positions_that_restart():
    packed = PackedDataset(Samples([3, 2, 6]), size=6, seed=1, keep_order=True)
    row = packed[0]
    assert row["tokens"].tolist() == [0, 0, 0, 1, 1]
    assert row["labels"].tolist() == [1000] * 3 + [1001] * 2
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert row["cu_seqlens"].tolist() == [0, 3, 5] and row["cu_seqlens"].dtype == torch.int32
    assert packed.lengths.tolist() == [5, 6]
    assert str(packed.report) == "2 packs of 6, 1.5 samples in each, 91.7% filled"


def test_samples_padded_by_themselves_learn_nothing_more():
    packed = PackedDataset(Samples([3, 2, 6]), size=8, seed=1, keep_order=True, multiple_of=4, pad_id=9)
    assert packed.packs == [[0, 1], [2]] and packed.lengths.tolist() == [8, 8]
    row = packed[0]
    assert row["tokens"].tolist() == [0, 0, 0, 9, 1, 1, 9, 9] and row["cu_seqlens"].tolist() == [0, 4, 8]
    assert row["labels"].tolist() == [1000, 1000, 1000, 9, 1001, 1001, 9, 9]
    assert row["loss_mask"].tolist() == [1, 1, 1, 0, 1, 1, 0, 0] and row["loss_mask"].dtype == torch.float32
    assert row["position_ids"].tolist() == [0, 1, 2, 3] * 2


def test_batches_of_packs_say_where_samples_end():
    packed = PackedDataset(Samples([3, 2, 6]), size=6, seed=1, keep_order=True)
    sizes = {"micro_batch_size": 2, "global_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    padding = Padding(seq_length=8, multiple_of=8, pad_id=9)
    [batch] = next(build_step_iterator(packed, consumed_samples=0, seed=1, shuffle=False, padding=padding, **sizes))
    assert batch["tokens"].shape == (2, 8)
    assert batch["cu_seqlens"].tolist() == [[0, 3, 5], [0, 6, 8]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    alone = PackedDataset(Samples([3]), size=6, seed=1)
    [[batch]] = build_evaluation_steps(alone, padding=padding, **sizes)
    assert batch["cu_seqlens"].tolist() == [[0, 3], [0, 8]], "a row that fills up the batch is one sample"
    assert batch["loss_mask"].sum() == 3


def test_too_few_packs_are_named_as_packs():
    packed = PackedDataset(Samples([1] * 20), size=64, seed=1)
    sizes = {"micro_batch_size": 1, "global_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    with pytest.raises(ValueError, match="has 1 packs, fewer than one global batch"):
        build_step_iterator(packed, consumed_samples=0, seed=1, shuffle=True, padding=Padding(seq_length=64), **sizes)


def test_a_sample_is_shortened_to_what_fits_when_it_is_padded(write_jsonl, tokenizer):
    path = write_jsonl([{"input": "a", "output": "z" * 60}, {"input": "a", "output": "b"}])
    specs = PackedSequenceSpecs(packed_sequence_size=30, pad_seq_to_mult=8)
    config = GPTSFTDatasetConfig(32, dataset_root=str(path.parent), packed_sequence_specs=specs, do_validation=False)
    train, _, _ = build_datasets(config, DatasetBuildContext(10, 0, 0, tokenizer))
    assert sorted(train.lengths) == [8, 24]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, None),
        ({"packed_sequence_specs": PackedSequenceSpecs()}, None),
        ({"packed_sequence_specs": PackedSequenceSpecs(packed_sequence_size=24)}, 24),
        ({"enable_offline_packing": True}, 32),
        ({"enable_offline_packing": True, "offline_packing_specs": PackedSequenceSpecs()}, 32),
        ({"enable_offline_packing": True, "offline_packing_specs": PackedSequenceSpecs(packed_sequence_size=24)}, 24),
    ],
)
def test_both_public_spellings_pack(write_jsonl, tokenizer, options, size):
    path = write_jsonl([{"input": "a", "output": "b" * number} for number in range(1, 40)])
    config = GPTSFTDatasetConfig(32, dataset_root=str(path.parent), do_validation=False, do_test=False, **options)
    assert config.pack_size == size
    train, _, _ = build_datasets(config, DatasetBuildContext(10, 0, 0, tokenizer))
    assert getattr(train, "is_packed", False) == (size is not None)
    assert max(train.lengths) <= (size or 32)
    if size is not None:
        assert len(train) < 39
