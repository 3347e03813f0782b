# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options of Megatron Bridge that are not built here yet: asking for one is an error, never silence.

When something is built, delete its row.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.training.config.sections import RunSections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unsupported:
    """One row: an option, the values that ask for nothing new, and the way out."""

    option: str
    """Section and field, e.g. checkpoint.async_save; or a section alone."""

    accepted: tuple[Any, ...] = (None, False)
    """Values that work."""

    instead: str = ""
    """What to do. Empty: set the first accepted value."""


_NO_DUMPS = "write whole checkpoints (checkpoint.save_interval) instead"
_NO_FSDP = "use the distributed optimizer (ddp.use_distributed_optimizer=true) instead"
_FROM_LM = "convert the checkpoint first and set the options in the configuration"
_ONE_PROCESS_GROUP_STYLE = "leave it off: process groups are made at the start, in Core's global state"

UNSUPPORTED = (
    # whole sections
    Unsupported("ft", (None,), "restart the job from its newest checkpoint instead"),
    Unsupported("straggler", (None,)),
    Unsupported("nvrx_straggler", (None,)),
    Unsupported("tensor_inspect", (None,)),
    Unsupported("inprocess_restart", (None,), "restart the job from its newest checkpoint instead"),
    # length of the run and its checks
    # Core from 0.17 ignores it, and the data is read in batches of one size
    Unsupported("train.rampup_batch_size", (None,), "set train.global_batch_size alone"),
    Unsupported("train.num_epochs", (None,), "set train.train_iters or train.train_samples instead"),
    Unsupported("train.check_optimizer_step_success"),
    Unsupported("train.check_weight_hash_across_dp_replicas_interval"),
    Unsupported("train.train_sync_interval"),
    Unsupported("train.empty_unused_memory_level", (0,)),
    Unsupported("train.decrease_batch_size_if_needed"),
    Unsupported("validation.multiple_validation_sets"),
    Unsupported("validation.validation_set_names"),
    Unsupported("validation.start_eval_at_iter"),
    Unsupported("validation.test_mode"),
    Unsupported("profiling.use_nsys_profiler", (False, None), "set profiling.use_pytorch_profiler=true"),
    Unsupported("profiling.pytorch_profiler_collect_chakra"),
    Unsupported("profiling.record_memory_history"),
    Unsupported("profiling.nvtx_ranges", (False, None), "set profiling.use_pytorch_profiler=true"),
    # the optimizer
    Unsupported("scheduler.max_steps", (None,), "set scheduler.lr_decay_iters instead"),
    Unsupported("rerun_state_machine.rerun_mode", ("disabled",)),
    Unsupported("rerun_state_machine.error_injection_rate", (0,)),
    # process groups
    Unsupported("dist.align_grad_reduce", (True,)),
    Unsupported("dist.disable_jit_fuser"),
    Unsupported("dist.use_megatron_fsdp", (False,), _NO_FSDP),
    Unsupported("dist.use_torch_fsdp2", (False,), _NO_FSDP),
    Unsupported("ddp.use_megatron_fsdp", (False,), _NO_FSDP),
    Unsupported("ddp.use_custom_fsdp", (False,), _NO_FSDP),
    Unsupported("dist.lazy_mpu_init", (False,), _ONE_PROCESS_GROUP_STYLE),
    Unsupported("dist.lazy_init", (False,), _ONE_PROCESS_GROUP_STYLE),
    Unsupported("dist.use_decentralized_pg", (False,), _ONE_PROCESS_GROUP_STYLE),
    Unsupported("dist.use_tp_pp_dp_mapping"),
    Unsupported("dist.use_sharp"),
    Unsupported("dist.sharp_enabled_group"),
    Unsupported("dist.nccl_communicator_config_path"),
    Unsupported("dist.high_priority_stream_groups", (None, [])),
    # the model: what Core only knows the number of, and needs more of a run than its configuration
    Unsupported("model.mtp_num_layers", (None, 0), "layers that predict further tokens aren't built; leave it unset"),
    Unsupported("model.multi_latent_attention", (False,), "no supported family has it"),
    Unsupported("model.heterogeneous_block_specs", (False,), "set model.transformer_layer_spec instead"),
    Unsupported("model.qk_clip", (False,)),
    Unsupported("model.use_mup"),  # Core from 0.18
    Unsupported("model.external_cuda_graph", (False,)),
    Unsupported("model.cuda_graph_impl", ("none", "local", None)),
    Unsupported("model.context_parallel_size", (1,), "shorten model.seq_length or raise tensor parallelism instead"),
    Unsupported("model.fp8_quantizer_factory", (None,), "choose a model.fp8_recipe of Transformer Engine's instead"),
    Unsupported("model.fp4_quantizer_factory", (None,), "choose a model.fp4_recipe of Transformer Engine's instead"),
    # what is saved and loaded
    Unsupported("checkpoint.ckpt_format", ("torch_dist",)),
    Unsupported(
        "checkpoint.ckpt_convert_format", (None,), "python -m megatron.bridge.convert converts to Hugging Face"
    ),
    Unsupported("checkpoint.ckpt_convert_save"),
    Unsupported("checkpoint.ckpt_convert_update_legacy_dist_opt_format"),
    Unsupported("checkpoint.save_params_interval", (None,), _NO_DUMPS),
    Unsupported("checkpoint.save_activations_interval", (None,), _NO_DUMPS),
    Unsupported("checkpoint.save_tokens_per_expert_interval", (None,), _NO_DUMPS),
    Unsupported("checkpoint.save_wgrads_interval", (None,), _NO_DUMPS),
    Unsupported("checkpoint.save_dgrads_interval", (None,), _NO_DUMPS),
    Unsupported("checkpoint.non_persistent_ckpt_type", (None, "None", "local", "global"), "set it to local or global"),
    Unsupported("checkpoint.replication"),
    Unsupported("checkpoint.replication_jump"),
    Unsupported("checkpoint.use_checkpoint_args", (False,), _FROM_LM),
    Unsupported("checkpoint.use_mp_args_from_checkpoint_args", (False,), _FROM_LM),
    Unsupported("checkpoint.auto_detect_ckpt_format", (False,), "the format is torch_dist"),
    Unsupported("checkpoint.dist_ckpt_save_pre_mcore_014"),
    Unsupported("checkpoint.distrib_optim_fully_reshardable_mem_efficient"),
    Unsupported("checkpoint.ckpt_fully_parallel_save_process_group", ("dp",)),
    Unsupported("checkpoint.ckpt_fully_parallel_load_process_group", ("dp",)),
    Unsupported("checkpoint.ckpt_assume_constant_structure"),
    Unsupported("checkpoint.storage_writers_per_rank", (1,)),
    Unsupported("checkpoint.dist_ckpt_workers", (1,)),
    Unsupported("checkpoint.custom_manager_class"),
    Unsupported(
        "checkpoint.also_save_hf_checkpoint", (False,), "export afterwards: python -m megatron.bridge.convert export"
    ),
    Unsupported("checkpoint.hf_distributed_save"),
    Unsupported("checkpoint.hf_trust_remote_code"),
)
"""Options that are refused unless they hold an accepted value."""


