# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import multiprocessing
import random
import signal
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.bridge.data.config import DatasetProvider
from megatron.bridge.data.loaders import (
    Padding,
    build_datasets,
    build_evaluation_steps,
    build_iterator,
    build_step_iterator,
    setup_data_iterators,
)
from megatron.bridge.training.state import TrainState
from tests.rigs.tiny import tiny_config


class Counting(torch.utils.data.Dataset):
    """Sample i is tokens i, i+1, ... of a length that depends on i; so a row tells which sample it is."""

    def __init__(self, size, *, tell_lengths=True):
        self.size = size
        sizes = np.array([3 + (7 * index) % 11 for index in range(size)])
        self.sizes = sizes
        if tell_lengths:
            self.lengths = sizes

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        tokens = torch.arange(index, index + int(self.sizes[index]))
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(len(tokens))}


def arguments(*, rank=0, ranks=1, micro=2, total=8, **others):
    sizes = {"micro_batch_size": micro, "global_batch_size": total}
    place = {"data_parallel_rank": rank, "data_parallel_size": ranks}
    padding = Padding(seq_length=16, multiple_of=4, pad_id=999)
    return sizes | place | {"padding": padding} | others


def steps(dataset, count, *, consumed=0, **others):
    iterator = build_step_iterator(dataset, consumed_samples=consumed, seed=11, shuffle=True, **arguments(**others))
    return list(islice(iterator, count))


def samples_of(step):
    return [int(row) for micro_batch in step for row in micro_batch["tokens"][:, 0]]


def equal(one, other):
    return all(
        left.keys() == right.keys() and all(left[k] is right[k] is None or torch.equal(left[k], right[k]) for k in left)
        for left, right in zip(one, other, strict=True)
    )


def test_micro_batches_have_the_agreed_form():
    [step] = steps(Counting(20), 1)
    assert len(step) == 4
    for batch in step:
        size = batch["tokens"].shape
        assert size[0] == 2 and size[1] % 4 == 0
        assert [batch[k].shape for k in ("labels", "loss_mask", "position_ids")] == [size] * 3
        assert [batch[k].dtype for k in ("tokens", "labels", "position_ids")] == [torch.int64] * 3
        assert batch["loss_mask"].dtype == torch.float32
        assert batch["attention_mask"] is None
        for tokens, positions in zip(batch["tokens"], batch["position_ids"], strict=True):
            length = int(Counting(20).sizes[int(tokens[0])])
            assert positions.tolist() == [*range(length), *[0] * (size[1] - length)]


