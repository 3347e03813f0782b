# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read `.npy` files of Python objects, which are pickles, without executing anything in them."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from megatron.bridge.checkpoint.inert_objects import ForeignNameError
from megatron.bridge.checkpoint.safe_pickle import PLAIN_DATA, check_memo

_ARRAYS = {name: value for name, value in PLAIN_DATA.items() if name.startswith("numpy.")}
_LARGEST_CHECKED_BYTES = 4 << 20
"""Of a longer pickle, an index of the memo that it can't hold isn't searched for: that would take minutes."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ARRAYS.get(f"{module}.{name}")
        if found is None:
            raise ForeignNameError(f"{module}.{name}")
        return found


def read_object_array(path: Path) -> np.ndarray:
    """Reads an `.npy` file of lists, dicts, numbers and texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds no objects, or names something that is not plain data.
    """
    expected = "expected an array of objects that numpy.save wrote"
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            _, _, dtype = read_header[version](stream)
            if not dtype.hasobject:
                raise ValueError(f"{path} holds numbers of type {dtype}: {expected}")
            content = stream.read()
        if len(content) <= _LARGEST_CHECKED_BYTES:
            check_memo(content)
        array = _ArrayUnpickler(io.BytesIO(content)).load()
    except FileNotFoundError:
        raise
    except ForeignNameError as error:
        raise ValueError(
            f"{path} names {error}, which is not plain data, and nothing of the file was executed: {expected}"
        ) from None
    except Exception as error:  # damaged bytes make the readers raise whatever they do
        if str(error).startswith(str(path)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} can't be read ({reason}): {expected}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        shape = f"an array of shape {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{path} holds {shape}: expected one with an entry for each row")
    return array
