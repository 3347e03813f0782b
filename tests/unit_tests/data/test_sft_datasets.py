# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where samples come from: plain text, one file cut into splits, and directories of Hugging Face's `datasets`."""

import builtins
import json

import pytest

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, PackedSequenceSpecs, SFTOptions
from megatron.bridge.data.loaders import build_datasets
from megatron.bridge.data.sft import load_sft_dataset
from megatron.bridge.data.sources import without_nulls
from megatron.bridge.data.sources.hf import HFDatasetSourceConfig
from megatron.bridge.data.sources.hf_splits import open_hf_source

PAIRS = [{"input": f"the cat {number}", "output": "sat"} for number in range(20)]


def text_of(sample, tokenizer):
    return tokenizer.ids_to_text([int(sample["tokens"][0]), *sample["labels"].tolist()])


def open_dataset(where):
    return open_hf_source(HFDatasetSourceConfig(str(where)))


def build(tokenizer, **options):
    options = {"do_test": False, **options}
    return build_datasets(GPTSFTDatasetConfig(64, **options), DatasetBuildContext(10, 0, 0, tokenizer))


def test_plain_text_is_learned_from_its_second_token_to_eos(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "the cat sat\non the mat", "source": "x"}, {"text": "dog"}])
    dataset = load_sft_dataset(path, tokenizer=tokenizer, seq_length=64, options=SFTOptions())
    assert text_of(dataset[0], tokenizer) == "the cat sat\non the mat<|im_end|>"
    assert dataset[0]["loss_mask"].min() == 1
    assert dataset[0]["labels"][-1] == tokenizer.eos_id
    bare = load_sft_dataset(path, tokenizer=tokenizer, seq_length=64, options=SFTOptions(add_eos=False, add_bos=True))
    assert text_of(bare[1], tokenizer) == "<|begin|>dog"


def test_text_beside_an_answer_is_a_field_like_others(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "a", "input": "b", "output": "c"}])
    dataset = load_sft_dataset(path, tokenizer=tokenizer, seq_length=64, options=SFTOptions())
    assert text_of(dataset[0], tokenizer) == "b c<|im_end|>"


def test_a_line_without_the_text_is_named(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "a"}, {"txt": "b"}])
    with pytest.raises(ValueError, match=r"training\.jsonl:2: no field 'text' \(found: 'txt'\)"):
        load_sft_dataset(path, tokenizer=tokenizer, seq_length=64, options=SFTOptions())


def test_the_report_names_the_first_line_that_lost_something(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "a"}, {"text": ""}, {"text": "the cat " * 30}, {"text": "x" * 90}])
    dataset = load_sft_dataset(path, tokenizer=tokenizer, seq_length=16, options=SFTOptions())
    expected = "2 truncated (the first in line 3), 1 dropped (the first in line 2); dropped: a blank answer in 1"
    assert expected in str(dataset.report)


def test_one_file_is_cut_by_the_seed(write_jsonl, tokenizer):
    root = str(write_jsonl(PAIRS).parent)

    def texts(**options):
        parts = build(tokenizer, dataset_root=root, split="70,20,10", do_test=True, **options)
        return [[text_of(part[i], tokenizer) for i in range(len(part))] for part in parts]

    parts = texts()
    assert [len(part) for part in parts] == [14, 4, 2]
    assert sorted(sum(parts, [])) == sorted(f"the cat {i} sat<|im_end|>" for i in range(20))
    assert texts() == parts and texts(seed=5) != parts
    assert texts(max_train_samples=3)[0] == parts[0][:3]
    train, valid, test = build(tokenizer, dataset_root=root, split="80,10,10", do_validation=False)
    assert (len(train), valid, test) == (16, None, None), "what is held out stays out"


@pytest.mark.parametrize(
    ("split", "extra", "message"),
    [
        ("98,1,1", None, "dataset.split='98,1,1' leaves no validation sample of 20: change it"),
        ("90,10,0", "validation.jsonl", "cuts .*training.jsonl, but .* has validation.jsonl too: remove it"),
    ],
)
def test_cuts_that_cannot_work_are_refused(write_jsonl, tokenizer, split, extra, message):
    path = write_jsonl(PAIRS)
    if extra:
        write_jsonl(PAIRS, extra)
    with pytest.raises(ValueError, match=message):
        build(tokenizer, dataset_root=str(path.parent), split=split)


