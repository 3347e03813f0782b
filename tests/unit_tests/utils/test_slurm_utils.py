# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What Slurm's environment says."""

import pytest

from megatron.bridge.utils import slurm_utils


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("node7", "node7"),
        ("gpu[03-06,09],login1", "gpu03"),
        ("a1,a2", "a1"),
        ("rack[1,2]-gpu", "rack1-gpu"),
        ("h-1.x[10-11]", "h-1.x10"),
    ],
)
def test_the_first_machine_of_a_list(machines, first):
    assert slurm_utils.first_machine(machines) == first


def test_a_job_says_where_its_ranks_meet(monkeypatch):
    job = {"JOB_ID": "40123", "PROCID": "5", "NTASKS": "8", "LOCALID": "1", "JOB_NODELIST": "gpu[03-04]"}
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert slurm_utils.resolve_slurm_master_addr() == "gpu03"
    assert slurm_utils.resolve_slurm_master_port() == 15000 + 123
    ranks = [slurm_utils.resolve_slurm_rank(), slurm_utils.resolve_slurm_world_size()]
    assert [*ranks, slurm_utils.resolve_slurm_local_rank()] == [5, 8, 1]


def test_outside_slurm_there_is_nothing_to_say(monkeypatch):
    for name in ("JOB_ID", "PROCID", "NTASKS", "LOCALID", "JOB_NODELIST", "STEP_NODELIST"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert not slurm_utils.is_slurm_job()
    assert slurm_utils.resolve_slurm_master_addr() is slurm_utils.resolve_slurm_master_port() is None


def test_a_list_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        slurm_utils.first_machine("[1-2")
