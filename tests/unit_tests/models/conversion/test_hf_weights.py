# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.models.conversion.hf_weights import (
    INDEX_FILE,
    HFWeights,
    HFWeightsWriter,
    ShardPlan,
    names_of_tensors,
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(8, 6, generator=generator).bfloat16() for name in ("a", "b", "c")}


def write(directory, tensors, max_shard_bytes=10**6):
    plan = ShardPlan.make([(name, tensor.nbytes) for name, tensor in tensors.items()], max_shard_bytes)
    writer = HFWeightsWriter(directory, plan)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**6, 1), (200, 2), (1, 3)])
def test_what_is_written_is_read(tmp_path, tensors, max_shard_bytes, num_files):
    write(tmp_path, tensors, max_shard_bytes)
    weights = HFWeights(tmp_path)
    assert len(set(weights.files.values())) == num_files == len(list(tmp_path.glob("*.safetensors")))
    assert (tmp_path / INDEX_FILE).exists() == (num_files > 1)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor)
        assert (weights.shape(name), weights.dtype(name)) == ((8, 6), "BF16")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")} == {0o644}


def test_plan_fills_files_in_order():
    plan = ShardPlan.make([("a", 6), ("b", 3), ("c", 2), ("big", 50), ("d", 1)], 10)
    files = {name: int(file[6:11]) for name, file in plan.file_of.items()}
    assert files == {"a": 1, "b": 1, "c": 2, "big": 3, "d": 4}
    assert plan.total_bytes == 62
    assert plan.file_of["d"] == "model-00004-of-00004.safetensors"


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        HFWeights(tmp_path).files  # noqa: B018


def test_missing_shard_is_named(tmp_path, tensors):
    write(tmp_path, tensors, 200)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors is missing"):
        HFWeights(tmp_path).files  # noqa: B018


def test_half_written_file_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-50])
    with pytest.raises(ValueError, match="model.safetensors is damaged or half-written"):
        HFWeights(tmp_path).files  # noqa: B018


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged"),
        ('{"weight_map": {"a": "model-1.safetensors", "z": "model-1.safetensors"}}', "holds no 'z'"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "names '../elsewhere.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd' for 'a': expected a file in the same directory"),
        ('{"weight_map": {"a": ".."}}', "names '..' for 'a'"),
        ('{"weight_map": {"a": 1}}', "names 1 for 'a'"),
        ('{"weight_map": [1, 2]}', "is damaged"),
    ],
)
def test_wrong_index_is_named(tmp_path, tensors, index, message):
    save_file(tensors, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(ValueError, match=message):
        HFWeights(tmp_path).files  # noqa: B018


def test_index_is_what_transformers_writes(tmp_path, tensors):
    write(tmp_path, tensors, 200)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_single_file_goes_before_an_index(tmp_path, tensors, caplog):
    """As in transformers: an index and its shards are what is left of an earlier save."""
    write(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()}, 200)
    for shards_are_there in (True, False):
        save_file(tensors, tmp_path / "model.safetensors")
        weights = HFWeights(tmp_path)
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
        assert f"model.safetensors is read, as by transformers, and {INDEX_FILE} is not" in caplog.text
        caplog.clear()
        for path in tmp_path.glob("model-*") if shards_are_there else ():
            path.unlink()


def test_what_a_shard_holds_counts_though_no_index_names_it(tmp_path, tensors):
    write(tmp_path, tensors, 200)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    del index["weight_map"]["b"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert set(HFWeights(tmp_path).files) == set(tensors)
    save_file({**load_file(tmp_path / "model-00002-of-00002.safetensors"), "b": tensors["b"]}, tmp_path / "more")
    (tmp_path / "more").rename(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors both hold 'b': expected it once"):
        HFWeights(tmp_path).files  # noqa: B018


def test_an_index_alone_names_the_language_model_as_its_own_files_would(tmp_path):
    """As for a model of the hub whose weights aren't fetched, because an export reads none."""
    names = ("model.language_model.norm.weight", "model.visual.norm.weight", "lm_head.weight", "mtp.norm.weight")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    assert names_of_tensors(tmp_path) == {"model.norm.weight", "lm_head.weight", "mtp.norm.weight"}