def test_rows_are_padded_to_the_longest_sample_of_the_global_batch_and_masked_by_length():
    dataset = Counting(20)
    for step in steps(dataset, 5):
        longest = max(dataset.sizes[sample] for sample in samples_of(step))
        assert {batch["tokens"].shape[1] for batch in step} == {-(-longest // 4) * 4}
        for batch in step:
            for tokens, labels, mask in zip(batch["tokens"], batch["labels"], batch["loss_mask"], strict=True):
                size = int(dataset.sizes[int(tokens[0])])
                assert mask.tolist() == [1.0] * size + [0.0] * (len(mask) - size)
                assert tokens[:size].tolist() == [int(tokens[0]) + i for i in range(size)]
                assert labels[:size].tolist() == (tokens[:size] + 1).tolist()
                assert set(tokens[size:].tolist()) | set(labels[size:].tolist()) <= {999}


def test_a_learned_token_that_looks_like_padding_stays_learned():
    class EndingInPad(Counting):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample["labels"][-1] = 999
            sample["loss_mask"][0] = 0.0
            return sample

    dataset = EndingInPad(20)
    [step] = steps(dataset, 1)
    for tokens, mask in zip(step[0]["tokens"], step[0]["loss_mask"], strict=True):
        size = int(dataset.sizes[int(tokens[0])])
        assert mask.tolist() == [0.0] + [1.0] * (size - 1) + [0.0] * (len(mask) - size)


def test_padding_can_go_to_the_full_length_and_never_beyond():
    assert Padding(seq_length=10, multiple_of=4).row_length(np.array([0]), np.array([9])) == 10
    full = Padding(seq_length=16, to_full_length=True)
    assert full.row_length(np.array([0]), np.array([3])) == 16
    [step] = steps(Counting(20, tell_lengths=False), 1)
    assert {batch["tokens"].shape[1] for batch in step} == {16}


@pytest.mark.parametrize("steps_before", [1, 3, 6])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(steps_before):
    whole = steps(Counting(20), steps_before + 3)
    resumed = steps(Counting(20), 3, consumed=8 * steps_before)
    assert all(equal(one, other) for one, other in zip(whole[steps_before:], resumed, strict=True))
    assert not equal(whole[0], resumed[0])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_resumed_on_more_ranks_sees_the_same_micro_batches(ranks):
    alone = steps(Counting(20), 3, consumed=24)
    shared = [steps(Counting(20), 3, consumed=24, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, whole in enumerate(alone):
        dealt = [shared[index % ranks][number][index // ranks] for index in range(4)]
        assert equal(whole, dealt)


def test_two_epochs_drop_nothing():
    seen = [sample for step in steps(Counting(20), 5) for sample in samples_of(step)]
    assert sorted(seen) == sorted(list(range(20)) * 2)


def test_the_flat_iterator_gives_the_same_micro_batches():
    flat = build_iterator(Counting(20), consumed_samples=8, seed=11, shuffle=True, **arguments())
    grouped = steps(Counting(20), 3, consumed=8)
    assert equal([batch for step in grouped for batch in step], list(islice(flat, 12)))


def test_worker_processes_change_nothing():
    assert all(
        equal(one, other)
        for one, other in zip(steps(Counting(20), 4), steps(Counting(20), 4, num_workers=2), strict=True)
    )


@pytest.mark.parametrize("is_caught", [True, False])
def test_a_worker_lives_on_at_a_signal_that_the_run_catches(is_caught):
    before = signal.signal(signal.SIGTERM, (lambda *_: None) if is_caught else signal.SIG_DFL)
    others = set(multiprocessing.active_children())  # ranks of other tests
    try:
        iterator = build_step_iterator(
            Counting(40), **arguments(consumed_samples=0, seed=1, shuffle=False, num_workers=1)
        )
        next(iterator)
        for worker in set(multiprocessing.active_children()) - others:  # as torchrun and schedulers do
            worker.terminate()
            worker.join(0.5)
        if is_caught:
            assert len([next(iterator) for _ in range(4)]) == 4
        else:
            with pytest.raises(RuntimeError, match="DataLoader worker"):
                [next(iterator) for _ in range(4)]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_reading_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    steps(Counting(20), 4)
    list(build_evaluation_steps(Counting(20), **arguments()))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_too_few_samples_end_before_the_first_step():
    with pytest.raises(ValueError, match="has 7 samples, fewer than one global batch"):
        build_step_iterator(Counting(7), consumed_samples=0, seed=1, shuffle=True, **arguments())
    with pytest.raises(ValueError, match="there is no training data"):
        build_step_iterator(None, consumed_samples=0, seed=1, shuffle=True, **arguments())


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_sees_every_sample_once_and_fills_up_with_masked_rows(ranks):
    dataset = Counting(21)
    seen, shapes, learned = [], [], 0.0
    for rank in range(ranks):
        passes = build_evaluation_steps(dataset, **arguments(rank=rank, ranks=ranks))
        assert (len(passes), passes.num_samples) == (3, 21)
        own = list(passes)
        assert all(equal(one, other) for one, other in zip(own, list(passes), strict=True)), "a second pass is the same"
        shapes.append([[batch["tokens"].shape for batch in step] for step in own])
        for batch in (batch for step in own for batch in step):
            seen += [int(row[0]) for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True) if mask.any()]
            learned += float(batch["loss_mask"].sum())
    assert sorted(seen) == list(range(21))
    assert learned == dataset.sizes.sum()
    assert shapes.count(shapes[0]) == ranks


def test_an_evaluation_may_stop_early_and_needs_samples():
    passes = build_evaluation_steps(Counting(21), **arguments(), max_batches=2)
    assert (len(list(passes)), passes.num_samples) == (2, 16)
    with pytest.raises(ValueError, match="the evaluation data has no samples"):
        build_evaluation_steps(Counting(0), **arguments())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"tokens": torch.ones(3)}, "sample 0 of Wrong has no tensor 'labels' .found: tokens"),
        (torch.ones(3), "sample 0 of Wrong has no tensor 'tokens' .found: Tensor"),
        (
            {"tokens": torch.ones(3), "labels": torch.ones(2), "loss_mask": torch.ones(3)},
            r"labels has shape \[2\], expected \[3\]",
        ),
        (dict.fromkeys(("tokens", "labels", "loss_mask"), torch.ones(17)), "has 17 tokens, expected at most 16"),
    ],
)
def test_a_users_wrong_samples_are_named(sample, message):
    class Wrong(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return sample

    iterator = build_step_iterator(Wrong(), consumed_samples=0, seed=1, shuffle=False, **arguments())
    with pytest.raises(ValueError, match=message):
        next(iterator)


def test_a_users_positions_are_kept():
    class Packed(Counting):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"position_ids": torch.zeros(len(sample["tokens"]), dtype=torch.int64)}

    [step] = steps(Packed(8), 1)
    first = step[0]["position_ids"][0]
    size = int(Counting(8).sizes[int(step[0]["tokens"][0, 0])])
    assert first[:size].tolist() == [0] * size


def test_each_micro_batch_may_have_a_length_of_its_own():
    dataset = Counting(20)
    padding = Padding(seq_length=64, multiple_of=4, per_micro_batch=True)
    iterator = build_step_iterator(
        dataset,
        consumed_samples=0,
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=1,
        shuffle=True,
        padding=padding,
    )
    step = next(iterator)
    lengths = [batch["tokens"].shape[1] for batch in step]
    longest = [max(int(dataset.sizes[int(row[0])]) for row in batch["tokens"]) for batch in step]
    assert lengths == [-(-length // 4) * 4 for length in longest]
    assert len(set(lengths)) > 1


@dataclass
class _Numbers(DatasetProvider):
    def build_datasets(self, context):
        items = [{name: torch.full((4,), i) for name in ("tokens", "labels", "loss_mask")} for i in range(12)]
        return items, items[:5], None


def test_a_script_sets_up_the_iterators_of_a_run(tmp_path):
    """The same batches as `setup`: after the consumed samples, dealt to this rank, evaluated in whole passes."""
    cfg = tiny_config(tmp_path, train={"global_batch_size": 4, "micro_batch_size": 2}, validation={"eval_iters": 1})
    cfg.dataset = _Numbers(dataloader_type="single")
    state = TrainState(consumed_train_samples=4)
    training, validation, test = setup_data_iterators(
        cfg, state, 1, build_datasets, SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    )
    steps = [[batch["tokens"][:, 0].tolist() for batch in next(training)] for _ in range(2)]
    assert steps == [[[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    for _ in range(2):
        assert [[batch["tokens"][:, 0].tolist() for batch in step] for step in validation] == [[[0, 1], [2, 3]]]
    assert test is None
    second = setup_data_iterators(cfg, state, 1, build_datasets, SimpleNamespace(rank=lambda: 1, size=lambda: 2))[0]
    assert [batch["tokens"][:, 0].tolist() for batch in next(second)] == [[6, 7]]
