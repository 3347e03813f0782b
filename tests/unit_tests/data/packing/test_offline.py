# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Packs that are written are read as what a run would have packed."""

import json

import pytest
import torch

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, PackedSequenceSpecs
from megatron.bridge.data.loaders import build_datasets
from megatron.bridge.data.packing.offline import prepare_gpt_sft_packed_data

ROWS = [{"input": "the cat" * (1 + number % 3), "output": f"sat {number}"} for number in range(12)]


@pytest.mark.parametrize(("suffix", "multiple"), [(".npy", 1), (".npy", 8), (".parquet", 1)])
def test_a_run_reads_what_was_written(write_jsonl, tokenizer, tmp_path, suffix, multiple):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="the extra datasets is not installed")
    data, packs, about = write_jsonl(ROWS), tmp_path / f"packs{suffix}", tmp_path / "packs.json"
    prepare_gpt_sft_packed_data(data, packs, about, 64, tokenizer, seed=1234, pad_seq_to_mult=multiple)
    context = DatasetBuildContext(0, None, None, tokenizer)

    def read(**paths):
        specs = PackedSequenceSpecs(packed_sequence_size=64, pad_seq_to_mult=multiple, **paths)
        root = None if paths else str(tmp_path)
        options = {"do_validation": False, "do_test": False, "packed_sequence_specs": specs}
        return build_datasets(GPTSFTDatasetConfig(64, dataset_root=root, **options), context)[0]

    written = read(packed_train_data_path=str(packs), packed_metadata_path=str(about))
    packed = read()
    assert len(written) == len(packed) > 1
    for ours, theirs in zip(packed, written, strict=True):
        learned = ours["loss_mask"] == 1
        assert torch.equal(ours["cu_seqlens"], theirs["cu_seqlens"])
        assert torch.equal(ours["loss_mask"], theirs["loss_mask"])
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["tokens"][learned], theirs["tokens"][learned])
    assert json.loads(about.read_text())[0]["num_samples"] == len(ROWS)


def test_one_rank_writes_without_the_others(write_jsonl, tokenizer, tmp_path, monkeypatch):
    def wait_for_the_others(value):
        raise AssertionError("a collective")

    monkeypatch.setattr("megatron.bridge.utils.distributed.all_gathered", wait_for_the_others)
    prepare_gpt_sft_packed_data(write_jsonl(ROWS), tmp_path / "packs.npy", None, 64, tokenizer)
    assert (tmp_path / "packs.npy").is_file()


def test_what_cannot_be_written_is_refused(write_jsonl, tokenizer, tmp_path):
    data = write_jsonl(ROWS)
    with pytest.raises(ValueError, match="expected a file that ends in .npy or .parquet"):
        prepare_gpt_sft_packed_data(data, tmp_path / "packs.bin", None, 64, tokenizer)
    with pytest.raises(ValueError, match="has no tokenizer"):
        prepare_gpt_sft_packed_data(data, tmp_path / "packs.npy")
    with pytest.raises(ValueError, match="packed_sequence_size=0: expected an integer"):
        prepare_gpt_sft_packed_data(data, tmp_path / "packs.npy", None, 0, tokenizer)
