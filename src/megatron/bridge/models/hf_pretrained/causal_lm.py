# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face model whose parts are loaded when they are asked for: configuration, tokenizer, weights, model.

Shapes: B batch, S sequence.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge.models.conversion.hf_config import precision_fields, read_hf_config
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.load_options import read_load_options
from megatron.bridge.models.conversion.tokenizer_files import TOKENIZER_PATTERNS, copy_files
from megatron.bridge.utils import simulated_accelerator
from megatron.bridge.utils.hf_hub import find_hf_directory

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

__all__ = ["PreTrainedCausalLM"]

ARTIFACTS = (*TOKENIZER_PATTERNS, "config.json", "generation_config.json", "LICENSE*", "NOTICE*")


class PreTrainedCausalLM:
    """A Hugging Face model. Nothing but `config.json` is read until it is asked for; so are weights of the hub fetched.

    Args:
        model_name_or_path: Directory, or hub name.
        device: Where `model` lies; None: in host memory.
        load_options: As for `AutoBridge.from_hf_pretrained`.

    Raises:
        FileNotFoundError: No such model.
        ValueError: An option that isn't known.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        **load_options: Any,
    ) -> None:
        options = read_load_options(load_options)
        self.model_name_or_path = os.fspath(model_name_or_path)
        self.directory = find_hf_directory(self.model_name_or_path, with_weights=False, **options.download)
        self._download = options.download
        self.device = torch.device("cpu" if device is None else device)
        self.hf_config = options.apply(read_hf_config(self.directory))
        options.check_code(self.hf_config, self.model_name_or_path)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike[str], **options: Any) -> "Self":
        """A Hugging Face model, as the class makes it."""
        return cls(model_name_or_path, **options)

    def __repr__(self) -> str:
        state = "loaded" if self.has_model else "not loaded"
        return f"{type(self).__name__}({self.model_name_or_path!r}, {self.hf_config.get('architectures')}, {state})"

    @cached_property
    def config(self) -> "PretrainedConfig":
        """Transformers' configuration object."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
        config.dtype = self.dtype
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format: the one asked for, else the one that `config.json` names."""
        name = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype") or "float32"
        return precision_fields(name)["params_dtype"]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Transformers' tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)

    @cached_property
    def generation_config(self) -> "GenerationConfig | None":
        """Transformers' settings of generation; None: the directory has none."""
        if not (self.directory / "generation_config.json").is_file():
            return None
        from transformers import GenerationConfig

        return GenerationConfig.from_pretrained(self.directory)

    @cached_property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The weights by name, each read from its file when it is taken."""
        return _Weights(HFWeights(self._with_weights()))

    @cached_property
    def model(self) -> "PreTrainedModel":
        """Transformers' model with the weights, for evaluation."""
        from transformers import AutoModelForCausalLM

        directory = self._with_weights()
        with _on_the_real_host():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype, trust_remote_code=False)
            return model.to(self.device).eval()

    @property
    def has_model(self) -> bool:
        """Whether `model` is in memory."""
        return "model" in self.__dict__

    @property
    def num_parameters(self) -> int:
        """How many numbers the files of weights hold."""
        weights = HFWeights(self._with_weights())
        return sum(torch.Size(weights.shape(name)).numel() for name in weights.files)

    def _with_weights(self) -> Path:
        return find_hf_directory(self.model_name_or_path, **self._download)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for what transformers' model takes, such as `input_ids` [B, S]."""
        with _on_the_real_host(), torch.no_grad():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids [B, S], int64: the prompts and what follows, as transformers generates it."""
        with _on_the_real_host():
            return self.model.generate(*args, **kwargs)

    def save_artifacts(self, save_directory: str | os.PathLike[str]) -> None:
        """Write all but the weights into a directory: configuration, tokenizer, settings of generation, licence."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        copy_files(self.directory, target, ARTIFACTS)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the model into a directory, weights included."""
        self.save_artifacts(save_directory)
        with _on_the_real_host():
            self.model.save_pretrained(save_directory)


class _Weights(Mapping[str, torch.Tensor]):
    """The tensors of a directory's files."""

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._weights.files:
            raise KeyError(name)
        return self._weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.files)

    def __len__(self) -> int:
        return len(self._weights.files)


def _on_the_real_host() -> AbstractContextManager[None]:
    """Transformers asks where its tensors are: without the simulated accelerator they are where they seem to be."""
    return simulated_accelerator.suspended()
