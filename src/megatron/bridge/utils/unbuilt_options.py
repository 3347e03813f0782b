# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The options that Megatron Bridge has and this package doesn't, in one table.

`section.py` asks it where a section is made, set or read; files and command lines ask it too. When something is built,
delete its row and add the field.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal


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
_NO_OVERLAP = "set comm_overlap=null; ddp.overlap_grad_reduce and ddp.overlap_param_gather do what they say"
_OVERLAPS = (
    "tp_comm_overlap tp_comm_overlap_cfg tp_comm_bootstrap_backend overlap_p2p_comm batch_p2p_comm overlap_grad_reduce "
    "overlap_param_gather overlap_param_gather_with_optimizer_step align_param_gather bucket_size "
    "defer_embedding_wgrad_compute wgrad_deferral_limit data_parallel_size"
).split()
_RESTART = "start the job with torchrun --max-restarts: each start resumes from the newest checkpoint"
_ONE_PROCESS_GROUP_STYLE = "leave it off: process groups are made at the start, in Core's global state"

UNSUPPORTED = (
    # whole sections
    Unsupported("straggler", (None,)),
    Unsupported("tensor_inspect", (None,)),
    # switches of NVIDIA's resiliency extension
    Unsupported("ft.enable_ft_package", (False, None), _RESTART),
    Unsupported(
        "ft.calc_ft_timeouts", (False, None), "set dist.distributed_timeout_minutes: a rank that hangs ends itself"
    ),
    Unsupported("ft.simulate_fault", (False, None), "kill a rank yourself: a new start resumes"),
    Unsupported(
        "nvrx_straggler.enabled", (False, None), "set logger.timing_log_level=1 and timing_log_option=all instead"
    ),
    Unsupported("inprocess_restart.enabled", (False, None), _RESTART),
    # length of the run and its checks
    # Core from 0.17 ignores it, and the data is read in batches of one size
    Unsupported("train.rampup_batch_size", (None,), "set train.global_batch_size alone"),
    Unsupported("train.check_optimizer_step_success"),
    Unsupported("train.check_weight_hash_across_dp_replicas_interval"),
    Unsupported("train.train_sync_interval"),
    Unsupported("train.empty_unused_memory_level", (0,)),
    Unsupported("train.decrease_batch_size_if_needed"),
    Unsupported("validation.start_eval_at_iter"),
    Unsupported("validation.test_mode"),
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
    Unsupported("model.heterogeneous_block_specs", (False,), "set model.transformer_layer_spec instead"),
    Unsupported("model.qk_clip", (False,)),
    Unsupported("model.use_mup"),  # Core from 0.18
    Unsupported("model.external_cuda_graph", (False,)),
    Unsupported("model.cuda_graph_impl", ("none", "local", None)),
    Unsupported("model.hybrid_context_parallel", (False,), "set model.context_parallel_size alone"),
    Unsupported("model.fp8_quantizer_factory", (None,), "choose a model.fp8_recipe of Transformer Engine's instead"),
    Unsupported("model.fp4_quantizer_factory", (None,), "choose a model.fp4_recipe of Transformer Engine's instead"),
    # overlap of communication and compute
    *(Unsupported(f"comm_overlap.{name}", (None, False), _NO_OVERLAP) for name in _OVERLAPS),
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
    Unsupported(
        "checkpoint.also_save_hf_checkpoint", (False,), "export afterwards: python -m megatron.bridge.convert export"
    ),
    Unsupported("checkpoint.hf_distributed_save"),
    Unsupported("checkpoint.hf_trust_remote_code"),
)
"""Options that are refused unless they hold an accepted value."""


@dataclass(frozen=True)
class WithoutEffect:
    """One row: an option that is accepted with any value of its type, and changes nothing; the log says so."""

    option: str
    """Section and field."""

    default: Any = False
    """What it holds unless it is set; or a function that says it."""

    hint: Any = bool
    """Its type."""

    @property
    def neutral(self) -> Any:
        """What it holds unless it is set."""
        return self.default() if callable(self.default) else self.default


