# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The list of a checkpoint's files: every flipped bit and every cut is found, and the file is named."""

import json
import random
import zlib

import pytest
import torch

from megatron.bridge.checkpoint import manifest
from megatron.bridge.checkpoint.manifest import MANIFEST_FILE, check_files_of, is_small_file, is_tensor_file

DAMAGES = 500


@pytest.fixture
def directory(tmp_path):
    """Files of all kinds and sizes that a checkpoint has, with their manifest."""
    draw = random.Random(3)
    sizes = {"__0_0.distcp": 5000, "__1_0.distcp": 4097, ".metadata": 300, "train_state.pt": 90}
    for name, size in {**sizes, "tokenizer/tokenizer.json": 700, "metadata.json": 2, "empty": 0}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(draw.randbytes(size))
    manifest.write_manifest(tmp_path)
    return tmp_path


def check_everything(directory):
    return check_files_of(directory, lambda name: True)


def test_a_whole_checkpoint_passes_and_all_of_it_is_read(directory):
    assert check_everything(directory) == 5000 + 4097 + 300 + 90 + 700 + 2
    assert check_files_of(directory, is_tensor_file) == 5000 + 4097
    assert check_files_of(directory, is_small_file) == 300 + 90 + 700 + 2


def test_all_bytes_are_reported_as_they_are_read(directory):
    seen = []
    name = "__0_0.distcp"
    assert manifest.damage_of(directory / name, manifest.read_manifest(directory)[name], progress=seen.append) is None
    assert sum(seen) == 5000


def test_ranks_share_the_files(directory):
    parts = [check_files_of(directory, is_tensor_file, share=share, shares=2) for share in range(2)]
    assert sorted(parts) == [4097, 5000]


def test_every_damage_is_found_and_names_its_file(directory):
    draw = random.Random(8)
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    listed = manifest.read_manifest(directory)
    for _ in range(DAMAGES):
        path = draw.choice(paths)
        whole = path.read_bytes()
        if draw.random() < 0.3:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        else:
            at = draw.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        if path.name == MANIFEST_FILE and _says_the_same(directory, listed):
            pass  # white space: without effect
        else:
            with pytest.raises(ValueError, match=".*") as error:
                check_everything(directory)
            message = str(error.value)
            assert "\n" not in message and "checkpoint.ckpt_step" in message
            assert path.name == MANIFEST_FILE or str(path) in message
        path.write_bytes(whole)
    assert check_everything(directory)


def _says_the_same(directory, listed):
    try:
        return manifest.read_manifest(directory) == listed
    except ValueError:
        return False


def test_a_missing_file_is_named(directory):
    (directory / "train_state.pt").unlink()
    with pytest.raises(ValueError, match="train_state.pt is missing: expected 90 bytes; .* remove manifest.json"):
        check_files_of(directory, is_small_file)
    check_files_of(directory, is_tensor_file)


def test_without_a_manifest_nothing_is_checked(directory):
    (directory / MANIFEST_FILE).unlink()
    (directory / "train_state.pt").unlink()
    assert manifest.read_manifest(directory) is None
    assert check_everything(directory) == 0


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"algorithm": "md5", "files": {}}', '{"algorithm": "crc32", "files": {"a": 3}}', "\0"]
)
def test_a_manifest_of_another_form_is_refused(directory, content):
    (directory / MANIFEST_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged \(.*\): expected crc32 checksums") as error:
        check_everything(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/file", "a/../../b", "x" * 300, "a\0b", "\ud800", ""])
def test_a_manifest_that_names_files_elsewhere_is_refused(directory, name):
    (directory / MANIFEST_FILE).write_text(json.dumps({"algorithm": "crc32", "files": {name: [3, "352441c2"]}}))
    with pytest.raises(ValueError, match="manifest.json names .*: expected files below") as error:
        check_everything(directory)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_what_was_summed_while_it_was_written_is_not_read_again(tmp_path):
    path = tmp_path / "__0_0.distcp"
    with open(path, "wb") as file:
        writer = manifest.ChecksumWriter(file)
        for seed in range(3):
            torch.save(torch.randn(100, generator=torch.Generator().manual_seed(seed)), writer)
            writer.write(memoryview(b"between"))
        entry = writer.entry
    content = path.read_bytes()
    assert entry == (len(content), f"{zlib.crc32(content):08x}")

    manifest.write_manifest(tmp_path, {path.name: (3, "as told")})
    (tmp_path / "later").write_bytes(b"x")
    manifest.write_manifest(tmp_path)
    assert manifest.read_manifest(tmp_path)[path.name] == (3, "as told")
    assert set(json.loads((tmp_path / MANIFEST_FILE).read_text())["files"]) == {path.name, "later"}
