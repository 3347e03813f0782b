# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Run a NeMo-Run job from start to end: wait for it, stop it with its launcher, and show why it failed.

NeMo-Run leaves three things to its caller. A failed job raises no error. A launcher that is stopped leaves torchrun and
its workers running. And the reason for a failure is in one of many files.
"""

import contextlib
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.recipes.nemo_run_import import import_nemo_run

TASK = "training"
"""Name of the one task of an experiment, and of its folder."""

_MARK = "MEGATRON_BRIDGE_LAUNCH"
"""Environment variable that marks every process of a launch on this machine, also those whose parent is gone."""


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How a job ended."""

    state: str
    """As NeMo-Run calls it: SUCCEEDED, FAILED, CANCELLED, SUBMITTED."""

    directory: Path
    """The experiment's folder: configuration, sbatch script, logs."""

    handle: str
    """NeMo-Run's name for the job; it ends with Slurm's number."""

    signal_number: int | None = None
    """The signal that told the launcher to stop, if one did."""

    log: Path | None = None
    """The log that says why it failed."""

    last_lines: tuple[str, ...] = field(default=())
    """The end of it."""

    @property
    def exit_code(self) -> int:
        """0: succeeded or submitted. 128 + signal: told to stop. 1: anything else."""
        if self.signal_number is not None:
            return 128 + self.signal_number
        return 0 if self.state in ("SUCCEEDED", "SUBMITTED") else 1


class LaunchStopped(BaseException):
    """The launcher was told to stop before the job was started."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def dry_run(task: Any, executor: Any, *, title: str, plugins: Sequence[Any] = ()) -> tuple[Path, str]:
    """Write everything that a run would write, start nothing.

    Returns:
        The experiment's folder, and the command that each machine would run. For Slurm the folder holds
        `training_sbatch.sh`.
    """
    with _experiment(title) as experiment:
        experiment.add(task, executor=executor, name=TASK, plugins=list(plugins))
        experiment.dryrun(log=False, delete_exp_dir=False)
        role = experiment.jobs[0]._executable.roles[0]
    return Path(experiment._exp_dir), " ".join([role.entrypoint, *role.args])


def run_job(
    task: Any,
    executor: Any,
    *,
    title: str,
    plugins: Sequence[Any] = (),
    detach: bool = False,
    tail_logs: bool = True,
    stop_seconds: float = 60.0,
) -> JobOutcome:
    """Start a job, wait for its end, and leave no process behind. For the main thread: it takes signals.

    SIGINT or SIGTERM ends the job: on this machine torchrun gets SIGTERM and passes it on (a run with
    `train.exit_signal_handler=true` saves), and what is left after `stop_seconds` is killed, or at once when the signal
    comes a second time. A Slurm job is cancelled.

    Args:
        task: A `run.Script` or `run.Partial`.
        executor: Where it runs.
        title: Name of the experiment.
        plugins: NeMo-Run plugins.
        detach: Return once a Slurm job is submitted.
        tail_logs: Print the job's output as it comes.
        stop_seconds: Seconds between SIGTERM and SIGKILL.

    Raises:
        RuntimeError: The job couldn't be started.
    """
    mark = uuid.uuid4().hex
    if isinstance(executor, import_nemo_run().LocalExecutor):
        # Newer torchruns kill their workers that many seconds after a signal; 30, unless told otherwise.
        torchrun_seconds = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(stop_seconds))}
        executor.env_vars = {**torchrun_seconds, **executor.env_vars, _MARK: mark}
    stopper = _Stopper(mark, stop_seconds)
    experiment = _experiment(title)
    with stopper.listening():
        try:
            with experiment:
                experiment.add(task, executor=executor, name=TASK, plugins=list(plugins))
                experiment.run(detach=detach, tail_logs=tail_logs and not detach)
                stopper.started(experiment)
        except LaunchStopped as stopped:
            handle = next((job.handle for job in experiment.jobs), "")
            if handle and not isinstance(executor, import_nemo_run().LocalExecutor):
                experiment._runner.cancel(handle)
            return JobOutcome(
                state="CANCELLED",
                directory=Path(experiment._exp_dir),
                handle=handle,
                signal_number=stopped.signal_number,
            )
        except Exception as error:
            if type(error).__name__ != "UnexpectedExit":  # invoke's: a command of Slurm's failed
                raise
            raise RuntimeError(f"the job could not be submitted: {' '.join(str(error).split())[:400]}") from error
        finally:
            kill_processes(mark)
    job = experiment.jobs[0]
    state = "SUBMITTED" if detach else job.state.name
    outcome = {"directory": Path(experiment._exp_dir), "handle": job.handle, "signal_number": stopper.signal_number}
    if state in ("SUCCEEDED", "SUBMITTED") or stopper.signal_number is not None:
        return JobOutcome(state=state, **outcome)
    log = failure_log(Path(experiment._exp_dir) / TASK)
    return JobOutcome(state=state, log=log, last_lines=tuple(last_lines(log)), **outcome)


def _experiment(title: str) -> Any:
    """An experiment that prints nothing of its own. Its title is a folder's name, which NeMo-Run leaves unquoted."""
    return import_nemo_run().Experiment(
        re.sub(r"[^\w.+-]+", "_", title),
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )


