# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the overlapped step: waits left out, errors lost."""

from tests.mutants.changes import Change, condition, returning, value, without_call
from tests.mutants.rows.mutant import Mutant

_STEP = "tests/functional_tests/test_order_of_streams.py::test_the_overlapped_step_waits_for_all_it_needs"
_RUNS = "tests/functional_tests/test_overlapped_step.py::test_"
_RUN = f"{_RUNS}weights_are_there_when_they_are_read"
_HYBRID = "offload_engine.overlap.hybrid"
_ARRIVALS = "offload_engine.overlap.arrivals"
_CONNECT = "offload_engine.overlap.connect"
_WORKER = "tests/unit_tests/offload_engine/overlap/test_worker.py::test_"
_EARLY = "offload_engine.overlap.early_gradients:EarlyGradients"
_CROSS = "tests/unit_tests/offload_engine/overlap/test_early_gradients.py::test_"
_SENT = "tests/unit_tests/offload_engine/overlap/test_hybrid.py::test_"
_CALLBACKS = "tests/unit_tests/training/test_callbacks.py::test_"


def _overlapped(what: str, breaks: str, where: str, change: Change, test: str) -> Mutant:
    return Mutant(f"overlapped step, {what}", breaks, f"megatron.bridge.{where}", change, (test,))


