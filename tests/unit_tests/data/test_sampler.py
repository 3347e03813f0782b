# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
from itertools import islice

import numpy as np
import pytest

from megatron.bridge.data.sampler import (
    PADDING_ROW,
    BatchLayout,
    epoch_order,
    evaluation_batches,
    sample_indices,
    training_batches,
)


def layout(*, rank=0, ranks=1, micro=2, total=8):
    return BatchLayout(
        micro_batch_size=micro, global_batch_size=total, data_parallel_rank=rank, data_parallel_size=ranks
    )


def first_batches(count, *, num_samples=20, consumed=0, seed=7, shuffle=True, total=8):
    batches = training_batches(num_samples, layout(total=total), consumed_samples=consumed, seed=seed, shuffle=shuffle)
    return [batch.tolist() for batch in islice(batches, count)]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    orders = [epoch_order(50, seed=3, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != epoch_order(50, seed=4, epoch=0).tolist()
    assert orders[0] != list(range(50))


def test_the_order_is_frozen():
    # A run is resumed in the order it began with, whatever versions are installed by then.
    assert epoch_order(10, seed=1234, epoch=1).tolist() == [3, 9, 7, 6, 4, 1, 8, 2, 5, 0]


def test_epochs_follow_each_other_inside_a_global_batch_and_drop_nothing():
    positions = [index for batch in first_batches(5) for index in batch]
    assert sorted(positions[:20]) == sorted(positions[20:40]) == list(range(20))
    assert 20 % 8, "the epoch ends inside a batch"


def test_without_shuffling_samples_come_as_they_are_stored():
    assert first_batches(3, shuffle=False) == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, 12, 13, 14, 15],
        [16, 17, 18, 19, 0, 1, 2, 3],
    ]


@pytest.mark.parametrize("steps_before", [1, 2, 5, 9])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(steps_before):
    uninterrupted = first_batches(steps_before + 4)
    assert first_batches(4, consumed=8 * steps_before) == uninterrupted[steps_before:]


def test_a_run_resumed_with_another_global_batch_goes_on_at_the_same_sample():
    line = sample_indices(0, 60, num_samples=20, seed=7, shuffle=True).tolist()
    assert [i for batch in first_batches(3, consumed=24, total=12) for i in batch] == line[24:60]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_global_batch_and_its_micro_batches_do_not_depend_on_their_number(ranks):
    batch = np.arange(100, 108)
    dealt = {}
    for rank in range(ranks):
        rows = layout(rank=rank, ranks=ranks).rank_slice(batch)
        assert rows.shape == (4 // ranks, 2)
        for number, micro_batch in enumerate(rows.tolist()):
            dealt[number * ranks + rank] = micro_batch
    assert [dealt[number] for number in range(4)] == [[100, 101], [102, 103], [104, 105], [106, 107]]


def test_too_few_samples_are_refused_at_once():
    with pytest.raises(ValueError, match=r"has 7 samples, fewer than one global batch \(train.global_batch_size=8\)"):
        training_batches(7, layout(), consumed_samples=0, seed=1, shuffle=True)
    training_batches(8, layout(), consumed_samples=0, seed=1, shuffle=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 3}, "global_batch_size=8 is not a multiple of .*micro_batch_size=2 x data-parallel size 3"),
        ({"micro": 0}, "train.micro_batch_size=0: expected 1 or more"),
        ({"rank": 2, "ranks": 2}, "rank 2 of 2 does not exist"),
    ],
)
def test_layouts_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layout(**arguments)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 23])
def test_an_evaluation_covers_every_sample_once_over_all_ranks(ranks, num_samples):
    seen, counts = [], set()
    for rank in range(ranks):
        own = layout(rank=rank, ranks=ranks)
        slices = [own.rank_slice(batch) for batch in evaluation_batches(num_samples, own)]
        counts.add(tuple(len(rows) for rows in slices))
        seen += [int(row) for rows in slices for row in rows.ravel()]
    assert len(counts) == 1, "all ranks run the same numbers of micro-batches"
    assert sorted(row for row in seen if row != PADDING_ROW) == list(range(num_samples))
    assert seen.count(PADDING_ROW) == -num_samples % (2 * ranks)


def test_an_evaluation_can_stop_early():
    assert [batch.tolist() for batch in evaluation_batches(23, layout(), max_batches=1)] == [list(range(8))]


@pytest.mark.parametrize(("at_once", "rows"), [(1, 2), (2, 4), (3, 6), (9, 8)])
def test_the_last_batch_may_be_filled_up_to_several_micro_batches(at_once, rows):
    batches = evaluation_batches(9, layout(), micro_batches_at_once=at_once)
    assert [len(batch) for batch in batches] == [8, rows]
