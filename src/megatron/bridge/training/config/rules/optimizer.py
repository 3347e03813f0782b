# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on the optimizer: what can be offloaded to the CPU, what precision-aware mode needs, what ddp must agree on."""

import importlib.util
import logging

from megatron.bridge.training.config.optimizer import AUTO
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.section import unbuilt_values

logger = logging.getLogger(__name__)


def _offloads(cfg: RunSections) -> bool:
    """Whether the optimizer is asked to live on the CPU."""
    return cfg.optimizer.optimizer_cpu_offload


def check_offload_fraction_is_a_part(cfg: RunSections, world_size: int) -> None:
    """The offloaded part is between nothing and everything, or left to the run."""
    fraction = cfg.optimizer.optimizer_offload_fraction
    if fraction == AUTO:
        return
    if isinstance(fraction, str):
        raise ValueError(f"optimizer.optimizer_offload_fraction is {fraction!r}: set 0 to 1, or {AUTO}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"optimizer.optimizer_offload_fraction is {fraction}: it is the part of the optimizer that lives on "
            f"the CPU; "
            "set 0 to 1, e.g. optimizer.optimizer_offload_fraction=1.0"
        )


def check_auto_has_a_choice(cfg: RunSections, world_size: int) -> None:
    """What a run is to settle by itself isn't ruled out or settled already."""
    options = cfg.optimizer
    gib, given = options.optimizer_device_memory_gib, f"optimizer.optimizer_offload_fraction={AUTO}"
    if gib is not None and not gib > 0:
        raise ValueError(f"optimizer.optimizer_device_memory_gib is {gib}: it must be above 0, or null")
    if options.optimizer_offload_fraction != AUTO:
        return
    if not _offloads(cfg):
        raise ValueError(f"{given} without optimizer.optimizer_cpu_offload=true: set it, or leave the fraction out")
    if options.optimizer != "adam":
        raise ValueError(f"{given} with optimizer.optimizer={options.optimizer}: only Adam is planned; set a number")
    if options.optimizer_streamed_fraction:
        raise ValueError(
            f"{given} with optimizer.optimizer_streamed_fraction={options.optimizer_streamed_fraction}: {AUTO} chooses "
            "both; leave out optimizer.optimizer_streamed_fraction"
        )


def check_host_threads_have_work(cfg: RunSections, world_size: int) -> None:
    """Threads of the host's optimizer are asked for where there is one."""
    num_threads = cfg.optimizer.optimizer_cpu_num_threads
    if num_threads is None:
        return
    if num_threads < 1:
        raise ValueError(f"optimizer.optimizer_cpu_num_threads is {num_threads}: it must be at least 1, or null")
    if not _offloads(cfg):
        raise ValueError(
            f"optimizer.optimizer_cpu_num_threads={num_threads} without optimizer.optimizer_cpu_offload=true: nothing "
            "steps on the host; leave it out"
        )


def check_streamed_state_is_offloaded(cfg: RunSections, world_size: int) -> None:
    """What passes through the device in a step is a part of Adam's state on the host."""
    fraction = cfg.optimizer.optimizer_streamed_fraction
    given = f"optimizer.optimizer_streamed_fraction={fraction}"
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{given}: it is the part of the offloaded optimizer that the device steps on; set 0 to 1")
    if fraction and not _offloads(cfg):
        raise ValueError(
            f"{given} without optimizer.optimizer_cpu_offload=true: no state lives on the host, whence it could pass "
            "through the device; set optimizer.optimizer_cpu_offload=true or leave it out"
        )
    if fraction and cfg.optimizer.optimizer != "adam":
        raise ValueError(
            f"{given} with optimizer.optimizer={cfg.optimizer.optimizer}: only Adam's state can pass through the "
            "device; set optimizer.optimizer=adam or optimizer.optimizer_streamed_fraction=0"
        )


