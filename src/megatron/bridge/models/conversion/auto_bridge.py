# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`AutoBridge`: from a Hugging Face directory to a Megatron model and back.

Importing this module is cheap; torch and Megatron-Core are imported by the methods that build or move a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.adapter_export import AdapterExport
from megatron.bridge.models.conversion.bridge_base import as_chunks
from megatron.bridge.models.conversion.checkpoint_conversion import CheckpointConversion
from megatron.bridge.models.conversion.hf_config import config_as_dict, precision_fields, read_hf_config
from megatron.bridge.models.conversion.load_options import read_load_options
from megatron.bridge.models.families import (
    ModelFamily,
    architecture_of,
    build_provider,
    check_supported,
    family_of,
    supported_architectures,
)
from megatron.bridge.utils.hf_hub import find_hf_directory, is_hub_name

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule
    from transformers import PretrainedConfig

    from megatron.bridge.models.conversion.bridge_base import Model
    from megatron.bridge.models.conversion.roundtrip import TensorResult
    from megatron.bridge.models.conversion.tasks import ConversionTask
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


class AutoBridge(CheckpointConversion, AdapterExport):
    """Converts one Hugging Face model. Make it with `from_hf_pretrained` or `from_hf_config`.

    Args:
        hf_config: Content of `config.json`.
        directory: Where the configuration, the tokenizer and the weights are; None: nowhere.
        name: What the user called the model, for errors and for `hf_model_id`.
        download: If `name` is one on the hub: the options that it was found with, to fetch the weights later.

    Raises:
        ValueError: The architecture is not supported.
    """

    def __init__(
        self,
        hf_config: dict[str, Any],
        *,
        directory: Path | None,
        name: str,
        download: Mapping[str, Any] | None = None,
    ) -> None:
        check_supported(hf_config, name)
        self.hf_config = hf_config
        self.directory = directory
        self.name = name
        self.download = download

    @classmethod
    def from_hf_pretrained(cls, path: "str | Path", **load_options: Any) -> "AutoBridge":
        """Bridge a model directory, or a model of the Hugging Face hub, whose weights are fetched when they are read.

        Args:
            path: Directory, or hub name; a directory of that name goes first.
            load_options: `dtype` (or `torch_dtype`) of the Megatron weights; `revision`, `token`, `local_files_only`, …
                for the hub; `trust_remote_code` and `device_map` are accepted, and no code of the directory is run.

        Raises:
            FileNotFoundError: No such model.
            ValueError: The architecture is not supported, or an option isn't known.
        """
        options = read_load_options(load_options)
        directory = find_hf_directory(path, with_weights=False, **options.download)
        hf_config = options.apply(read_hf_config(directory))
        options.check_code(hf_config, str(path))
        download = options.download if is_hub_name(path) else None
        return cls(hf_config, directory=directory, name=str(path), download=download)

    @classmethod
    def from_hf_config(cls, config: "PretrainedConfig | Mapping[str, Any]") -> "AutoBridge":
        """Bridge a configuration without weights: a model to be trained from scratch, or loaded by `hf_path`."""
        return cls(config_as_dict(config), directory=None, name="the configuration")

    @classmethod
    def can_handle(cls, path: "str | Path", **load_options: Any) -> bool:
        """Whether `path` is a model whose architecture is supported."""
        download = read_load_options(load_options).download
        try:
            return cls.supports(read_hf_config(find_hf_directory(path, with_weights=False, **download)))
        except (FileNotFoundError, ValueError):
            return False

    @staticmethod
    def supports(config: "PretrainedConfig | Mapping[str, Any]") -> bool:
        """Whether the architecture of a configuration is supported."""
        return architecture_of(config_as_dict(config)) is not None

    @staticmethod
    def list_supported_models() -> list[str]:
        """The Hugging Face architectures that can be converted."""
        return supported_architectures()

    @property
    def family(self) -> ModelFamily:
        """The tables of the model's family."""
        return family_of(self.hf_config)

    @cached_property
    def hf_pretrained(self) -> "PreTrainedCausalLM | PretrainedConfig":
        """The Hugging Face model, loaded when it is used; of a bridge made from a configuration that configuration."""
        if self.directory is None:
            from megatron.bridge.models.conversion.transformers_config import config_object

            return config_object(self.hf_config)
        from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

        is_on_hub = self.download is not None
        found = PreTrainedCausalLM(self.name if is_on_hub else self.directory, **(self.download or {}))
        found.hf_config = self.hf_config  # with the dtype that was asked for
        return found

    def to_megatron_provider(
        self, load_weights: bool = True, hf_path: "str | Path | None" = None
    ) -> "GPTModelProvider":
        """The Megatron configuration of this model.

        Args:
            load_weights: Load the weights when the model is built, before it is wrapped.
            hf_path: Read the weights here instead.

        Raises:
            ValueError: The configuration asks for what Megatron can't express, or there are no weights to load.
        """
        from megatron.bridge.utils.set_fields import forget_set_fields

        provider = build_provider(self.hf_config)
        forget_set_fields(provider)  # the directory says it, and mixed_precision may say otherwise
        if self.directory is not None:
            provider.hf_model_id = str(self.directory.resolve()) if self.download is None else self.name
        if load_weights:
            directory = self._weights_directory(hf_path)  # refuse now rather than after the model is built
            provider.perform_initialization = False
            provider.register_pre_wrap_hook(lambda chunks: self.load_hf_weights(chunks, directory))
        return provider

    def get_model_config(self) -> "GPTModelProvider":
        """The Megatron configuration of this model, which loads no weights: as recipes take it."""
        return self.to_megatron_provider(load_weights=False)

    def get_model(self, load_weights: bool = True, **options: Any) -> "list[MegatronModule]":
        """Build the model; the same as `to_megatron_model`."""
        return self.to_megatron_model(load_weights, **options)

    def to_megatron_model(self, load_weights: bool = True, **options: Any) -> "list[MegatronModule]":
        """Build the model; brings up a process group and model-parallel state where there are none.

        Args:
            load_weights: Load the weights.
            options: For `provide_distributed_model`.
        """
        from megatron.bridge.models.conversion.saved_provider import set_parallel_sizes

        provider = self.to_megatron_provider(load_weights)
        set_parallel_sizes(provider, {})
        return provider.provide_distributed_model(**options)

    def load_hf_weights(
        self,
        model: "Model",
        hf_path: "str | Path | None" = None,
        allowed_mismatched_params: Sequence[str] | None = None,
        *,
        show_progress: bool = True,
    ) -> "list[MegatronModule]":
        """Copy the weights into a built model, one slice at a time. Collective.

        Args:
            model: This rank's chunks, wrapped or not.
            hf_path: Read the weights here instead.
            allowed_mismatched_params: Patterns of weights whose shape may differ; these keep their values.
            show_progress: Whether rank 0 shows a bar.

        Raises:
            FileNotFoundError: No weights, or a shard is missing.
            ValueError: A tensor is missing, unexpected, or of the wrong shape; the model is unchanged then.
        """
        from megatron.bridge.models.conversion.expert_stacks import open_weights
        from megatron.bridge.models.conversion.load import load_weights
        from megatron.bridge.utils.distributed import run_while_others_wait

        directory = run_while_others_wait(lambda: self._weights_directory(hf_path), doing="finding the weights")
        assert directory is not None  # every rank has work
        chunks, weights = as_chunks(model), open_weights(directory, self.family.stacks_in_files)
        allowed = allowed_mismatched_params or ()
        load_weights(chunks, self.family, weights, allowed_mismatched=allowed, show_progress=show_progress)
        return chunks

    def export_hf_weights(
        self,
        model: "Model",
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: "Sequence[ConversionTask] | None" = None,
        merge_adapter_weights: bool = True,
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield (Hugging Face name, whole tensor) pairs. Collective: every rank must take every pair.

        Args:
            model: This rank's chunks, wrapped or not.
            cpu: Yield tensors in host memory.
            show_progress: Whether rank 0 shows a bar.
            conversion_tasks: Only these weights; None: all.
            merge_adapter_weights: With adapters: export weights that have them inside, or leave them out.
        """
        from megatron.bridge.models.conversion.export import export_weights

        chunks = as_chunks(model)
        tasks = self.get_conversion_tasks(chunks) if conversion_tasks is None else conversion_tasks
        if not merge_adapter_weights:
            tasks = [replace(task, adapted=None) for task in tasks]
        return export_weights(chunks, self.family, cpu=cpu, show_progress=show_progress, tasks=tasks)

    def get_conversion_tasks(self, model: "Model") -> "list[ConversionTask]":
        """Each weight that this rank holds, with the Hugging Face tensors that it is made of."""
        from megatron.bridge.models.conversion.tasks import local_tasks

        return [task for chunk in local_tasks(as_chunks(model), self.family) for task in chunk]

    def save_hf_pretrained(
        self,
        model: "Model",
        path: "str | Path",
        show_progress: bool = True,
        source_path: "str | Path | None" = None,
        strict: bool = True,
        *,
        max_shard_bytes: int = 5_000_000_000,
        dtype: "str | torch.dtype | None" = None,
        checkpoint: "str | Path | None" = None,
    ) -> None:
        """Write a Hugging Face directory: configuration, tokenizer and weights. Collective.

        Args:
            model: This rank's chunks, wrapped or not.
            path: New directory, or an earlier export to replace.
            show_progress: Whether rank 0 shows a bar.
            source_path: Take configuration and tokenizer from here instead.
            strict: Refuse an export whose tensor names differ from the source's.
            max_shard_bytes: Size that a file of weights stays below.
            dtype: Of the tensors in the files; None: the model's.
            checkpoint: Take tokenizer and end tokens from this Megatron checkpoint, where it has them.

        Raises:
            ValueError: `path` is taken, or the names differ.
        """
        from megatron.bridge.models.conversion.hf_directory import save_hf_directory
        from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
        from megatron.bridge.utils.distributed import raise_on_all_ranks

        source = find_hf_directory(source_path, with_weights=False) if source_path else self.directory
        with raise_on_all_ranks("reading the model's tokenizer"):
            text = TokenizerFiles.of(source, checkpoint=checkpoint)
        save_hf_directory(
            as_chunks(model),
            self.family,
            path,
            hf_config=read_hf_config(source) if source_path and source else self.hf_config,
            source=source,
            text=text,
            strict=strict,
            show_progress=show_progress,
            max_shard_bytes=max_shard_bytes,
            dtype=precision_fields(dtype)["params_dtype"] if dtype else None,
        )

    def save_hf_weights(
        self,
        model: "Model",
        path: "str | Path",
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Write the weights alone as safetensors, in place of those in the directory. Collective.

        Args:
            model: This rank's chunks, wrapped or not.
            path: New directory, or one with a `config.json`, which stays as it is.
            show_progress: Whether rank 0 shows a bar.
            strict: Refuse an export whose tensor names differ from the source's.
            merge_adapter_weights: With adapters: export weights that have them inside, or leave them out.
            max_shard_bytes: Size that a file of weights stays below.

        Raises:
            ValueError: `path` is the source or taken by something else, or the names differ.
        """
        from megatron.bridge.models.conversion.hf_directory import save_hf_weights

        chunks = as_chunks(model)
        weights = self.export_hf_weights(chunks, True, show_progress, merge_adapter_weights=merge_adapter_weights)
        save_hf_weights(
            chunks, self.family, path, weights, source=self.directory, strict=strict, max_shard_bytes=max_shard_bytes
        )

    def export_hf_weights_modelopt(self, *args: Any, **options: Any) -> None:
        """Refused: quantised by NVIDIA's ModelOpt, which isn't supported."""
        raise NotImplementedError("export_hf_weights_modelopt: ModelOpt is not supported; take export_hf_weights")

    def export_hf_weights_quant(self, *args: Any, **options: Any) -> None:
        """Refused: quantised weights aren't made here."""
        raise NotImplementedError(
            "export_hf_weights_quant: weights are not quantised here; take save_hf_pretrained, then quantise its files"
        )

    def check_roundtrip(self, *, show_progress: bool = True, **sizes: int) -> "list[TensorResult]":
        """Load the weights into a Megatron model, export them, and compare them with the files, bit-exact. Collective.

        Args:
            show_progress: Whether rank 0 shows bars.
            sizes: Parallel sizes while converting, by their names in a provider.

        Returns:
            The result for each tensor, in the order of the model.
        """
        from megatron.bridge.models.conversion.expert_stacks import open_weights
        from megatron.bridge.models.conversion.roundtrip import compare_with_files
        from megatron.bridge.models.conversion.saved_provider import build_on_host
        from megatron.bridge.utils.distributed import model_parallel_groups

        with model_parallel_groups(**sizes):
            chunks = build_on_host(self.to_megatron_provider(load_weights=False))
            self.load_hf_weights(chunks, show_progress=show_progress)
            weights = open_weights(self._weights_directory(None), self.family.stacks_in_files)
            return compare_with_files(chunks, self.family, weights, show_progress=show_progress)
