# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import heapq
import json
from itertools import islice

import numpy as np
import pytest
import torch

from megatron.bridge.data.blends import JoinedDataset, draws
from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.loaders import Padding, build_datasets, build_step_iterator
from megatron.bridge.data.sampler import epoch_order


def reference(weights):
    """The draws of a blend without end, one after the other."""
    queue = [(1 / weight, member, 0) for member, weight in enumerate(weights)]
    heapq.heapify(queue)
    while True:
        _, member, number = heapq.heappop(queue)
        yield member, number
        heapq.heappush(queue, ((2 * number + 3) / weights[member], member, number + 1))


@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [3, 1], [0.3, 0.7], [1], [0.01, 2, 0.5, 7, 0.01], [1] * 12])
def test_draws_come_as_the_weights_say_from_any_position(weights):
    expected = list(islice(reference(weights), 1000))
    members, numbers = draws(0, 1000, weights)
    assert list(zip(members.tolist(), numbers.tolist(), strict=True)) == expected
    for start in (1, 2, 17, 640, 999):
        members, numbers = draws(start, min(9, 1000 - start), weights)
        assert list(zip(members.tolist(), numbers.tolist(), strict=True)) == expected[start : start + 9]


def test_proportions_are_exact_after_each_period_and_near_before_it():
    members, _ = draws(0, 4000, [0.3, 0.6, 0.1])
    for length in range(1, 4001):
        counts = np.bincount(members[:length], minlength=3)
        assert np.abs(counts - np.array([0.3, 0.6, 0.1]) * length).max() <= (1e-6 if length % 10 == 0 else 1)


def test_a_position_far_away_needs_nothing_before_it():
    members, numbers = draws(10**12, 1000, [0.3, 0.7])
    assert np.bincount(members).tolist() == [300, 700]
    assert numbers[members == 0][0] == 3 * 10**11


class Numbers:
    """Sample i of set s is the token 100 s + i."""

    def __init__(self, member, size):
        self.member, self.lengths = member, np.ones(size, dtype=np.int64)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        tokens = torch.tensor([100 * self.member + index])
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1)}


def batches(dataset, steps, *, consumed=0, shuffle=True):
    iterator = build_step_iterator(
        dataset, consumed_samples=consumed, micro_batch_size=4, global_batch_size=4, data_parallel_rank=0,
        data_parallel_size=1, seed=7, shuffle=shuffle, padding=Padding(seq_length=1),
    )  # fmt: skip
    return [next(iterator)[0]["tokens"].flatten().tolist() for _ in range(steps)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_set_goes_through_its_own_epochs_and_a_resume_finds_its_place(shuffle):
    sizes, weights = [5, 11, 3], [0.5, 0.3, 0.2]
    dataset = JoinedDataset([Numbers(member, size) for member, size in enumerate(sizes)], weights)
    expected = []
    for member, number in islice(reference(weights), 80):
        epoch, offset = divmod(number, sizes[member])
        order = epoch_order(sizes[member], seed=7 + member, epoch=epoch) if shuffle else range(sizes[member])
        expected.append(100 * member + int(order[offset]))
    whole = batches(dataset, 20, shuffle=shuffle)
    assert sum(whole, []) == expected
    again = JoinedDataset([Numbers(member, size) for member, size in enumerate(sizes)], weights)
    assert batches(again, 7, consumed=52, shuffle=shuffle) == whole[13:]


def test_without_weights_each_sample_comes_once_an_epoch():
    dataset = JoinedDataset([Numbers(0, 5), Numbers(1, 11)])
    taken = sum(batches(dataset, 8), [])
    assert sorted(taken[:16]) == sorted(taken[16:]) == [*range(5), *range(100, 111)] and taken[:16] != taken[16:]
    assert [int(dataset[index]["tokens"]) for index in (0, 4, 5, 15)] == [0, 4, 100, 110]
    with pytest.raises(IndexError):
        dataset[16]


@pytest.fixture
def roots(tmp_path):
    """Two directories with 6 and 10 samples for training, and 2 and 3 for validation."""
    for name, sizes in (("books", (6, 2, 1)), ("code", (10, 3, 0))):
        (tmp_path / name).mkdir()
        for split, size in zip(("training", "validation", "test"), sizes, strict=True):
            rows = [{"input": f"{name} {split}", "output": str(index)} for index in range(size)]
            if rows:
                (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "books"), str(tmp_path / "code")]


def texts(dataset, tokenizer):
    return [tokenizer.ids_to_text(dataset[index]["tokens"].tolist()) for index in range(len(dataset))]


