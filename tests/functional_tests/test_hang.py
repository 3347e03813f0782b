# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A rank that never comes: every rank shows where it is, and the job ends within the timeout."""

import re
import time

import pytest

from megatron.bridge.training.config import DistributedInitConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.monitoring.hang_watchdog import HangWatchdog, Hung, watched
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.distributed import rank
from megatron.bridge.utils.exit_codes import HUNG
from tests.soak.run import RANKS, Run, warm_up

TIMEOUT_SECONDS = 40
"""Of which 15 percent is the time that all ranks have to show their stacks; on a busy machine they need it."""
HANGS_AFTER = 2


def sleep_on_rank_1(state: GlobalState, data_iterator, model):
    """A forward step that never comes back, on one rank."""
    if rank() == 1 and state.train_state.step == HANGS_AFTER:
        time.sleep(6000)
    return forward_step(state, data_iterator, model)


@pytest.mark.any_core
@pytest.mark.timeout(1800)
def test_a_rank_that_hangs_and_the_one_that_waits_for_it_show_their_stacks_and_end(tmp_path):
    warm_up()
    timeout = {"distributed_timeout_seconds_after_init": TIMEOUT_SECONDS}
    run = Run(tmp_path / "run", forward_step_func=sleep_on_rank_1, dist=timeout, checkpoint={"save_interval": None})
    run.start()
    while run.is_running() and min(run.log_lines()) < HANGS_AFTER:
        time.sleep(0.001)
    assert run.join(900), run.errors()
    assert [process.exitcode for process in run.processes] == [HUNG] * RANKS, run.errors()
    waits, hangs = ((run.directory / f"errors_{number}.txt").read_text() for number in range(RANKS))
    for number, text in enumerate((waits, hangs)):
        head = rf"^\[rank {number}\] rank {number} hangs: no sign of life for ([\d.]+) s after step {HANGS_AFTER};"
        found = re.search(head, text, flags=re.MULTILINE)
        assert found, text
        assert float(found[1]) > 0.79 * TIMEOUT_SECONDS
    assert "in sleep_on_rank_1" in hangs and "in sleep_on_rank_1" not in waits
    assert "in train_step" in waits and "in train_step" in hangs


class Clock:
    """It moves when it is told to, however busy the machine is."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def of_two_ranks() -> int:
    return 2


@pytest.mark.any_core
@pytest.mark.parametrize(("sign_comes", "raised"), [(False, Hung), (True, RuntimeError)])
def test_an_error_that_comes_after_the_stacks_is_a_hang_too(caplog, sign_comes, raised):
    """A rank may be a moment later than the one whose end breaks its collective."""
    clock, config = Clock(), DistributedInitConfig(distributed_timeout_minutes=1)
    watchdog = HangWatchdog(clock, num_ranks=of_two_ranks)
    with pytest.raises(raised) as caught, watched(watchdog, config):
        clock.now += 0.9 * 60
        while not watchdog.hangs:
            time.sleep(0.01)
        if sign_comes:
            watchdog.heartbeat(1)
        raise RuntimeError("Connection closed by peer\nand more")
    if raised is Hung:
        assert caught.value.code == HUNG
        assert "RuntimeError: Connection closed by peer; it came after" in caplog.text


@pytest.mark.any_core
def test_signs_of_life_pauses_and_the_end_keep_it_quiet(capfd):
    """A thread of its own, so that what would end this process can be seen instead."""
    clock, ended = Clock(), []
    watchdog = HangWatchdog(clock, ended.append, of_two_ranks)
    watchdog.start(0.5)

    def pass_time(seconds):
        clock.now += seconds
        time.sleep(1.1)  # it looks at least once a second

    for step in range(2):
        pass_time(0.3)
        watchdog.heartbeat(step)
    with watchdog.paused():
        pass_time(0.8)
    pass_time(0.3)
    watchdog.stop()
    pass_time(0.6)
    assert not ended and "hangs" not in capfd.readouterr().err

    watchdog = HangWatchdog(clock, ended.append, of_two_ranks)
    watchdog.start(60)
    watchdog.heartbeat(7)
    watchdog.start(0.3)  # shortened after the first step
    clock.now += 1.2
    while not ended:
        time.sleep(0.01)
    watchdog.stop()
    assert set(ended) == {HUNG}
    said = capfd.readouterr().err
    assert "rank 0 hangs: no sign of life for 1.2 s after step 7; it ends after 0.3 s with exit code 124" in said
    assert "in test_signs_of_life_pauses" in said
