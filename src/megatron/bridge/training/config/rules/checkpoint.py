# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on what is saved and loaded, adapters among it."""

from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing import tensor_aware_state_dict

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.hf_hub import is_hub_name
from megatron.bridge.utils.section import unbuilt_values


def check_pretrained_checkpoint_exists(cfg: RunSections, world_size: int) -> None:
    """The weights that a run starts from are there, or may be on the hub."""
    path = cfg.checkpoint.pretrained_checkpoint
    if path is not None and not Path(path).exists() and not is_hub_name(path):
        raise FileNotFoundError(
            f"checkpoint.pretrained_checkpoint={path}: there is no such file or directory; expected a Megatron "
            "checkpoint (its root or an iter_N folder), a Hugging Face directory or a name on the hub; correct the path"
        )


def check_peft(cfg: RunSections, world_size: int) -> None:
    """Adapters adapt something, and their options are right."""
    if cfg.peft is None:
        return
    if not isinstance(cfg.peft, PEFT):
        raise ValueError(
            f"peft={cfg.peft!r} is a {type(cfg.peft).__name__}: expected adapters, such as "
            "{_target_: megatron.bridge.peft.lora.LoRA, dim: 8}, or null"
        )
    cfg.peft.check()
    if cfg.checkpoint.pretrained_checkpoint is None:
        raise ValueError(
            "peft is set without checkpoint.pretrained_checkpoint: adapters need the weights they adapt; "
            "set checkpoint.pretrained_checkpoint, or peft=null"
        )
    if cfg.checkpoint.load_main_params_from_ckpt:
        raise ValueError(
            "peft is set with checkpoint.load_main_params_from_ckpt=true: frozen weights have no FP32 masters; "
            "set load_main_params_from_ckpt=false"
        )


def check_non_persistent_checkpoints_have_a_place(cfg: RunSections, world_size: int) -> None:
    """What is saved in between has a kind, a place and what it needs, and no option speaks of another kind."""
    checkpoint = cfg.checkpoint
    kind = checkpoint.non_persistent_ckpt_type
    for name, kinds in (
        ("save_interval", ("local", "global")),
        ("local_ckpt_dir", ("local",)),
        ("global_ckpt_dir", ("global",)),
    ):
        value = getattr(checkpoint, f"non_persistent_{name}")
        if value is not None and kind not in kinds:
            raise ValueError(
                f"checkpoint.non_persistent_{name}={value} with checkpoint.non_persistent_ckpt_type={kind or 'null'}: "
                f"set checkpoint.non_persistent_ckpt_type={' or '.join(kinds)}, or leave it unset"
            )
    if kind == "local" and checkpoint.non_persistent_local_ckpt_dir is None:
        raise ValueError(
            "checkpoint.non_persistent_ckpt_type=local without checkpoint.non_persistent_local_ckpt_dir: "
            "set it to a directory on each machine's own disk, one for this run alone"
        )
    if kind == "local" and not tensor_aware_state_dict.HAVE_NVRX:
        raise ValueError(
            "checkpoint.non_persistent_ckpt_type=local needs the package nvidia-resiliency-ext, which is not "
            'installed: pip install "megatron-bridge[local]", or set checkpoint.non_persistent_ckpt_type=global'
        )
    if kind == "global" and checkpoint.non_persistent_root(checkpoint.save) is None:
        raise ValueError(
            "checkpoint.non_persistent_ckpt_type=global with neither checkpoint.save nor "
            "checkpoint.non_persistent_global_ckpt_dir: set the directory to save into"
        )
    for option in ("save", "load"):
        value, between = getattr(checkpoint, option), checkpoint.non_persistent_global_ckpt_dir
        if value is not None and between is not None and Path(value).resolve() == Path(between).resolve():
            raise ValueError(
                f"checkpoint.non_persistent_global_ckpt_dir={between} is checkpoint.{option} too, whose iterations "
                "would be removed with it: set another directory, or leave it unset"
            )


def check_background_writer_is_a_thread(cfg: RunSections, world_size: int) -> None:
    """A thread of each rank writes in the background: what would set up a process of its own must be left as it is."""
    asked = unbuilt_values(cfg.checkpoint) if cfg.checkpoint.async_save else {}
    for name in (
        "async_ckpt_cpu_priority", "async_ckpt_io_priority", "async_ckpt_use_cpu_shm", "use_persistent_ckpt_worker"
    ):  # fmt: skip
        if name in asked:
            raise ValueError(
                f"checkpoint.{name}={asked[name]} with checkpoint.async_save=true: a thread of each rank writes, which "
                "has no such option; leave it out"
            )


def check_exchange_suits_the_backend(cfg: RunSections, world_size: int) -> None:
    """Core's rounds gather tensors of several sizes, which gloo can't."""
    way = cfg.checkpoint.ckpt_fully_parallel_load_exchange_algo
    backend = dist.get_backend() if dist.is_initialized() else cfg.dist.distributed_backend
    if cfg.checkpoint.fully_parallel_load and way == "gather_rounds" and backend == "gloo":
        raise ValueError(
            f"checkpoint.ckpt_fully_parallel_load_exchange_algo={way} over gloo, which gathers tensors of one "
            "size only: set it to broadcast"
        )