def build(tokenizer, *, sets=False, names=None, **options):
    context = DatasetBuildContext(10, None, None, tokenizer, multiple_validation_sets=sets, validation_set_names=names)
    return build_datasets(GPTSFTDatasetConfig(64, **options), context)


def test_directories_are_blended(roots, tokenizer):
    train, valid, test = build(tokenizer, blend=(roots, [0.25, 0.75]))
    assert (len(train), len(valid), len(test), train.weights) == (16, 5, 1, [0.25, 0.75])
    assert [text.split()[0] for text in texts(train, tokenizer)] == ["books"] * 6 + ["code"] * 10
    assert str(train.report).startswith("0.25 of ") and "; 0.75 of " in train.report
    _, valid, _ = build(tokenizer, sets=True, blend=(roots, None))
    assert {name: len(each) for name, each in valid.items()} == {"books": 2, "code": 3}
    _, valid, _ = build(tokenizer, sets=True, names=("a", "b"), blend=(roots, None))
    assert list(valid) == ["a", "b"]
    with pytest.raises(ValueError, match="validation_set_names=.'a'.: expected 2 names"):
        build(tokenizer, sets=True, names=("a",), blend=(roots, None))
    packed, _, _ = build(tokenizer, blend=(roots, None), enable_offline_packing=True)
    assert packed.is_packed and len(packed) < 16


def test_each_split_has_its_own_files(roots, tokenizer):
    books, code = roots
    per_split = [([books, f"{code}/training.jsonl"], [1, 2]), ([f"{code}/validation.jsonl", books], None), None]
    train, valid, test = build(tokenizer, blend_per_split=per_split)
    assert (len(train), len(valid), test, train.weights) == (16, 5, None, [1, 2])
    assert texts(valid, tokenizer)[0].startswith("code validation")
    _, valid, _ = build(tokenizer, sets=True, blend_per_split=per_split)
    assert {name: len(each) for name, each in valid.items()} == {"code": 3, "books": 2}
    assert build(tokenizer, blend_per_split=per_split, do_validation=False)[1] is None
    with pytest.raises(FileNotFoundError, match="names .*code for test: expected a JSONL file, or a directory with"):
        build(tokenizer, blend_per_split=[per_split[0], None, ([code], None)])


def test_a_directory_that_is_unset_by_an_empty_text_is_unset(roots):
    GPTSFTDatasetConfig(64, blend=(roots, None), dataset_root="").finalize()


def test_one_cache_keeps_the_tokens_of_each_file(roots, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    for _ in range(2):
        build(tokenizer, blend=(roots, None), path_to_cache=str(tmp_path / "cache"), do_test=False)
    assert caplog.text.count("its tokens are taken from") == 4


def test_one_file_can_be_cut(roots, tokenizer):
    parts = build(tokenizer, blend=([f"{roots[1]}/training.jsonl"] * 2, [1, 1]), split="50,30,20")
    assert [len(part) for part in parts] == [10, 6, 4]
    with pytest.raises(FileNotFoundError, match="code/validation.jsonl does not exist"):
        build(tokenizer, blend=([f"{roots[1]}/training.jsonl"], None))
    with pytest.raises(FileNotFoundError, match="nothing.jsonl' is no directory"):
        build(tokenizer, blend=([f"{roots[0]}/nothing.jsonl"], None))


def test_sets_of_one_name_are_refused(roots, tokenizer):
    with pytest.raises(ValueError, match="several validation sets would be called 'books' .*: set validation.valid"):
        build(tokenizer, sets=True, blend=([roots[0], f"{roots[0]}/"], None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend": ["a", "b"]}, "dataset.blend=.*: expected paths and weights"),
        ({"blend": (["a", "b"], [1])}, "there are 2 paths"),
        ({"blend": (["a", "b"], [1, 0])}, "dataset.blend has the weight 0: expected a number above 0"),
        ({"blend": (["a"], [float("nan")])}, "has the weight nan"),
        ({"blend": ([], None)}, "expected paths and weights"),
        ({"blend": (["a"], None), "dataset_root": "b"}, "dataset.blend and dataset.dataset_root are both set"),
        ({"blend": (["a"], None), "max_train_samples": 3}, "dataset.blend and dataset.max_train_samples are both set"),
        ({"blend_per_split": [(["a"], None)]}, "expected three blends"),
        ({"blend_per_split": [None, None, None]}, "names no training data"),
        ({"blend_per_split": [(["a"], None), (["a"], [1]), None]}, "has weights for held-out data"),
        ({"blend_per_split": [(["a"], None), None, None], "split": "1,1,0"}, "blend_per_split and dataset.split are"),
    ],
)
def test_blends_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPTSFTDatasetConfig(64, **options).finalize()
