# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Models of Megatron checkpoints outside a run: built and loaded, saved, looked at.

Public as `megatron.bridge.training.model_load_save`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron.bridge.checkpoint.iterations import is_hf_directory
from megatron.bridge.checkpoint.model_checkpoint import chunk_keys, load_model_weights
from megatron.bridge.data.config import TokenizerConfig
from megatron.bridge.data.tokenizer import Tokenizer, build_tokenizer
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.bridge_base import as_chunks
from megatron.bridge.models.conversion.checkpoint_conversion import check_no_tokenizer_options
from megatron.bridge.models.conversion.saved_adapters import check_base, find_saved_adapters, load_adapters
from megatron.bridge.models.conversion.saved_provider import (
    PARALLEL_SIZES,
    read_model_section,
    save_model,
    set_parallel_sizes,
)
from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.device import choose_device
from megatron.bridge.utils.distributed import model_parallel_groups
from megatron.bridge.utils.yaml_io import from_yaml_dict

__all__ = [
    "build_and_load_model",
    "load_megatron_model",
    "load_model_config",
    "load_tokenizer",
    "save_megatron_model",
    "temporary_distributed_context",
]

StateDict = dict[str, Any]


@contextlib.contextmanager
def temporary_distributed_context(backend: str = "gloo", **sizes: int) -> Iterator[None]:
    """A process group and model-parallel state for work outside a run, taken down at the end.

    Under torchrun its ranks form the group, else this process alone. What is up already is used, and stays.

    Args:
        backend: "gloo", "nccl", or "auto".
        sizes: Parallel sizes, by their names in a provider.
    """
    with model_parallel_groups(choice=choose_device(distributed_backend=backend), **sizes):
        yield


def load_model_config(checkpoint_path: str | Path) -> tuple[GPTModelProvider, None]:
    """The provider that a checkpoint's `run_config.yaml` describes; nothing in the file is executed.

    Fields that only another version of Megatron-Core has are left out, with a warning.

    Args:
        checkpoint_path: Root, or `iter_N` directory.

    Returns:
        The provider, with the parallel sizes of the run that saved it; and None, in the place of the arguments of a
        Megatron-LM checkpoint, which this function doesn't read.

    Raises:
        FileNotFoundError: No checkpoint there, or none with a configuration.
        ValueError: Its model isn't a `GPTModelProvider`.
    """
    section = read_model_section(checkpoint_path)
    where = f"{checkpoint_path}: model"
    return from_yaml_dict(section, expected=GPTModelProvider, strict=False, where=where), None


def load_tokenizer(checkpoint_path: str | Path, **overrides: Any) -> Tokenizer:
    """The tokenizer that was saved with a checkpoint, or else that of the Hugging Face model that it names.

    Args:
        checkpoint_path: Root, or `iter_N` directory.
        overrides: Fields of `TokenizerConfig`.

    Raises:
        FileNotFoundError: No checkpoint there, or no tokenizer.
    """
    found = TokenizerFiles.of_checkpoint(checkpoint_path).tokenizer
    if found is None and "tokenizer_model" not in overrides:
        raise FileNotFoundError(
            f"{checkpoint_path} holds no tokenizer, and names no model that does: pass tokenizer_model with a directory"
        )
    return build_tokenizer(TokenizerConfig(**{"tokenizer_model": str(found), **overrides}))


def load_megatron_model(
    checkpoint_path: str | Path,
    model_type: str | None = None,
    return_state_dict: bool = False,
    use_cpu_init: bool = False,
    skip_temp_dist_context: bool | None = None,
    mp_overrides: Mapping[str, Any] | None = None,
) -> list[MegatronModule] | StateDict:
    """Build the model of a checkpoint and load its weights, with adapters if it holds those. Collective.

    Args:
        checkpoint_path: Root, or `iter_N` directory.
        model_type: "gpt" or None.
        return_state_dict: See `build_and_load_model`, as for the next two.
        use_cpu_init: Build in host memory.
        skip_temp_dist_context: Whether the caller has brought up process groups.
        mp_overrides: Parallel sizes and other provider fields; sizes not named are those of the model-parallel state
            that is up, or 1.

    Raises:
        FileNotFoundError: No checkpoint there, or no weights under the adapters.
        ValueError: Not complete, or no GPT.
    """
    provider, _ = load_model_config(checkpoint_path)
    return build_and_load_model(
        checkpoint_path,
        provider,
        model_type,
        return_state_dict=return_state_dict,
        use_cpu_init=use_cpu_init,
        skip_temp_dist_context=skip_temp_dist_context,
        mp_overrides=mp_overrides or {},
    )


