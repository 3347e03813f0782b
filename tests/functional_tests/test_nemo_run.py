# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The launcher: real jobs on this machine, and on a Slurm that is a few small programs.

Most of a job's time is spent in waiting, so all jobs are started at once, and each test looks at one of them.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.rigs.slurm_stub import slurm_on_path

if importlib.util.find_spec("nemo_run") is None:
    pytest.skip("nemo_run is not installed: pip install 'megatron-bridge[recipes]'", allow_module_level=True)

pytestmark = [pytest.mark.any_core, pytest.mark.timeout(2 * 900)]

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "scripts" / "training" / "launch_with_nemo_run.py"
SECONDS = 900
"""Only ends what hangs."""
ARGUMENTS = ["a=[0, 1]", 'b={x: "y"}', "c=it's", "--peft-scheme", "dora"]

JOB = """
import os, signal, sys, time
from pathlib import Path

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]

def note(name, text=""):
    Path(f"{name}-{rank}").write_text(text)

if "what=write" in sys.argv:
    note("arguments", repr(sys.argv[1:]))
    note("environment", os.environ["TEXT"])
    sys.exit(attempt == "0")  # the workers are started again
elif "what=fail" in sys.argv and rank == "1":
    raise RuntimeError("boom on purpose")
elif "what=sleep" in sys.argv:
    note("started")
    time.sleep(6000)
elif "what=resume" in sys.argv:
    # As a run does with train.exit_signal_handler: it saves at the signal and ends with 75; started again, it resumes.
    note("arguments", repr(sys.argv[1:]))
    note("environment", os.environ["TEXT"])
    if Path("saved-0").exists():
        sys.exit(note("resumed"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(note("saved") or 75))
    note("started")
    time.sleep(6000)
"""

SLURM = ["--executor", "slurm", "--account", "account", "--gpus-per-node", "0"]

JOBS = {
    "write": ["--max-restarts", "1", "--nproc-per-node", "2", "what=write", *ARGUMENTS, "--", "--mode", "z"],
    "fail": ["--nproc-per-node", "2", "--quiet", "what=fail"],
    "stop": ["--nproc-per-node", "2", "--quiet", "what=sleep"],
    "slurm-resume": [*SLURM, "--preempt-seconds", "60", "what=resume", *ARGUMENTS],
    "slurm-fail": [*SLURM, "--nproc-per-node", "2", "--quiet", "--preempt-seconds", "60", "what=fail"],
    "slurm-stop": [*SLURM, "--quiet", "what=sleep"],
}


def start(folder, *arguments, **env):
    """The launcher, in a folder, where experiments go too."""
    variables = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONWARNINGS": "ignore", "PATH": "/usr/bin:/bin", **env}
    command = [sys.executable, str(LAUNCHER), "--home", str(folder / "home"), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, text=True, **pipes)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All jobs: (launcher, its folder) by name."""
    started = {}
    for name, arguments in JOBS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "job.py").write_text(JOB)
        env = {}
        if "slurm" in name:
            seconds_left = "30" if name == "slurm-resume" else "3600"
            env = slurm_on_path(folder / "slurm") | {"SIGNAL_WHEN": f"{folder}/started-0", "SECONDS_LEFT": seconds_left}
        options = ["--script", "job.py", "--env", "TEXT=two words"]
        started[name] = start(folder, *options, *arguments, **env), folder
    yield started
    for process, folder in started.values():
        process.kill()
        for left in processes_of(folder):
            left.kill()


@pytest.fixture(scope="module")
def recipes(inputs, tmp_path_factory):
    """A real finetune, as a script and as a function of the package: (launcher, its folder)."""
    started = []
    for task in ("script", "partial"):
        folder = tmp_path_factory.mktemp(task)
        arguments = ["--task", task, "--nproc-per-node", "2", "--recipe", "smollm2_135m", "--mode", "sft"]
        arguments += ["--hf-path", str(inputs / "my-model"), "--seq-length", "32", "train.train_iters=2"]
        arguments += [
            f"dataset.dataset_root={inputs / 'my-data'}",
            "train.global_batch_size=4",
            "scheduler.lr_warmup_iters=1",
        ]
        arguments += ["checkpoint.save=out", "checkpoint.load=out", "logger.tensorboard_dir=null"]
        started.append((start(folder, *arguments), folder))
    yield started
    for process, _ in started:
        process.kill()


def wait_for(path, process):
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.1)


def processes_of(folder):
    """Running processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_alive and any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


