# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The adapters beside a model's linear layers as Hugging Face tensors, under the names of the peft library.

A layer with an adapter is known by its method `adapted_weights`: this room needs nothing of the one that makes them.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors.torch import save_file

from megatron.bridge.models.conversion.expert_adapters import PeftAdapters, adapters_for_peft
from megatron.bridge.models.conversion.export import export_weights
from megatron.bridge.models.conversion.generation_config import FILE as GENERATION_FILE
from megatron.bridge.models.conversion.generation_config import end_ids, generation_config_of_model
from megatron.bridge.models.conversion.mapping import WeightMapping, replicated, split_rows
from megatron.bridge.models.conversion.tasks import ConversionTask, WeightPlace, all_places, local_tasks, model_config
from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks
from megatron.bridge.utils.files import replaced_directory, use_umask

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PEFT_NAMES = {
    "linear_in.weight": "lora_A.weight",
    "linear_out.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


_PARTS = {"adapter_q": 0, "adapter_k": 1, "adapter_v": 2, "adapter_gate": 0, "adapter_up": 1}
"""Adapters of one Hugging Face tensor among those that a weight is made of, and the tensor's place among them."""


def adapter_tasks(chunks: Sequence[MegatronModule], family: ModelFamily) -> list[ConversionTask]:
    """This rank's adapter parameters.

    Raises:
        ValueError: An adapter of a part of what files have in one tensor.
    """
    tasks = []
    for task in (task for chunk in local_tasks(chunks, family) for task in chunk):
        if task.adapted is None:
            continue
        of_weight = task.place.mapping
        for name, parameter in task.adapted.adapter.named_parameters():
            mapping = _adapter_mapping(of_weight, name)
            place = WeightPlace(mapping, tuple(parameter.shape), parameter.dtype, task.place.owner, is_copy=False)
            tasks.append(ConversionTask(place, parameter))
    return tasks


def _adapter_mapping(of_weight: WeightMapping, name: str) -> WeightMapping:
    """Where one of an adapter's parameters belongs. It is cut as the weight is, if it is on the side that is cut."""
    megatron_name = of_weight.megatron_name.removesuffix("weight") + f"adapter.{name}"
    part, _, of_part = name.partition(".") if name.startswith("adapter_") else ("", "", name)
    hf_names = tuple(_PREFIX + hf.removesuffix("weight") + _PEFT_NAMES[of_part] for hf in of_weight.hf_names)
    is_cut = (of_part != "linear_in.weight") == (of_weight.dim == 0)
    if part and len(hf_names) == 1:
        raise ValueError(
            f"{of_weight.hf_names[0]} is one tensor in files, and the model has an adapter of a part of it ({part}), "
            "for which peft has no place: merge the adapters into the weights (python -m "
            "megatron.bridge.convert export), or train LoRA, which adapts the whole"
        )
    if part:
        return (split_rows if is_cut else replicated)(megatron_name, hf_names[_PARTS[part]])
    if is_cut:
        return replace(of_weight, megatron_name=megatron_name, hf_names=hf_names)
    return replicated(megatron_name, hf_names[0])


def export_adapter_weights(
    chunks: Sequence[MegatronModule], family: ModelFamily, *, cpu: bool = False, show_progress: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) pairs as `export_weights` does. Collective.

    An adapter of a whole fused layer has one A for query, key and value, or for gate and up; each gets a copy here.
    """
    tasks = adapter_tasks(chunks, family)
    shared: dict[str, Sequence[str]] = {}
    for place in all_places([tasks]):
        first, *others = (name.replace("lora_B", "lora_A") for name in place.mapping.hf_names)
        if others and "lora_B" in place.mapping.hf_names[0]:
            shared[first] = others
    for name, tensor in export_weights(chunks, family, cpu=cpu, show_progress=show_progress, tasks=tasks):
        yield name, tensor
        yield from ((other, tensor.clone()) for other in shared.get(name, ()))


def save_hf_adapter(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    path: str | Path,
    *,
    options: Mapping[str, Any],
    base: Path | None,
    text: TokenizerFiles,
    base_name: str | None = None,
    show_progress: bool = True,
) -> None:
    """Write the adapters as a directory that the peft library loads. Collective; rank 0 writes.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        path: The directory; an earlier export there is replaced once the new one is complete.
        options: `dim`, `alpha` and `dropout` of the adapters.
        base: Directory of the Hugging Face model under them.
        text: The tokenizer, and where a text ends.
        base_name: What `adapter_config.json` calls that model; None: its directory.
        show_progress: Whether rank 0 shows a bar.

    Raises:
        ValueError: The model has no adapters, peft has no place for one, or `path` holds something else.
    """
    path = Path(path).expanduser()
    with raise_on_all_ranks(f"preparing {path}"):
        if path.exists() and not (path / CONFIG_FILE).is_file() and (path.is_file() or any(path.iterdir())):
            raise ValueError(f"{path} holds something else than adapters: name a new or empty directory")
        adapter_tasks(chunks, family)  # which peft must have a place for
    tensors = dict(export_adapter_weights(chunks, family, cpu=True, show_progress=show_progress))
    with raise_on_all_ranks(f"writing {path}"):
        if not tensors:
            raise ValueError(f"the model has no adapters: there is nothing to write to {path}")
        if is_rank_0():
            adapters = adapters_for_peft(tensors, family, model_config(chunks), rank=options["dim"])
            config = adapter_config(adapters, options, base=base_name or base)
            warn_of_end_ids(path, text, base)
            with replaced_directory(path) as directory:
                weights = {name: tensor.contiguous() for name, tensor in adapters.tensors.items()}
                save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
                use_umask(directory / WEIGHTS_FILE)  # safetensors makes files that only their owner can read
                (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                text.write(directory)


def warn_of_end_ids(path: Path, text: TokenizerFiles, base: Path | None) -> None:
    """Say it where the adapters end a text with tokens that the model under them, whose settings count, doesn't."""
    ids = end_ids(text.generation or {})
    if base is not None and set(ids) - set(end_ids(generation_config_of_model(base))):
        logger.warning(
            "the adapters in %s learned to end with the tokens %s, and the peft library goes by the %s of %s, which "
            "lacks some: pass it generate(eos_token_id=%s)",
            path,
            list(ids),
            GENERATION_FILE,
            base,
            list(ids),
        )


def adapter_config(adapters: PeftAdapters, options: Mapping[str, Any], *, base: str | Path | None) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Args:
        adapters: As peft has them.
        options: As for `save_hf_adapter`.
        base: The name or directory of the model under them.
    """
    rank, alpha, parameters = options["dim"], options["alpha"], adapters.parameters
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else options["dropout"],  # peft has none for parameters
        "use_dora": any("lora_magnitude_vector" in name for name in adapters.tensors),
        "target_modules": adapters.modules,
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": adapters.ranks,
        "alpha_pattern": {end: alpha * own / rank for end, own in adapters.ranks.items()},  # at the same scale
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
