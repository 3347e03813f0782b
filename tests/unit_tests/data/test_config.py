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
from megatron.bridge.data.config import PackedSequenceSpecs as PACKS
from megatron.bridge.data.sources.hf import HFDatasetSourceConfig
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict


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


def test_packs_survive_a_file_and_have_their_public_path():
    from megatron.bridge.data.datasets.packed_sequence import PackedSequenceSpecs

    config = GPTSFTDatasetConfig(128, dataset_root="x", packed_sequence_specs=PACKS(packed_sequence_size=64))
    assert PackedSequenceSpecs is PACKS and from_yaml_dict(to_yaml_dict(config)) == config


def test_checks_change_nothing():
    config = GPTSFTDatasetConfig(128, dataset_root="somewhere", dataset_kwargs={"chat": True})
    before = yaml.safe_dump(vars(config))
    config.finalize()
    assert yaml.safe_dump(vars(config)) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packed_sequence_specs": {"packed_sequence_size": 8}}, "expected PackedSequenceSpecs"),
        ({"packed_sequence_specs": PACKS(packed_sequence_size=129)}, r"=129: expected 1 to dataset.seq_length=128, or"),
        ({"packed_sequence_specs": PACKS(packed_sequence_size=0)}, "packed_sequence_specs.packed_sequence_size=0"),
        ({"packed_sequence_specs": PACKS(pad_cu_seqlens=True)}, "pad_cu_seqlens=True is not supported"),
        ({"packed_sequence_specs": PACKS(pad_seq_to_mult=0)}, "pad_seq_to_mult=0: expected an integer of 1 or more"),
        ({"packed_sequence_specs": PACKS(pad_seq_to_mult=129)}, "pad_seq_to_mult=129: no sample fits into a row then"),
        ({"packed_sequence_specs": PACKS(packed_train_data_path=7)}, "packed_train_data_path=7: expected the path of"),
        ({"packed_sequence_specs": PACKS(packed_metadata_path="x")}, "packed_metadata_path='x' without packed_train"),
        (
            {"packed_sequence_specs": PACKS(packed_train_data_path="x"), "dataset_root": None},
            "packed_train_data_path='x' without validation data: set packed_val_data_path, or",
        ),
        (
            {"packed_sequence_specs": PACKS(packed_train_data_path="x"), "max_train_samples": 3},
            "dataset.max_train_samples=3 with packed_train_data_path='x': rows that are packed can't be cut",
        ),
        ({"packed_sequence_specs": PACKS(), "enable_offline_packing": True}, "both set"),
        ({"offline_packing_specs": PACKS()}, "set dataset.enable_offline_packing=true with it"),
        (
            {"hf_dataset": {"path": "squad"}},
            "dataset.hf_dataset=.*: expected a dataset's name, or HFDatasetSourceConfig",
        ),
        (
            {"dataset_root": None, "hf_dataset": HFDatasetSourceConfig()},
            "expected one of dataset_name and dataset_dict",
        ),
        ({"split": "90,10"}, "dataset.split=.90,10.: expected shares of training, validation and test, such as"),
        ({"split": "0,1,1"}, "dataset.split='0,1,1': expected shares"),
        ({"memmap_workers": 0}, "dataset.memmap_workers=0: expected an integer of 1 or more"),
        ({"preprocessing": "f"}, "dataset.preprocessing='f': expected PromptCompletionSFTPreprocessingConfig or Chat"),
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
