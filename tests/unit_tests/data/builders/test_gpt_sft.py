# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets that a script builds by itself."""

import pytest

from megatron.bridge.data.builders import DirectHFSFTDatasetBuilder, GPTSFTDatasetBuilder, GPTSFTDatasetConfig
from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split
from megatron.bridge.data.config import HFDatasetSourceConfig

ROWS = [{"input": f"the cat {number}", "output": "sat"} for number in range(6)]


@pytest.fixture
def root(write_jsonl):
    write_jsonl(ROWS[:2], "validation.jsonl")
    return str(write_jsonl(ROWS).parent)


def test_from_a_configuration_or_from_its_fields(root, tokenizer):
    config = GPTSFTDatasetConfig(64, dataset_root=root, do_test=False)
    fields = {"dataset_root": root, "seq_length": 64, "do_test": False}
    for builder in (GPTSFTDatasetBuilder(config, tokenizer), GPTSFTDatasetBuilder(tokenizer=tokenizer, **fields)):
        train, valid, test = builder.build()
        assert (len(train), len(valid), test) == (6, 2, None)


def test_a_tokenizer_of_transformers_will_do(root, tokenizer):
    fields = {"dataset_root": root, "seq_length": 64, "do_test": False}
    ours = GPTSFTDatasetBuilder(tokenizer=tokenizer, **fields).build()[0]
    theirs = GPTSFTDatasetBuilder(tokenizer=tokenizer.hf_tokenizer, **fields).build()[0]
    assert ours[3]["tokens"].tolist() == theirs[3]["tokens"].tolist()


def test_prepared_data_is_kept(root, tokenizer, caplog):
    builder = GPTSFTDatasetBuilder(dataset_root=root, seq_length=64, do_test=False, tokenizer=tokenizer)
    builder.prepare_data()
    caplog.set_level("INFO")
    builder.build()
    assert caplog.text.count("its tokens are taken from") == 2


def test_one_split(root, tokenizer):
    config = GPTSFTDatasetConfig(64, dataset_root=root, do_test=False)
    sizes = {split: build_gpt_sft_split(config, tokenizer, split) for split in ("training", "train", "validation")}
    assert {split: len(rows) for split, rows in sizes.items()} == {"training": 6, "train": 6, "validation": 2}
    assert build_gpt_sft_split(config, tokenizer, "test") is None
    with pytest.raises(ValueError, match="split='dev': expected training, validation or test"):
        build_gpt_sft_split(config, tokenizer, "dev")


def test_a_blend_goes_before_a_dataset(root, tokenizer, caplog):
    caplog.set_level("INFO")
    config = GPTSFTDatasetConfig(64, blend=([root, root], [1, 2]), hf_dataset="squad", do_test=False)
    train, valid, _ = GPTSFTDatasetBuilder(config, tokenizer).build()
    assert (len(train), len(valid), train.weights) == (12, 4, [1, 2])
    assert "dataset.hf_dataset isn't read: dataset.blend is set" in caplog.text


def test_straight_from_rows(tokenizer):
    source = HFDatasetSourceConfig(dataset_dict={"train": ROWS, "validation": ROWS[:1]})
    train, valid, _ = DirectHFSFTDatasetBuilder(tokenizer=tokenizer, seq_length=64, hf_dataset=source).build()
    assert (len(train), len(valid)) == (6, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tokenizer is not set"),
        (
            {"config": GPTSFTDatasetConfig(64, dataset_root="x"), "seq_length": 8, "tokenizer": 1},
            "and seq_length are both",
        ),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTSFTDatasetBuilder(**arguments)
    config = GPTSFTDatasetConfig(64, dataset_root="x")
    with pytest.raises(ValueError, match="config is a GPTSFTDatasetConfig: expected DirectHFSFTDatasetConfig"):
        DirectHFSFTDatasetBuilder(config, tokenizer=1)
