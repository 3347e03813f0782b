# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of a resume: repairs of Core's optimizers left out, and states that are not restored."""

from tests.mutants.changes import Change, condition, expression, value, without_call, without_element, without_operand
from tests.mutants.rows.mutant import EXPERTS, NOT_OFFLOADED, OFFLOADED, RESHARDED, RESUME, Mutant

_FROZEN = "tests/functional_tests/test_frozen_weights.py::test_"
_REPAIRED = "tests/functional_tests/test_repairs.py::test_"
_FINITE = "tests/functional_tests/test_finite_steps.py::test_"
_PLAIN = "tests/functional_tests/test_plain_resume.py::test_"
_DEVICE = "tests/functional_tests/test_device_step.py::test_"
_RANDOM = "tests/unit_tests/training/run_state/test_rng.py::test_"
_COUNTS = f"{_DEVICE}a_device_optimizer_that_counts_in_its_groups_counts_on"


def _without(repair: str, file: str, *tests: str, kept: str = "") -> Mutant:
    """A repair left out; `kept` is what of its file stays in."""
    repairs = f"{file}.REPAIRS"
    return Mutant(
        name=f"without {repair}",
        breaks=f"Core's defect is back: {repair}",
        where="megatron.bridge.core_repairs.install:REPAIRS",
        change=expression(repairs, f"{repairs}{kept}") if kept else without_element(file),
        tests=tests,
    )


THE_REPAIRS = (
    _without("empty shard", "empty_shard", f"{_FROZEN}a_frozen_stage_resumes"),
    _without("empty bucket", "empty_bucket", f"{_FROZEN}a_shard_of_padding_between_two_parameters_resumes_by_bucket"),
    _without("load template", "load_template", NOT_OFFLOADED, kept="[1:]"),
    _without("no dummy step", "load_template", f"{_REPAIRED}an_empty_optimizer_is_filled_without_a_step", kept="[:1]"),
    _without("master lookup", "master_lookup", OFFLOADED),
    _without("state device", "state_device", f"{_REPAIRED}state_is_on_the_side_of_its_parameter"),
    _without("step counter", "step_counter", f"{_COUNTS}[nothing]", f"{_COUNTS}[half]"),
    _without("gradient wait", "gradient_wait", f"{_DEVICE}the_device_steps_when_its_gradients_are_cast"),
    _without("exact resume", "exact_resume", OFFLOADED),
    Mutant(
        name="without adam kernel",
        breaks="Core's defect is back: runs with offload and without step with kernels that round differently",
        where="megatron.bridge.core_repairs.install:REPAIRS",
        change=without_element("adam_kernel"),
        tests=(f"{_REPAIRED}adam_steps_with_the_same_kernel_with_offload_and_without",),
    ),
    _without("duplicate master", "duplicate_master", f"{RESUME}[dense-DP2-bf16-shards-0.0-serial-fully-offload_on]"),
    _without("plain param groups", "plain_param_groups", f"{_REPAIRED}saved_param_groups_are_plain_data"),
    _without(
        "native FP32 parameters", "native_fp32", f"{_REPAIRED}state_is_found_under_its_own_parameter", kept="[1:]"
    ),
    _without(
        "native FP32 gradients",
        "native_fp32",
        f"{_REPAIRED}fp32_weights_on_the_device_move",
        kept="[:1]",
    ),
    _without("group order", "group_order", f"{_REPAIRED}state_is_found_under_its_own_parameter"),
    _without("reshardable state", "reshardable_state", RESHARDED),
    _without("flat step", "offload_step", f"{_REPAIRED}parameters_share_an_optimizer_on_the_host", kept="[1:]"),
    _without("flat shards", "offload_step", f"{_REPAIRED}shards_cross_in_few_copies", kept="[:1]"),
    _without("plain state", "plain_state", f"{_PLAIN}it_resumes_to_the_bit[bf16, FP32 norms]"),
    _without("finite gradients", "finite_gradients", f"{_FINITE}so_does_one_whose_norm_overflows"),
    _without("lazy hybrid init", "lazy_hybrid_init", f"{_REPAIRED}only_what_a_rank_owns_is_copied"),
    Mutant(
        name="native FP32 parameters, views",
        breaks="a run with FP32 parameters can't be resumed: a view whose base was changed",
        where="megatron.bridge.core_repairs.native_fp32:_detached",
        change=value("leaf", "torch.no_grad()(shard.view)(-1)"),
        tests=(f"{RESUME}[FP32norms-DP2-bf16-shards-0.5-serial-fully-as_it_was]",),
    ),
)