_INERT = tuple(
    f"logger.{name}"
    for name in (
        "log_timers_to_tensorboard log_memory_to_tensorboard memory_keys log_memory_interval log_device_memory_used "
        "log_l2_norm_grad_to_tensorboard log_num_zeros_in_grad log_max_attention_logit log_energy timing_log_level"
    ).split()
)
"""Options that only ask for more to be shown: they are accepted, without effect, and the log says so."""

_OF_NO_USE = tuple(
    """
    train.exit_signal_handler_for_dataloader dist.local_rank rerun_state_machine.error_injection_type
    logger.timing_log_option logger.barrier_with_L1_time profiling.memory_snapshot_path
    checkpoint.use_tokenizer_model_from_checkpoint_args checkpoint.async_strategy checkpoint.use_persistent_ckpt_worker
    checkpoint.async_ckpt_cpu_priority checkpoint.async_ckpt_io_priority checkpoint.async_ckpt_use_cpu_shm
    checkpoint.async_write_results_mp_mode checkpoint.strict_fsdp_dtensor_load checkpoint.replication_factor
    checkpoint.stream_ckpt_dequant checkpoint.hf_source_path checkpoint.hf_save_every_n_ranks
    dataset.persistent_workers dataset.data_sharding dataset.packed_sequence_specs.tokenizer_model_name
    dataset.offline_packing_specs.tokenizer_model_name
    """.split()
)
"""Options about how something is done that is done otherwise here, or not at all: accepted, and the log says so."""


def _value_of(cfg: RunSections, option: str) -> Any:
    """What an option holds; None in a section that is None, or where this Core has no such field."""
    value: Any = cfg
    for name in option.split("."):
        value = getattr(value, name, None)
    return value


def _differs_from_default(cfg: RunSections, option: str) -> bool:
    """Whether an option asks for anything; one that its section hasn't got doesn't."""
    section, _, name = option.rpartition(".")
    field = getattr(_value_of(cfg, section), "__dataclass_fields__", {}).get(name)
    if field is None:
        return False
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return _value_of(cfg, option) != default


def log_options_without_effect(cfg: RunSections) -> None:
    """Name, in one line, the options that are set and change nothing."""
    kinds = {"not built yet": _INERT, "of no use here": _OF_NO_USE}
    asked = {kind: [option for option in names if _differs_from_default(cfg, option)] for kind, names in kinds.items()}
    said = [f"{kind}: {', '.join(options)}" for kind, options in asked.items() if options]
    if said:
        logger.info("accepted without effect, %s", "; ".join(said))


def check_options_are_built(cfg: RunSections, world_size: int) -> None:
    """Nothing is asked for that isn't built."""
    for row in UNSUPPORTED:
        _check_row(row, _value_of(cfg, row.option))


def check_overrides_are_built(values: Mapping[str, Any]) -> None:
    """The same for single options, before there is a configuration; one without effect is refused too.

    Args:
        values: What is asked for, by option: {"profiling.use_nsys_profiler": True}.
    """
    for row in UNSUPPORTED:
        if row.option in values:
            _check_row(row, values[row.option])
    for option in _INERT:
        if values.get(option):
            raise ValueError(f"{option}={_as_text(values[option])} is not built yet: leave it out")


def _check_row(row: Unsupported, value: Any) -> None:
    if not any(value is accepted or value == accepted for accepted in row.accepted):
        way_out = row.instead or f"set {row.option}={_as_text(row.accepted[0])}"
        raise ValueError(f"{row.option}={_as_text(value)} is not built yet: {way_out}")


def check_comm_overlap_is_off(cfg: RunSections, world_size: int) -> None:
    """`comm_overlap` may be there, with everything in it off."""
    overlap = cfg.comm_overlap
    if overlap is None:
        return
    for name in overlap.__dataclass_fields__:
        if getattr(overlap, name) not in (None, False):
            raise ValueError(
                f"comm_overlap.{name}={getattr(overlap, name)} is not built yet: set comm_overlap=null; "
                "ddp.overlap_grad_reduce and ddp.overlap_param_gather do what they say"
            )


def _as_text(value: Any) -> str:
    """A value as an override would say it, on one line."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return text or " ".join(str(value).split())[:80]
