# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""SIGTERM: all ranks save at the next step boundary and end with a code of their own; started again, they resume."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.config import CheckpointConfig, TrainingConfig
from megatron.bridge.training.monitoring.interrupt import ended_by_interrupt
from megatron.bridge.training.monitoring.preemption import Preempted, catch_exit_signal
from megatron.bridge.utils.exit_codes import INTERRUPTED, PREEMPTED
from tests.soak.rank import STEPS
from tests.soak.restarted_rank import KILLED_AT
from tests.soak.run import RANKS, Run, check_equal, wait_for_saves, warm_up

SECONDS = 300
"""Only ends what hangs."""

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    warm_up()
    run = Run(tmp_path_factory.mktemp("preemption") / "whole")
    run.start()
    assert run.join(SECONDS) and run.has_ended_well(), run.errors()
    return run


def _wait_until(run, condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert run.is_running() and time.monotonic() < deadline, run.errors()
        time.sleep(0.001)


def _terminate(run, ranks):
    for rank in ranks:
        run.processes[rank].terminate()


def _assert_preempted(run, *, saved):
    """Both ranks ended in time, with the exit code, and the last step that was taken is saved."""
    assert run.join(SECONDS), run.errors()
    assert [process.exitcode for process in run.processes] == [PREEMPTED] * RANKS, run.errors()
    tracker = iterations.read_tracker(run.directory / "checkpoints")
    assert (tracker is None) if saved is None else (tracker.iteration == max(run.losses()[0]) == saved)


def test_a_run_stopped_again_and_again_ends_as_the_uninterrupted_one(tmp_path, whole):
    choose = random.Random(seed := time.time_ns() % 10**6)
    print(f"seed {seed}")  # shown when the test fails
    run = Run(tmp_path / "run", train={"exit_signal_handler": True})

    run.start()
    _wait_until(run, lambda: "layer spec: " in run.errors())  # it is being set up: there is nothing to save
    _terminate(run, [1])
    _assert_preempted(run, saved=None)
    assert run.errors().count("SIGTERM has arrived on rank 1") == 1

    run.start()
    steps = choose.randint(1, 5)
    _wait_until(run, lambda: run.log_lines()[0] >= steps)
    time.sleep(choose.uniform(0, 0.1))
    _terminate(run, [0])
    assert run.join(SECONDS), run.errors()
    first = max(run.losses()[0])
    _assert_preempted(run, saved=first)
    assert steps <= first < STEPS

    run.sections["checkpoint"] = {"async_save": True}
    run.start()
    wait_for_saves(run, choose.randint(1, 2))
    for _ in range(3):  # schedulers send it more than once; the second and third come while it saves
        _terminate(run, range(RANKS))
        time.sleep(0.03)
    assert run.join(SECONDS), run.errors()
    _assert_preempted(run, saved=max(run.losses()[0]))
    assert first < max(run.losses()[0])

    run.start()
    assert run.join(SECONDS) and run.has_ended_well(), run.errors()
    check_equal(run, whole)


@pytest.mark.any_core
def test_torchrun_starts_a_killed_rank_again_and_hands_the_signal_on(tmp_path, whole):
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with open(tmp_path / "torchrun.txt", "w") as output:
        torchrun = subprocess.Popen(
            [*command, "-m", "tests.soak.restarted_rank", str(run.directory)], stdout=output, stderr=output, cwd=ROOT
        )
    deadline = time.monotonic() + 2 * SECONDS
    try:
        while run.log_lines()[0] < KILLED_AT + 3:
            said = (tmp_path / "torchrun.txt").read_text()
            assert torchrun.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.01)
        torchrun.terminate()
        assert torchrun.wait(SECONDS) == 1  # whatever its ranks ended with
    finally:
        torchrun.kill()
    said = (tmp_path / "torchrun.txt").read_text()
    assert (run.directory / "killed").exists() and "failed (exitcode: -9) local_rank: 1" in said
    assert "SIGTERM has arrived on rank 1" in said and "stopped by a signal after step" in said
    tracker = iterations.read_tracker(run.directory / "checkpoints")
    assert KILLED_AT <= tracker.iteration == max(run.losses()[0]) < STEPS

    run.start()
    assert run.join(SECONDS) and run.has_ended_well(), run.errors()
    check_equal(run, whole)


def test_without_the_option_the_signal_ends_the_process_as_ever(tmp_path):
    run = Run(tmp_path / "run")
    run.start()
    _wait_until(run, run.trains)
    _terminate(run, range(RANKS))
    assert run.join(SECONDS)
    assert [process.exitcode for process in run.processes] == [-signal.SIGTERM] * RANKS


def test_ctrl_c_ends_all_ranks_with_one_line(tmp_path):
    run = Run(tmp_path / "run")
    run.start()
    wait_for_saves(run, 2)  # the second is being written
    for process in run.processes:
        os.kill(process.pid, signal.SIGINT)
    assert run.join(SECONDS), run.errors()
    assert [process.exitcode for process in run.processes] == [INTERRUPTED] * RANKS, run.errors()
    said, other = run.said(0), run.said(1)
    saved = iterations.read_tracker(run.checkpoints).iteration
    assert f"interrupted by SIGINT: the newest checkpoint in {run.checkpoints} is of step {saved}, " in said
    assert "interrupted by" not in other and "Traceback" not in said + other
    assert iterations.is_complete(iterations.checkpoint_name(run.checkpoints, saved))


def test_an_interrupted_run_that_a_script_catches_is_a_keyboard_interrupt(caplog):
    with pytest.raises(KeyboardInterrupt) as caught, ended_by_interrupt(CheckpointConfig()):
        raise KeyboardInterrupt
    assert isinstance(caught.value, SystemExit) and caught.value.code == INTERRUPTED
    assert "nothing was saved (checkpoint.save is not set); exit code 130" in caplog.text


def test_a_caught_signal_is_given_back_except_on_the_way_out():
    config, before = (
        TrainingConfig(exit_signal_handler=True, exit_signal=signal.SIGUSR1),
        signal.getsignal(signal.SIGUSR1),
    )
    with catch_exit_signal(config) as caught:
        signal.raise_signal(signal.SIGUSR1)
        assert caught.name == "SIGUSR1" and caught._has_arrived
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(RuntimeError), catch_exit_signal(config):
        raise RuntimeError
    assert signal.getsignal(signal.SIGUSR1) == before
    try:
        with pytest.raises(Preempted) as ended, catch_exit_signal(config):
            raise Preempted(3)
        assert ended.value.code == PREEMPTED
        signal.raise_signal(signal.SIGUSR1)  # doesn't end this process
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_in_a_thread_can_catch_no_signal():
    errors = []

    def run():
        try:
            with catch_exit_signal(TrainingConfig(exit_signal_handler=True)):
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors and "train.exit_signal_handler=true in a thread" in errors[0]


def test_a_signal_that_no_process_can_catch_is_refused():
    with pytest.raises(ValueError, match="train.exit_signal=SIGKILL: no process can catch it"):
        TrainingConfig(micro_batch_size=1, train_iters=1, exit_signal=signal.SIGKILL).finalize()
