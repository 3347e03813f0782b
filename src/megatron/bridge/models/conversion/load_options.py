# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The options that scripts pass where they name a Hugging Face model: transformers' and the hub's."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_ACCEPTED = ("device_map", "low_cpu_mem_usage", "use_safetensors")
"""Of transformers' models: without effect, as weights are read slice by slice into a Megatron model where it lies."""
_DTYPE = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class LoadOptions:
    """What was asked for."""

    download: dict[str, Any]
    """For `huggingface_hub.snapshot_download`."""
    dtype: Any = None
    """Of the weights, in place of the one that `config.json` names; None or "auto": that one."""
    trust_remote_code: bool | None = None
    """Whether the user would let code of the model's directory run. It never is."""

    def apply(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `config.json` with the dtype that was asked for.

        Raises:
            ValueError: A dtype that Megatron has no parameters in.
        """
        if self.dtype in (None, "auto"):
            return dict(hf_config)
        from megatron.bridge.models.conversion.hf_config import precision_fields

        precision_fields(self.dtype)
        plain = {key: value for key, value in hf_config.items() if key not in _DTYPE}
        return {**plain, "torch_dtype" if "torch_dtype" in hf_config else "dtype": str(self.dtype).split(".")[-1]}

    def check_code(self, hf_config: Mapping[str, Any], name: str) -> None:
        """Say so where the model has code of its own and the user would have it run."""
        if self.trust_remote_code and hf_config.get("auto_map"):
            logger.warning(
                "trust_remote_code: %s has code of its own, which is never run here; transformers' own class for %s "
                "is taken",
                name,
                hf_config.get("architectures"),
            )


def read_load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Sort what was passed along with a model's name.

    Args:
        options: `dtype` (or `torch_dtype`), `trust_remote_code`, and those of `snapshot_download`: `revision`,
            `token`, `local_files_only`, …; transformers' `device_map` and the like are accepted.

    Raises:
        ValueError: An option that isn't known.
    """
    options = {name: value for name, value in options.items() if name not in _ACCEPTED}
    asked = [options.pop(name) for name in _DTYPE if options.get(name) is not None]
    trust = options.pop("trust_remote_code", None)
    download = {name: value for name, value in options.items() if name not in _DTYPE}
    if download:
        from huggingface_hub import snapshot_download

        known = inspect.signature(snapshot_download).parameters
        for name in download:
            if name not in known or name in ("repo_id", "allow_patterns"):
                raise ValueError(
                    f"option {name}={download[name]!r} is unknown: expected dtype, trust_remote_code, or one of "
                    "huggingface_hub's snapshot_download, such as revision"
                )
    return LoadOptions(download, asked[0] if asked else None, trust)
