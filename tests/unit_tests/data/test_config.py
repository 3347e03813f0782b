# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import yaml

from megatron.bridge.data.config import (
    DatasetBuildContext,
    DatasetProvider,
    FinetuningDatasetConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
)


def test_public_defaults():
    config = FinetuningDatasetConfig(dataset_root="somewhere", seq_length=128)
    assert isinstance(config, GPTSFTDatasetConfig)
    config.finalize()
    options = config.options
    assert (options.prompt_template, options.label_key, options.truncation_field) == (
        "{input} {output}",
        "output",
        "input",
    )
    assert (options.answer_only_loss, options.add_bos, options.add_eos) == (True, False, True)
    assert (config.seed, config.dataloader_type, config.is_shuffled) == (1234, "batch", True)
    assert not MockGPTDatasetConfig(128).is_shuffled


def test_checks_change_nothing():
    config = GPTSFTDatasetConfig(128, dataset_root="somewhere", dataset_kwargs={"chat": True})
    before = yaml.safe_dump(vars(config))
    config.finalize()
    assert yaml.safe_dump(vars(config)) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packed_sequence_specs": {"packed_sequence_size": 8}}, "dataset.packed_sequence_specs=.*not supported yet"),
        ({"enable_offline_packing": True}, "dataset.enable_offline_packing=True: packing is not supported yet"),
        ({"offline_packing_specs": {"a": 1}}, "dataset.offline_packing_specs"),
        ({"hf_dataset": "squad"}, "dataset.hf_dataset='squad': data from a hub is not supported"),
        ({"preprocessing": "f"}, "dataset.preprocessing"),
        ({"dataset_root": None}, "dataset.dataset_root is not set"),
        ({"seq_length": 0}, "dataset.seq_length=0: expected an integer of 1 or more"),
        ({"max_train_samples": -3}, "dataset.max_train_samples=-3"),
        ({"dataloader_type": "external"}, "dataset.dataloader_type='external' is not supported"),
        ({"num_workers": -1}, "dataset.num_workers=-1"),
        ({"dataset_kwargs": {"promt_template": "x"}}, "unknown key 'promt_template': did you mean 'prompt_template'"),
    ],
)
def test_sft_configurations_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTSFTDatasetConfig(**{"seq_length": 128, "dataset_root": "somewhere"} | arguments).finalize()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTDatasetConfig(128, reset_attention_mask=True), "dataset.reset_attention_mask=True is not supported"),
        (GPTDatasetConfig(128, skip_getting_attention_mask_from_dataset=False), "is not supported"),
        (GPTDatasetConfig(128, blend=(["a"], None)), "dataset.split is not"),
        (GPTDatasetConfig(128, blend=(["a"], None), blend_per_split=[None] * 3), "both set"),
        (MockGPTDatasetConfig(128, blend=(["a"], None), split="1,0,0"), "set on mock data"),
    ],
)
def test_pretraining_configurations_that_cannot_work_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.finalize()


def test_a_provider_must_build_datasets():
    class Incomplete(DatasetProvider):
        pass

    with pytest.raises(TypeError, match="build_datasets"):
        Incomplete()
    assert DatasetBuildContext(1, 2, 3).tokenizer is None
