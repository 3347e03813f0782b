# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rules across sections of a configuration: one function a rule, named after it. A rule reads and never changes.

Here: batches, data, schedule and checkpoints. Parallelism, the optimizer and what isn't built yet have files of their
own; `RULES` is all of them in the order in which they speak.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.dist_checkpointing import tensor_aware_state_dict

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config_checks_optimizer import OPTIMIZER_RULES
from megatron.bridge.training.config_checks_parallel import PARALLEL_RULES, check_virtual_pipeline_fits
from megatron.bridge.training.config_checks_values import VALUE_RULES
from megatron.bridge.training.config_derived import data_parallel_size, derive, global_batch_size
from megatron.bridge.training.config_unsupported import check_comm_overlap_is_off, check_options_are_built
from megatron.bridge.training.profiling import check_profiles_have_a_place
from megatron.bridge.training.trackers import check_trackers_are_installed

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def check_global_batch_is_divisible(cfg: "ConfigContainer", world_size: int) -> None:
    """Each data-parallel rank takes equally many micro-batches."""
    micro, copies = cfg.train.required_micro_batch_size(), data_parallel_size(cfg, world_size)
    batch = global_batch_size(cfg, world_size)
    if batch % (micro * copies):
        raise ValueError(
            f"train.global_batch_size={batch} is no multiple of train.micro_batch_size={micro} x data-parallel size "
            f"{copies} = {micro * copies}: change train.global_batch_size, train.micro_batch_size or the number "
            f"of ranks"
        )


def check_evaluation_batch_is_divisible(cfg: "ConfigContainer", world_size: int) -> None:
    """The same for an evaluation with its own batch sizes."""
    derived = derive(cfg, world_size)
    share = derived.eval_micro_batch_size * derived.data_parallel_size
    if derived.eval_global_batch_size % share:
        raise ValueError(
            f"validation.eval_global_batch_size={derived.eval_global_batch_size} is no multiple of "
            f"validation.eval_micro_batch_size={derived.eval_micro_batch_size} x data-parallel size "
            f"{derived.data_parallel_size} = {share}: change one of them"
        )


def check_sequence_lengths_agree(cfg: "ConfigContainer", world_size: int) -> None:
    """Model and data say the same longest sequence."""
    data_length = getattr(cfg.dataset, "seq_length", None)  # a DatasetProvider may leave it to the model
    if data_length is not None and data_length != cfg.model.seq_length:
        raise ValueError(
            f"dataset.seq_length={data_length} and model.seq_length={cfg.model.seq_length}: they must agree; "
            "set both to the longest sample in tokens"
        )


def check_schedule_counts_as_the_run_does(cfg: "ConfigContainer", world_size: int) -> None:
    """A run counted in steps has a schedule in steps, a run counted in samples one in samples."""
    scheduler = cfg.scheduler
    in_steps = cfg.train.train_iters is not None
    foreign = "samples" if in_steps else "iters"
    for name in (f"lr_decay_{foreign}", f"lr_warmup_{foreign}", f"lr_wsd_decay_{foreign}"):
        if getattr(scheduler, name):
            length, other = ("train_iters", "iters") if in_steps else ("train_samples", "samples")
            raise ValueError(
                f"scheduler.{name}={getattr(scheduler, name)} in a run whose length is train.{length}: "
                f"set scheduler.{name.replace(foreign, other)} instead"
            )


def check_schedule_fits_the_run(cfg: "ConfigContainer", world_size: int) -> None:
    """The schedule has a length, the warm-up is shorter than it, and a WSD schedule says when it falls."""
    derived, unit = derive(cfg, world_size), "samples" if cfg.train.train_iters is None else "iters"
    if derived.skip_train:
        return
    if derived.lr_decay_steps < 1:
        raise ValueError(f"train.train_iters={derived.train_iters}: a run takes at least one step; set 1 or more")
    if derived.lr_warmup_steps >= derived.lr_decay_steps:
        per_unit = derived.global_batch_size if unit == "iters" else 1
        raise ValueError(
            f"scheduler.lr_warmup_{unit}={derived.lr_warmup_steps // per_unit} but the learning rate decays over "
            f"{derived.lr_decay_steps // per_unit} {unit} (scheduler.lr_decay_{unit}, or the run's length): "
            "the warm-up must be shorter; lower it"
        )
    if cfg.scheduler.lr_decay_style == "WSD" and derived.wsd_decay_steps is None:
        raise ValueError(
            f"scheduler.lr_decay_style=WSD without scheduler.lr_wsd_decay_{unit}: set how long the last, "
            f"falling part is"
        )
    if derived.wsd_decay_steps is not None and derived.wsd_decay_steps > derived.lr_decay_steps:
        raise ValueError(
            f"scheduler.lr_wsd_decay_{unit} is longer than scheduler.lr_decay_{unit} (or the run): lower it"
        )