def check_overlapped_steps_can_run(cfg: RunSections, world_size: int) -> None:
    """A step that returns early needs buckets on the host, and modules that wait for their weights."""
    if not cfg.optimizer.overlap_cpu_optimizer_step:
        return
    option, off = "optimizer.overlap_cpu_optimizer_step=true", "set optimizer.overlap_cpu_optimizer_step=false"
    if not _offloads(cfg) or cfg.optimizer.optimizer_offload_fraction == 0.0:
        raise ValueError(
            f"{option}, but nothing is offloaded: set optimizer.optimizer_cpu_offload=true and "
            "optimizer.optimizer_offload_fraction above 0, or leave it out"
        )
    if not cfg.optimizer.overlap_cpu_optimizer_d2h_h2d:
        raise ValueError(
            f"{option} with optimizer.overlap_cpu_optimizer_d2h_h2d=false: buckets would wait for each other; set "
            "optimizer.overlap_cpu_optimizer_d2h_h2d=true"
        )
    if cfg.optimizer.optimizer != "adam":
        raise ValueError(f"{option} with optimizer.optimizer={cfg.optimizer.optimizer}: only adam steps so; {off}")
    model = cfg.model
    streamed = cfg.optimizer.optimizer_streamed_fraction
    hindrances = {
        f"optimizer.optimizer_streamed_fraction={streamed}": (streamed, "the device can't step beside its own work"),
        "weights kept in FP8 or FP4": (
            model.fp8_param or model.fp4_param or getattr(cfg.ddp, "fp8_param_gather", False),
            "they are quantised when the step ends",
        ),
        "CUDA graphs": (
            model.enable_cuda_graph or model.external_cuda_graph or model.cuda_graph_impl != "none",
            "a graph can't wait for the host",
        ),
        "model.overlap_moe_expert_parallel_comm=true": (
            model.overlap_moe_expert_parallel_comm,
            "it runs parts of layers, which wait for no weights",
        ),
        "optimizer.overlap_param_gather_with_optimizer_step=true": (
            cfg.optimizer.overlap_param_gather_with_optimizer_step,
            "it gathers weights before they are stepped on",
        ),
    }
    for name, (is_on, why) in hindrances.items():
        if is_on:
            raise ValueError(f"{option} with {name}: {why}; {off}")


def check_offload_has_distributed_optimizer(cfg: RunSections, world_size: int) -> None:
    """Without it Core replaces the parameters that the offloaded optimizer knows, and the first step is a KeyError."""
    if _offloads(cfg) and not (cfg.optimizer.use_distributed_optimizer and cfg.ddp.use_distributed_optimizer):
        raise ValueError(
            "optimizer.optimizer_cpu_offload=true without the distributed optimizer: its first step would fail; "
            "set optimizer.use_distributed_optimizer=true and ddp.use_distributed_optimizer=true"
        )


def check_offload_has_no_fp8_weights(cfg: RunSections, world_size: int) -> None:
    """Weights kept in FP8 have no half-precision copy from which the CPU's could be made, unless scaling is delayed."""
    if not _offloads(cfg):
        return
    in_fp8 = cfg.model.fp8 is not None and (cfg.model.fp8_param or cfg.ddp.fp8_param_gather)
    in_fp4 = cfg.model.fp4 is not None and (cfg.model.fp4_param or getattr(cfg.ddp, "fp4_param_gather", False))
    if in_fp4 or (in_fp8 and cfg.model.fp8_recipe != "delayed"):
        recipe = cfg.model.fp4_recipe if in_fp4 else cfg.model.fp8_recipe
        bits = 4 if in_fp4 else 8
        raise ValueError(
            f"optimizer.optimizer_cpu_offload=true with weights kept in FP{bits} (model.fp{bits}_param, recipe "
            f"{recipe}): "
            f"there is nothing to copy the CPU's weights from; set model.fp{bits}_param=false and "
            f"ddp.fp{bits}_param_gather=false, or use FP8 with model.fp8_recipe=delayed"
        )


def check_offload_has_no_fsdp(cfg: RunSections, world_size: int) -> None:
    """FSDP keeps its shards itself; Core's offloaded optimizer can't read them."""
    if not _offloads(cfg):
        return
    options = {
        "ddp.use_megatron_fsdp": cfg.ddp.use_megatron_fsdp,
        "ddp.use_custom_fsdp": cfg.ddp.use_custom_fsdp,
        **{f"dist.{name}": unbuilt_values(cfg.dist).get(name) for name in ("use_megatron_fsdp", "use_torch_fsdp2")},
    }
    for option, is_on in options.items():
        if is_on:
            raise ValueError(
                f"optimizer.optimizer_cpu_offload=true with {option}=true: Core can't offload the shards of FSDP; "
                f"set {option}=false and use the distributed optimizer"
            )


def check_offload_knows_the_optimizer(cfg: RunSections, world_size: int) -> None:
    """Core's offloaded optimizer has an Adam and an SGD."""
    if _offloads(cfg) and cfg.optimizer.optimizer not in ("adam", "sgd"):
        raise ValueError(
            f"optimizer.optimizer={cfg.optimizer.optimizer} with optimizer.optimizer_cpu_offload=true: only "
            f"adam and sgd "
            "can be offloaded; set optimizer.optimizer=adam or optimizer.optimizer_cpu_offload=false"
        )


