# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Configurations that work, as overrides of the small one."""

OFFLOAD = ("optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=1.0")
AWARE = "optimizer.use_precision_aware_optimizer=true"
OVERLAPPED = (
    *OFFLOAD,
    "optimizer.overlap_cpu_optimizer_d2h_h2d=true",
    "optimizer.overlap_cpu_optimizer_step=true",
)

GOOD = {
    "plain": ((), 1),
    "two ranks": ((), 2),
    "batch from the ranks": (("train.global_batch_size=null",), 4),
    "offload": (("mixed_precision=bf16_mixed", *OFFLOAD), 2),
    "half offload, overlapped": (
        ("mixed_precision=bf16_mixed", OFFLOAD[0], "optimizer.optimizer_offload_fraction=0.5")
        + ("optimizer.overlap_cpu_optimizer_d2h_h2d=true",),
        2,
    ),
    "offload, overlapped with the forward pass": (("mixed_precision=bf16_mixed", *OVERLAPPED), 2),
    "state in BF16 on the host": (
        ("mixed_precision=bf16_mixed", *OVERLAPPED, AWARE, "optimizer.adam_beta2=0.98")
        + ("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16", "optimizer.main_grads_dtype=bf16")
        + ("optimizer.optimizer_split_masters=true",),
        2,
    ),
    "offload of nothing": ((OFFLOAD[0],), 1),
    "offload of SGD": ((*OFFLOAD, "optimizer.optimizer=sgd", "checkpoint.save_optim=false"), 1),
    "fp16": (("mixed_precision=fp16_mixed",), 1),
    "tensor and sequence parallel": (("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"), 2),
    "context parallel": (("model.context_parallel_size=2", "model.cp_comm_type=a2a"), 4),
    "context parallel, packed": (
        ("model.context_parallel_size=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
        + ("dataset.packed_sequence_specs={packed_sequence_size: 32, pad_seq_to_mult: 8}",),
        4,
    ),
    "context parallel under a window": (
        ("model.context_parallel_size=2", "model.window_size=[7,0]", "model.cp_comm_type=all_gather"),
        2,
    ),
    "context parallel on two levels": (
        ("model.context_parallel_size=4", "model.cp_comm_type=a2a+p2p")
        + ("model.hierarchical_context_parallel_sizes=[2,2]",),
        4,
    ),
    "more tensor parallel ranks than groups": (("model.tensor_model_parallel_size=8",), 8),
    "padded vocabulary": (
        ("model.tensor_model_parallel_size=2", "model.vocab_size=97", "model.should_pad_vocab=true"),
        2,
    ),
    "pipeline": (("model.pipeline_model_parallel_size=2", "mixed_precision=bf16_mixed"), 2),
    "uneven pipeline": (
        ("model.pipeline_model_parallel_size=2", "model.num_layers=5", "model.num_layers_in_first_pipeline_stage=2")
        + ("mixed_precision=bf16_mixed",),
        2,
    ),
    "virtual pipeline": (
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2")
        + ("model.overlap_p2p_comm=true", "model.batch_p2p_comm=false", "mixed_precision=bf16_mixed"),
        2,
    ),
    "counted in samples": (
        ("train.train_iters=null", "train.train_samples=160", "scheduler.lr_warmup_iters=0")
        + ("scheduler.lr_warmup_samples=16",),
        1,
    ),
    "WSD": (("scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=5"), 1),
    "growing weight decay": (
        ("scheduler.start_weight_decay=0.0", "scheduler.end_weight_decay=0.1")
        + ("scheduler.weight_decay_incr_style=linear",),
        1,
    ),
    "full recomputation": (
        ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"),
        1,
    ),
    "overlap": (("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"), 2),
    "evaluation only": (("validation.skip_train=true", "train.train_iters=0"), 1),
    "experts on tensor-parallel ranks": (
        ("model.num_moe_experts=4", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
        + ("model.moe_ffn_hidden_size=32", "model.moe_router_load_balancing_type=sinkhorn"),
        2,
    ),
    "a communication overlap that is all off": (("comm_overlap={tp_comm_overlap: false}",), 1),
}
"""Overrides and ranks."""