def check_learning_rates_are_ordered(cfg: "ConfigContainer", world_size: int) -> None:
    """A learning rate is set; the smallest and the first one are not above it."""
    lr = cfg.optimizer.lr
    if lr is None:
        raise ValueError("optimizer.lr is not set: it is the largest learning rate; set it, e.g. optimizer.lr=1e-5")
    if lr < 0:
        raise ValueError(f"optimizer.lr is {lr}: it can't be negative; set 0 or more")
    others = {"optimizer.min_lr": cfg.optimizer.min_lr, "scheduler.lr_warmup_init": cfg.scheduler.lr_warmup_init}
    for option, value in others.items():
        if value is not None and not 0.0 <= value <= lr:
            raise ValueError(f"{option}={value} with optimizer.lr={lr}: expected 0 to optimizer.lr; change one of them")


def check_weight_decay_grows(cfg: "ConfigContainer", world_size: int) -> None:
    """Weight decay stays or grows; it stays in the style named constant."""
    derived = derive(cfg, world_size)
    start, end, style = derived.start_weight_decay, derived.end_weight_decay, cfg.scheduler.weight_decay_incr_style
    if not 0.0 <= start <= end or (style == "constant" and start != end):
        expected = "equal values with weight_decay_incr_style=constant" if style == "constant" else "0 <= start <= end"
        raise ValueError(
            f"scheduler.start_weight_decay={start} and scheduler.end_weight_decay={end} (unset: "
            f"optimizer.weight_decay): "
            f"expected {expected}; change them"
        )


def check_pretrained_checkpoint_exists(cfg: "ConfigContainer", world_size: int) -> None:
    """The weights that a run starts from are there."""
    path = cfg.checkpoint.pretrained_checkpoint
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"checkpoint.pretrained_checkpoint={path}: there is no such file or directory; expected a Megatron "
            f"checkpoint "
            "(its root or an iter_N folder) or a Hugging Face directory; correct the path"
        )


def check_peft(cfg: "ConfigContainer", world_size: int) -> None:
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


def check_non_persistent_checkpoints_have_a_place(cfg: "ConfigContainer", world_size: int) -> None:
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


def check_background_writer_is_a_thread(cfg: "ConfigContainer", world_size: int) -> None:
    """A thread of each rank writes in the background: what would set up a process of its own must be left as it is."""
    defaults = type(cfg.checkpoint).__dataclass_fields__
    for name in ("cpu_priority", "io_priority", "use_cpu_shm"):
        option = f"async_ckpt_{name}"
        value = getattr(cfg.checkpoint, option)
        if cfg.checkpoint.async_save and value != defaults[option].default:
            raise ValueError(
                f"checkpoint.{option}={value} with checkpoint.async_save=true: a thread of each rank writes, which has "
                f"no such option; leave it at {defaults[option].default}"
            )


def check_exchange_suits_the_backend(cfg: "ConfigContainer", world_size: int) -> None:
    """Core's rounds gather tensors of several sizes, which gloo can't."""
    way = cfg.checkpoint.ckpt_fully_parallel_load_exchange_algo
    backend = dist.get_backend() if dist.is_initialized() else cfg.dist.distributed_backend
    if cfg.checkpoint.fully_parallel_load and way == "gather_rounds" and backend == "gloo":
        raise ValueError(
            f"checkpoint.ckpt_fully_parallel_load_exchange_algo={way} over gloo, which gathers tensors of one "
            "size only: set it to broadcast"
        )


RULES: tuple[Callable[["ConfigContainer", int], None], ...] = (
    *VALUE_RULES,
    *PARALLEL_RULES,
    check_global_batch_is_divisible,
    check_evaluation_batch_is_divisible,
    check_virtual_pipeline_fits,
    check_sequence_lengths_agree,
    *OPTIMIZER_RULES,
    check_schedule_counts_as_the_run_does,
    check_schedule_fits_the_run,
    check_learning_rates_are_ordered,
    check_weight_decay_grows,
    check_options_are_built,
    check_comm_overlap_is_off,
    check_pretrained_checkpoint_exists,
    check_peft,
    check_non_persistent_checkpoints_have_a_place,
    check_background_writer_is_a_thread,
    check_exchange_suits_the_backend,
    check_trackers_are_installed,
    check_profiles_have_a_place,
)
"""Every rule, in the order in which they speak: what is wrong first is said first."""
