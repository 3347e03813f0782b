# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which names in a blob count, and what becomes of them."""

import argparse
import os
import pathlib
import pickle
import signal
import sys
import types

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron.bridge.checkpoint.safe_pickle import (
    MEGATRON_CLASSES,
    OPTIMIZER_CLASSES,
    InertValue,
    read_blob,
    read_dcp_metadata,
)


@pytest.fixture
def classes_elsewhere(monkeypatch):
    """Classes by full names, as a machine that can import them has them; here only until they are pickled."""

    def make(full_name):
        module_name, _, name = full_name.rpartition(".")
        module = types.ModuleType(module_name)
        made = type(name, (), {"__module__": module_name, "__init__": lambda self, *_: None})
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module_name, module)
        parents = module_name.split(".")
        for parent in (".".join(parents[:count]) for count in range(1, len(parents))):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        return made

    return make


def _saved(tmp_path, content):
    torch.save(content, tmp_path / "blob.pt")
    return tmp_path / "blob.pt"


@pytest.mark.parametrize("full_name", OPTIMIZER_CLASSES)
def test_an_optimizers_class_is_dropped(tmp_path, classes_elsewhere, monkeypatch, full_name):
    found = classes_elsewhere(full_name)
    group = {"lr": 0.1, "cpu_optimizer_cls": found, "betas": (0.9, 0.99)}
    path = _saved(tmp_path, {"optimizer": {"param_groups": [group, group]}, "iteration": 3})
    monkeypatch.undo()
    before = set(sys.modules)
    plain = {"lr": 0.1, "betas": (0.9, 0.99)}
    assert read_blob(path) == {"optimizer": {"param_groups": [plain, plain]}, "iteration": 3}
    assert set(sys.modules) == before


@pytest.mark.parametrize("full_name", MEGATRON_CLASSES)
def test_megatrons_records_stay_inert(tmp_path, classes_elsewhere, monkeypatch, full_name):
    record = classes_elsewhere(full_name)()
    record.size = 3
    path = _saved(tmp_path, {"args": argparse.Namespace(record=record, lr=0.1)})
    monkeypatch.undo()
    args = read_blob(path)["args"]
    assert args.lr == 0.1 and isinstance(args.record, InertValue) and args.record.state == {"size": 3}
    assert type(args.record).__name__ == full_name.rpartition(".")[2]


def test_plain_data_comes_back_as_it_was(tmp_path):
    content = {
        "tensor": torch.arange(3, dtype=torch.int32),
        "dtype": torch.bfloat16,
        "array": np.random.RandomState(1).get_state()[1],
        "scalar": np.float64(0.1),
        "signal": signal.SIGTERM,
        "path": pathlib.PosixPath("/there"),
        "args": argparse.Namespace(lr=0.1, flags=[True, None, {1: (2, 3)}]),
        "space": types.SimpleNamespace(a=1),
        "slice": slice(1, 2),
    }
    read = read_blob(_saved(tmp_path, content))
    assert torch.equal(read.pop("tensor"), content.pop("tensor"))
    assert np.array_equal(read.pop("array"), content.pop("array"))
    assert read == content


@pytest.mark.parametrize(
    ("foreign", "name"),
    [(os.getcwd, "posix.getcwd"), (eval, "eval"), (torch.nn.Linear, "torch.nn.modules.linear.Linear")],
)
def test_any_other_name_is_refused(tmp_path, foreign, name):
    path = _saved(tmp_path, {"hook": foreign})
    with pytest.raises(ValueError, match=rf"blob.pt names (builtins\.)?{name}, which is not plain data"):
        read_blob(path)


def test_what_the_process_registered_with_torch_does_not_count_and_stays(tmp_path):
    path = _saved(tmp_path, {"fraction": torch.nn.Linear})
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([torch.nn.Linear]):
        with pytest.raises(ValueError, match="Linear"):
            read_blob(path)
        assert torch.load(path, weights_only=True) == {"fraction": torch.nn.Linear}
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "blob.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="blob.pt can't be read as plain data: .*restore the file from another copy"):
        read_blob(tmp_path / "blob.pt")
    with pytest.raises(FileNotFoundError):
        read_blob(tmp_path / "nothing.pt")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"no": "description"})])
def test_a_description_that_is_none(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="expected torch's description of a distributed checkpoint"):
        read_dcp_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("content", [b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x02Np2147483647\n."])
def test_a_description_that_asks_for_all_memory(tmp_path, content):
    """Pickle's own reader would make room for 2 ** 32 objects, and the system would end the process."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged .it numbers an object 2147483647, more than it can hold"):
        read_dcp_metadata(tmp_path / ".metadata")


def _described(place="__0_0.distcp", offset=0, length=4):
    index = dcp_metadata.MetadataIndex("a", torch.Size([0]), 0)
    tensor = dcp_metadata.TensorStorageMetadata(
        dcp_metadata.TensorProperties(dtype=torch.float32),
        torch.Size([1]),
        [dcp_metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))],
    )
    return dcp_metadata.Metadata({"a": tensor}, {}, {index: _StorageInfo(place, offset, length)})


@pytest.mark.parametrize("place", ["../__0_0.distcp", "/dev/zero", "a/../../b", "x" * 300, "a\0b", ""])
def test_a_description_that_leads_elsewhere(tmp_path, place):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_described(place)))
    with pytest.raises(ValueError, match="is damaged .it names .*, which is no file beside it") as error:
        read_dcp_metadata(tmp_path / ".metadata")
    assert "\n" not in str(error.value)


def _changed(change):
    description = _described()
    change(description)
    return description


@pytest.mark.parametrize(
    "description",
    [
        _described(offset=-(2**40), length=2**40 + 4),
        _described(place=3),
        _changed(lambda it: it.state_dict_metadata.update(a=3)),
        _changed(lambda it: it.state_dict_metadata.update({3: it.state_dict_metadata["a"]})),
        _changed(lambda it: setattr(it.state_dict_metadata["a"], "size", "large")),
        _changed(lambda it: setattr(it.state_dict_metadata["a"].properties, "dtype", "float")),
        _changed(lambda it: setattr(it.state_dict_metadata["a"].properties, "memory_format", torch.channels_last)),
        _changed(lambda it: setattr(it.state_dict_metadata["a"].properties, "layout", torch.sparse_coo)),
        _changed(lambda it: it.storage_data.update(a=3)),
        _changed(lambda it: setattr(it, "storage_data", None)),
        _changed(lambda it: setattr(it, "storage_meta", "here")),
    ],
)
def test_a_description_of_other_parts(tmp_path, description):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    with pytest.raises(ValueError, match="is damaged") as error:
        read_dcp_metadata(tmp_path / ".metadata")
    assert "\n" not in str(error.value)


def test_a_description_is_read(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_described()))
    assert read_dcp_metadata(tmp_path / ".metadata") == _described()