def _not_restored(what: str, breaks: str, where: str, change: Change, test: str) -> Mutant:
    return Mutant(f"{what} not restored", breaks, f"megatron.bridge.{where}", change, (test,))


THE_RESUME = (
    _not_restored(
        "step",
        "Adam's bias correction starts over",
        "core_repairs.exact_resume:_restore_step_and_masters.RestoreStepAndMasters.load_state_dict",
        value("step", 'state["step"]'),
        OFFLOADED,
    ),
    _not_restored(
        "masters",
        "they keep what the optimizer was built on",
        "core_repairs.reshardable_state:_saved",
        condition("step", becomes='key.startswith("exp_avg")'),
        RESHARDED,
    ),
    _not_restored(
        "moments",
        "Adam's second moment starts at 0",
        "core_repairs.reshardable_state:_saved",
        condition("step", becomes='_ and key != "exp_avg_sq"'),
        RESHARDED,
    ),
    _not_restored(
        "random states",
        "dropout follows another course",
        "training.run_state.planned_load:load_megatron",
        without_call("restore_rng_state"),
        NOT_OFFLOADED,
    ),
    _not_restored(
        "random states of each expert-parallel rank",
        "all take the first rank's",
        "training.run_state.rng:_entry_of_this_rank",
        without_operand("is_of_each"),
        EXPERTS,
    ),
    _not_restored(
        "random states of another device",
        "a run can't be taken from a GPU to a machine without one",
        "training.run_state.rng:_of_another_device",
        condition("size", "own_size"),
        f"{_RANDOM}the_devices_states_start_anew_together_and_on_all_ranks",
    ),
    _not_restored(
        "the tracker's random states with the generator's",
        "parts of the device's states are a GPU's, and parts are not",
        "training.run_state.rng:_of_another_device",
        expression('state["rng_tracker_states"].items()', "()"),
        f"{_RANDOM}the_devices_states_start_anew_together_and_on_all_ranks",
    ),
    _not_restored(
        "damaged random states",
        "they are an error of torch's, a step later",
        "training.run_state.rng:_num_bytes",
        condition("is_whole"),
        f"{_RANDOM}a_damaged_state_ends_all_ranks_in_a_line_that_names_it",
    ),
    _not_restored(
        "place in the data",
        "samples are seen again",
        "data.loaders:training_iterator",
        value("consumed_samples", "0"),
        NOT_OFFLOADED,
    ),
    _not_restored(
        "schedule",
        "the warm-up starts over",
        "training.run_state.schedule:load_optimizer",
        without_call("scheduler.load_state_dict"),
        NOT_OFFLOADED,
    ),
    _not_restored(
        "another number of optimizers",
        "experts can't be spread over other ranks",
        "training.run_state.schedule:load_optimizer",
        value("saved", 'loaded["optimizer"]'),
        f"{RESUME}[experts-EP2-bf16-aware-0.5-overlap-fully-DP_2]",
    ),
    _not_restored(
        "learning rates of single parameters",
        "LoRA+ and decoupled_lr resume with one rate for all, on Core 0.16.1",
        "training.config.optimizer:OptimizerConfigOverrideProvider.build_config_overrides",
        condition("max_lr"),
        "tests/unit_tests/training/config/test_config.py::test_the_override_provider_gives_cores_usual_overrides",
    ),
    _not_restored(
        "rates that alone tell groups apart",
        "a provider's groups all resume with the last one's rate, on Core 0.16.1",
        "training.run_state.schedule:load_optimizer",
        without_call("_tell_groups_apart"),
        "tests/unit_tests/training/run_state/test_schedule.py::test_groups_that_only_their_rates_tell_apart_keep_them",
    ),
    _not_restored(
        "learning rates that are others than the checkpoint's",
        "LoRA+ that is switched on at a resume fails with Core's KeyError",
        "training.run_state.schedule:load_optimizer",
        without_call("_check_rates_of_single_parameters"),
        "tests/functional_tests/test_lora.py::test_what_cannot_work_is_refused_in_one_line[LoRA+ where there was none]",
    ),
)
