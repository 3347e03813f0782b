# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""NeMo-Run, or one line that says why it can't be imported."""

import importlib
import importlib.metadata
from types import ModuleType


def import_nemo_run() -> ModuleType:
    """The module `nemo_run`. It takes about 3 seconds and doesn't import torch.

    Raises:
        ImportError: It isn't installed, or the leptonai beside it is too new for it.
    """
    try:
        return importlib.import_module("nemo_run")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "nemo_run":
            raise ImportError("nemo_run is not installed: pip install 'megatron-bridge[recipes]'") from None
        if missing.split(".")[0] == "leptonai" and missing != "leptonai":
            raise ImportError(
                f"nemo_run can't be imported: leptonai {importlib.metadata.version('leptonai')} has no {missing}; "
                "pip install 'leptonai<0.47'"
            ) from error
        raise ImportError(f"nemo_run can't be imported: {error}: pip install 'megatron-bridge[recipes]'") from error
