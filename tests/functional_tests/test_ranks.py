# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The ranks that tests share (`tests/rigs/ranks.py`): a run leaves nothing that would end them."""

import os

from tests.rigs.on_ranks import make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config


def _trained_in(directory):
    make_pretrained(directory / "base")
    run_finetune(tiny_config(directory, train_iters=1, checkpoint={"pretrained_checkpoint": str(directory / "base")}))
    return os.getpid()


def test_the_ranks_of_a_run_serve_the_next_task(tmp_path):
    trained_in = run_on_ranks(_trained_in, 2, tmp_path)
    assert run_on_ranks(os.getpid, 2) == trained_in
