# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What reads the files of a stranger's checkpoint; see `data_readers`."""

import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.data_readers import LAUGHS, NESTED, NUMBERS, TAGS, TARGET, Reader, fast_disk


def readers() -> list[Reader]:
    """What `make fuzz` feeds."""
    return [*_plain_files(), *_pickles()]


def _plain_files() -> list[Reader]:
    from megatron.bridge.checkpoint import iterations
    from megatron.bridge.checkpoint.manifest import check_files_of, read_manifest
    from megatron.bridge.checkpoint.model_checkpoint import read_run_config
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.utils.yaml_io import from_yaml_dict

    manifest = {"algorithm": "crc32", "files": {"metadata.json": [3, "352441c2"]}}
    odd = (b"null", b"[]", b"{}", b'"', b"-", b"\n", b"release", b"\x00", b"\xd9\xa3", b"..", b"/", b"{" * 3000)

    def tracked(path: Path) -> Any:
        return iterations.resolve_checkpoint(path.parent)

    def described(path: Path) -> Any:
        return iterations.why_incomplete(path.parent)

    def listed(path: Path) -> Any:
        (path.parent / iterations.METADATA_FILE).write_bytes(b"abc")
        return read_manifest(path.parent), check_files_of(path.parent, lambda _: True)

    def configured(path: Path) -> Any:
        section = read_run_config(path.parent).get("model")
        return from_yaml_dict(section or {}, expected=GPTModelProvider, strict=False, where=f"{path}: model")

    words = (*odd, *NUMBERS, *NESTED)
    path_words = (b'"../../../etc/passwd"', b'"/dev/zero"', b'"/dev/stdin"', b'"."', b'""')
    return [
        Reader(iterations.TRACKER_FILE, tracked, (b"6", b"release", b"0000012"), words),
        Reader(iterations.METADATA_FILE, described, (b'{"sharded_backend": "torch_dist"}',), words),
        Reader("manifest.json", listed, (json.dumps(manifest).encode(),), (*words, *path_words)),
        Reader(
            iterations.CONFIG_FILE,
            configured,
            (b"model:\n  _target_: x.Y\n  num_layers: 2\ntrain: {train_iters: 3}\n",),
            (*words, b"&a ", b"*a", b"!!python/object/apply:os.system ['touch hacked']", TARGET, *TAGS, LAUGHS),
        ),
    ]


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


def _pickles() -> list[Reader]:
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    from megatron.bridge.checkpoint.safe_pickle import read_blob
    from megatron.bridge.checkpoint.sharded_state import check_files, stored_shapes
    from megatron.bridge.training.state import TrainState

    saved = Path(tempfile.mkdtemp(dir=fast_disk())) / "blob"
    torch.save({**TrainState().state_dict(), "names": ["a", (1, None)]}, saved)
    with zipfile.ZipFile(saved) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in inside if name.endswith("data.pkl"))

    def restored(path: Path) -> Any:
        return TrainState().load_state_dict(read_blob(path))

    def packed(path: Path) -> Any:
        """A pickle in an archive whose checksums are right."""
        content = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            for name, stored in inside.items():
                archive.writestr(name, content if name == pickled else stored)
        return restored(path)

    def described(path: Path) -> Any:
        (path.parent / "__0_0.distcp").write_bytes(b"abcd")
        check_files(path.parent)
        return stored_shapes(path.parent)

    harm = pickle.dumps(_Payload())
    laughs = b"]" + b"\x94]\x94(h\x00h\x00e" * 3
    words = (
        b"cposix\nmkdir\n(Vhacked\ntR.",
        b"cbuiltins\neval\n",
        b"cbuiltins\ngetattr\n",
        harm,
        b"\x80\x04",
        b".",
        b"R",
        b"(",
        b"\xff" * 8,
        laughs,
    )
    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(dtype=torch.float32),
        torch.Size([1]),
        [dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))],
    )
    description = dcp.Metadata(
        {"a": dcp.BytesStorageMetadata(), "b": tensor},
        {},
        {dcp.MetadataIndex("b", torch.Size([0]), 0): _StorageInfo("__0_0.distcp", 0, 4)},
    )
    return [
        Reader("train_state.pt", restored, (saved.read_bytes(), pickle.dumps({"a": 1}), harm), words),
        Reader("data.pkl", packed, (inside[pickled], pickle.dumps({"a": 1}), harm), words),
        Reader(".metadata", described, (pickle.dumps(description), harm), words),
    ]
