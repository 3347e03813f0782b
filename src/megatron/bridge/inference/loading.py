# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From a command line to a model on its ranks, from a Hugging Face directory or a Megatron checkpoint."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.inference.options import SIZES

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def resolve_hf_model_path(args: argparse.Namespace) -> str:
    """The Hugging Face model that a command line names, or else the one that its Megatron checkpoint came from.

    Args:
        args: With the options of `add_model_loading_args`.

    Returns:
        Directory, or hub name.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: Neither is named, or the checkpoint doesn't say it.
    """
    model, checkpoint = named_models(args)
    if model is not None:
        return str(model)
    if checkpoint is None:
        raise ValueError("no model is named: pass --hf-model-path or --megatron-model-path")
    from megatron.bridge.models.conversion.saved_provider import read_model_section

    found = read_model_section(checkpoint).get("hf_model_id")
    if not found:
        raise ValueError(f"{checkpoint} doesn't say which Hugging Face model it came from: pass --hf-model-path")
    return str(found)


def named_models(args: argparse.Namespace) -> tuple[str | Path | None, str | Path | None]:
    """The Hugging Face model and the Megatron checkpoint that a command line names; None: it doesn't."""
    return getattr(args, "hf_model_path", None), getattr(args, "megatron_model_path", None)


def load_bridge_model(
    args: argparse.Namespace, hf_model_path: str | Path | None = None, **overrides: Any
) -> "MegatronModule":
    """Build the model that a command line names, with its weights, in evaluation mode. Collective.

    Brings up a process group and model-parallel state where there are none, and leaves them up.

    Args:
        args: With the options of `add_model_loading_args`, and those of `add_parallelism_args`,
            `add_distributed_args` and `add_sampling_args` where they were added.
        hf_model_path: The Hugging Face model to load, where the command line names no model.
        overrides: Fields of the provider to set.

    Returns:
        This rank's part of the model. Of a checkpoint of adapters: the model with adapters.

    Raises:
        FileNotFoundError: No such model.
        ValueError: Neither model is named, it isn't supported, or it can't be shared out so.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.conversion.hf_config import precision_fields
    from megatron.bridge.models.conversion.saved_provider import set_parallel_sizes
    from megatron.bridge.models.generation import load_for_generation
    from megatron.bridge.utils.distributed import bring_up_groups, run_while_others_wait

    bring_up_groups(**_groups_asked_for(args))
    fields = {"inference_sampling_seed": getattr(args, "seed", 1234), **overrides}
    dtype, base = getattr(args, "dtype", None), getattr(args, "base", None)
    model, checkpoint = named_models(args)
    if checkpoint is not None:
        (chunk,) = load_for_generation(checkpoint, hf_model=model, base=base, dtype=dtype, sizes=fields)
        return chunk
    if base is not None:
        raise ValueError("--base is of adapters in a Megatron checkpoint: add --megatron-model-path")
    name, trust = model or hf_model_path or resolve_hf_model_path(args), getattr(args, "trust_remote_code", None)
    provider = run_while_others_wait(
        lambda: AutoBridge.from_hf_pretrained(name, trust_remote_code=trust).to_megatron_provider(),
        doing="finding the model",
    )
    assert provider is not None  # every rank has work
    set_parallel_sizes(provider, {**(precision_fields(dtype) if dtype else {}), **fields})
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return chunk.eval()


def groups_of(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """The process groups that `load_bridge_model` needs, as a context. What it creates is destroyed at its end."""
    from megatron.bridge.utils.distributed import model_parallel_groups

    return model_parallel_groups(**_groups_asked_for(args))


def _groups_asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `bring_up_groups` that a command line, with the options of `load_bridge_model`, says."""
    from megatron.bridge.utils.device import choose_device, enter_device

    device, backend = getattr(args, "device", "auto"), getattr(args, "distributed_backend", "auto")
    return {
        "choice": enter_device(None if (device, backend) == ("auto", "auto") else choose_device(device, backend)),
        "seed": getattr(args, "seed", 1234),
        "timeout_minutes": getattr(args, "distributed_timeout_minutes", 10.0),
        **{size.field: getattr(args, short, size.default) for short, size in SIZES.items()},
    }
