# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.data.builders import ChatSFTPreprocessingConfig, GPTSFTDatasetConfig, HFDatasetSourceConfig
from megatron.bridge.utils.overrides import apply_overrides
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (HFDatasetSourceConfig("a", dataset_dict=[{}]), "expected one of dataset_name and dataset_dict"),
        (HFDatasetSourceConfig("a", val_proportion=1.5), "val_proportion=1.5: expected a share"),
        (HFDatasetSourceConfig("a", split="train[1"), r"split='train\[1': expected a split's name"),
        (
            HFDatasetSourceConfig("a", process_example_fn="sqad"),
            "process_example_fn='sqad': expected a function, or squad",
        ),
        (HFDatasetSourceConfig("a", hf_kwargs={"split": "b"}), "hf_kwargs has 'split': expected it as a field"),
    ],
)
def test_sources_that_cannot_work_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        GPTSFTDatasetConfig(64, hf_dataset=source).finalize()


def test_names_of_other_libraries_mean_the_same():
    source = HFDatasetSourceConfig(path="a", name="b")
    assert (source.dataset_name, source.subset) == ("a", "b")
    source.dataset_subset = "c"
    assert source == HFDatasetSourceConfig("a", "c") and source.config_name == "c"
    with pytest.raises(TypeError, match="got dataset_name twice, once as path"):
        HFDatasetSourceConfig(dataset_name="a", path="b")


def test_a_source_survives_a_file_and_takes_overrides():
    config = GPTSFTDatasetConfig(
        64, hf_dataset=HFDatasetSourceConfig("squad", split="train[:5]"), preprocessing=ChatSFTPreprocessingConfig()
    )
    assert from_yaml_dict(to_yaml_dict(config)) == config
    config = GPTSFTDatasetConfig(64, hf_dataset="squad")
    apply_overrides(config, ["hf_dataset.split=train[:7]", "hf_dataset.process_example_fn=gsm8k"])
    assert config.hf_dataset == HFDatasetSourceConfig("squad", split="train[:7]", process_example_fn="gsm8k")
    apply_overrides(config, ["hf_dataset=a/b"])
    assert config.hf_dataset == "a/b"
