# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a small file may stand for: counted without unfolding it."""

import io
import zipfile

import numpy as np
import pytest
import torch

from megatron.bridge.utils.expansion_limits import DEEPEST, LARGEST_EXPANSION, check_archive, check_expansion


def doubled(times):
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


def nested(levels):
    value = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def holding_itself():
    value = {}
    value["a"] = (value,)
    return value


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        {},
        doubled(15),
        nested(DEEPEST),
        list(range(LARGEST_EXPANSION // 2)),
        {"a": [1, (2, {"b", 3})], "c": None},
    ],
)
def test_what_is_not_too_much(value):
    check_expansion(value, 10)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (doubled(30), "its 10 bytes stand for 3.22e.09 values"),
        ({"a": doubled(20), "b": (doubled(20),)}, "its 10 bytes stand for"),
        ([text := "x" * 1000] * 2 + [[text] * 2000], "its 10 bytes stand for 2e.06 values"),
        (nested(DEEPEST + 1), f"it is nested {DEEPEST + 1} deep: expected at most {DEEPEST} levels"),
        (holding_itself(), "it holds itself"),
    ],
)
def test_what_is_too_much(value, message):
    with pytest.raises(ValueError, match=message):
        check_expansion(value, 10)


def test_a_long_file_may_stand_for_much():
    check_expansion(doubled(20), 1_000_000)


def _archive(compression=zipfile.ZIP_STORED, content=b"a" * 1000):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        archive.writestr("first", content)
        archive.writestr("second", content)
    return packed.getvalue()


def test_an_archive_without_checksums_passes():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(300)}, packed := io.BytesIO())
    finally:
        torch.serialization.set_crc32_options(before)
    check_archive(packed)


def test_archives_of_torch_and_numpy_pass(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", a=np.ones(300))
    for name in ("a.pt", "a.npz"):
        check_archive(tmp_path / name)
        with open(tmp_path / name, "rb") as file:
            check_archive(file)
            assert file.tell() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_archive(zipfile.ZIP_DEFLATED), "'first' in it is compressed"),
        (_archive().replace(b"a" * 1000, b"b" + b"a" * 999, 1), "the checksum of 'first' in it is wrong"),
        (_archive().replace((1000).to_bytes(4, "little"), (10**9).to_bytes(4, "little")), "its entries overlap"),
        (b"PK", "not a zip file"),
    ],
)
def test_others_do_not(content, message):
    with pytest.raises(zipfile.BadZipFile, match=message):
        check_archive(io.BytesIO(content))


def test_sums_may_be_left_out():
    check_archive(io.BytesIO(_archive().replace(b"a" * 1000, b"b" + b"a" * 999, 1)), sums=False)
