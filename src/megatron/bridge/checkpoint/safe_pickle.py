# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read the pickled objects of a checkpoint without executing anything.

A pickle names the classes and functions that rebuild its objects, and pickle's own reader imports and calls them. Here
a name is accepted only if it is in one of the tables below:

* Tensors and plain data are rebuilt.
* Other objects that Megatron-LM and Megatron Bridge write become an `InertValue`. Nothing is imported for them.
* Optimizer classes, which their offloaded optimizers leave in the param groups (NVIDIA-NeMo/RL #1553), are dropped.

Any other name is refused.
"""

import argparse
import contextlib
import functools
import io
import os
import pathlib
import pickle
import pickletools
import re
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner

from megatron.bridge.checkpoint.inert_objects import (
    Enumeration,
    ForeignNameError,
    InertMember,
    InertValue,
    MemberLookup,
    inert,
)
from megatron.bridge.utils.expansion_limits import check_archive, check_expansion
from megatron.bridge.utils.files import is_below

_multiarray = getattr(np, "_core", None) or np.core  # numpy 2 renamed it

PLAIN_DATA: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "pathlib.PosixPath": pathlib.PosixPath,
    "pathlib._local.PosixPath": pathlib.PosixPath,
    "_io.BytesIO": io.BytesIO,
    "signal.Signals": Enumeration(signal.Signals),
    **{f"signal.{name}": member for name, member in signal.Signals.__members__.items()},
    "builtins.getattr": MemberLookup(),
    "builtins.slice": slice,
    "torch._C.Generator": torch.Generator,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.dtypes.{type(np.dtype(kind)).__name__}": type(np.dtype(kind)) for kind in "?bBhHiIlLefdUS"},
    **{
        f"numpy.{package}.multiarray.{name}": getattr(_multiarray.multiarray, name)
        for package in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
}
"""Types that hold data and execute nothing when built, in addition to those that torch's `weights_only` accepts."""

OPTIMIZER_CLASSES = (
    *(f"torch.optim.{name}" for name in ("adam.Adam", "adamw.AdamW", "sgd.SGD")),
    *(
        f"{package}.{name}"
        for package in ("transformer_engine.pytorch.optimizers", "apex.optimizers")
        for name in ("fused_adam.FusedAdam", "fused_sgd.FusedSGD")
    ),
    "megatron.core.optimizer.cpu_offloading.hybrid_optimizer.HybridDeviceOptimizer",
)
"""Classes that `HybridDeviceOptimizer` stores in its param groups (`cpu_optimizer_cls` and `gpu_optimizer_cls`)."""

MEGATRON_ENUMERATIONS = (
    *(f"megatron.core.enums.{name}" for name in ("ModelType", "Fp4Recipe", "Fp8Recipe")),
    *(
        f"megatron.core.transformer.enums.{name}"
        for name in (
            *("AttnBackend", "AttnMaskType", "AttnType", "CudaGraphModule", "CudaGraphScope"),
            *("InferenceCudaGraphScope", "LayerType", "ModelType"),
        )
    ),
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
)
MEGATRON_CLASSES = (
    *MEGATRON_ENUMERATIONS,
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
)
"""Enumerations and dataclasses in the arguments and in the rerun state machine's state that Megatron-LM saves."""


class _OptimizerClass(InertValue):
    """Base of the replacements of optimizer classes."""


_KNOWN: dict[str, Any] = {
    **PLAIN_DATA,
    **{name: inert(name, _OptimizerClass) for name in OPTIMIZER_CLASSES},
    **{name: inert(name, InertMember if name in MEGATRON_ENUMERATIONS else InertValue) for name in MEGATRON_CLASSES},
}

_OF_DCP = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata"),
        )
    },
    **{
        (dcp_planner.__name__, name): getattr(dcp_planner, name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem")
    },
    # Missing in torch 2.6, which can read files that a newer torch has written.
    (dcp_planner.__name__, "BytesIOWriteData"): getattr(dcp_planner, "BytesIOWriteData", None)
    or inert(f"{dcp_planner.__name__}.BytesIOWriteData"),
    (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"): Enumeration(dcp_metadata._MEM_FORMAT_ENCODING),
    (dcp_planner.__name__, "WriteItemType"): Enumeration(dcp_planner.WriteItemType),
    ("builtins", "getattr"): PLAIN_DATA["builtins.getattr"],
    **{(dcp_filesystem.__name__, name): getattr(dcp_filesystem, name) for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,
    # Of Core 0.15; it has no content.
    **{
        (module, name): inert(f"{module}.{name}")
        for module in ("megatron.core.dist_checkpointing.strategies.torch",)
        for name in ("MCoreMetadata", "MCoreSavePlan")
    },
}
"""The classes in torch's metadata of a distributed checkpoint, by module and name."""


def read_blob(
    source: str | Path | BinaryIO,
    *,
    named: str | Path | None = None,
    classes: tuple[Callable[..., Any], ...] = (),
    mmap: bool | None = None,
) -> Any:
    """Read a file of `torch.save` without executing anything in it. Tensors are loaded into host memory.

    Args:
        source: Path of the file, or the open file.
        named: Name of the file for errors. None: `source` is its path.
        classes: Further classes of this process that the file may name. They must only hold data.
        mmap: Map the tensors instead of reading them. None: read them.

    Returns:
        The content. Entries of dicts that are optimizer classes are dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or names something that is not plain data.
    """
    file = source if named is None else named
    try:
        check_archive(source, sums=not mmap)
        with _known_only(classes):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        check_expansion(content, _num_bytes(source))
    except FileNotFoundError:
        raise
    except ForeignNameError as error:
        raise ValueError(_refusal(file, str(error))) from None
    except Exception as error:  # torch raises a different class for each kind of damage
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is not None:
            raise ValueError(_refusal(file, foreign.group(1))) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} can't be read as plain data: {reason}; restore the file from another copy") from error
    return _without_optimizer_classes(content)


def _num_bytes(source: str | Path | BinaryIO) -> int:
    return os.path.getsize(source) if isinstance(source, (str, Path)) else source.seek(0, os.SEEK_END)


PLAIN_MEMORY = (torch.strided, torch.contiguous_format)
"""Layout and memory format of every tensor that torch and Core describe; both fields are deprecated."""


def read_dcp_metadata(path: Path) -> dcp_metadata.Metadata:
    """Read torch's metadata of a distributed checkpoint, which is a bare pickle instead of an archive.

    Raises:
        ValueError: The file is damaged, or names a class that doesn't belong into such metadata.
    """
    way_out = "restore it from another copy, or load another iteration (checkpoint.ckpt_step)"
    expected = "expected torch's description of a distributed checkpoint"
    try:
        with open(path, "rb") as file:
            stored = file.read()
        check_memo(stored)
        content = _MetadataUnpickler(io.BytesIO(stored)).load()
        if isinstance(content, dcp_metadata.Metadata):
            _check_description(content)
    except ForeignNameError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except OSError:
        raise
    except Exception as error:  # damaged bytes may raise anything in pickle's reader
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}): {expected}; {way_out}") from error
    if not isinstance(content, dcp_metadata.Metadata):
        raise ValueError(f"{path} holds a {type(content).__name__}: {expected}; {way_out}")
    return content


