# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which tests see CUDA, and which are quick."""

import os
import subprocess
import sys

import pytest

from tests.rigs import gpus, quick
from tests.rigs.ranks import run_on_ranks

pytestmark = pytest.mark.any_core


@pytest.mark.parametrize(("is_gpu_test", "count", "device"), [(False, 0, "cpu"), (False, 8, "cpu"), (True, 2, "cuda")])
def test_only_a_test_marked_gpu_computes_on_cuda(is_gpu_test, count, device):
    assert gpus.choose(2, is_gpu_test=is_gpu_test, count=count) == device


@pytest.mark.parametrize("count", [0, 1])
def test_two_ranks_never_share_a_gpu(count):
    with pytest.raises(pytest.skip.Exception, match=rf"needs 2 CUDA device\(s\), one a rank; this machine has {count}"):
        gpus.choose(2, is_gpu_test=True, count=count)


def test_this_process_and_those_it_starts_see_no_gpu_and_import_no_compiler():
    assert os.environ[gpus.VARIABLE] == ""
    code = "import sys, megatron.core.fusions.fused_bias_geglu; print('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("given", "shown"), [("1,3", "1,3"), (gpus.UNSET, None)])
def test_a_test_marked_gpu_sees_what_pytest_was_given_but_not_in_what_is_shared(monkeypatch, given, shown):
    monkeypatch.setenv(gpus.VARIABLE, "")
    monkeypatch.setenv(gpus.GIVEN, given)
    monkeypatch.setenv(gpus.NO_COMPILER, "")
    gpus.hide_from_tests()  # as in a worker: what is remembered stays
    with gpus.gpu_test():
        assert os.environ.get(gpus.VARIABLE) == shown and gpus.NO_COMPILER not in os.environ
        with gpus.shared_fixture():
            assert os.environ[gpus.VARIABLE] == "" and gpus.device_of_ranks(2) == "cpu"
        assert os.environ.get(gpus.VARIABLE) == shown
    assert os.environ[gpus.VARIABLE] == "" and gpus.device_of_ranks(2) == "cpu"


def _asks_for_ranks():
    return run_on_ranks(int, 1)


class _Holder:
    def start(self):
        subprocess.run(["true"])


def _asks_inside():
    return [_asks_for_ranks() for _ in range(1)]


def _asks_a_class():
    return _Holder().start()


def _asks_for_nothing():
    return len("abc")


def test_what_reaches_ranks_or_a_program_is_not_quick():
    assert all(map(quick.reaches_slow, (_asks_for_ranks, _asks_inside, _asks_a_class)))
    assert not quick.reaches_slow(_asks_for_nothing)


def test_a_quick_test_that_asks_for_ranks_all_the_same_is_an_error(monkeypatch):
    monkeypatch.setattr("tests.rigs.ranks.is_quick", True)
    with pytest.raises(AssertionError, match="isn't quick"):
        run_on_ranks(int, 1)