def build_and_load_model(
    checkpoint_path: str | Path,
    model_cfg: GPTModelProvider,
    model_type: str | None = None,
    mlm_args: Any = None,
    return_state_dict: bool = False,
    use_cpu_init: bool = False,
    skip_temp_dist_context: bool | None = None,
    dist_backend: str = "gloo",
    *,
    mp_overrides: Mapping[str, Any] | None = None,
) -> list[MegatronModule] | StateDict:
    """Build a model and load a checkpoint's weights into it. Collective.

    Without process groups it brings up its own and takes them down again: such a model can be looked at, saved in no
    other layout and not run. To run it bring them up first (`model_cfg.initialize_model_parallel`).

    Args:
        checkpoint_path: Root, or `iter_N` directory.
        model_cfg: The model; changed: its parallel sizes become those of the process groups.
        model_type: "gpt" or None.
        mlm_args: Not supported: arguments of a Megatron-LM checkpoint.
        return_state_dict: Return the weights by name instead of the model; of several chunks, by chunk.
        use_cpu_init: Build in host memory.
        skip_temp_dist_context: Whether the caller has brought up process groups; None: whether they are up.
        dist_backend: Of the process group that is brought up.
        mp_overrides: As for `load_megatron_model`.

    Returns:
        This rank's chunks, not wrapped for training; or their weights.

    Raises:
        FileNotFoundError: No checkpoint there, or no weights under the adapters.
        ValueError: Not complete, for another model, or no GPT.
        RuntimeError: `skip_temp_dist_context`, and there are no process groups.
    """
    if model_type not in (None, "gpt"):
        raise ValueError(f"model_type={model_type!r} is not supported: expected 'gpt'")
    if mlm_args is not None:
        raise ValueError("mlm_args is not supported: pass the model as model_cfg, and leave mlm_args out")
    is_up = parallel_state.is_initialized()
    if skip_temp_dist_context and not is_up:
        raise RuntimeError("skip_temp_dist_context=True, but model-parallel state is not up: bring it up, or leave it")
    overrides = dict(mp_overrides or {})
    sizes = {name: overrides[name] for name in PARALLEL_SIZES if overrides.get(name)}
    context = contextlib.nullcontext() if is_up else temporary_distributed_context(dist_backend, **sizes)
    with context:
        set_parallel_sizes(model_cfg, overrides)
        model_cfg.perform_initialization = False
        chunks = model_cfg.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=use_cpu_init)
        _load(chunks, checkpoint_path)
        return _weights_of(chunks) if return_state_dict else chunks


def _load(chunks: Sequence[MegatronModule], checkpoint_path: str | Path) -> None:
    """Load a checkpoint's weights; of one with adapters those that they stand beside first."""
    saved = find_saved_adapters(checkpoint_path)
    if saved is None:
        load_model_weights(chunks, checkpoint_path)
        return
    base = check_base(saved, None, model=None)
    if is_hf_directory(base):
        AutoBridge.from_hf_pretrained(base).load_hf_weights(chunks)
    else:
        load_model_weights(chunks, base)
    load_adapters(chunks, saved)


def _weights_of(chunks: Sequence[MegatronModule]) -> StateDict:
    states = [
        {name: weight for name, weight in unwrap_model(chunk).state_dict().items() if isinstance(weight, torch.Tensor)}
        for chunk in chunks
    ]
    return states[0] if len(states) == 1 else dict(zip(chunk_keys(len(states)), states, strict=True))


def save_megatron_model(
    model: MegatronModule | Sequence[MegatronModule],
    path: str | Path,
    ckpt_format: str = "torch_dist",
    hf_tokenizer_path: str | Path | None = None,
    low_memory_save: bool = False,
    hf_tokenizer_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a weights-only checkpoint, iteration 0, that `finetune` starts from. Collective.

    Args:
        model: This rank's chunks, wrapped or not.
        path: Root directory of the checkpoint.
        ckpt_format: "torch_dist".
        hf_tokenizer_path: Directory of a Hugging Face tokenizer that is stored with it; None: none is.
        low_memory_save: Accepted: a save makes no second copy of the model.
        hf_tokenizer_kwargs: Not supported: the tokenizer's files are copied as they are.

    Returns:
        The iteration's directory.

    Raises:
        ValueError: Another format, or arguments for the tokenizer.
    """
    if ckpt_format != "torch_dist":
        raise ValueError(f"ckpt_format={ckpt_format!r} is not supported: expected 'torch_dist'")
    check_no_tokenizer_options(hf_tokenizer_kwargs)
    return save_model(as_chunks(model), path, text=TokenizerFiles.of(None, tokenizer=hf_tokenizer_path))