def check_offload_decouples_weight_decay(cfg: RunSections, world_size: int) -> None:
    """The CPU's Adam is AdamW."""
    if _offloads(cfg) and not cfg.optimizer.decoupled_weight_decay:
        raise ValueError(
            "optimizer.decoupled_weight_decay=false with optimizer.optimizer_cpu_offload=true: the offloaded Adam is "
            "AdamW; set optimizer.decoupled_weight_decay=true"
        )


def check_optimizer_is_known(cfg: RunSections, world_size: int) -> None:
    """Adam and SGD are built; Core's others are not wired up yet."""
    if cfg.optimizer.optimizer not in ("adam", "sgd"):
        raise ValueError(
            f"optimizer.optimizer={cfg.optimizer.optimizer} is not built yet: set optimizer.optimizer=adam or sgd"
        )


def check_sgd_is_not_distributed(cfg: RunSections, world_size: int) -> None:
    """Core's distributed optimizer asserts that it is Adam's, when it is built or, offloaded, when it is saved."""
    if cfg.optimizer.optimizer != "sgd" or not cfg.optimizer.use_distributed_optimizer:
        return
    if not _offloads(cfg):
        raise ValueError(
            "optimizer.optimizer=sgd with the distributed optimizer, which is Adam's alone: set "
            "optimizer.use_distributed_optimizer=false and ddp.use_distributed_optimizer=false, or "
            "optimizer.optimizer=adam"
        )
    saves = cfg.checkpoint.save is not None or cfg.checkpoint.non_persistent_ckpt_type is not None
    if saves and cfg.checkpoint.save_optim:
        raise ValueError(
            "optimizer.optimizer=sgd with optimizer.optimizer_cpu_offload=true and checkpoint.save_optim=true: the "
            "state of an offloaded SGD can't be saved; set checkpoint.save_optim=false, or optimizer.optimizer=adam"
        )


def check_precision_aware_mode_can_run(cfg: RunSections, world_size: int) -> None:
    """Precision-aware mode is Adam's, in the distributed optimizer, with an implementation that has it."""
    optimizer = cfg.optimizer
    if not optimizer.use_precision_aware_optimizer:
        return
    option = "optimizer.use_precision_aware_optimizer=true"
    if optimizer.optimizer != "adam":
        raise ValueError(f"{option} with optimizer.optimizer={optimizer.optimizer}: set optimizer.optimizer=adam")
    if not optimizer.use_distributed_optimizer:
        raise ValueError(
            f"{option} without the distributed optimizer: set optimizer.use_distributed_optimizer=true and "
            "ddp.use_distributed_optimizer=true"
        )
    if not _offloads(cfg) and not has_transformer_engine():
        raise ValueError(
            f"{option} without optimizer.optimizer_cpu_offload needs Transformer Engine, which is not installed: "
            "install transformer-engine or set optimizer.use_precision_aware_optimizer=false"
        )


def check_precision_aware_mode_clips_fp32_gradients(cfg: RunSections, world_size: int) -> None:
    """Core clips the gradients of precision-aware mode in FP32 or BF16, not in FP16."""
    is_fp16 = cfg.model.fp16 and not cfg.ddp.grad_reduce_in_fp32
    if cfg.optimizer.use_precision_aware_optimizer and is_fp16 and cfg.optimizer.clip_grad > 0:
        raise ValueError(
            "optimizer.use_precision_aware_optimizer=true with FP16 gradients (model.fp16=true, "
            f"ddp.grad_reduce_in_fp32=false) and optimizer.clip_grad={cfg.optimizer.clip_grad}: Core can't clip them; "
            "set ddp.grad_reduce_in_fp32=true or optimizer.clip_grad=0"
        )


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def check_fp8_has_transformer_engine(cfg: RunSections, world_size: int) -> None:
    """FP8 and FP4 matrix products are Transformer Engine's; weights in them need the products in them."""
    for bits in (8, 4):
        number_format = getattr(cfg.model, f"fp{bits}")
        if number_format is not None and not has_transformer_engine():
            raise ValueError(
                f"model.fp{bits}={number_format} needs Transformer Engine, which is not installed: "
                f"install transformer-engine or set model.fp{bits}=null"
            )
        if number_format is None and getattr(cfg.model, f"fp{bits}_param"):
            raise ValueError(
                f"model.fp{bits}_param=true with model.fp{bits}=null: set model.fp{bits} or model.fp{bits}_param=false"
            )