class _Stopper:
    """Ends the job when this process is told to end."""

    def __init__(self, mark: str, stop_seconds: float) -> None:
        self.signal_number: int | None = None
        self._mark = mark
        self._stop_seconds = stop_seconds
        self._experiment: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM; give them back at the end."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def started(self, experiment: Any) -> None:
        """The job runs: from here on a signal ends it, and the wait for it continues."""
        self._experiment = experiment

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._experiment is None:
            raise LaunchStopped(number)
        if self.signal_number is not None:
            kill_processes(self._mark)
            return
        self.signal_number = number
        # In a thread: the main one waits for the job's end, and a handler must not wait for it.
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        import psutil

        if not isinstance(self._experiment.jobs[0].executor, import_nemo_run().LocalExecutor):
            self._experiment._runner.cancel(self._experiment.jobs[0].handle)
            return
        marked = processes_of(self._mark)
        pids = {process.pid for process in marked}
        for process in marked:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.ppid() not in pids:  # torchrun, which passes it on
                    process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._stop_seconds
        while time.monotonic() < deadline and processes_of(self._mark):
            time.sleep(0.2)
        kill_processes(self._mark)


def processes_of(mark: str) -> list[Any]:
    """This machine's processes of a launch."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_processes(mark: str) -> None:
    """Kill what is left of a launch, and what it may start meanwhile."""
    import psutil

    for _ in range(10):
        left = processes_of(mark)
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def failure_log(task_directory: Path) -> Path | None:
    """The log that says why a job failed: stderr of the rank that failed first, else torchrun's, else Slurm's.

    Args:
        task_directory: The task's folder in the experiment's.
    """
    torchrun = _newest(task_directory.glob("nemo_run/*/*/*/stderr.log"))
    ranks = sorted(task_directory.glob("nemo_run/*/torchelastic/*/*/attempt_*/*/stderr.log"), key=_attempt_and_rank)
    if torchrun and ranks:
        first = _first_to_fail(torchrun.read_text(encoding="utf-8", errors="replace"))
        for path in ranks:
            is_last_attempt = path.parts[-3] == ranks[-1].parts[-3]
            if is_last_attempt and path.parent.name == first and path.stat().st_size:
                return path
    return torchrun or _newest(task_directory.glob("log-*")) or _newest(task_directory.glob("sbatch_*"))


def last_lines(path: Path | None, count: int = 20) -> list[str]:
    """The end of a log: where lines of all ranks are mixed, of the one that failed first; empty where there is none."""
    if path is None:
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, first = text.rstrip().splitlines(), _first_to_fail(text)
    of_first = [line for line in lines if first and re.match(rf"\[\w+?{first}\]:", line)]
    return (of_first or lines)[-count:]


def _first_to_fail(text: str) -> str | None:
    """The local rank under "Root Cause" in what torchrun writes at its end."""
    found = re.search(r"local_rank: (\d+)\)", text.rpartition("Root Cause")[2])
    return found[1] if found else None


def _attempt_and_rank(path: Path) -> tuple[float, int, int]:
    *_, attempt, rank, _ = path.parts
    return path.parents[2].stat().st_mtime, int(attempt.removeprefix("attempt_")), int(rank)


def _newest(paths: Iterator[Path]) -> Path | None:
    return max((path for path in paths if path.is_file()), key=os.path.getmtime, default=None)
