# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options that only another version of Megatron-Core has, so that a script or a file written for it runs here too.

A value that asks for nothing, the default there, is dropped wherever it is given: to a constructor, as an attribute, on
a command line, in a file. Any other value is refused, and the error says which version has the option.
"""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch


def _each(default: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), default)


_NEWER: dict[str, dict[str, Any]] = {
    "TransformerConfig": {
        **_each(
            None,
            "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards moe_grad_scale_func "
            "mtp_grad_scale_func mtp_hybrid_override_pattern flash_attention_version "
            "experimental_attention_variant_loss_scale_func dsa_indexer_k_norm_epsilon mup_base_hidden_size "
            "mup_base_head_dim moe_shared_expert_glu_interleave_size moe_router_force_biased "
            "moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute "
            "moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor inference_cuda_graph_scope "
            "mamba_training_ssm_states_dtype fine_grained_offloading_max_inflight_offloads",
        ),
        **_each(
            False,
            "overlap_dispatch_backward_with_experts_wgrad cpu_offloading_retain_pinned_cpu_buffers "
            "mtp_use_repeated_layer mtp_detach_heads dsa_indexer_rope_interleaved dsa_indexer_k_norm_fp32 use_mup "
            "fused_residual_rmsnorm use_transformer_engine_op_fuser fp8_output_proj high_priority_a2a_comm_stream "
            "use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_single_grouped_weight "
            "moe_single_grouped_bias moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs "
            "moe_pad_experts_for_cuda_graph_inference moe_ncclep_static_shape moe_ncclep_zero_copy "
            "nccl_all_reduce_for_prefill inference_disable_triton_nvls_kernels "
            "inference_moe_disable_fused_quant_kernels delay_offload_until_cuda_graph moe_paged_stash",
        ),
        **_each(True, "dsa_indexer_rotate_activation dsa_indexer_scoring_relu"),
        **_each(0, "dsa_indexer_skip_topk_offset delta_offload_bytes_across_pp_ranks"),
        **_each(1, "gtp_weight_remat_size expert_gtp_weight_remat_size dsa_indexer_topk_freq mlp_chunks_for_training"),
        **_each(0.0, "moe_router_quantile_balancing_ema moe_paged_stash_buffer_size_factor_cpu"),
        **_each(
            1.0, "mup_width_mult mup_embedding_mult mup_output_mult mup_attn_scale_power activation_offload_fraction"
        ),
        "moe_paged_stash_buffer_size_factor_cuda": 1.1,
        "moe_paged_stash_page_size": 64,
        "moe_hybridep_num_sms_preprocessing": 108,
        "dsa_kernel_backend": "none",
        "cuda_graph_modules": "full",
        "inference_grouped_gemm_backend": "vllm",
        "inference_moe_token_dispatcher_type": "nvls",
    },
    "OptimizerConfig": {
        **_each(False, "muon_nesterov use_layer_wise_distributed_optimizer optimizer_cuda_graph"),
        **_each(0.95, "lion_beta1 soap_shampoo_beta adaptive_muon_beta2"),
        "lion_beta2": 0.98,
        "adaptive_muon_eps": 1e-8,
        "soap_precondition_frequency": 1,
        "soap_use_kl_shampoo": True,
        "muon_coefficient_type": "quintic",
        "muon_scalar_optimizer": "adam",
        "adaptive_muon_moment2_method": "adamuon",
        "grad_norm_skip_threshold": float("inf"),
    },
    "DistributedDataParallelConfig": {
        **_each(None, "num_buckets megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype"),
        **_each(
            False,
            "fp4_param_gather fsdp_db_use_persist_buf_on_alloc_fail megatron_fsdp_use_decoupled_grad "
            "megatron_fsdp_cuda_graph_mode megatron_fsdp_enable_fine_grained_param_gather "
            "megatron_fsdp_max_pool_double_buffer",
        ),
        "fsdp_all_gather_in_start_param_sync": True,
        "param_name_patterns_for_fp32_local_accumulation": (),
        "megatron_fsdp_main_params_dtype": torch.float32,
    },
}
"""What 0.19.2 has and 0.16.1 hasn't, by Core's class, with the defaults."""

_OLDER: dict[str, dict[str, Any]] = {
    "TransformerConfig": {
        "moe_extended_tp": False,
        "async_tensor_model_parallel_allreduce": True,
        "moe_use_legacy_grouped_gemm": False,
    },
    "OptimizerConfig": {"muon_use_nesterov": False},
    "DistributedDataParallelConfig": {"preserve_fp32_weights": True},
}
"""What 0.16.1 has and 0.19.2 hasn't."""


@dataclass(frozen=True)
class OtherCoreOption:
    """An option that the installed Core lacks."""

    name: str
    default: Any
    version: str
    """A version that has it."""

    def is_asked_for(self, value: Any) -> bool:
        """Whether a value asks for anything: it isn't the default there."""
        if isinstance(value, list | tuple) and isinstance(self.default, tuple):
            return tuple(value) != self.default
        if isinstance(value, bool) != isinstance(self.default, bool):
            return True
        return value is not self.default and value != self.default

    def refusal(self, owner: str) -> str:
        """One line on a value that can't be had."""
        installed = importlib.metadata.version("megatron-core")
        return (
            f"{owner} has no option {self.name} on megatron-core {installed}: {self.version} has it; leave it out, or "
            f"install a version that has it"
        )


def option_of_another_core(cls: type, name: str) -> OtherCoreOption | None:
    """The option of that name that another Core's version of a class has; None: this one has it, or none has."""
    if name in getattr(cls, "__dataclass_fields__", {}) or hasattr(cls, name):
        return None
    for base in cls.__mro__:
        if not base.__module__.startswith("megatron.core."):
            continue
        for options, version in ((_NEWER, "0.19.2"), (_OLDER, "0.16.1")):
            known = options.get(base.__name__, {})
            if name in known:
                return OtherCoreOption(name, known[name], version)
    return None
