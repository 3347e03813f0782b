# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What each interpreter wrote is read here, and the way some name a member of an enumeration opens nothing else."""

import argparse
import enum
import io
import json
import pickle
import signal

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron.bridge.checkpoint.safe_pickle import MEGATRON_ENUMERATIONS, InertValue, read_blob, read_dcp_metadata
from tests.unit_tests.checkpoint.recorded import record

INTERPRETERS = ("3.10.13", "3.11.2", "3.11.7", "3.12.1", "3.13.0")
BY_NAME = "3.11.2"


def _recorded(version, part):
    return record.unpacked(json.loads((record.DIRECTORY / f"{version}.json").read_text())[part])


def test_one_of_the_recordings_has_members_by_name():
    by_name = [v for v in INTERPRETERS if b"getattr" in _recorded(v, "metadata") and b"getattr" in _recorded(v, "blob")]
    assert by_name == [BY_NAME]


@pytest.mark.parametrize("version", INTERPRETERS)
def test_a_description_of_each_interpreter_is_read(tmp_path, version):
    (tmp_path / ".metadata").write_bytes(_recorded(version, "metadata"))
    read = read_dcp_metadata(tmp_path / ".metadata")
    assert read == record.description()
    assert read.all_local_plans == record.description().all_local_plans


@pytest.mark.parametrize("version", [*INTERPRETERS, "this one"])
def test_a_blob_of_each_interpreter_is_read(version):
    blob = record.blob() if version == "this one" else _recorded(version, "blob")
    read = read_blob(io.BytesIO(blob), named="blob.pt")
    assert torch.equal(read.pop("tensor"), torch.arange(3))
    assert np.array_equal(read.pop("array"), np.arange(3)) and read.pop("stream").getvalue() == b"abc"
    backend, mode = read.pop("backend"), read.pop("mode")
    assert read == record.plain_content()
    assert isinstance(backend, InertValue) and isinstance(mode, InertValue)
    if version != "this one":
        names = ("unfused", "DISABLED") if version == BY_NAME else (3, "disabled")
        assert (*backend.arguments, *mode.arguments) == names


class _Looked:
    """Pickles as `getattr(*arguments)`."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def _of_both(tmp_path, payload):
    """A description and a blob with the payload in them, and what reads each."""
    description = record.description()
    description.planner_data = {"hook": payload}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    torch.save({"hook": payload}, tmp_path / "blob.pt")
    return (read_dcp_metadata, tmp_path / ".metadata"), (read_blob, tmp_path / "blob.pt")


ENCODING = dcp_metadata._MEM_FORMAT_ENCODING
NO_MEMBERS = (
    *("__class__", "__members__", "__init__", "__reduce_ex__", "__subclasses__", "_member_map_", "_value2member_map_"),
    *("mro", "name", "value", "__class__.mro", "TORCH_CONTIGUOUS_FORMAT.value", "", "a b", 3, None, b"mro"),
)


@pytest.mark.parametrize("name", NO_MEMBERS)
def test_nothing_but_a_member_is_taken_from_an_enumeration(tmp_path, name):
    for read, path in _of_both(tmp_path, _Looked(ENCODING, name)):
        with pytest.raises(ValueError, match=rf"{path.name} names \S+, which is not plain data, and nothing"):
            read(path)


@pytest.mark.parametrize("name", NO_MEMBERS)
def test_nothing_but_a_member_is_taken_from_one_of_megatrons(tmp_path, name):
    backend = enum.Enum("AttnBackend", ("flash",), module="megatron.core.transformer.enums")
    with record.importable(backend):
        torch.save([_Looked(backend, name)], tmp_path / "blob.pt")
    with pytest.raises(ValueError, match="blob.pt names builtins.getattr, which is not plain data, and nothing"):
        read_blob(tmp_path / "blob.pt")


@pytest.mark.parametrize(
    "owner",
    [
        argparse.Namespace,
        argparse.Namespace(system=1),
        np.dtype("float32"),
        np.ndarray,
        torch.bfloat16,
        torch.Size,
        {"system": 1},
        "system",
        signal.SIGTERM,
        ENCODING.TORCH_CONTIGUOUS_FORMAT,
        getattr,
        _Looked(ENCODING, "TORCH_CONTIGUOUS_FORMAT"),
    ],
)
@pytest.mark.parametrize("name", ["system", "__class__", "__init__", "__call__", "_members", "named"])
def test_nothing_is_taken_from_anything_else(tmp_path, owner, name):
    for read, path in _of_both(tmp_path, _Looked(owner, name)):
        with pytest.raises(ValueError, match=rf"{path.name} names \S+, which is not plain data, and nothing"):
            read(path)


@pytest.mark.parametrize(("owner", "name"), [("os system", "__call__"), ("re RegexFlag", "IGNORECASE")])
def test_an_owner_that_is_not_on_the_list_is_refused_by_its_own_name(tmp_path, owner, name):
    looked = _named("builtins getattr") + _named(owner) + _text(name) + b"\x86R"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + looked + b".")
    with pytest.raises(ValueError, match=f"names {owner.replace(' ', '.')}, which is not plain data"):
        read_dcp_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_default_or_no_name_is_refused(tmp_path, count):
    for read, path in _of_both(tmp_path, _Looked(*(ENCODING, "no_member", "default")[:count])):
        with pytest.raises(ValueError, match=path.name) as error:
            read(path)
        assert "\n" not in str(error.value)


def _named(text):
    module, name = text.encode().split()
    return b"c%b\n%b\n" % (module, name)


def _text(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize("state", [b"}" + _text("a") + b"K\x01s", b"N}" + _text("_members") + b"K\x01s\x86"])
@pytest.mark.parametrize("found", ["builtins getattr", f"{ENCODING.__module__} {ENCODING.__name__}"])
def test_what_stands_for_them_takes_no_state(tmp_path, found, state):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + _named(found) + state + b"b.")
    with pytest.raises(ValueError, match=r".metadata names .*, which is not plain data"):
        read_dcp_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("member", [*ENCODING, *WriteItemType, *signal.Signals])
def test_each_member_is_found_by_name_and_by_value(tmp_path, member):
    by_value = _Reduced(type(member), (member.value,))
    for payload in (_Looked(type(member), member.name), by_value):
        torch.save({"hook": payload}, tmp_path / "blob.pt")
        description = record.description()
        description.planner_data = {"hook": payload}
        (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
        if isinstance(member, signal.Signals):
            assert read_blob(tmp_path / "blob.pt") == {"hook": member}
        else:
            assert read_dcp_metadata(tmp_path / ".metadata").planner_data == {"hook": member}


class _Reduced:
    def __init__(self, made, arguments):
        self.made, self.arguments = made, arguments

    def __reduce__(self):
        return self.made, self.arguments


def test_an_enumeration_is_called_with_a_value_of_its_own(tmp_path):
    """Called with two arguments, `Enum` makes a class."""
    for arguments in ((99,), ("new", ["A"]), ([],)):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(_Reduced(ENCODING, arguments)))
        with pytest.raises(ValueError, match="is damaged"):
            read_dcp_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("full_name", MEGATRON_ENUMERATIONS)
def test_what_the_list_calls_an_enumeration_is_one_of_core(full_name):
    module_name, _, name = full_name.rpartition(".")
    module = pytest.importorskip(module_name)
    if not hasattr(module, name):
        pytest.skip("not in this version of Core")
    found = getattr(module, name)
    assert issubclass(found, enum.Enum) and not issubclass(found, enum.Flag), "combined flags are stored otherwise"
