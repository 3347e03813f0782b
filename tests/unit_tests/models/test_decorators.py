# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The main function of a script."""

import pytest
import torch.distributed as dist

from megatron.bridge.models.decorators import torchrun_main


def bring_up():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_what_it_returns_comes_back_and_its_groups_are_taken_down():
    @torchrun_main
    def main(number, *, more=0):
        """Says what it does."""
        bring_up()
        return number + more

    assert main(1, more=2) == 3 and not dist.is_initialized()
    assert main.__name__ == "main" and main.__doc__ == "Says what it does."


def test_an_error_is_raised_and_leaves_no_group():
    @torchrun_main
    def main():
        bring_up()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        main()
    assert not dist.is_initialized()


def test_an_error_is_written_where_torchrun_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    @torchrun_main
    def main():
        raise KeyError("mine")

    with pytest.raises(KeyError):
        main()
    assert "KeyError" in (tmp_path / "error.json").read_text()


def test_a_group_of_the_callers_stays():
    bring_up()
    try:
        torchrun_main(lambda: None)()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