def check_model_and_optimizer_agree_on_precision(cfg: RunSections, world_size: int) -> None:
    """Both sections say fp16 and bf16, and Core believes each."""
    if cfg.model.fp16 and cfg.model.bf16:
        raise ValueError("model.fp16=true and model.bf16=true: weights have one format; set one of them to false")
    for name in ("fp16", "bf16"):
        model, optimizer = getattr(cfg.model, name), getattr(cfg.optimizer, name)
        if model != optimizer:
            raise ValueError(
                f"model.{name}={model} and optimizer.{name}={optimizer}: they must agree; "
                f"set mixed_precision={name}_mixed, which sets both, or make them equal"
            )


def check_ddp_and_optimizer_agree(cfg: RunSections, world_size: int) -> None:
    """Both sections say whether the optimizer is distributed, and Core believes each."""
    ddp, optimizer = cfg.ddp.use_distributed_optimizer, cfg.optimizer.use_distributed_optimizer
    if ddp != optimizer:
        raise ValueError(
            f"ddp.use_distributed_optimizer={ddp} and optimizer.use_distributed_optimizer={optimizer}: they "
            f"must agree; "
            "set both alike (runtime_config_update does it)"
        )


def check_overlaps_can_run(cfg: RunSections, world_size: int) -> None:
    """Gathering weights during the forward pass needs the distributed optimizer and overlapped gradients."""
    ddp = cfg.ddp
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        raise ValueError(
            "ddp.overlap_param_gather=true without the distributed optimizer, which has nothing to gather: "
            "set ddp.use_distributed_optimizer=true or ddp.overlap_param_gather=false"
        )
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        raise ValueError(
            "ddp.overlap_param_gather=true with ddp.overlap_grad_reduce=false: the gathers follow the "
            "gradients' buckets; "
            "set ddp.overlap_grad_reduce=true"
        )
    if ddp.align_param_gather and not ddp.overlap_param_gather:
        raise ValueError(
            "ddp.align_param_gather=true with ddp.overlap_param_gather=false: there is nothing to align; "
            "set ddp.overlap_param_gather=true or ddp.align_param_gather=false"
        )
    if ddp.average_in_collective and cfg.model.calculate_per_token_loss:
        raise ValueError(
            "ddp.average_in_collective=true with model.calculate_per_token_loss=true: gradients are divided by tokens, "
            "not by ranks; set ddp.average_in_collective=false"
        )


def log_what_is_offloaded(cfg: RunSections) -> None:
    """Say it when nothing is offloaded although something in the configuration reads as if it were."""
    fraction = cfg.optimizer.optimizer_offload_fraction
    if cfg.optimizer.optimizer_device_memory_gib is not None and fraction != AUTO:
        logger.info(
            "optimizer.optimizer_device_memory_gib=%s has no effect: it is for optimizer.optimizer_offload_fraction=%s",
            cfg.optimizer.optimizer_device_memory_gib,
            AUTO,
        )
    if _offloads(cfg) and fraction == 0.0:
        logger.info(
            "optimizer.optimizer_cpu_offload=true with optimizer.optimizer_offload_fraction=0: nothing is offloaded; "
            "set the fraction to 1.0 to offload everything"
        )
    elif not isinstance(fraction, str) and fraction > 0.0 and not _offloads(cfg):
        logger.info(
            "optimizer.optimizer_offload_fraction=%s with optimizer.optimizer_cpu_offload=false: nothing is offloaded",
            fraction,
        )


OPTIMIZER_RULES = (
    check_offload_fraction_is_a_part,
    check_auto_has_a_choice,
    check_host_threads_have_work,
    check_streamed_state_is_offloaded,
    check_overlapped_steps_can_run,
    check_offload_has_no_fsdp,
    check_offload_knows_the_optimizer,
    check_offload_has_distributed_optimizer,
    check_offload_has_no_fp8_weights,
    check_offload_decouples_weight_decay,
    check_optimizer_is_known,
    check_sgd_is_not_distributed,
    check_precision_aware_mode_can_run,
    check_precision_aware_mode_clips_fp32_gradients,
    check_fp8_has_transformer_engine,
    check_model_and_optimizer_agree_on_precision,
    check_ddp_and_optimizer_agree,
    check_overlaps_can_run,
)
"""The offload's rules come first: they name the option that the user meant."""
