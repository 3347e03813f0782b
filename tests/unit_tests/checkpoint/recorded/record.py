# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Writes, beside itself, what this interpreter pickles: `python -m tests.unit_tests.checkpoint.recorded.record`.

A description of a distributed checkpoint, and what `torch.save` makes of arguments, numbers and states. It needs torch
and NumPy only; Megatron-LM's enumerations are made here under their own names.
"""

import argparse
import base64
import collections
import contextlib
import enum
import io
import json
import pathlib
import pickle
import platform
import signal
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

DIRECTORY = Path(__file__).parent


def description() -> dcp.Metadata:
    """A weight and a rank's random states, with the plans that Core 0.15 left beside them."""
    weight = dcp.TensorStorageMetadata(
        dcp.TensorProperties(dtype=torch.bfloat16),
        torch.Size([2, 4]),
        [dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4]))],
    )
    index = dcp.MetadataIndex("weight", torch.Size([0, 0]), 0)
    made = dcp.Metadata(
        state_dict_metadata={"weight": weight, "rng_state/shard_0_1": dcp.BytesStorageMetadata()},
        planner_data={"weight": ("weight",)},
        storage_data={
            index: _StorageInfo("__0_0.distcp", 0, 16),
            dcp.MetadataIndex("rng_state/shard_0_1"): _StorageInfo("__0_0.distcp", 16, 8),
        },
        storage_meta=dcp.StorageMeta(checkpoint_id=pathlib.PosixPath("there/iter_0000003")),
    )
    made.all_local_plans = [SavePlan([WriteItem(index=index, type=WriteItemType.SHARD)])]
    return made


def plain_content() -> dict:
    """All that comes back as it was."""
    return {
        "iteration": 3,
        "args": argparse.Namespace(
            lr=1e-5,
            save=pathlib.PosixPath("there/run"),
            exit_signal=signal.SIGTERM,
            params_dtype=torch.bfloat16,
        ),
        "signals": (signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1),
        "slice": slice(0, 4, None),
        "space": types.SimpleNamespace(step=3),
        "ordered": collections.OrderedDict(a=1),
        "bytes": (b"\xff\x00", bytearray(b"\xff")),
        "collected": ({1, 2}, 1j, 2**70, None, True),
        "scalar": np.float64(0.5),
    }


def blob() -> bytes:
    """As `torch.save` writes all of this, and members of Megatron-LM's enumerations."""
    arrays = {"tensor": torch.arange(3), "array": np.arange(3, dtype=np.uint32), "stream": io.BytesIO(b"abc")}
    file = io.BytesIO()
    backend = enum.Enum("AttnBackend", ("flash", "fused", "unfused"), module="megatron.core.transformer.enums")
    mode = enum.Enum("RerunMode", {"DISABLED": "disabled"}, module="megatron.core.rerun_state_machine", type=str)
    with importable(backend), importable(mode):
        torch.save({**plain_content(), **arrays, "backend": backend.unfused, "mode": mode.DISABLED}, file)
    return file.getvalue()


@contextlib.contextmanager
def importable(made: type) -> Iterator[None]:
    """Inside, a class is found in its module, which has nothing else."""
    before = sys.modules.get(made.__module__)
    sys.modules[made.__module__] = module = types.ModuleType(made.__module__)
    setattr(module, made.__name__, made)
    try:
        yield
    finally:
        del sys.modules[made.__module__]
        if before is not None:
            sys.modules[made.__module__] = before


def packed(content: bytes) -> str:
    """Short, and plain text."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpacked(text: str) -> bytes:
    """What was packed."""
    return zlib.decompress(base64.b64decode(text))


if __name__ == "__main__":
    recorded = {"metadata": packed(pickle.dumps(description())), "blob": packed(blob())}
    (DIRECTORY / f"{platform.python_version()}.json").write_text(json.dumps(recorded, indent=1) + "\n")
