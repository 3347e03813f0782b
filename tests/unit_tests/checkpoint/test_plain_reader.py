# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tensors come straight from the file into their place, whole or in part, and as torch reads them where they can't."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save_state_dict
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron.bridge.checkpoint import sharded_state
from megatron.bridge.checkpoint.sharded_state import PlainReader

STORED = {
    "weights": torch.randn(6, 4).bfloat16(),
    "moments": torch.randn(24),
    "columns": torch.randn(4, 6).t(),  # stored by columns
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader")
    save_state_dict(dict(STORED), FileSystemWriter(path, single_file_per_rank=True), no_dist=True)
    return path


class _Planner:
    """Gives one place, and sees what was put there."""

    def __init__(self, place):
        self.place, self.committed = place, 0

    def resolve_tensor(self, item):
        return self.place

    def commit_tensor(self, item, tensor):
        self.committed += 1


@pytest.mark.parametrize(
    ("name", "offsets", "place", "straight"),
    [
        ("weights", (0, 0), torch.zeros(6, 4, dtype=torch.bfloat16), True),
        ("weights", (2, 0), torch.zeros(3, 4, dtype=torch.bfloat16), True),  # some rows
        ("moments", (5,), torch.zeros(7), True),
        ("weights", (0, 1), torch.zeros(6, 2, dtype=torch.bfloat16), False),  # some columns
        ("weights", (0, 0), torch.zeros(6, 4), False),  # another dtype
        ("weights", (0, 0), torch.zeros(4, 6, dtype=torch.bfloat16).t(), False),  # a place in many pieces
        ("columns", (0, 0), torch.zeros(6, 4), False),
        ("moments", (3,), torch.zeros(0), False),
    ],
)
def test_what_is_read_is_what_was_stored(directory, monkeypatch, name, offsets, place, straight):
    read_by_torch = []
    narrow = torch_filesystem.narrow_tensor_by_index
    monkeypatch.setattr(
        torch_filesystem, "narrow_tensor_by_index", lambda *sizes: read_by_torch.append(1) or narrow(*sizes)
    )
    reader, planner = PlainReader(directory), _Planner(place)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    index = next(index for index in reader.storage_data if index.fqn == name)
    sizes = (LoadItemType.TENSOR, MetadataIndex(name), torch.Size([0] * place.ndim), index, torch.Size(offsets))
    reader.read_data(LoadPlan([ReadItem(*sizes, lengths=place.shape)]), planner)
    wanted = STORED[name]
    for dim, (offset, length) in enumerate(zip(offsets, place.shape, strict=True)):
        wanted = wanted.narrow(dim, offset, length)
    assert torch.equal(place, wanted.to(place.dtype)) and planner.committed == 1
    # Torch 2.6 does not tell where a tensor lies in its file: there all are read by it.
    assert bool(read_by_torch) != (straight and sharded_state._torch_tells_offsets())