def calls_of(program, folder):
    """What a program of Slurm's was called with, each time."""
    calls = [json.loads(line) for line in (folder / "slurm" / "calls.jsonl").read_text().splitlines()]
    return [arguments for name, *arguments in calls if name == program]


def test_a_script_gets_its_arguments_as_they_were_written_and_is_started_again(jobs):
    process, folder = jobs["write"]
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, (output, errors)
    for rank in (0, 1):
        assert (folder / f"arguments-{rank}").read_text() == repr(["what=write", *ARGUMENTS, "--mode", "z"])
        assert (folder / f"environment-{rank}").read_text() == "two words"
    assert "SUCCEEDED" in output and f"{folder}/home/experiments/job/" in output


def test_a_failed_job_is_an_error_that_shows_the_failing_ranks_last_lines(jobs):
    process, _ = jobs["fail"]
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "FAILED" in output, (output, errors)
    assert re.search(r"^the end of \S+/attempt_0/1/stderr.log:\n  Traceback", errors, re.MULTILINE)
    assert errors.endswith("  RuntimeError: boom on purpose\n")


def test_a_stopped_launcher_leaves_no_process(jobs):
    process, folder = jobs["stop"]
    for rank in (0, 1):
        wait_for(folder / f"started-{rank}", process)
    assert len(processes_of(folder)) >= 4, "the launcher, torchrun, two workers"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 143 and "STOPPED by SIGTERM" in output, (output, errors)
    assert processes_of(folder) == []


def test_a_slurm_job_saves_before_its_time_is_over_and_goes_on_from_the_queue(jobs):
    process, folder = jobs["slurm-resume"]
    output, errors = process.communicate(timeout=SECONDS)
    logs = [path.read_text() for path in (folder / "home").rglob("*.out")]
    assert process.returncode == 0 and "SUCCEEDED: 4242" in output, (output, errors, logs)
    assert (folder / "saved-0").exists() and (folder / "resumed-0").exists()
    assert calls_of("scontrol", folder).count(["requeue", "4242"]) == 1
    assert (folder / "arguments-0").read_text() == repr(["what=resume", *ARGUMENTS, "train.exit_signal_handler=true"])
    assert (folder / "environment-0").read_text() == "two words"


def test_a_slurm_job_that_fails_long_before_the_limit_is_not_requeued(jobs):
    process, folder = jobs["slurm-fail"]
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "FAILED: 4242" in output, (output, errors)
    assert re.search(r"^the end of \S+/log-account-account.training_4242_0.out:$", errors, re.MULTILINE)
    assert "RuntimeError: boom on purpose" in errors
    assert ["requeue", "4242"] not in calls_of("scontrol", folder)


def test_a_stopped_launcher_cancels_its_slurm_job(jobs):
    process, folder = jobs["slurm-stop"]
    wait_for(folder / "started-0", process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "STOPPED by SIGINT: 4242" in output, (output, errors)
    assert calls_of("scancel", folder) == [["4242"]]


def test_a_recipe_trains_on_two_processes_as_a_script_and_as_a_function(recipes):
    losses = []
    for process, folder in recipes:
        output, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0 and "SUCCEEDED" in output, (output[-3000:], errors[-3000:])
        assert (folder / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"
        losses.append([step["lm loss"] for step in map(json.loads, (folder / "out" / "metrics.jsonl").open())])
    assert len(losses[0]) >= 2 and losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detach"], "--detach: a job on this machine ends with its launcher; leave it out, or --executor slurm"),
        (["--account", "a"], "--account is for Slurm: add --executor slurm"),
        (["--executor", "slurm"], "--account is missing: --executor slurm needs one"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0, --nodes 1: at least 1 each"),
        (["--task", "partial"], "--script and --task partial: one of them says what runs; leave one out"),
    ],
)
def test_bad_options_are_one_line(tmp_path, arguments, message):
    (tmp_path / "job.py").touch()
    output, errors = start(tmp_path, "--script", "job.py", *arguments).communicate(timeout=SECONDS)
    assert (output, errors) == ("", f"error: {message}\n")


def test_help_imports_nothing_heavy():
    text = subprocess.run([sys.executable, "-X", "importtime", LAUNCHER, "--help"], capture_output=True, text=True)
    assert text.returncode == 0 and "--dry-run" in text.stdout
    assert not re.search(r"\| +(torch|nemo_run|megatron)\b", text.stderr)
