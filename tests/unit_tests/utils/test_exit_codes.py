# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How commands end."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.bridge.utils.exit_codes import exit_with

RECIPES = Path(__file__).parents[3] / "scripts" / "training" / "run_recipe.py"


@pytest.mark.parametrize(("argument", "statuses"), [("--list", [141]), ("--help", [0, 141])])  # argparse's is its own
def test_a_reader_that_goes_away_ends_a_command_in_silence(argument, statuses):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, str(RECIPES), argument], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode in statuses and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("argument", "unbuffered"), [("--list", ""), ("--list", "1"), ("--help", ""), ("--help", "1")])
def test_output_that_cannot_be_written_ends_a_command_with_one_line(argument, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, str(RECIPES), argument]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    line = "standard output can't be written (No space left on device): send it elsewhere\n"
    assert (done.returncode, done.stderr) == (1, line)


class _Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fileno(self):
        return self.file


def test_a_full_disk_behind_standard_output_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    with open(tmp_path / "full", "w") as file:
        full = _Full()
        full.file = file.fileno()
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            exit_with(lambda: print("figures"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "standard output can't be written (No space left on device): send it elsewhere\n"
    )


def test_a_full_disk_elsewhere_is_an_error():
    def main():
        raise OSError(errno.ENOSPC, "to a checkpoint")

    with pytest.raises(OSError, match="to a checkpoint"):
        exit_with(main)


def test_a_command_whose_output_is_closed_ends_as_it_would(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: 0)
    assert ended.value.code == 0


def test_another_broken_pipe_is_an_error():
    def main():
        raise BrokenPipeError("to a worker")

    with pytest.raises(BrokenPipeError, match="to a worker"):
        exit_with(main)


@pytest.mark.parametrize("status", [0, 1, None])
def test_the_status_is_the_commands(status):
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: status)
    assert ended.value.code == status


def test_every_command_ends_so():
    root = RECIPES.parents[2]
    commands = [*(root / "src").rglob("*.py"), RECIPES]  # the launcher imports nothing of the package for its --help
    for path in commands:
        text = path.read_text()
        assert 'if __name__ == "__main__":' not in text or "    exit_with(main)\n" in text, path
