# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The base of the mixins that make up `AutoBridge`. Cheap to import, as `auto_bridge` is."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron.bridge.models.conversion.hf_config import check_whole_model
from megatron.bridge.utils.hf_hub import find_hf_directory

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from typing_extensions import Self

    from megatron.bridge.models.families import ModelFamily
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    Model: TypeAlias = MegatronModule | Sequence[MegatronModule]


class BridgeBase(abc.ABC):
    """Base of the mixins of `AutoBridge`, which implements and documents the abstract methods."""

    hf_config: dict[str, Any]
    directory: Path | None
    name: str
    download: Mapping[str, Any] | None

    @classmethod
    @abc.abstractmethod
    def from_hf_pretrained(cls, path: "str | Path", **load_options: Any) -> "Self":
        """Bridge a model directory, or a model of the Hugging Face hub."""

    @property
    @abc.abstractmethod
    def family(self) -> "ModelFamily":
        """The tables of the model's family."""

    @abc.abstractmethod
    def to_megatron_provider(
        self, load_weights: bool = True, hf_path: "str | Path | None" = None
    ) -> "GPTModelProvider":
        """The Megatron configuration of this model."""

    @abc.abstractmethod
    def load_hf_weights(
        self,
        model: "Model",
        hf_path: "str | Path | None" = None,
        allowed_mismatched_params: Sequence[str] | None = None,
        *,
        show_progress: bool = True,
    ) -> "list[MegatronModule]":
        """Copy the weights into a built model."""

    @abc.abstractmethod
    def save_hf_pretrained(
        self, model: "Model", path: "str | Path", show_progress: bool = True, *args: Any, **options: Any
    ) -> None:
        """Write a Hugging Face directory."""

    def _weights_directory(self, hf_path: "str | Path | None") -> Path:
        directory = find_hf_directory(hf_path) if hf_path else self.directory
        if not hf_path and self.download is not None:
            directory = find_hf_directory(self.name, **self.download)  # until now without the weights
        if directory is None:
            raise ValueError(
                "there are no weights to load: this bridge was made from a configuration; pass hf_path, or "
                "load_weights=False"
            )
        check_whole_model(directory)
        return directory


def as_chunks(model: "Model") -> "list[MegatronModule]":
    """A model as a list of its chunks."""
    return list(model) if isinstance(model, Sequence) else [model]