_OF_A_SWITCH_THAT_IS_OFF = (
    WithoutEffect("ft.simulated_fault_type", "random", Literal["rank_hung", "rank_killed", "random"]),
    WithoutEffect("ft.simulated_fault_rank", None, int | None),
    WithoutEffect("ft.simulated_fault_base_delay", 0, int),
    WithoutEffect("nvrx_straggler.report_time_interval", 300.0, float),
    WithoutEffect("nvrx_straggler.calc_relative_gpu_perf", True),
    WithoutEffect("nvrx_straggler.calc_individual_gpu_perf", True),
    WithoutEffect("nvrx_straggler.num_gpu_perf_scores_to_print", 5, int),
    WithoutEffect("nvrx_straggler.gpu_relative_perf_threshold", 0.7, float),
    WithoutEffect("nvrx_straggler.gpu_individual_perf_threshold", 0.7, float),
    WithoutEffect("nvrx_straggler.stop_if_detected"),
    WithoutEffect("nvrx_straggler.enable_logging", True),
    WithoutEffect("nvrx_straggler.profiling_interval", 1, int),
    WithoutEffect("nvrx_straggler.logger_name", "megatron.bridge.NVRxStragglerDetection", str),
    *(
        WithoutEffect(f"inprocess_restart.{name}", seconds, float)
        for name, seconds in {
            "monitor_thread_interval": 1.0,
            "monitor_process_interval": 1.0,
            "progress_watchdog_interval": 1.0,
            "heartbeat_interval": 30.0,
            "soft_timeout": 60.0,
            "hard_timeout": 90.0,
            "heartbeat_timeout": 60.0,
            "barrier_timeout": 120.0,
            "completion_timeout": 120.0,
            "last_call_wait": 1.0,
            "termination_grace_time": 1.0,
        }.items()
    ),
    WithoutEffect("inprocess_restart.granularity", "node", Literal["node", "rank"]),
    WithoutEffect("inprocess_restart.max_iterations", None, int | None),
    WithoutEffect("inprocess_restart.max_rank_faults", None, int | None),
    WithoutEffect("inprocess_restart.active_world_size", None, int | None),
    WithoutEffect("inprocess_restart.empty_cuda_cache", True),
    WithoutEffect("inprocess_restart.monitor_process_logdir", None, str | None),
)
"""Options of what `UNSUPPORTED` refuses to switch on."""

OF_NO_USE = (
    *_OF_A_SWITCH_THAT_IS_OFF,
    WithoutEffect("train.exit_signal_handler_for_dataloader"),
    WithoutEffect("dist.local_rank", lambda: int(os.getenv("LOCAL_RANK", "0")), int),
    WithoutEffect(
        "rerun_state_machine.error_injection_type",
        "transient_error",
        Literal["correct_result", "transient_error", "persistent_error"],
    ),
    WithoutEffect("checkpoint.use_tokenizer_model_from_checkpoint_args", True),
    WithoutEffect("checkpoint.async_strategy", "nvrx", Literal["nvrx", "mcore"]),
    WithoutEffect("checkpoint.use_persistent_ckpt_worker", True),
    WithoutEffect("checkpoint.async_ckpt_cpu_priority", 10, int),
    WithoutEffect("checkpoint.async_ckpt_io_priority", 3, int | None),
    WithoutEffect("checkpoint.async_ckpt_use_cpu_shm"),
    WithoutEffect("checkpoint.async_write_results_mp_mode", "fork", Literal["fork", "spawn"]),
    WithoutEffect("checkpoint.strict_fsdp_dtensor_load"),
    WithoutEffect("checkpoint.replication_factor", 2, int),
    WithoutEffect("checkpoint.stream_ckpt_dequant", True),
    WithoutEffect("checkpoint.hf_source_path", None, str | None),
    WithoutEffect("checkpoint.hf_save_every_n_ranks", 1, int),
    WithoutEffect("dataset.persistent_workers"),
    WithoutEffect("dataset.data_sharding", True),
    WithoutEffect("dataset.packed_sequence_specs.tokenizer_model_name", None, str | None),
    WithoutEffect("dataset.offline_packing_specs.tokenizer_model_name", None, str | None),
)
"""Options about how something is done that is done otherwise here, or not at all."""

_TABLE = {row.option: WithoutEffect(row.option, row.accepted[0], Any | None) for row in UNSUPPORTED} | {
    row.option: row for row in OF_NO_USE
}


def unbuilt_names(section: str) -> list[str]:
    """The names of a section's rows; empty: the container's."""
    return [option.rpartition(".")[2] for option in _TABLE if option.rpartition(".")[0] == section]


def unbuilt_option(option: str) -> WithoutEffect | None:
    """Default and type of an option that only Megatron Bridge has; None: it hasn't got it either, or both have it."""
    return _TABLE.get(option)
