# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of how a run stops, restarts and hangs."""

from tests.mutants.changes import condition, expression, returning, value, without_call, without_operand
from tests.mutants.rows.mutant import Mutant

_PREEMPTION = "tests/functional_tests/test_preemption.py::test_"
_HANG = "tests/functional_tests/test_hang.py::test_"
_QUEUE = "tests/unit_tests/training/monitoring/test_metrics_queue.py::test_"
_FINITE = "tests/functional_tests/test_finite_steps.py::test_"

RUNS = (
    Mutant(
        name="a signal of one rank",
        breaks="the rank that got it stops alone",
        where="megatron.bridge.training.monitoring.preemption:ExitSignal.has_arrived_anywhere",
        change=without_call("all_reduce"),
        tests=(f"{_PREEMPTION}a_run_stopped_again_and_again_ends_as_the_uninterrupted_one",),
    ),
    Mutant(
        name="a stop without its code",
        breaks="a run that must be resumed looks like one that is done",
        where="megatron.bridge.training.train:run_training",
        change=without_call("Preempted"),
        tests=(f"{_PREEMPTION}a_run_stopped_again_and_again_ends_as_the_uninterrupted_one",),
    ),
    Mutant(
        name="a restart among the dead",
        breaks="the ranks of a restart look for those of the start before",
        where="megatron.bridge.utils.rendezvous:store_of_this_start",
        change=without_operand("word"),
        tests=("tests/unit_tests/utils/test_rendezvous.py::test_ranks_of_a_start_meet_behind_one_that_is_over",),
    ),
    Mutant(
        name="steps to skip counted from 0",
        breaks="the step that the log shows as bad is trained, and a good one is not",
        where="megatron.bridge.training.train:_take_step",
        change=without_operand("1"),
        tests=(
            "tests/functional_tests/test_what_a_step_says.py::test_steps_are_skipped_by_the_numbers_that_the_log_shows",
        ),
    ),
    Mutant(
        name="a gradient of NaN is stepped on",
        breaks="all weights become NaN",
        where="megatron.bridge.core_repairs.finite_gradients:_finite_gradient_norm.FiniteGradientNorm.get_grad_norm",
        change=condition("isfinite"),
        tests=(f"{_FINITE}a_gradient_that_is_not_a_number_ends_the_run_before_the_step[precision-aware]",),
    ),
    Mutant(
        name="a loss of NaN on one rank",
        breaks="that rank ends alone, or nobody does",
        where="megatron.bridge.training.micro_batches:run_micro_batches",
        change=condition("checked_as"),
        tests=(f"{_FINITE}so_does_one_of_an_evaluation",),
    ),
    Mutant(
        name="weights of NaN are saved",
        breaks="the last good checkpoint is removed for one that can't be trained on",
        where="megatron.bridge.training.checkpointing:save_checkpoint",
        change=without_call("check_weights_are_finite"),
        tests=(f"{_FINITE}weights_that_are_not_numbers_are_not_saved",),
    ),
    Mutant(
        name="nobody watches",
        breaks="a rank that is stuck never ends and never says where",
        where="megatron.bridge.training.monitoring.hang_watchdog:HangWatchdog.start",
        change=condition("_thread"),
        tests=(f"{_HANG}a_rank_that_hangs_and_the_one_that_waits_for_it_show_their_stacks_and_end",),
    ),
    Mutant(
        name="workers die at the signal",
        breaks="the last step before the save has no batch",
        where="megatron.bridge.data.loaders:_load_steps",
        change=value("worker_init_fn", "None"),
        tests=("tests/unit_tests/data/test_loaders.py::test_a_worker_lives_on_at_a_signal_that_the_run_catches",),
    ),
    Mutant(
        name="a parameter counted twice",
        breaks="the summary's number of parameters grows with tensor parallelism",
        where="megatron.bridge.training.monitoring.whole_model:is_counted_here",
        change=without_operand("param_is_not_tensor_parallel_duplicate"),
        tests=("tests/functional_tests/test_run_report.py::test_each_parameter_is_counted_once_in_every_layout",),
    ),
    Mutant(
        name="an expert's parameter counted on each of its tensor-parallel ranks",
        breaks="figures of adapters beside experts grow with expert tensor parallelism",
        where="megatron.bridge.training.monitoring.whole_model:is_counted_here",
        change=expression("mpu.get_expert_tensor_parallel_rank() == 0", "True"),
        tests=(
            "tests/unit_tests/training/monitoring/test_whole_model.py::"
            "test_what_all_tensor_parallel_ranks_of_an_expert_hold_counts_on_the_first",
        ),
    ),
    Mutant(
        name="weights that nobody initialized have no mark",
        breaks="on Core 0.16 clipping counts the parts of the first tensor-parallel rank alone",
        where="megatron.bridge.models.model_provider:ModelProviderMixin.provide_distributed_model",
        change=without_call("mark_weights"),
        tests=(
            "tests/unit_tests/models/test_gpt_provider.py::"
            "test_the_gradient_norm_counts_each_ranks_part_of_a_weight_that_nothing_initialized",
        ),
    ),
    Mutant(
        name="gradients that aren't reduced",
        breaks="norms and zeros count what each rank has for the parts of others",
        where="megatron.bridge.training.monitoring.gradient_figures:_own_gradients",
        change=condition("use_distributed_optimizer", becomes="True"),
        tests=(
            "tests/functional_tests/test_step_figures.py::"
            "test_norms_and_zeros_of_gradients_are_those_of_the_whole_model_whatever_the_layout",
        ),
    ),
    Mutant(
        name="ranks don't agree on what is reported",
        breaks="a figure that is a mean on one rank and a sum on another is added up",
        where="megatron.bridge.training.monitoring.reported_losses:_agreed_forms",
        change=without_call("_two_forms"),
        tests=(
            "tests/functional_tests/test_own_losses.py::test_ranks_that_report_unlike_figures_agree_and_none_waits",
        ),
    ),
    Mutant(
        name="routers' losses add up over steps",
        breaks="the load-balancing loss grows with each step",
        where="megatron.bridge.training.train:train_step",
        change=without_call("clear_router_losses"),
        tests=("tests/functional_tests/test_router_losses.py::test_what_is_shown_is_what_the_routers_logits_give",),
    ),
    Mutant(
        name="a torn line stays",
        breaks="the metrics file of a killed run can't be read any more",
        where="megatron.bridge.training.monitoring.metrics:MetricsFile._opened",
        change=without_call("_cut_torn_line"),
        tests=(
            "tests/unit_tests/training/monitoring/test_metrics.py::"
            "test_a_resumed_file_has_the_last_line_of_each_step_and_no_torn_one",
        ),
    ),
    Mutant(
        name="configuration: mixed precision overwrites what was set",
        breaks="ddp.grad_reduce_in_fp32=false is dropped, and the run sums in FP32",
        where="megatron.bridge.training.config.precedence:apply_mixed_precision",
        change=without_call("with_values"),
        tests=("tests/unit_tests/training/config/test_precedence.py::test_a_value_set_in_a_section_counts",),
    ),
    Mutant(
        name="configuration: a section's own number format dropped",
        breaks="model.bf16=false runs in BF16",
        where="megatron.bridge.training.config.precedence:apply_mixed_precision",
        change=condition("_FORMATS"),
        tests=("tests/unit_tests/training/config/test_precedence.py::test_a_format_of_one_section_alone_is_refused",),
    ),
    Mutant(
        name="a tracker that is away ends the run",
        breaks="what a service's outage costs is all steps since the last save",
        where="megatron.bridge.training.monitoring.metrics_queue:MetricsQueue._try",
        change=expression("BaseException", "KeyError"),
        tests=(f"{_QUEUE}what_was_missed_comes_later_and_in_order[at once]",),
    ),
    Mutant(
        name="configuration: an option that nobody reads passes",
        breaks="train.manual_gc_eval changes nothing, and nothing says so",
        where="megatron.bridge.training.train:_garbage_collection_around_evaluation",
        change=without_operand("manual_gc_eval"),
        tests=(
            "tests/unit_tests/training/config/test_options_have_an_effect.py::"
            "test_an_option_is_read_or_refused_or_named_in_the_log[train-TrainingConfig-manual_gc_eval]",
        ),
    ),
    Mutant(
        name="a clean-up that fails ends the run",
        breaks="a complete checkpoint's run dies of an old one that can't be removed",
        where="megatron.bridge.utils.files:clean_up",
        change=expression("OSError", "KeyError"),
        tests=(
            "tests/unit_tests/checkpoint/test_iterations.py::test_what_cannot_be_removed_is_a_warning_and_tried_again",
        ),
    ),
    Mutant(
        name="the host's step on the process's threads",
        breaks="under torchrun Adam runs on one core, however many the machine has",
        where="megatron.bridge.training.optim:setup_optimizer",
        change=without_call("_prepare_steps_on_the_host"),
        tests=(
            "tests/functional_tests/test_options_in_a_run.py::test_an_offloaded_step_runs_with_the_threads_asked_for",
        ),
    ),
    Mutant(
        name="the threads of the step kept after it",
        breaks="all else runs with the threads of the offloaded step",
        where="megatron.bridge.offload_engine.host_threads:step_with",
        change=without_call("register_step_post_hook"),
        tests=("tests/unit_tests/offload_engine/test_host_threads.py::test_the_step_alone_has_them",),
    ),
    Mutant(
        name="norm of the weights: experts counted once a stage",
        breaks="the norm shown depends on the layout",
        where="megatron.bridge.training.monitoring.whole_model:sum_over_parameters",
        change=expression(
            "mpu.get_expert_tensor_model_pipeline_parallel_group()", "mpu.get_pipeline_model_parallel_group()"
        ),
        tests=(
            "tests/functional_tests/test_step_figures.py::test_the_norm_is_that_of_the_whole_model_whatever_the_layout",
        ),
    ),
    Mutant(
        name="configuration: a name that nobody knows is set",
        breaks="a script's typo changes nothing, and nothing says so",
        where="megatron.bridge.utils.section:_is_known",
        change=returning("True"),
        tests=("tests/unit_tests/utils/test_section.py::test_a_name_that_nobody_knows_is_refused_at_once",),
    ),
    Mutant(
        name="configuration: an option that isn't built is forgotten",
        breaks="train.rampup_batch_size=[...] trains with one batch size, and nothing says so",
        where="megatron.bridge.utils.section:unbuilt_values",
        change=returning("{}"),
        tests=(
            "tests/unit_tests/training/config/test_unsupported.py::"
            "test_an_option_that_is_not_built_is_refused_and_its_accepted_values_are_not",
        ),
    ),
)
