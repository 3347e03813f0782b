# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets by name: short names, the hub's cache, local copies."""

import logging
from types import SimpleNamespace

import pytest

from megatron.bridge.data.builders import DirectHFSFTDatasetConfig, HFDatasetSourceConfig
from megatron.bridge.data.sources import hf_loading
from megatron.bridge.data.sources.hf import load_and_adapt_hf_dataset
from megatron.bridge.utils.hf_hub import commits_of
from tests.unit_tests.data.hf_data import ROWS, build, text_of, texts


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """SQuAD in the hub's cache, as `hf download` lays it out, on a machine without a network."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    commit = "7b6d24c440a36b6815f21b70d25016731768db1f"
    folder = tmp_path / "hub" / "datasets--rajpurkar--squad"
    snapshot = folder / "snapshots" / commit
    (snapshot / "plain_text").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        path = snapshot / "plain_text" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    files = "".join(f"  - split: {name}\n    path: plain_text/{name}-*\n" for name in ("train", "validation"))
    (snapshot / "README.md").write_text(f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{files}---\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_short_name_finds_what_was_fetched_before(hub_cache, tokenizer):
    for _ in range(2):  # the second time from the tokens that were kept
        train, valid, _ = build(tokenizer, "squad")
        assert (len(train), len(valid)) == (20, 3)
        assert text_of(train[7], tokenizer) == "Context: the cat 7 Question: who? Answer: the cat<|im_end|>"
        assert tokenizer.ids_to_text(train[7]["labels"][train[7]["loss_mask"] == 1].tolist()) == " the cat<|im_end|>"
        assert "original_answers" not in "".join(train.report.warnings)
    assert list((hub_cache.parents[3] / "datasets").rglob("*.npz")), "tokens are kept in the library's cache"
    assert commits_of(["datasets/rajpurkar/squad"]) == {"datasets/rajpurkar/squad": hub_cache.name}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("in_memory", "told", "why"),
    [
        (False, COMMIT, None),
        (True, COMMIT, None),
        (True, None, "the hub didn't tell: no network"),
        (True, "default-0123456789abcdef", "it was found as 'default-0123456789abcdef', which is no commit"),
        (False, "default-0123456789abcdef", "it was found as 'default-0123456789abcdef', which is no commit"),
    ],
)
def test_the_commit_is_known_wherever_the_library_puts_its_tables(tmp_path, monkeypatch, caplog, in_memory, told, why):
    """One that it reads into memory, by `keep_in_memory` or because it is empty, has no file that tells."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"question": "q", "context": "c", "answers": {"text": ["a"]}}])
    if not in_memory:
        rows.save_to_disk(str(tmp_path / told))
        rows = datasets.load_from_disk(str(tmp_path / told))
    asked = []

    class Library:
        @staticmethod
        def load_dataset(path, name=None, split=None, cache_dir=None, revision=None, keep_in_memory=None, **more):
            return {"train": rows.select([]) if in_memory else datasets.Dataset.from_list([]), "validation": rows}

        @staticmethod
        def load_dataset_builder(path, name=None, cache_dir=None, revision=None, **more):
            asked.append(more)
            if told is None:
                raise ConnectionError("no network")
            return SimpleNamespace(hash=told)

    monkeypatch.setattr(hf_loading, "_library", lambda where: Library)
    monkeypatch.setattr("megatron.bridge.utils.hf_hub._commits", {})
    options = {"keep_in_memory": True, "split": None, "encoding": "utf-8"}
    hf_loading.load_from_hub(HFDatasetSourceConfig(dataset_name="some/data", hf_kwargs=options))
    assert commits_of(["datasets/some/data"]) == ({} if why else {"datasets/some/data": COMMIT})
    said = [record.getMessage() for record in caplog.records]
    assert all("its commit isn't recorded" in line and f"({why})" in line for line in said)
    assert len(said) == (1 if why else 0)
    assert asked == ([{"encoding": "utf-8"}] if in_memory else [])


def test_without_a_network_the_error_says_what_to_fetch_and_where(hub_cache, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_and_adapt_hf_dataset("gsm8k")
    message = str(caught.value)
    for part in (
        "openai/gsm8k",
        "hf download --repo-type dataset openai/gsm8k",
        str(hub_cache.parents[2]),
        "a local copy",
    ):
        assert part in message
    assert "\n" not in message


def test_a_part_of_the_files_is_refused(hub_cache):
    whole = hub_cache / "plain_text" / "train-00000-of-00001.parquet"
    whole.rename(whole.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(ValueError, match=r"plain_text/train-\*: 1 of 2 files are there: fetch the others"):
        load_and_adapt_hf_dataset("squad")


def test_a_local_copy_takes_the_same_function(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad), process_example_fn="squad")
    train, valid, _ = build(tokenizer, source)
    assert (len(train), len(valid)) == (20, 3)
    assert text_of(train[0], tokenizer) == "Context: the cat 0 Question: who? Answer: the cat<|im_end|>"


def test_a_directory_of_the_datasets_name_is_a_local_copy(squad, tokenizer, monkeypatch):
    monkeypatch.chdir(squad.parent)
    train, _, _ = build(tokenizer, "squad")
    assert text_of(train[0], tokenizer).startswith("Context: the cat 0")


def test_one_file_is_the_training_data(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad / "train.jsonl"), process_example_fn="squad", val_proportion=0.1)
    train, valid, _ = build(tokenizer, source)
    assert (len(train), len(valid)) == (18, 2)
    assert sorted(texts(train, tokenizer) + texts(valid, tokenizer)) == sorted(
        f"Context: the cat {number} Question: who? Answer: the cat<|im_end|>" for number in range(20)
    )


def test_a_direct_dataset_writes_nothing(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad), process_example_fn="squad")
    train, _, _ = build(tokenizer, source, kind=DirectHFSFTDatasetConfig)
    assert len(train) == 20 and not (squad / ".tokens").exists()
    assert len(build(tokenizer, source)[0]) == 20 and (squad / ".tokens").exists()
    with pytest.raises(ValueError, match="hf_dataset is not set"):
        DirectHFSFTDatasetConfig(64).finalize()


def test_a_directory_of_lines_goes_before_the_recipes_dataset(squad, write_jsonl, tokenizer, caplog):
    root = str(write_jsonl([{"input": "a", "output": "b"}]).parent)
    caplog.set_level(logging.INFO)
    train, _, _ = build(tokenizer, "squad", dataset_root=root, do_validation=False)
    assert len(train) == 1 and "dataset.hf_dataset isn't read: dataset.dataset_root=" in caplog.text
