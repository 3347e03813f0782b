# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of a resume: repairs of Core's optimizers left out, and states that are not restored."""

from tests.mutants.changes import (
    Change,
    condition,
    expression,
    moved,
    value,
    without_call,
    without_element,
    without_operand,
)
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


def _flat(what: str, breaks: str, method: str, change: Change) -> Mutant:
    where = f"megatron.bridge.offload_engine.adam:{method}"
    test = "tests/functional_tests/test_flat_step.py::test_the_bits_are_those_of_cores_own_step[precision-aware-serial]"
    return Mutant(f"flat step, {what}", breaks, where, change, (test,))


THE_FLAT_STEP = (
    _flat(
        "tails in the run",
        "gaps are stepped on as parameters, and last elements round otherwise",
        "Bucket.__init__",
        value("_in_run", "len(params)"),
    ),
    _flat(
        "counters of the run",
        "all but its first parameter stay at step 0",
        "Bucket.step_lists",
        without_call("_counters_of_run"),
    ),
    _flat(
        "counters that differ",
        "parameters at different steps are stepped on as if at one",
        "FlatAdam._bucket_to_step_on",
        without_operand("counters_agree"),
    ),
    _flat(
        "state that a load left elsewhere",
        "steps continue with the moments from before the load",
        "Bucket.place",
        without_call("copy_"),
    ),
)


def _formats(what: str, breaks: str, where: str, change: Change, *tests: str) -> Mutant:
    path = "tests/unit_tests/offload_engine/test_state_formats.py::test_"
    return Mutant(
        f"state formats, {what}",
        breaks,
        f"megatron.bridge.offload_engine.{where}",
        change,
        tuple(map(path.__add__, tests)),
    )


THE_STATE_FORMATS = (
    _formats(
        "not handed over",
        "what is asked for in BF16 is kept in FP32",
        "state_formats:keep_state_in",
        condition("are_fp32", becomes="True"),
        "the_bytes_held_are_those_asked_for",
    ),
    _formats(
        "moments not stored",
        "moments in BF16 stay zero",
        "piecewise_adam:step_on_piece",
        without_call("piece.copy_"),
        "pieces_have_the_bits_of_one_call[dtype1]",
    ),
    _formats(
        "parameters without a gradient",
        "they are stepped on with what their gradient's memory holds",
        "adam:FlatAdam._step_in_pieces",
        without_operand("has_all_gradients"),
        "a_run_is_that_in_fp32_with_rounded_moments",
    ),
)


_SPLIT = "tests/unit_tests/offload_engine/test_split_masters.py::test_"
_SAME_BITS, _SEEN = f"{_SPLIT}a_run_has_the_bits_of_fp32_masters", f"{_SPLIT}memory_is_given_back_and_weights_that_"


def _split(what: str, breaks: str, where: str, change: Change, test: str = _SAME_BITS) -> Mutant:
    return Mutant(f"split masters, {what}", breaks, f"megatron.bridge.offload_engine.{where}", change, (test,))


THE_SPLIT_MASTERS = (
    _split(
        "ties rounded down",
        "a master midway between two weights comes back as the one between the next two",
        "split_masters:split",
        condition("is_lost", becomes="True"),
        f"{_SPLIT}weight_and_rest_give_back_every_master[32768]",
    ),
    _split(
        "weights that changed",
        "rests are added to weights that they don't belong to",
        "split_masters:SplitMasters._join_piece",
        condition("checksum"),
        f"{_SEEN}changed_are_seen",
    ),
    _split(
        "memory kept",
        "masters take 6 bytes instead of 2",
        "split_masters:SplitMasters._split",
        without_call("_memory.give_back"),
        f"{_SEEN}changed_are_seen",
    ),
    _split(
        "not joined for a reader",
        "whoever reads masters between steps finds zeros",
        "split_step:SplitStep.prepare_read",
        condition("_is_stepping"),
    ),
    _split(
        "no wait for weights",
        "masters are joined from weights of another piece, and weights overwritten before they have crossed",
        "weight_transit:Passage.wait",
        without_call("synchronize"),
    ),
    _split(
        "no wait for weights that come down",
        "masters are joined from weights of another piece",
        "split_masters:SplitMasters._join_piece",
        without_call("wait"),
    ),
    _split(
        "no wait for weights that go back",
        "weights are overwritten before they have crossed",
        "split_masters:SplitMasters._split_piece",
        without_call("wait"),
    ),
    _split(
        "no wait for the last copy",
        "the host waits for the copy before it",
        "weight_transit:Passage.copy",
        moved("record_event", before="bypass_simulation"),
    ),
    _split(
        "no wait of copies for what changes weights",
        "masters are joined from weights of before a load, and the change goes unseen",
        "split_masters:SplitMasters.join",
        without_call("start_after_current"),
        f"{_SPLIT}weights_that_a_stream_has_yet_to_change_are_seen",
    ),
    _split(
        "no wait before a buffer grows",
        "weights come from memory that was given back",
        "weight_transit:Passage.reserve",
        without_call("wait"),
        f"{_SPLIT}a_buffer_keeps_its_memory_until_it_was_sent",
    ),
)


_ORDER = "tests/functional_tests/test_order_of_streams.py::test_the_step_in_buckets_waits_for_all_it_needs"
_STREAMS = "tests/unit_tests/test_adversarial_streams.py::test_our_waits_order_streams"
_SYNCED = "tests/functional_tests/test_order_of_streams.py::test_runs_load_sync_and_step_the_same"
_OVERLAP = (f"{_ORDER}[default-overlap]", f"{_ORDER}[precision-aware-overlap]")


def _no_wait(what: str, breaks: str, where: str, change: Change, *tests: str) -> Mutant:
    return Mutant(f"no wait, {what}", breaks, f"megatron.bridge.{where}", change, tests)


THE_WAITS = (
    _no_wait(
        "of the host for gradients",
        "Adam steps on gradients that are not on the host yet",
        "offload_engine.step:BucketedStep._send_gradients",
        expression("self._d2h_stream.record_event()", "None"),
        f"{_ORDER}[default-serial]",
    ),
    _no_wait(
        "of weights' readers",
        "what comes after the step reads weights of before it",
        "utils.device:queued_on",
        without_call("wait"),
        *_OVERLAP,
    ),
    _no_wait(
        "of a stream beside for the current one",
        "what the current stream still reads is overwritten",
        "utils.device:queued_on",
        without_call("wait_stream"),
        _STREAMS,
    ),
    _no_wait(
        "for a stream",
        "the current stream doesn't wait when it is told to",
        "utils.device:wait_for_stream",
        without_call("wait_stream"),
        _STREAMS,
    ),
    _no_wait(
        "of the device for its gradients",
        "the device steps on gradients that are not cast yet",
        "core_repairs.gradient_wait:_gradient_wait",
        expression("wait_for_stream(self._d2h_stream)", "None"),
        f"{_ORDER}[precision-aware-overlap]",
    ),
    _no_wait(
        "of the host for copies that a sync wrote",
        "masters are read before the weights are in them",
        "training.cpu_offload.param_copies:rebuild_param_copies",
        without_call("synchronize"),
        f"{_SYNCED}[bf16-dense-TP1-fp32_shards-1.0-serial]",
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
