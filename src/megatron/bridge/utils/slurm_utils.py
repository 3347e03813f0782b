# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read a job's processes from Slurm's environment variables, for scripts that `srun` starts without torchrun."""

import os
import re

__all__ = [
    "is_slurm_job",
    "resolve_slurm_local_rank",
    "resolve_slurm_master_addr",
    "resolve_slurm_master_port",
    "resolve_slurm_rank",
    "resolve_slurm_world_size",
]

FIRST_PORT = 15000
NUM_PORTS = 20000


def is_slurm_job() -> bool:
    """Whether `srun` started this process as one of a job's tasks."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ


def resolve_slurm_rank() -> int | None:
    """This task's number in the job; None outside Slurm."""
    return _number("SLURM_PROCID")


def resolve_slurm_world_size() -> int | None:
    """The number of tasks; None outside Slurm."""
    return _number("SLURM_NTASKS")


def resolve_slurm_local_rank() -> int | None:
    """This task's number on its machine; None outside Slurm."""
    return _number("SLURM_LOCALID")


def resolve_slurm_master_addr() -> str | None:
    """The first machine of the job, which its ranks can meet on; None outside Slurm.

    Raises:
        ValueError: Slurm's list of machines can't be read.
    """
    machines = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return first_machine(machines) if is_slurm_job() and machines else None


def resolve_slurm_master_port() -> int | None:
    """A port that the job's ranks can meet on, the same in every task and another for each job; None outside Slurm."""
    job = _number("SLURM_JOB_ID")
    return None if job is None or not is_slurm_job() else FIRST_PORT + job % NUM_PORTS


def first_machine(machines: str) -> str:
    """The first name of a list in Slurm's short form: `gpu03` of `gpu[03-06,09],login1`.

    Raises:
        ValueError: It isn't such a list.
    """
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d+)[-,\d]*\]([\w.-]*))?(?:,.*)?", machines.strip())
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST={machines!r} can't be read: set MASTER_ADDR to the first machine's name")
    return match[1] + (match[2] or "") + (match[3] or "")


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    return int(value) if value is not None else None
