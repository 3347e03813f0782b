# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.bridge.data.config import (
    DatasetBuildContext,
    DatasetProvider,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
    TokenizerConfig,
)
from megatron.bridge.data.loaders import build_datasets, build_iterator, padding_for
from megatron.bridge.data.tokenizer import NullTokenizer, build_tokenizer
from megatron.bridge.recipes.utils.dataset_utils import get_blend_fields_from_data_paths
from tests.rigs.ranks import run_on_ranks


@pytest.fixture
def sft_root(tmp_path):
    for split, size in {"training": 12, "validation": 5}.items():
        rows = [{"input": f"{split} {number}", "output": "the cat " * (number + 1)} for number in range(size)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def data_log(caplog):
    logger = logging.getLogger("megatron.bridge.data")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def context(tokenizer, samples=100):
    return DatasetBuildContext(samples, 10, 10, tokenizer)


def test_sft_datasets_are_built_and_reported(sft_root, tokenizer, data_log):
    config = GPTSFTDatasetConfig(128, dataset_root=str(sft_root), max_train_samples=9)
    train, valid, test = build_datasets(config, context(tokenizer))
    assert (len(train), len(valid), test) == (9, 5, None)
    assert "training.jsonl: 9 samples" in data_log.text and "validation.jsonl: 5 samples" in data_log.text
    assert "test.jsonl does not exist" in data_log.text


def test_unwanted_splits_are_not_read(sft_root, tokenizer, data_log):
    (sft_root / "validation.jsonl").write_text("{broken")
    config = GPTSFTDatasetConfig(128, dataset_root=str(sft_root), do_validation=False, do_test=False)
    assert build_datasets(config, context(tokenizer))[1:] == (None, None)
    assert "test.jsonl" not in data_log.text


def test_padding_follows_the_configuration(sft_root, tokenizer):
    config = GPTSFTDatasetConfig(120, dataset_root=str(sft_root), dataset_kwargs={"pad_seq_length_to_mult": 8})
    padding = padding_for(config, tokenizer, seq_length=120, divisor=3)
    assert (padding.seq_length, padding.multiple_of, padding.pad_id) == (120, 24, tokenizer.pad_id)
    with pytest.raises(ValueError, match="seq_length=120 is not a multiple of 7"):
        padding_for(config, tokenizer, seq_length=120, divisor=7)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("training.jsonl", r"training\.jsonl does not exist"),
        (
            "validation.jsonl",
            r"validation\.jsonl does not exist: add it, cut it off with .* or set dataset.do_validation=false",
        ),
        ("", r"dataset.dataset_root='.*' is no directory"),
    ],
)
def test_what_is_missing_is_named(sft_root, tokenizer, missing, message):
    target = sft_root / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    config = GPTSFTDatasetConfig(128, dataset_root=str(sft_root))
    with pytest.raises(FileNotFoundError, match=message) as caught:
        build_datasets(config, context(tokenizer))
    assert "\n" not in str(caught.value)


def test_a_run_needs_a_tokenizer(sft_root):
    for config in (GPTSFTDatasetConfig(128, dataset_root=str(sft_root)), MockGPTDatasetConfig(16)):
        with pytest.raises(ValueError, match="DatasetBuildContext.tokenizer is not set"):
            build_datasets(config, context(None))


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return dict.fromkeys(("tokens", "labels", "loss_mask"), torch.tensor([index]))


@dataclass(kw_only=True)
class OwnData(DatasetProvider):
    result: tuple = ()

    def build_datasets(self, context):
        return self.result or (Numbers(context.train_samples), None, None)


def test_a_users_provider_is_asked(tokenizer):
    train, valid, test = build_datasets(OwnData(), context(tokenizer, samples=30))
    assert (len(train), valid, test) == (30, None, None)
    with pytest.raises(ValueError, match="OwnData.build_datasets returned tuple: expected a tuple of three datasets"):
        build_datasets(OwnData(result=(1, 2)), context(tokenizer))
    with pytest.raises(ValueError, match="OwnData.build_datasets returned int"):
        build_datasets(OwnData(result=1), context(tokenizer))
    with pytest.raises(ValueError, match="dataset is a dict: expected GPTSFTDatasetConfig"):
        build_datasets({}, context(tokenizer))