@functools.lru_cache(maxsize=2)  # a load reads the same metadata several times
def check_memo(stored: bytes) -> None:
    """Refuse a pickle with a memo index beyond its own length: the reader allocates memory for all lower indices.

    Otherwise a pickle of ten bytes could allocate 64 GB.
    """
    for opcode, argument, _ in pickletools.genops(stored):
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(stored):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, more than it can hold")


def _check_description(content: dcp_metadata.Metadata) -> None:
    """Refuse metadata whose parts have wrong types, or that names a file outside its directory.

    Raises:
        ValueError: Names the part.
    """
    for key, stored in content.state_dict_metadata.items():
        is_tensor = isinstance(stored, dcp_metadata.TensorStorageMetadata) and (
            isinstance(stored.size, torch.Size) and isinstance(stored.properties.dtype, torch.dtype)
        )
        if not isinstance(key, str) or not (is_tensor or isinstance(stored, dcp_metadata.BytesStorageMetadata)):
            raise ValueError(f"{str(key)[:80]!r} in it is neither a tensor nor an object")
        if (
            isinstance(stored, dcp_metadata.TensorStorageMetadata)
            and (stored.properties.layout, stored.properties.memory_format) != PLAIN_MEMORY
        ):
            raise ValueError(f"the tensor {key[:80]!r} in it doesn't lie in memory row by row")
    for index, part in content.storage_data.items():
        if not isinstance(index, dcp_metadata.MetadataIndex) or not isinstance(part, dcp_filesystem._StorageInfo):
            raise ValueError(f"it holds a {type(part).__name__} where a part of a file is described")
        if not is_below(part.relative_path):
            raise ValueError(f"it names {part.relative_path[:80]!r}, which is no file beside it")
        if min(part.offset, part.length) < 0:
            raise ValueError(f"{index.fqn[:80]!r} begins at byte {part.offset} and has {part.length}")
    if not isinstance(content.storage_meta, dcp_metadata.StorageMeta | None):
        raise ValueError(f"it holds a {type(content.storage_meta).__name__} where its origin is described")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _OF_DCP:
            raise ForeignNameError(f"{module}.{name}")
        return _OF_DCP[module, name]


def _refusal(named: str | Path | BinaryIO, foreign: str) -> str:
    return (
        f"{named} names {foreign}, which is not plain data, and nothing of the file was executed: expected tensors, "
        "numbers, text and the classes that Megatron Bridge and Megatron-LM write; load a checkpoint whose origin you "
        "know, or write this one again without it"
    )


@contextlib.contextmanager
def _known_only(classes: tuple[Callable[..., Any], ...]) -> Iterator[None]:
    """Within the context, `weights_only` accepts only the tables' names, not what else is registered with torch."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*classes, *((made, name) for name, made in _KNOWN.items())])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _without_optimizer_classes(content: Any) -> Any:
    if type(content) is dict:
        return {key: _without_optimizer_classes(value) for key, value in content.items() if not _is_optimizer(value)}
    if type(content) is list:
        return [_without_optimizer_classes(value) for value in content]
    return content


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, _OptimizerClass)