def test_fields_that_are_null_count_as_missing():
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}], "tools": None, "n": [None, 1]}
    assert without_nulls(row) == {"messages": [{"role": "user", "content": "a"}], "n": [None, 1]}


@pytest.fixture
def save_arrow(tmp_path):
    """Writes splits as `save_to_disk` does; one under None is a dataset by itself."""
    datasets = pytest.importorskip("datasets")

    def save(**splits):
        made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        saved = made["alone"] if "alone" in made else datasets.DatasetDict(made)
        saved.save_to_disk(str(tmp_path / "arrow"))
        return str(tmp_path / "arrow")

    return save


def test_saved_datasets_give_what_their_rows_give_as_lines(save_arrow, write_jsonl, tokenizer):
    turns = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat", "name": "x"}]
    rows = [{"messages": turns}, {"messages": turns[:2] * 2}]
    where = save_arrow(train=rows, validation=rows[:1])
    lines = load_sft_dataset(write_jsonl(rows), tokenizer=tokenizer, seq_length=64, options=SFTOptions())
    for _ in range(2):  # the second time from the cache
        train, valid, _ = build(tokenizer, hf_dataset=where)
        assert (len(train), len(valid)) == (2, 1)
        assert [train[i]["tokens"].tolist() for i in (0, 1)] == [lines[i]["tokens"].tolist() for i in (0, 1)]
        assert train[1]["loss_mask"].tolist() == lines[1]["loss_mask"].tolist()


def test_a_single_saved_dataset_is_the_training_data(save_arrow, tokenizer):
    where = save_arrow(alone=PAIRS)
    train, valid, _ = build(tokenizer, hf_dataset=where, split="90,10,0")
    assert (len(train), len(valid)) == (18, 2)
    with pytest.raises(FileNotFoundError, match="validation does not exist: add it, cut it off with dataset.split"):
        build(tokenizer, hf_dataset=where)


def test_a_bad_row_is_named(save_arrow, tokenizer):
    where = save_arrow(train=[*PAIRS, {"input": "a", "output": None}])
    with pytest.raises(ValueError, match=r"arrow/train:21: no field 'output' \(found: 'input'\)"):
        build(tokenizer, hf_dataset=where, do_validation=False)


def test_images_beside_the_text_are_left_as_they_are(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    kinds = {"input": datasets.Value("string"), "output": datasets.Value("string"), "image": datasets.Image()}
    columns = {"input": ["a"], "output": ["b"], "image": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "seen"))
    train, _, _ = build(tokenizer, hf_dataset=str(tmp_path / "seen"), do_validation=False, do_test=False)
    assert "field 'image' is ignored in 1" in str(train.report)


def test_a_saved_dataset_without_rows_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none' can't be opened"):
        open_dataset(tmp_path / "none")


def test_what_is_no_saved_dataset_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(
        FileNotFoundError, match="dataset.hf_dataset='/no/such' does not exist: expected a directory that"
    ):
        open_dataset("/no/such")
    (tmp_path / "data.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="can't be opened .*: expected what datasets' save_to_disk wrote") as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"needs the datasets library.*: pip install 'megatron-bridge\[datasets\]'"):
        open_dataset(tmp_path)


def test_what_is_too_long_for_a_pack_names_the_packs_size(write_jsonl, tokenizer):
    root = str(
        write_jsonl(
            [{"messages": [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "b"}]}]
        ).parent
    )
    specs = PackedSequenceSpecs(packed_sequence_size=8)
    with pytest.raises(
        ValueError, match=r"packed_sequence_size=8: raise packed_sequence_specs\.packed_sequence_size or"
    ):
        build(tokenizer, dataset_root=root, do_validation=False, packed_sequence_specs=specs)


def test_what_is_ignored_is_logged_before_training(write_jsonl, tokenizer, caplog):
    root = str(write_jsonl([{"instruction": "a", "input": "b", "output": "c"}]).parent)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        build(tokenizer, dataset_root=root, do_validation=False)
        assert [record.levelname for record in caplog.records if "'instruction'" in record.getMessage()][
            -1
        ] == "WARNING"
