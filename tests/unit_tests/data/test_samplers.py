# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""PyTorch's loader in the order of a run."""

from itertools import chain, islice

import pytest

from megatron.bridge.data.sampler import BatchLayout, training_batches
from megatron.bridge.data.samplers import build_pretraining_data_loader


def load(dataset, kind, *, consumed=0, rank=0, ranks=2, count=None, **options):
    loader = build_pretraining_data_loader(
        dataset, consumed, kind, 2, data_parallel_rank=rank, data_parallel_size=ranks, pin_memory=False, **options
    )
    return [batch.tolist() for batch in islice(loader, count)]


def test_single_deals_the_stored_order_once():
    assert load(range(11), "single") == [[0, 1], [4, 5]]
    assert load(range(11), "single", rank=1) == [[2, 3], [6, 7]]
    assert load(range(11), "single", consumed=4) == [[4, 5]]
    assert load(range(11), "single", drop_last=False) == [[0, 1], [4, 5], [8, 9]]
    assert load(range(11), "single", drop_last=False, rank=1) == [[2, 3], [6, 7], [10]]


@pytest.mark.parametrize(("size", "drop_last"), [(8, True), (11, True), (11, False), (9, False)])
def test_its_length_is_the_number_of_batches(size, drop_last):
    for rank in (0, 1):
        loader = build_pretraining_data_loader(
            range(size), 0, "single", 2, data_parallel_rank=rank, data_parallel_size=2, drop_last=drop_last
        )
        assert len(loader) == len(list(loader))


def test_shuffled_batches_are_those_of_a_run():
    layout = BatchLayout(micro_batch_size=2, global_batch_size=4, data_parallel_rank=0, data_parallel_size=2)
    batches = training_batches(10, layout, consumed_samples=4, seed=3, shuffle=True)
    expected = [layout.rank_slice(batch).reshape(-1).tolist() for batch in islice(batches, 6)]
    options = {"consumed": 4, "count": 6, "seed": 3}
    assert load(range(10), "cyclic", **options) == expected
    assert load(range(10), "batch", global_batch_size=4, **options) == expected
    whole = load(range(10), "batch", global_batch_size=8, count=5, seed=3)
    assert all(len(batch) == 4 for batch in whole)
    assert list(chain(*whole)) == list(chain(*load(range(10), "cyclic", count=10, seed=3)))


def test_a_dataset_joins_its_rows_itself():
    class Words(list):
        def collate_fn(self, rows):
            return "+".join(rows)

    loader = build_pretraining_data_loader(Words("abcd"), 0, "single", 2)
    assert list(loader) == ["a+b", "c+d"]


def test_what_is_no_loader():
    assert build_pretraining_data_loader(None, 0, "single", 2) is None
    mine = iter([1])
    assert build_pretraining_data_loader(mine, 0, "external", 2) is mine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((range(4), 0, "random", 2), "dataloader_type='random': expected single, cyclic, batch or external"),
        ((range(4), 0, "batch", 2), "needs global_batch_size"),
        ((range(4), 4, "single", 2), "4 samples are consumed already, of 4"),
        ((range(0), 0, "cyclic", 2), "has no samples"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pretraining_data_loader(*arguments)
