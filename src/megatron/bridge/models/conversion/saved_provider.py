# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rebuild the model that a Megatron checkpoint describes, at the parallel sizes of this process."""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.checkpoint.iterations import TOKENIZER_DIRECTORY, resolve_checkpoint
from megatron.bridge.checkpoint.model_checkpoint import read_run_config, save_model_checkpoint
from megatron.bridge.models.conversion.hf_config import precision_fields
from megatron.bridge.models.conversion.tasks import model_config
from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
from megatron.bridge.models.conversion.trained_config import COMPUTED_WITH
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.field_types import field_hints
from megatron.bridge.utils.hf_hub import commits_of
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, sizes_of_groups
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict

SIZES_TO_CONVERT_AT = tuple(PARALLEL_SIZES[short].field for short in ("TP", "PP", "VP", "EP", "ETP"))
"""How ranks may share a model while it converts. The result can be loaded at any other layout."""

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_global_query_groups",
    "global_kv_channels",
    "values_are_keys",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "share_embeddings_and_output_weights",
)


def save_model(chunks: Sequence[MegatronModule], path: str | Path, *, text: TokenizerFiles) -> Path:
    """Write a weights-only checkpoint, iteration 0, that says which model it holds. Collective.

    Args:
        chunks: The model, wrapped or not.
        path: Root directory of the checkpoint.
        text: The tokenizer, and where a text ends.

    Returns:
        The iteration's directory.
    """
    provider = copy.copy(model_config(chunks))
    provider.perform_initialization, provider.use_cpu_initialization = True, False  # how it was built, not what

    def write_text_files(directory: Path) -> None:
        target = directory / TOKENIZER_DIRECTORY
        target.mkdir()
        text.write(target)

    run_config: dict[str, Any] = {"model": to_yaml_dict(provider)}
    if commits := commits_of([provider.hf_model_id] if provider.hf_model_id else []):
        run_config["checkpoint"] = {"hub_revisions": commits}
    return save_model_checkpoint(chunks, path, run_config=run_config, write_beside=write_text_files)


def build_saved_model(
    provider: GPTModelProvider,
    path: str | Path,
    names: Collection[str],
    *,
    mp_overrides: Mapping[str, Any],
    **options: Any,
) -> list[MegatronModule]:
    """Build the model that a checkpoint describes, its weights still to be loaded. Collective.

    Args:
        provider: As for `apply_saved_fields`; changed in place.
        path: As for `apply_saved_fields`.
        names: As for `apply_saved_fields`.
        mp_overrides: As for `set_parallel_sizes`.
        options: For `provide_distributed_model`; not wrapped for training by default.
    """
    apply_saved_fields(provider, path, names)
    set_parallel_sizes(provider, mp_overrides)
    provider.perform_initialization = False
    return provider.provide_distributed_model(**{"wrap_with_ddp": False, **options})


def read_model_section(path: str | Path) -> dict[str, Any]:
    """The `model` section of a checkpoint's configuration, as plain data.

    Raises:
        FileNotFoundError: No checkpoint, or none with a configuration.
        ValueError: The configuration has no such section.
    """
    directory = resolve_checkpoint(path)
    section = read_run_config(directory).get("model")
    if not isinstance(section, Mapping):
        raise ValueError(f"{directory} has a configuration without a 'model' section: expected the model's fields")
    return dict(section)


def apply_saved_fields(provider: GPTModelProvider, path: str | Path, names: Collection[str]) -> None:
    """Set those fields of a provider that a checkpoint's configuration describes; nothing in the file is executed.

    Only the fields that a conversion knows are taken. The others say how a run was trained (recomputation, fusions,
    overlap, …), under the names and defaults of its own version of Megatron-Core.

    Args:
        provider: Made from the Hugging Face configuration that belongs to the checkpoint.
        path: Root, or `iter_N` directory.
        names: The fields to take, where the file has them; those that logits depend on are taken too.

    Raises:
        FileNotFoundError: No checkpoint, or none with a configuration.
        ValueError: A value of the wrong type, or a size that the provider has otherwise.
    """
    section = read_model_section(path)
    hints = field_hints(type(provider))
    for name in dict.fromkeys((*names, *COMPUTED_WITH)):
        if name not in section or name not in hints:
            continue
        value = from_yaml_dict(section[name], expected=hints[name], where=f"{path}: model.{name}")
        if name in _SIZES and value != getattr(provider, name):
            raise ValueError(
                f"{path} was saved with model.{name}={value}, but the Hugging Face configuration says "
                f"{getattr(provider, name)}: name the model that the checkpoint was imported from"
            )
        setattr(provider, name, value)


def set_parallel_sizes(provider: GPTModelProvider, overrides: Mapping[str, Any]) -> None:
    """Give a provider the sizes of Core's model-parallel state, brought up with `overrides` where there is none.

    Args:
        provider: Any; its own sizes are those of the run that saved it.
        overrides: Provider fields to set; parallel sizes not named are the state's, or 1.

    Raises:
        ValueError: The model can't be shared out so.
    """
    provider.sequence_parallel = False
    provider.pipeline_model_parallel_layout = None
    provider.num_layers_in_first_pipeline_stage = provider.num_layers_in_last_pipeline_stage = None
    provider.account_for_embedding_in_pipeline_split = provider.account_for_loss_in_pipeline_split = False
    is_up = parallel_state.is_initialized()
    groups = sizes_of_groups() if is_up else {size.field: size.default for size in PARALLEL_SIZES.values()}
    for name, value in {**groups, "context_parallel_size": 1, **overrides}.items():
        setattr(provider, name, value)
    check_parallel_sizes(provider)
    if not is_up:
        provider.initialize_model_parallel()


def build_on_host(provider: GPTModelProvider, *, dtype: str | torch.dtype | None = None) -> list[MegatronModule]:
    """The model, its weights still to be loaded, in host memory, at the sizes of the model-parallel state.

    Args:
        provider: Made from a Hugging Face configuration.
        dtype: Of the weights; None: the provider's.
    """
    for name, value in (precision_fields(dtype) if dtype else {}).items():
        setattr(provider, name, value)
    set_parallel_sizes(provider, {})
    provider.perform_initialization = False
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def check_parallel_sizes(provider: GPTModelProvider) -> None:
    """Refuse a layout that leaves a remainder: Core would stop at an assertion, deep in the building of the model.

    Raises:
        ValueError: Names the sizes.
    """
    experts, ep = provider.num_moe_experts, provider.expert_model_parallel_size
    if ep > 1 and (not experts or experts % ep):
        raise ValueError(f"{experts or 'no'} experts don't divide among expert_model_parallel_size={ep}: change it")
    stages = provider.pipeline_model_parallel_size * (provider.virtual_pipeline_model_parallel_size or 1)
    shards = ("tensor-parallel ranks", provider.tensor_model_parallel_size)
    widths = {"num_layers": ("pipeline stages", stages), "num_attention_heads": shards}
    if experts:
        of_expert = ("expert-tensor-parallel ranks", provider.expert_tensor_parallel_size or shards[1])
        widths["moe_ffn_hidden_size"] = of_expert
    else:
        widths["ffn_hidden_size"] = shards
    for name, (among, count) in widths.items():
        if getattr(provider, name) % count:
            raise ValueError(f"{name}={getattr(provider, name)} doesn't divide among {count} {among}: change the sizes")
