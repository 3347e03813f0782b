# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Data paths of a script as fields of a GPTDatasetConfig."""

import pytest

from megatron.bridge.data.config import GPTDatasetConfig
from megatron.bridge.recipes.utils.dataset_utils import (
    DATASET_PRESETS,
    build_dataset_config,
    dataset_train_mode,
    get_blend_fields_from_data_paths,
)
from megatron.bridge.recipes.utils.finetune_utils import (
    default_gsm8k_config,
    default_openmathinstruct2_config,
    default_squad_config,
)

SHARES = "9999,8,2"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, (None, None, None)),
        ({"data_paths": ["a"], "mock": True}, (None, None, None)),
        ({"data_paths": ["a", "b"]}, ((["a", "b"], None), None, SHARES)),
        ({"data_paths": ["0.3", "a", "0.7", "b"]}, ((["a", "b"], [0.3, 0.7]), None, SHARES)),
        ({"train_data_path": ["a"], "test_data_path": ["1", "b"]}, (None, [(["a"], None), None, (["b"], [1.0])], None)),
    ],
)
def test_paths_become_fields(options, fields):
    blend, blend_per_split, split = get_blend_fields_from_data_paths(**options)
    assert (blend, blend_per_split, split) == fields
    GPTDatasetConfig(seq_length=8, blend=blend, blend_per_split=blend_per_split, split=split).finalize()


def test_paths_may_stand_in_a_file(tmp_path):
    (tmp_path / "data.txt").write_text("0.5 a\n0.5 b\n")
    found = get_blend_fields_from_data_paths(data_args_path=tmp_path / "data.txt")
    assert found == ((["a", "b"], [0.5, 0.5]), None, SHARES)
    assert found == get_blend_fields_from_data_paths("0.5 a 0.5 b")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_paths": ["a"], "train_data_path": ["b"]}, "set one kind"),
        ({"data_paths": ["a"], "data_args_path": "b"}, "set one of them"),
        ({"data_paths": ["0.3", "a", "b"]}, "a weight before each path"),
        ({"data_paths": ["a", "0.3"]}, "a weight before each path"),
        ({"data_paths": ["0.3", "a", "0.7"]}, "a weight before each path"),
    ],
)
def test_contradictions_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        get_blend_fields_from_data_paths(**options)


def test_presets_are_configurations_by_a_short_name():
    for name in DATASET_PRESETS:
        config = build_dataset_config(name, 64, seed=3) if name != "mock" else build_dataset_config(name, 64)
        config.finalize()
        assert config.seq_length == 64 and getattr(config, "hf_dataset", "mock") == name
        assert dataset_train_mode(name) == ("pretrain" if name == "mock" else "finetune")
    assert build_dataset_config("rajpurkar/squad", 64).source.title == "rajpurkar/squad/plain_text"
    with pytest.raises(ValueError, match="dataset preset 'sqad': expected one of squad, gsm8k"):
        dataset_train_mode("sqad")


def test_the_defaults_of_recipes_by_their_functions():
    packed = default_squad_config(64, packed_sequence=True, pad_seq_to_mult=8)
    assert (packed.pack_size, packed.packing.pad_seq_to_mult, packed.hf_dataset) == (64, 8, "squad")
    assert default_gsm8k_config(64, do_validation=False).pack_size is None
    assert default_openmathinstruct2_config().pack_size == 4096
    for config in (packed, default_gsm8k_config(64), default_openmathinstruct2_config()):
        config.finalize()
