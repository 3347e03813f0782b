# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""At least one configuration for each rule that it refuses."""

from tests.unit_tests.training.config.working_configs import AWARE, OFFLOAD, OVERLAPPED

SPLIT = "optimizer.optimizer_split_masters=true"
IN_FP32 = "ddp.grad_reduce_in_fp32=true"
AUTO = ["optimizer.optimizer_offload_fraction=auto"]

BAD = {
    "check_numbers_are_finite": [
        (["optimizer.lr=nan"], 1, "optimizer.lr=nan: expected a finite number"),
        (["optimizer.clip_grad=nan"], 1, "optimizer.clip_grad=nan"),
        (["optimizer.lr=.inf"], 1, "optimizer.lr=inf"),
        (["model.layernorm_epsilon=nan"], 1, "model.layernorm_epsilon=nan"),
    ],
    "check_paths_are_not_empty": [
        ([f"{option}="], 1, f"{option} is empty: set a text, or null")
        for option in ("checkpoint.save", "checkpoint.load", "logger.tensorboard_dir", "dataset.path_to_cache")
    ],
    "check_optimizer_numbers_are_in_range": [
        (["optimizer.clip_grad=-1"], 1, "optimizer.clip_grad is -1.0: set 0 to clip nothing"),
        (["optimizer.adam_beta1=1.0"], 1, "optimizer.adam_beta1 is 1.0"),
        (["optimizer.adam_beta2=-0.1"], 1, "optimizer.adam_beta2 is -0.1"),
        (["optimizer.adam_eps=-1e-8"], 1, "optimizer.adam_eps is -1e-08"),
    ],
    "check_router_losses_have_weights": [
        (["model.num_moe_experts=4", "model.moe_aux_loss_coeff=[0.1,0.2]"], 1, "expected one coefficient for each"),
        (["model.num_moe_experts=4", "model.moe_aux_loss_coeff=-0.1"], 1, "model.moe_aux_loss_coeff=-0.1: it can't"),
        (["model.num_moe_experts=4", "model.moe_z_loss_coeff=-1"], 1, "model.moe_z_loss_coeff=-1.0: it can't"),
        (["model.moe_aux_loss_coeff=0.1"], 1, "model.moe_aux_loss_coeff=0.1 in a model without experts"),
        (["model.moe_z_loss_coeff=0.1"], 1, "model.moe_z_loss_coeff=0.1 in a model without experts"),
    ],
    "check_adapters_leave_router_biases": [
        (
            [
                "model.num_moe_experts=4",
                "model.moe_router_enable_expert_bias=true",
                "peft={_target_: megatron.bridge.peft.lora.LoRA}",
            ],
            1,
            "model.moe_router_bias_update_rate=0.001 with adapters",
        ),
    ],
    "check_latent_attention_has_its_sizes": [
        (["model.multi_latent_attention=true"], 1, "model.multi_latent_attention=True in a "),
    ],
    "check_model_has_a_size": [(["model.num_layers=0"], 1, "model.num_layers is not set")],
    "check_parallel_sizes_are_positive": [
        (["model.pipeline_model_parallel_size=0"], 1, "model.pipeline_model_parallel_size is 0"),
        (["model.expert_tensor_parallel_size=0"], 1, "model.expert_tensor_parallel_size is 0"),
        (["model.virtual_pipeline_model_parallel_size=0"], 1, "virtual_pipeline_model_parallel_size is 0: it counts"),
    ],
    "check_parallel_sizes_divide_world": [
        (["model.tensor_model_parallel_size=2"], 3, "3 ranks can't be shared by model.tensor_model_parallel_size=2")
    ],
    "check_tensor_parallel_divides_heads": [
        (["model.tensor_model_parallel_size=3"], 3, "set model.tensor_model_parallel_size to one of [1, 2, 4, 8]")
    ],
    "check_query_groups_fit": [
        (["model.num_query_groups=3"], 1, "model.num_query_groups=3 doesn't divide model.num_attention_heads=8"),
        (
            ["model.num_attention_heads=12", "model.num_query_groups=6", "model.tensor_model_parallel_size=4"],
            4,
            "one must divide the other",
        ),
    ],
    "check_tensor_parallel_divides_ffn": [
        (
            ["model.tensor_model_parallel_size=2", "model.ffn_hidden_size=129"],
            2,
            "doesn't divide model.ffn_hidden_size=129",
        )
    ],
    "check_tensor_parallel_divides_vocabulary": [
        (["model.tensor_model_parallel_size=2", "model.vocab_size=97"], 2, "set model.should_pad_vocab=true")
    ],
    "check_pipeline_parallel_divides_layers": [
        (["model.pipeline_model_parallel_size=3"], 3, "model.num_layers=4 can't be shared"),
        (
            ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=3"],
            2,
            "expected a multiple of 6",
        ),
    ],
    "check_two_virtual_stages_keep_messages_apart": [
        (
            ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2", *overlap],
            2,
            "set model.overlap_p2p_comm=true and model.batch_p2p_comm=false",
        )
        for overlap in ([], ["model.overlap_p2p_comm=true"], ["model.batch_p2p_comm=false"])
    ],
    "check_context_parallel_divides_rows": [
        (
            ["model.context_parallel_size=2", "model.seq_length=34", "dataset.seq_length=34"],
            2,
            "expected a multiple of 2 x context_parallel_size = 4",
        ),
        (
            [
                "model.context_parallel_size=2",
                "model.tensor_model_parallel_size=4",
                "model.sequence_parallel=true",
                "model.seq_length=40",
                "dataset.seq_length=40",
            ],
            8,
            "expected a multiple of 2 x context_parallel_size x tensor_model_parallel_size = 16",
        ),
    ],
    "check_context_parallel_divides_packed_samples": [
        (
            ["model.context_parallel_size=2", "dataset.enable_offline_packing=true"],
            2,
            "set dataset.offline_packing_specs.pad_seq_to_mult=4",
        ),
        (
            [
                "model.context_parallel_size=2",
                "model.tensor_model_parallel_size=2",
                "model.sequence_parallel=true",
                "dataset.packed_sequence_specs={packed_sequence_size: 32, pad_seq_to_mult: 12}",
            ],
            4,
            "multiple of 2 x context_parallel_size x tensor_model_parallel_size = 8; set "
            "dataset.packed_sequence_specs.pad_seq_to_mult=24",
        ),
    ],
    "check_exchange_suits_the_attention": [
        (["model.context_parallel_size=2", "model.cp_comm_type=ring"], 2, "'ring' isn't known; set one of p2p, all_"),
        (["model.context_parallel_size=2", "model.cp_comm_type=[p2p]"], 2, "one for each of model.num_layers=4"),
        (["model.context_parallel_size=2", "model.window_size=[7,0]"], 2, "set model.cp_comm_type=all_gather"),
        (
            ["model.context_parallel_size=2", "model.softmax_type=learnable", "model.cp_comm_type=all_gather"],
            2,
            "under attention sinks by a2a alone; set model.cp_comm_type=a2a",
        ),
    ],
    "check_heads_are_shared_evenly": [
        (
            ["model.context_parallel_size=8", "model.cp_comm_type=a2a", "model.num_query_groups=4"],
            8,
            "model.cp_comm_type=a2a with model.num_query_groups=4: expected a multiple of",
        ),
        (
            [
                "model.context_parallel_size=6",
                "model.cp_comm_type=a2a+p2p",
                "model.hierarchical_context_parallel_sizes=[3,2]",
                "model.seq_length=48",
                "dataset.seq_length=48",
            ],
            6,
            "model.cp_comm_type=a2a+p2p with model.num_attention_heads=8",
        ),
    ],
    "check_hierarchy_makes_up_context_parallelism": [
        (["model.context_parallel_size=4", "model.cp_comm_type=a2a+p2p"], 4, "sizes=None with model.context_"),
        (
            ["model.context_parallel_size=4", "model.cp_comm_type=a2a+p2p"]
            + ["model.hierarchical_context_parallel_sizes=[2,4]"],
            4,
            "two sizes that multiply to the context parallel size",
        ),
        (["model.hierarchical_context_parallel_sizes=[2,2]"], 1, "set both options, or neither"),
    ],
    "check_sequence_parallel_needs_tensor_parallel": [
        (["model.sequence_parallel=true"], 1, "model.sequence_parallel=true with model.tensor_model_parallel_size=1"),
        (
            ["model.sequence_parallel=true", "model.tensor_model_parallel_size=2", "model.seq_length=33"],
            2,
            "expected a multiple of model.tensor_model_parallel_size=2",
        ),
    ],
    "check_experts_are_shared_evenly": [
        (["model.expert_model_parallel_size=2"], 2, "with model.num_moe_experts=None"),
        (["model.expert_model_parallel_size=4", "model.num_moe_experts=4"], 2, "2 ranks can't be shared"),
    ],
    "check_experts_train_with_sequence_parallelism": [
        (["model.num_moe_experts=4", "model.tensor_model_parallel_size=2"], 2, "set model.sequence_parallel=true"),
    ],
    "check_router_suits_its_balancing": [
        (
            ["model.num_moe_experts=4", "model.moe_aux_loss_coeff=0.1", f"model.moe_router_load_balancing_type={kind}"],
            1,
            "it balances without a loss; set model.moe_aux_loss_coeff=0",
        )
        for kind in ("sinkhorn", "quantile_balancing")
    ]
    + [
        (
            ["model.num_moe_experts=4", "model.moe_router_load_balancing_type=[aux_loss,sinkhorn]"]
            + ["model.moe_aux_loss_coeff=[0.1,0.0]"],
            1,
            "Core leaves it out of a list of losses without a word",
        ),
    ],
    "check_tokens_have_enough_experts": [
        (["model.num_moe_experts=4", "model.moe_router_topk=5"], 1, "model.moe_router_topk=5 with model.num_moe_exp"),
        (
            ["model.num_moe_experts=4", "model.moe_router_num_groups=3", "model.moe_router_group_topk=2"],
            1,
            "model.moe_router_num_groups=3 doesn't div",
        ),
        (
            ["model.num_moe_experts=4", "model.moe_router_num_groups=4", "model.moe_router_group_topk=1"],
            1,
            "model.moe_router_topk=2 with 1 of 4 groups of 1 experts",
        ),
    ],
    "check_weights_on_experts_inputs_are_whole": [
        (["model.num_moe_experts=4", "model.moe_apply_probs_on_input=true"], 1, "set model.moe_apply_probs_on_input=f"),
    ],
    "check_padded_experts_fit_the_tokens": [
        (
            ["model.num_moe_experts=4", "model.moe_expert_capacity_factor=2.5"]
            + ["model.moe_pad_expert_input_to_capacity=true"],
            1,
            "which Core can't pad; lower it to 2 or less",
        ),
    ],
    "check_recomputation_is_complete": [
        (["model.recompute_granularity=full"], 1, "set model.recompute_method=uniform"),
        (
            ["model.recompute_granularity=selective", "model.recompute_num_layers=2"],
            1,
            "model.recompute_num_layers=2 with model.recompute_granularity=selective",
        ),
        (
            [
                "model.distribute_saved_activations=true",
                "model.sequence_parallel=true",
                "model.tensor_model_parallel_size=2",
            ],
            2,
            "set model.distribute_saved_activations=false",
        ),
    ],
    "check_activation_offload_stands_alone": [
        (
            ["model.cpu_offloading=true", "model.pipeline_model_parallel_size=2"],
            2,
            "model.cpu_offloading=true with model.pipeline_model_parallel_size=2",
        ),
        (
            [
                "model.cpu_offloading=true",
                "model.recompute_granularity=full",
                "model.recompute_method=uniform",
                "model.recompute_num_layers=1",
            ],
            1,
            "model.cpu_offloading=true with model.recompute_granularity=full",
        ),
    ],
    "check_tensor_parallel_overlap_can_run": [(["model.tp_comm_overlap=true"], 1, "model.tp_comm_overlap=true")],
    "check_global_batch_is_divisible": [
        (["train.global_batch_size=9"], 1, "train.global_batch_size=9 is no multiple of train.micro_batch_size=2"),
        ([], 3, "data-parallel size 3 = 6"),
    ],
    "check_evaluation_batch_is_divisible": [
        (["validation.eval_global_batch_size=3"], 1, "validation.eval_global_batch_size=3 is no multiple of")
    ],
    "check_virtual_pipeline_fits": [
        (["model.virtual_pipeline_model_parallel_size=2"], 1, "virtual stages cut real ones"),
        (
            [
                "model.pipeline_model_parallel_size=2",
                "model.virtual_pipeline_model_parallel_size=2",
                "train.global_batch_size=6",
            ],
            2,
            "3 micro-batches in a step",
        ),
    ],
    "check_sequence_lengths_agree": [
        (["dataset.seq_length=16"], 1, "dataset.seq_length=16 and model.seq_length=32: they must agree")
    ],
    "check_offload_fraction_is_a_part": [
        (["optimizer.optimizer_offload_fraction=1.5"], 1, "optimizer.optimizer_offload_fraction is 1.5"),
        (["optimizer.optimizer_offload_fraction=-0.1"], 1, "set 0 to 1"),
        (["optimizer.optimizer_offload_fraction=.nan"], 1, "optimizer.optimizer_offload_fraction is nan"),
        (["optimizer.optimizer_offload_fraction=half"], 1, "is 'half': set 0 to 1, or auto"),
    ],
    "check_auto_has_a_choice": [
        (["optimizer.optimizer_offload_fraction=auto"], 1, "without optimizer.optimizer_cpu_offload=true"),
        ([*OFFLOAD, "optimizer.optimizer_device_memory_gib=0"], 1, "it must be above 0"),
        ([*OFFLOAD, *AUTO, "optimizer.optimizer=sgd"], 1, "only Adam is planned"),
        ([*OFFLOAD, *AUTO, "optimizer.optimizer_streamed_fraction=0.5"], 1, "auto chooses both"),
    ],
    "check_host_threads_have_work": [
        (["optimizer.optimizer_cpu_num_threads=2"], 1, "without optimizer.optimizer_cpu_offload=true"),
        ([*OFFLOAD, "optimizer.optimizer_cpu_num_threads=0"], 1, "it must be at least 1"),
    ],
    "check_streamed_state_is_offloaded": [
        ([*OFFLOAD, "optimizer.optimizer_streamed_fraction=1.5"], 1, "set 0 to 1"),
        ([*OFFLOAD, "optimizer.optimizer_streamed_fraction=.nan"], 1, "optimizer.optimizer_streamed_fraction=nan"),
        (["optimizer.optimizer_streamed_fraction=1"], 1, "without optimizer.optimizer_cpu_offload=true"),
        ([*OFFLOAD, "optimizer.optimizer_streamed_fraction=1", "optimizer.optimizer=sgd"], 1, "only Adam's state"),
    ],
    "check_overlapped_steps_can_run": [
        (["optimizer.overlap_cpu_optimizer_step=true"], 1, "nothing is offloaded"),
        ([*OFFLOAD[:1], "optimizer.overlap_cpu_optimizer_step=true"], 1, "optimizer_offload_fraction above 0"),
        ([*OFFLOAD, "optimizer.overlap_cpu_optimizer_step=true"], 1, "set optimizer.overlap_cpu_optimizer_d2h_h2d"),
        ([*OVERLAPPED, "optimizer.optimizer=sgd", "checkpoint.save_optim=false"], 1, "only adam steps so"),
        ([*OVERLAPPED, "optimizer.optimizer_streamed_fraction=1"], 1, "optimizer_streamed_fraction=1"),
        ([*OVERLAPPED, "model.cuda_graph_impl=local"], 1, "with CUDA graphs: a graph can't wait for the host"),
    ],
    "check_offload_has_distributed_optimizer": [
        (
            [*OFFLOAD, "optimizer.use_distributed_optimizer=false", "ddp.use_distributed_optimizer=false"],
            1,
            "optimizer.optimizer_cpu_offload=true without the distributed optimizer",
        ),
        ([*OFFLOAD, "ddp.use_distributed_optimizer=false"], 1, "set optimizer.use_distributed_optimizer=true"),
    ],
    "check_offload_has_no_fp8_weights": [
        ([*OFFLOAD, "model.fp8=hybrid", "model.fp8_recipe=tensorwise", "model.fp8_param=true"], 1, "recipe tensorwise"),
        (
            [*OFFLOAD, "model.fp8=e4m3", "model.fp8_recipe=mxfp8", "ddp.fp8_param_gather=true"],
            1,
            "ddp.fp8_param_gather=false",
        ),
        ([*OFFLOAD, "model.fp8=e4m3", "model.fp8_recipe=blockwise", "model.fp8_param=true"], 1, "recipe blockwise"),
        ([*OFFLOAD, "model.fp4=e2m1", "model.fp4_param=true"], 1, "recipe nvfp4"),
    ],
    "check_offload_has_no_fsdp": [
        ([*OFFLOAD, "ddp.use_megatron_fsdp=true"], 1, "set ddp.use_megatron_fsdp=false"),
        ([*OFFLOAD, "dist.use_megatron_fsdp=true"], 1, "set dist.use_megatron_fsdp=false"),
        ([*OFFLOAD, "dist.use_torch_fsdp2=true"], 1, "set dist.use_torch_fsdp2=false"),
    ],
    "check_offload_knows_the_optimizer": [
        ([*OFFLOAD, "optimizer.optimizer=muon"], 1, "only adam and sgd can be offloaded"),
    ],
    "check_sgd_is_not_distributed": [
        (
            [*OFFLOAD, "optimizer.optimizer=sgd", "checkpoint.save=saved"],
            1,
            "the state of an offloaded SGD can't be saved; set checkpoint.save_optim=false",
        ),
        (["optimizer.optimizer=sgd"], 1, "sgd with the distributed optimizer, which is Adam's alone: set "),
    ],
    "check_offload_decouples_weight_decay": [
        ([*OFFLOAD, "optimizer.decoupled_weight_decay=false"], 1, "set optimizer.decoupled_weight_decay=true")
    ],
    "check_offload_can_store_the_formats": [
        ([*OFFLOAD, AWARE, "optimizer.exp_avg_dtype=uint8"], 1, "set optimizer.exp_avg_dtype=bfloat16 or float32"),
        ([*OFFLOAD, AWARE, "optimizer.exp_avg_sq_dtype=fp16"], 1, "FP16 has no room for small moments"),
        ([*OFFLOAD, AWARE, "optimizer.main_params_dtype=float16"], 1, "set optimizer.main_params_dtype=float32"),
        ([OFFLOAD[0], AWARE, "optimizer.main_grads_dtype=bf16"], 1, "nothing is on the host"),
        (
            [*OFFLOAD, AWARE, "optimizer.exp_avg_dtype=bf16", "optimizer.optimizer_streamed_fraction=0.5"],
            1,
            "the device steps on FP32 state alone",
        ),
        (
            [OFFLOAD[0], AWARE, "optimizer.exp_avg_dtype=bf16", "optimizer.optimizer_offload_fraction=auto"],
            1,
            "it places FP32 state alone",
        ),
    ],
    "check_masters_can_be_split": [
        ([SPLIT], 1, "without optimizer.optimizer_cpu_offload=true: no master is on the host"),
        ([OFFLOAD[0], AWARE, SPLIT], 1, "optimizer.optimizer_offload_fraction=0.0: no master is on the host"),
        (
            [OFFLOAD[0], AWARE, SPLIT, *AUTO],
            1,
            "it places FP32 state alone; set optimizer.optimizer_split",
        ),
        ([*OFFLOAD, SPLIT], 1, "set optimizer.use_precision_aware_optimizer=true; or set optimizer.optimizer_split"),
        ([*OFFLOAD, AWARE, SPLIT, "optimizer.optimizer_streamed_fraction=1"], 1, "the device steps on FP32 state"),
        ([*OFFLOAD, AWARE, SPLIT, "mixed_precision=fp16_mixed", IN_FP32], 1, "only BF16 has the exponent of FP32"),
    ],
    "check_stored_moments_can_change": [
        ([*OFFLOAD, AWARE, "optimizer.exp_avg_sq_dtype=bf16"], 1, "set optimizer.adam_beta2 to 0.996 at most"),
        (
            [*OFFLOAD, AWARE, "optimizer.exp_avg_dtype=bf16", "optimizer.adam_beta1=0.999"],
            1,
            "optimizer.adam_beta1=0.999: a step changes a moment by 0.001 of its value, which BF16 rounds away",
        ),
    ],
    "check_optimizer_is_known": [(["optimizer.optimizer=muon"], 1, "optimizer.optimizer=muon is not built yet")],
    "check_precision_aware_mode_can_run": [
        (
            ["optimizer.use_precision_aware_optimizer=true", "optimizer.optimizer=sgd"],
            1,
            "set optimizer.optimizer=adam",
        ),
        (
            ["optimizer.use_precision_aware_optimizer=true", "optimizer.use_distributed_optimizer=false"],
            1,
            "without the distributed optimizer",
        ),
    ],
    "check_precision_aware_mode_clips_fp32_gradients": [
        (
            [*OFFLOAD, "optimizer.use_precision_aware_optimizer=true", "model.fp16=true", "optimizer.fp16=true"],
            1,
            "set ddp.grad_reduce_in_fp32=true or optimizer.clip_grad=0",
        )
    ],
    "check_state_dtypes_need_precision_aware_mode": [
        (["optimizer.exp_avg_dtype=bf16"], 1, "or optimizer.use_precision_aware_optimizer=true"),
        ([*OFFLOAD, "optimizer.main_grads_dtype=bf16"], 1, "without precision-aware mode: only float32 works"),
    ],
    "check_fp8_has_transformer_engine": [
        (["model.fp8_param=true"], 1, "model.fp8_param=true with model.fp8=null"),
        (["model.fp4_param=true"], 1, "model.fp4_param=true with model.fp4=null"),
    ],
    "check_model_and_optimizer_agree_on_precision": [
        (["model.bf16=true"], 1, "set mixed_precision=bf16_mixed"),
        (["model.bf16=true", "model.fp16=true"], 1, "weights have one format"),
    ],
    "check_ddp_and_optimizer_agree": [
        (["ddp.use_distributed_optimizer=false"], 1, "ddp.use_distributed_optimizer=False and optimizer.")
    ],
    "check_overlaps_can_run": [
        (
            [
                "ddp.overlap_param_gather=true",
                "ddp.use_distributed_optimizer=false",
                "optimizer.use_distributed_optimizer=false",
            ],
            1,
            "which has nothing to gather",
        ),
        (["ddp.overlap_param_gather=true"], 1, "set ddp.overlap_grad_reduce=true"),
        (["ddp.align_param_gather=true"], 1, "there is nothing to align"),
        (
            ["ddp.average_in_collective=true", "model.calculate_per_token_loss=true"],
            1,
            "set ddp.average_in_collective=false",
        ),
    ],
    "check_schedule_counts_as_the_run_does": [
        (["scheduler.lr_decay_samples=10"], 1, "set scheduler.lr_decay_iters instead"),
        (["train.train_iters=null", "train.train_samples=80"], 1, "set scheduler.lr_warmup_samples instead"),
    ],
    "check_schedule_fits_the_run": [
        (["train.train_iters=0"], 1, "a run takes at least one step"),
        (
            ["scheduler.lr_warmup_iters=20"],
            1,
            "scheduler.lr_warmup_iters=20 but the learning rate decays over 20 iters",
        ),
        (["scheduler.lr_decay_style=WSD"], 1, "without scheduler.lr_wsd_decay_iters"),
        (["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=30"], 1, "is longer than"),
    ],
    "check_learning_rates_are_ordered": [
        (["optimizer.lr=null"], 1, "optimizer.lr is not set"),
        (["optimizer.lr=-1.0"], 1, "optimizer.lr is -1.0"),
        (["optimizer.min_lr=0.1"], 1, "optimizer.min_lr=0.1 with optimizer.lr=0.0001"),
        (["scheduler.lr_warmup_init=0.1"], 1, "scheduler.lr_warmup_init=0.1 with optimizer.lr=0.0001"),
    ],
    "check_weight_decay_grows": [
        (["scheduler.start_weight_decay=0.0"], 1, "equal values with weight_decay_incr_style=constant"),
        (
            ["scheduler.start_weight_decay=0.1", "scheduler.weight_decay_incr_style=linear"],
            1,
            "expected 0 <= start <= end",
        ),
    ],
    "check_options_are_built": [
        (["checkpoint.replication=true"], 1, "checkpoint.replication=true is not built yet"),
        (
            ["checkpoint.non_persistent_ckpt_type=in_memory"],
            1,
            "checkpoint.non_persistent_ckpt_type=in_memory is not built yet: set it to local or global",
        ),
    ],
    "check_pretrained_checkpoint_exists": [
        (
            ["checkpoint.pretrained_checkpoint=no/such/dir"],
            1,
            "checkpoint.pretrained_checkpoint=no/such/dir: there is no",
        )
    ],
    "check_progress_has_a_place": [
        (["logger.log_progress=true", "checkpoint.save=null"], 1, "logger.log_progress=true without checkpoint.save"),
    ],
    "check_profiles_have_a_place": [
        (
            ["profiling={use_pytorch_profiler: true}", "logger.tensorboard_dir=null"],
            1,
            "profiling.use_pytorch_profiler=true needs logger.tensorboard_dir: set it",
        ),
        (
            ["profiling={use_pytorch_profiler: true, profile_ranks: [0, 2]}", "logger.tensorboard_dir=logs"],
            2,
            "profiling.profile_ranks holds 2: the run has ranks 0 to 1",
        ),
    ],
    "check_peft": [
        (["peft={dim: 8}"], 1, "peft={'dim': 8} is a dict: expected adapters, such as"),
        (["peft={_target_: megatron.bridge.peft.lora.LoRA}"], 1, "peft is set without checkpoint.pretrained"),
    ],
    "check_non_persistent_checkpoints_have_a_place": [
        (
            ["checkpoint.non_persistent_save_interval=2"],
            1,
            "checkpoint.non_persistent_save_interval=2 with checkpoint.non_persistent_ckpt_type=null: "
            "set checkpoint.non_persistent_ckpt_type=local or global",
        ),
        (
            ["checkpoint.non_persistent_ckpt_type=global", "checkpoint.non_persistent_local_ckpt_dir=run"],
            1,
            "set checkpoint.non_persistent_ckpt_type=local, or leave it unset",
        ),
        (
            ["checkpoint.non_persistent_global_ckpt_dir=run"],
            1,
            "set checkpoint.non_persistent_ckpt_type=global, or leave it unset",
        ),
        (["checkpoint.non_persistent_ckpt_type=local"], 1, "without checkpoint.non_persistent_local_ckpt_dir: set it"),
        (
            ["checkpoint.non_persistent_ckpt_type=global", "checkpoint.save=null"],
            1,
            "with neither checkpoint.save nor checkpoint.non_persistent_global_ckpt_dir",
        ),
        (
            ["checkpoint.non_persistent_ckpt_type=global", "checkpoint.save=run"]
            + ["checkpoint.non_persistent_global_ckpt_dir=a/../run"],
            1,
            "is checkpoint.save too, whose iterations would be removed",
        ),
    ],
    "check_exchange_suits_the_backend": [
        (
            [
                "checkpoint.fully_parallel_load=true",
                "checkpoint.ckpt_fully_parallel_load_exchange_algo=gather_rounds",
                "dist.distributed_backend=gloo",
            ],
            1,
            "gather_rounds over gloo",
        )
    ],
    "check_background_writer_is_a_thread": [
        (
            ["checkpoint.async_save=true", "checkpoint.save=run", "checkpoint.async_ckpt_use_cpu_shm=true"],
            1,
            "checkpoint.async_ckpt_use_cpu_shm=True with checkpoint.async_save=true: a thread of each rank writes",
        ),
        (
            ["checkpoint.async_save=true", "checkpoint.save=run", "checkpoint.use_persistent_ckpt_worker=false"],
            1,
            "checkpoint.use_persistent_ckpt_worker=False with checkpoint.async_save=true: a thread",
        ),
    ],
}
"""By rule: overrides that break it, ranks, what the error must contain."""