OVERLAP = (
    _overlapped(
        "no wait of the worker for gradients",
        "Adam steps on gradients that are not on the host yet",
        f"{_HYBRID}:Crossing._step",
        without_call("synchronize"),
        f"{_STEP}[default]",
    ),
    _overlapped(
        "no wait of the next backward pass for gradients' copies",
        "gradients are overwritten while they are copied",
        f"{_HYBRID}:OverlappedStep._queue_step",
        without_call("wait_for_stream"),
        f"{_STEP}[default]",
    ),
    _overlapped(
        "no wait of copies for gradients",
        "gradients are copied before they are there",
        f"{_HYBRID}:OverlappedStep._send_gradients",
        without_call("start_after_current"),
        f"{_STEP}[default]",
    ),
    _overlapped(
        "no wait of early copies for the current stream",
        "gradients cross before they are reduced",
        f"{_EARLY}.is_reduced",
        without_call("start_after_current"),
        f"{_CROSS}they_cross_once_they_are_there",
    ),
    _overlapped(
        "no wait of early copies for the reduction",
        "gradients cross before they are reduced beside the backward pass",
        f"{_EARLY}.is_reduced",
        without_call("handle.wait"),
        f"{_CROSS}they_cross_once_another_stream_has_reduced_them",
    ),
    _overlapped(
        "no wait of scaling for early copies",
        "gradients are scaled in place while they cross, and again on the host",
        f"{_EARLY}._wait_before_changes",
        without_call("wait_for_stream"),
        f"{_CROSS}they_cross_before_they_are_scaled",
    ),
    _overlapped(
        "no wait of early copies for the host",
        "gradients are overwritten that the last step still reads",
        f"{_EARLY}._cross",
        without_call("wait_for_host_of"),
        f"{_CROSS}they_wait_for_the_step_that_reads_those_before",
    ),
    _overlapped(
        "no wait of the way back for readers",
        "weights return while the backward pass still reads those before",
        f"{_HYBRID}:OverlappedStep._queue_step",
        without_call("start_after_current"),
        f"{_CROSS}weights_return_once_the_backward_pass_has_read_them",
    ),
    _overlapped(
        "no check of early gradients",
        "what changes gradients after their reduction goes unseen",
        f"{_EARLY}.norm_is_taken",
        without_call("_check"),
        f"{_CROSS}what_changed_in_another_way_crosses_again_and_is_logged",
    ),
    _overlapped(
        "no clipping on the host",
        "gradients that cross early are never clipped",
        f"{_EARLY}.norm_is_taken",
        condition("coefficient"),
        f"{_RUN}[by layer]",
    ),
    _overlapped(
        "the loss scale stays in early gradients",
        "in FP16 the host steps on scaled gradients",
        f"{_ARRIVALS}:ShardsArriveLater.prepare_grads",
        without_call("is_unscaled"),
        "tests/functional_tests/test_order_of_streams.py::test_runs_load_sync_and_step_the_same",
    ),
    _overlapped(
        "sums over other ranks come too late",
        "norms' gradients cross before tensor ranks sum them",
        "offload_engine.overlap.later_changes:changed_after_reduction",
        returning("set()"),
        f"{_RUN}[after sums]",
    ),
    _overlapped(
        "no wait of readers for the way back",
        "weights are read that are still being copied",
        f"{_HYBRID}:Crossing.arrive",
        without_call("wait_for_event"),
        f"{_STEP}[precision-aware]",
    ),
    _overlapped(
        "no wait of readers for the worker",
        "weights are read before they are stepped on",
        f"{_HYBRID}:Crossing.arrive",
        without_call("result"),
        f"{_STEP}[precision-aware]",
    ),
    _overlapped(
        "no wait of readers of state",
        "state is read before it is stepped on",
        f"{_HYBRID}:OverlappedStep.prepare_read",
        without_call("finish"),
        f"{_STEP}[default]",
    ),
    _overlapped(
        "no wait in what readers of state call",
        "state is read before it is stepped on",
        f"{_HYBRID}:OverlappedStep.finish",
        without_call("arrive"),
        f"{_STEP}[default]",
    ),
    _overlapped(
        "a worker that isn't ready",
        "the process gets the number of threads of the worker",
        "offload_engine.overlap.worker:HostWorker.__init__",
        without_call("result"),
        f"{_WORKER}it_is_ready_once_it_is_built",
    ),
    _overlapped(
        "masters in 32 bits",
        "twice as many bytes cross, by way of pageable memory",
        f"{_HYBRID}:Crossing.__init__",
        value("rounds_on_the_host", "False"),
        f"{_SENT}masters_cross_in_16_bits_rounded_as_the_device_does",
    ),
    _overlapped(
        "no wait of a layer",
        "a layer computes with the weights of before the step",
        f"{_ARRIVALS}:Arrivals.wait_for",
        without_call("_arrive"),
        f"{_RUN}[by layer]",
    ),
    _overlapped(
        "no wait of modules",
        "their hooks wait for nothing",
        f"{_CONNECT}:_WaitFor.__call__",
        without_call("wait_for"),
        f"{_RUN}[by layer]",
    ),
    _overlapped(
        "no wait of a model's state",
        "`state_dict` has the weights of before the step",
        f"{_CONNECT}:_WaitFor.__call__",
        without_call("wait_for_all"),
        f"{_RUN}[in a gather for each bucket]",
    ),
    _overlapped(
        "no gather for a layer",
        "a layer computes with other ranks' weights of before the step",
        f"{_ARRIVALS}:Arrivals.wait_for",
        without_call("start_param_sync"),
        f"{_RUN}[in one gather]",
    ),
    _overlapped(
        "no wait of a gather",
        "weights are gathered before they are stepped on",
        f"{_ARRIVALS}:Arrivals.wait_for_group",
        without_call("_arrive"),
        f"{_RUN}[in 2 bytes]",
    ),
    _overlapped(
        "no rounding of what arrived",
        "16-bit weights stay those of before the step",
        f"{_ARRIVALS}:Arrivals._arrive",
        without_call("copy_to_weights"),
        f"{_RUN}[in one gather]",
    ),
    _overlapped(
        "no rounding of what the device stepped on",
        "16-bit weights of the part that stays never change",
        f"{_ARRIVALS}:ShardsArriveLater._copy_main_params_to_model_params",
        without_call("copy_to_weights"),
        f"{_RUN}[by layer]",
    ),
    _overlapped(
        "no wait at the end",
        "the last step's weights are not there when a run ends",
        "training.train:run_training",
        without_call("wait_for_weights"),
        f"{_RUN}[in 2 bytes]",
    ),
    _overlapped(
        "no gather for who takes a model's state",
        "the state has other ranks' weights of before the step",
        f"{_ARRIVALS}:Arrivals.wait_for_all",
        without_call("start_param_sync"),
        f"{_RUN}[in a gather for each bucket]",
    ),
    _overlapped(
        "no wait of a load into the model",
        "the step overwrites the weights that were loaded",
        "offload_engine.overlap.connect:overlap_steps",
        without_call("register_load_state_dict_pre_hook"),
        f"{_RUN}[in a gather for each bucket]",
    ),
    _overlapped(
        "no gather before a read",
        "saves, callbacks and the end of a run have other ranks' weights of before the step",
        f"{_ARRIVALS}:gather_late_weights",
        without_call("start_param_sync"),
        f"{_RUNS}weights_that_ranks_gather_in_the_next_forward_pass_are_there_before",
    ),
    _overlapped(
        "no wait for callbacks",
        "a callback reads weights of before the step",
        "training.callbacks:CallbackManager.fire",
        without_call("_wait"),
        f"{_CALLBACKS}weights_are_awaited_before_callbacks_that_read_them",
    ),
    _overlapped(
        "a lost error",
        "a run continues although the host can't step",
        "offload_engine.overlap.connect:raise_failures",
        returning("None"),
        f"{_RUNS}an_error_on_one_host_ends_all_ranks",
    ),
    _overlapped(
        "no guard",
        "a weight that is left behind goes unseen",
        "training.cpu_offload.overlapped_steps:check_overlapped_step",
        without_call("_check_weights"),
        f"{_RUNS}a_weight_left_behind_ends_all_ranks",
    ),
)
