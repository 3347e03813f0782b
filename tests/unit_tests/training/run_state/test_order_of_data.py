# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a resume says of data that isn't that of the run that saved."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron.bridge.data.config import GPTSFTDatasetConfig
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig
from megatron.bridge.training.run_state.order_of_data import warn_of_other_data
from megatron.bridge.utils.yaml_io import to_yaml_dict

BLEND = {"blend": (["a", "b"], [0.25, 0.75]), "seed": 1}


def _warned(saved, now, caplog):
    file = yaml.safe_load(yaml.safe_dump({"dataset": to_yaml_dict(GPTSFTDatasetConfig(32, **saved))}))
    warn_of_other_data(SimpleNamespace(dataset=GPTSFTDatasetConfig(**{"seq_length": 32, **now})), file, Path("iter_2"))
    return caplog.text


@pytest.mark.parametrize(
    "same", [BLEND, {"dataset_root": "a"}, {"hf_dataset": HFDatasetSourceConfig("squad", split="train[:9]")}]
)
def test_the_same_data_is_no_matter(same, caplog):
    assert _warned(same, {**same, "seq_length": 64, "memmap_workers": 2}, caplog) == ""


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"blend": (["a", "b"], [0.5, 0.5])}, "dataset.blend [['a', 'b'], [0.25, 0.75]] -> [['a', 'b'], [0.5, 0.5]]"),
        ({"seed": 2}, "dataset.seed 1 -> 2"),
        ({"dataloader_type": "single"}, "dataset.dataloader_type batch -> single"),
        ({"blend": None, "hf_dataset": "squad"}, "dataset.hf_dataset None -> squad"),
    ],
)
def test_other_data_is_named(change, shown, caplog):
    text = _warned(BLEND, {**BLEND, **change}, caplog)
    assert "iter_2 was saved by a run on other data, or in another order:" in text and shown in text


def test_a_dataset_of_ones_own_has_no_such_options(caplog):
    warn_of_other_data(SimpleNamespace(dataset=HFDatasetSourceConfig("mine")), {"dataset": {"seed": 1}}, Path("iter_2"))
    warn_of_other_data(SimpleNamespace(dataset=GPTSFTDatasetConfig(32, seed=1)), {}, Path("iter_2"))
    assert caplog.text == ""