def first_micro_batch(dataset, config, tokenizer):
    padding = padding_for(config, tokenizer, seq_length=config.seq_length)
    sizes = {"micro_batch_size": 2, "global_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
    return next(build_iterator(dataset, consumed_samples=0, seed=1, shuffle=False, padding=padding, **sizes))


def test_cores_mock_data_flows_through_the_same_iterator():
    config, tokenizer = MockGPTDatasetConfig(32), NullTokenizer(100)
    train, valid, test = build_datasets(config, context(tokenizer, samples=8))
    assert min(len(train), len(valid), len(test)) >= 8
    batch = first_micro_batch(train, config, tokenizer)
    assert batch["tokens"].shape == (2, 32)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["attention_mask"] is None


def write_indexed_dataset(prefix: Path, documents: list[list[int]]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_cores_indexed_data_flows_through_the_same_iterator(tmp_path):
    tokenizer = NullTokenizer(1000)
    documents = [[*range(start, start + 50), tokenizer.eod] for start in range(0, 800, 10)]
    prefix = write_indexed_dataset(tmp_path / "corpus", documents)
    config = GPTDatasetConfig(16, blend=([prefix], None), split="80,10,10", path_to_cache=str(tmp_path / "cache"))
    config.finalize()
    train, valid, test = build_datasets(config, DatasetBuildContext(20, 4, 4, tokenizer))
    assert len(train) >= 20 and valid is not None and test is not None
    batch = first_micro_batch(train, config, tokenizer)
    steps = batch["labels"] - batch["tokens"]
    inside = (batch["tokens"] != tokenizer.eod) & (batch["labels"] != tokenizer.eod)
    assert inside.any() and (steps[inside] == 1).all()


@pytest.fixture
def corpora(tmp_path):
    """Core's files: documents of ids below 400 in one, above in the other."""
    return [
        write_indexed_dataset(tmp_path / name, [[*range(start, start + 40), 999] for start in starts])
        for name, starts in (("low", range(0, 350, 10)), ("high", range(400, 900, 10)))
    ]


def shares(dataset, size):
    """How many of the first samples are from each corpus."""
    low = sum(int(dataset[index]["tokens"].min()) < 400 for index in range(size))
    return low, size - low


def test_a_scripts_data_paths_become_a_blend_that_core_reads(corpora):
    low, high = corpora
    blend, per_split, split = get_blend_fields_from_data_paths(data_paths=["0.25", low, "0.75", high])
    options = {"random_seed": 5}
    config = GPTDatasetConfig(16, blend=blend, blend_per_split=per_split, split="90,5,5" if split else None, **options)
    tokenizer = NullTokenizer(1000)
    train, valid, _ = build_datasets(config, DatasetBuildContext(40, 4, 4, tokenizer))
    assert shares(train, 40) == (10, 30) and len(valid) >= 4
    assert first_micro_batch(train, config, tokenizer)["tokens"].shape == (2, 16)
    _, per_split, _ = get_blend_fields_from_data_paths(
        train_data_path=[low, high], valid_data_path=[low, high], test_data_path=[high]
    )
    config = GPTDatasetConfig(16, blend_per_split=per_split, **options)
    several = DatasetBuildContext(None, None, None, tokenizer, multiple_validation_sets=True)
    train, valid, test = build_datasets(config, several)
    assert list(valid) == ["low", "high"] and shares(test, len(test))[0] == 0
    assert [shares(each, len(each)).index(0) for each in valid.values()] == [1, 0]
    assert len(train) == sum(map(len, valid.values()))  # an epoch of both
    with pytest.raises(ValueError, match=r"train.num_epochs with weights in dataset.blend \(\[1.0, 2.0\]\)"):
        build_datasets(GPTDatasetConfig(16, blend=([low, high], [1.0, 2.0]), split="1,0,0", **options), several)
    for changed, message in (
        ([per_split[0], ([low, high], [1.0, 2.0]), None], "sets that are evaluated by themselves have none"),
        ([per_split[0], None, None], "without validation data of its own: name the sets in the second place"),
    ):
        with pytest.raises(ValueError, match=message):
            build_datasets(GPTDatasetConfig(16, blend_per_split=changed, **options), several)


def test_a_blend_of_missing_files_is_named(tmp_path):
    config = GPTDatasetConfig(16, blend=([str(tmp_path / "nothing")], None), split="1,0,0")
    with pytest.raises(FileNotFoundError, match=r"dataset.blend names .*nothing, but .*nothing\.idx does not exist"):
        build_datasets(config, context(NullTokenizer(10)))


def build_on_rank(root: str, tokenizer_directory: str, broken_rank: int | None) -> tuple[int, int]:
    """Builds SFT datasets; `broken_rank` sees another, broken, copy of the files."""
    from megatron.bridge.utils.distributed import rank

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=tokenizer_directory))
    folder = f"{root}/broken" if rank() == broken_rank else root
    train, valid, _ = build_datasets(GPTSFTDatasetConfig(128, dataset_root=folder), context(tokenizer))
    return len(train), len(valid)


def failure_on_rank(root: str, tokenizer_directory: str, broken_rank: int) -> str:
    try:
        build_on_rank(root, tokenizer_directory, broken_rank)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_on_one_rank_ends_all_ranks(sft_root, tokenizer_directory):
    broken = sft_root / "broken"
    broken.mkdir()
    shutil.copy(sft_root / "validation.jsonl", broken)
    (broken / "training.jsonl").write_text('{"input": "a", "output": "b"}\n{"input"\n')
    where = (str(sft_root), str(tokenizer_directory))
    assert run_on_ranks(build_on_rank, 2, *where, None) == [(12, 5), (12, 5)]
    first, second = run_on_ranks(failure_on_rank, 2, *where, 1)
    assert first.startswith("RuntimeError: reading ") and "training.jsonl failed on rank 1: ValueError: " in first
    assert second.startswith("ValueError: ")
    assert "broken/training.jsonl:2: not valid JSON" in first and "broken/training.jsonl:2: not valid JSON" in second
