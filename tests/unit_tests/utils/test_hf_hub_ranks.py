# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.utils import hf_hub_ranks
from megatron.bridge.utils.hf_hub_ranks import find_on_all_ranks
from tests.rigs.hub import COMMIT, put_into_cache, use_hub

NAME, OPTION = "some-org/Tiny-1B", "checkpoint.pretrained_checkpoint"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A cached model."""
    monkeypatch.chdir(tmp_path)
    use_hub(monkeypatch, tmp_path / "hub")
    (tmp_path / "source").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "source" / name).write_text(name)
    return put_into_cache(tmp_path / "hub", NAME, tmp_path / "source")


def test_a_rank_that_needs_nothing_finds_nothing(snapshot):
    assert find_on_all_ranks(lambda: NAME, option=OPTION) == snapshot
    assert find_on_all_ranks(lambda: None, option=OPTION) is None


def test_machines_with_different_revisions_are_refused(snapshot, monkeypatch):
    monkeypatch.setattr(hf_hub_ranks, "all_gathered", lambda commit: [commit, None, "f" * 40])
    message = f"{OPTION} is at revision {COMMIT} on rank 0, and at {'f' * 40} on rank 2: fetch one on all machines"
    with pytest.raises(ValueError, match=message):
        find_on_all_ranks(lambda: NAME, option=OPTION)


def test_an_error_names_the_option(snapshot):
    with pytest.raises(FileNotFoundError, match=f"{OPTION}: 'some-org/Other' is no directory"):
        find_on_all_ranks(lambda: "some-org/Other", option=OPTION)
