# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run records of the models, tokenizers and datasets that it takes from the hub, and what a resume says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.bridge.data.config import GPTSFTDatasetConfig, MockGPTDatasetConfig
from megatron.bridge.training.run_state.hub_revisions import record_hub_revisions
from megatron.bridge.utils import hf_hub
from megatron.bridge.utils.hf_hub import find_hf_directory, note_commit
from tests.rigs.hub import COMMIT, put_into_cache, use_hub
from tests.unit_tests.models.tiny_llama import save_tiny_llama

MODEL, OTHER = "some-org/Tiny-1B", "fedcba9876543210fedcba9876543210fedcba98"

pytestmark = pytest.mark.any_core


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a model, in a process that has found nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_hub, "_commits", {})
    use_hub(monkeypatch, tmp_path / "hub")
    put_into_cache(tmp_path / "hub", MODEL, save_tiny_llama(tmp_path / "hf", num_hidden_layers=1))


def _recorded(saved=None, dataset=None, train_state=True):
    cfg = SimpleNamespace(
        model=SimpleNamespace(hf_model_id=MODEL),
        tokenizer=SimpleNamespace(tokenizer_model="some-org/not-asked-for-yet"),
        checkpoint=SimpleNamespace(pretrained_checkpoint=None, hub_revisions={"of": "another run"}),
        dataset=dataset or MockGPTDatasetConfig(seq_length=32),
    )
    plan = None
    if saved is not None:
        plan = SimpleNamespace(
            run_config={"checkpoint": {"hub_revisions": saved}}, train_state=train_state, path=Path("iter_2")
        )
    record_hub_revisions(cfg, plan)
    return cfg.checkpoint.hub_revisions


def test_the_commit_of_what_was_found_is_recorded(cache, caplog):
    assert _recorded() is None
    find_hf_directory(MODEL, with_weights=False)
    note_commit("else/where", OTHER)  # by something that isn't this run
    note_commit("datasets/rajpurkar/squad", OTHER)
    note_commit(MODEL, "no commit")
    assert _recorded() == {MODEL: COMMIT}
    data = GPTSFTDatasetConfig(32, hf_dataset="squad")
    assert _recorded(dataset=data) == {MODEL: COMMIT, "datasets/rajpurkar/squad": OTHER}
    assert caplog.text == ""


def test_a_resume_names_what_has_changed_and_keeps_what_it_did_not_fetch(cache, caplog):
    kept = {"some-org/not-asked-for-yet": OTHER}
    assert _recorded({**kept, "of/another": OTHER}) == kept
    find_hf_directory(MODEL)
    assert _recorded({**kept, MODEL: COMMIT}) == {**kept, MODEL: COMMIT}
    assert caplog.text == ""
    assert _recorded({**kept, MODEL: OTHER}) == {**kept, MODEL: COMMIT}
    (said,) = caplog.messages
    assert said.startswith(f"iter_2 was saved with {MODEL} at revision {OTHER} of the hub, and this run has it at")
    assert f"`hf download {MODEL} --revision {OTHER}`" in said and "\n" not in said


def test_of_two_commits_of_one_name_each_is_compared(cache, caplog):
    """The tokenizer's and the weights', say, of which a resume needs one alone."""
    third = "00112233445566778899aabbccddeeff00112233"
    both = f"{COMMIT}, {OTHER}"
    find_hf_directory(MODEL)
    assert _recorded({MODEL: both}) == {MODEL: both}
    assert caplog.text == ""
    assert _recorded({MODEL: f"{third}, {OTHER}"}) == {MODEL: COMMIT}
    (said,) = caplog.messages
    assert f"run `hf download {MODEL} --revision {third}` and `hf download {MODEL} --revision {OTHER}` and name" in said


def test_an_imported_checkpoint_keeps_the_commit_of_its_weights(cache, caplog):
    saved = {MODEL: OTHER, "datasets/rajpurkar/squad": OTHER}
    data = GPTSFTDatasetConfig(32, hf_dataset="squad")
    assert _recorded(saved, data, train_state=False) == {MODEL: OTHER}, "its data are of no concern to this run"
    find_hf_directory(MODEL)
    _recorded(saved, data, train_state=False)
    assert f"`hf download {MODEL} --revision {OTHER}`" in caplog.text
