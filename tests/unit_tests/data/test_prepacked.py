# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows that were packed beforehand, read and checked."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, PackedSequenceSpecs
from megatron.bridge.data.loaders import build_datasets
from megatron.bridge.data.prepacked import PackedForm, find_packed_files, load_prepacked

FORM = PackedForm(size=8, size_option="dataset.seq_length", vocab_size=100)
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 1, 0, 1], "seq_start_id": [0, 3]},
    {"input_ids": [10, 11, 12], "loss_mask": [False, True, True], "seq_start_id": [0]},
]


def write_npy(path, rows):
    """As NeMo's offline packing writes rows."""
    np.save(path, np.array(rows, dtype=object), allow_pickle=True)
    return str(path)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    numbers = [row | {"loss_mask": [float(value) for value in row["loss_mask"]]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(numbers), path)
    return str(path)


def load(pattern, form=FORM, metadata_path=None):
    return load_prepacked(pattern, "packed_train_data_path", form=form, metadata_path=metadata_path)


def reference(row):
    """Tokens, labels, mask and ends of a row's samples, one sample after the other."""
    tokens, labels, mask, ends = [], [], [], [0]
    for start, end in zip(row["seq_start_id"], [*row["seq_start_id"][1:], len(row["input_ids"])], strict=True):
        tokens += row["input_ids"][start : end - 1]
        labels += row["input_ids"][start + 1 : end]
        mask += row["loss_mask"][start : end - 1]
        ends.append(ends[-1] + end - start - 1)
    return tokens, labels, [float(value) for value in mask], ends


@pytest.mark.parametrize("write", [write_npy, write_parquet])
def test_rows_are_read_exactly(tmp_path, write):
    dataset = load(write(tmp_path / f"packs{'.npy' if write is write_npy else '.parquet'}", ROWS))
    assert dataset.is_packed and dataset.lengths.tolist() == [3, 2]
    for item, row in zip((dataset[0], dataset[1]), ROWS, strict=True):
        tokens, labels, mask, ends = reference(row)
        assert item["tokens"].tolist() == tokens and item["labels"].tolist() == labels
        assert item["loss_mask"].tolist() == mask and item["cu_seqlens"].tolist() == ends
        assert (item["tokens"].dtype, item["cu_seqlens"].dtype) == (torch.int64, torch.int32)
    assert dataset[0]["position_ids"].tolist() == [0, 1, 0]
    assert str(dataset.report) == "2 packs of 8, 1.5 samples in each, 31.2% filled"
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize("kind", [list, np.array])
def test_a_run_reads_the_packs_that_it_would_make_itself(tmp_path, write_jsonl, tokenizer, kind, caplog):
    path = write_jsonl([{"input": "a b", "output": "c" * number} for number in range(1, 30)])
    made = GPTSFTDatasetConfig(64, dataset_root=str(path.parent), enable_offline_packing=True, do_validation=False)
    context = DatasetBuildContext(10, 0, 0, tokenizer)
    own, _, _ = build_datasets(made, context)
    rows = []
    for pack in own.packs:
        row = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
        for sample in (own.samples[number] for number in pack):
            row["seq_start_id"].append(len(row["input_ids"]))
            row["input_ids"] += [*sample["tokens"].tolist(), int(sample["labels"][-1])]
            row["loss_mask"] += [*sample["loss_mask"].tolist(), 0.0]
        rows.append({name: kind(values) for name, values in row.items()})
    write_npy(tmp_path / "packs_0.npy", rows[:2])
    write_npy(tmp_path / "packs_1.npy", rows[2:])
    specs = PackedSequenceSpecs(packed_sequence_size=64, packed_train_data_path=tmp_path / "packs_*.npy")
    read, validation, _ = build_datasets(
        GPTSFTDatasetConfig(64, packed_sequence_specs=specs, do_validation=False), context
    )
    assert len(read) == len(own) and validation is None and (read.lengths == own.lengths).all()
    for number in range(len(own)):
        assert all(torch.equal(read[number][name], value) for name, value in own[number].items())
    both = replace(specs, packed_val_data_path=str(tmp_path / "packs_1.npy"))
    _, validation, _ = build_datasets(GPTSFTDatasetConfig(64, packed_sequence_specs=both), context)
    assert len(validation) == len(own) - 2
    mixed = PackedSequenceSpecs(packed_sequence_size=64, packed_val_data_path=str(tmp_path / "packs_1.npy"))
    config = GPTSFTDatasetConfig(64, dataset_root=str(path.parent), packed_sequence_specs=mixed)
    train, validation, _ = build_datasets(config, context)
    assert (train.packs, len(validation)) == (own.packs, len(own) - 2)
    assert "alone" not in caplog.text
    write_jsonl([{"input": "a", "output": "b"}], name="validation.jsonl")
    config = GPTSFTDatasetConfig(64, dataset_root=str(path.parent), packed_sequence_specs=specs, do_test=False)
    assert len(build_datasets(config, context)[1]) == 1
    assert f"packs to train on alone: validation samples are those of dataset.dataset_root={path.parent}" in caplog.text


def test_one_token_and_a_start_at_the_end_have_no_position(tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 1, 1, 1], "seq_start_id": [0, 2, 3, 4]}
    item = load(write_npy(tmp_path / "packs.npy", [row]))[0]
    assert item["tokens"].tolist() == [5] and item["labels"].tolist() == [6] and item["cu_seqlens"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [5, 100, 7, 8, 9]}, "row 1: token 100 is outside the tokenizer's 100"),
        ({"input_ids": [5, -1, 7, 8, 9]}, "row 1: token -1 is outside"),
        ({"input_ids": [5, 6]}, "row 1: 2 input_ids, but 5 in loss_mask"),
        ({"input_ids": []}, "row 1: input_ids is of type float64 and shape .0.: expected a list of numbers"),
        ({"input_ids": ["a"] * 5}, "row 1: input_ids is of type <U1"),
        ({"input_ids": None}, "row 1: it has no input_ids"),
        ({"loss_mask": [0, 0.5, 1, 0, 1]}, "row 1: loss_mask holds 0.5: expected 0 and 1"),
        ({"loss_mask": [0, float("nan"), 1, 0, 1]}, "row 1: loss_mask holds nan"),
        ({"seq_start_id": [1, 3]}, "row 1: seq_start_id is .1, 3. in a row of 5 ids: expected 0 and then rising"),
        ({"seq_start_id": [0, 3, 3]}, "row 1: seq_start_id is .0, 3, 3."),
        ({"seq_start_id": [0, 6]}, "row 1: seq_start_id is .0, 6."),
        ({"seq_start_id": [0, 1, 2, 3, 4]}, "row 1: no sample in it has two tokens"),
        (
            {"input_ids": [1] * 10, "loss_mask": [1] * 10, "seq_start_id": [0]},
            "row 1: 9 positions: expected at most dataset.seq_length=8",
        ),
    ],
)
@pytest.mark.parametrize("write", [write_npy, write_parquet])
def test_a_row_that_does_not_fit_is_named(tmp_path, write, change, message):
    if write is write_parquet and change.get("input_ids", 0) in ([], ["a"] * 5):
        change, message = {"input_ids": None}, "row 1: it has no input_ids"  # columns have one type
    path = write(tmp_path / f"packs{'.npy' if write is write_npy else '.parquet'}", [ROWS[1], ROWS[0] | change])
    with pytest.raises(ValueError, match=f"^{path}, {message}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_rows_and_files_of_another_form_are_named(tmp_path):
    write_npy(tmp_path / "texts.npy", [["a"], {}])
    with pytest.raises(ValueError, match="texts.npy, row 0: it is a list: expected an object with input_ids"):
        load(str(tmp_path / "texts.npy"))
    np.save(tmp_path / "numbers.npy", np.arange(3))
    with pytest.raises(ValueError, match="numbers.npy holds numbers of type int64"):
        load(str(tmp_path / "numbers.npy"))
    np.save(tmp_path / "square.npy", np.array([[{}], [{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"square.npy holds an array of shape \[2, 1\]"):
        load(str(tmp_path / "square.npy"))
    write_npy(tmp_path / "cut.npy", ROWS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.npy can't be read"):
        load(str(tmp_path / "cut.npy"))
    write_npy(tmp_path / "empty.npy", [])
    with pytest.raises(ValueError, match="holds no rows"):
        load(str(tmp_path / "empty.npy"))
    write_npy(tmp_path / "nothing.npy", [ROWS[0] | {"loss_mask": [0] * 5}])
    with pytest.raises(ValueError, match="no token of its 1 rows is learned"):
        load(str(tmp_path / "nothing.npy"))


def test_nothing_in_a_file_is_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = write_npy(tmp_path / "packs.npy", [{"input_ids": Harm()}])
    with pytest.raises(ValueError, match=r"names \w+.mkdir, which is not plain data, and nothing of the file was exec"):
        load(path)
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        stream.write(pickle.PROTO + b"\x02" + pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f" + pickle.STOP)
    with pytest.raises(ValueError, match="more than it can hold"):
        load(path)


def test_files_are_found_in_order(tmp_path):
    for name in ("b.npy", "a.npy", "c.txt"):
        (tmp_path / name).touch()
    found = [tmp_path / "a.npy", tmp_path / "b.npy"]
    assert find_packed_files(str(tmp_path), "x") == find_packed_files(str(tmp_path / "*.npy"), "x") == found
    with pytest.raises(FileNotFoundError, match="x='.*d.npy': there is no such file; expected packs"):
        find_packed_files(str(tmp_path / "d.npy"), "x")
    with pytest.raises(ValueError, match="names .*c.txt: expected files that end in .npy"):
        find_packed_files(str(tmp_path / "*"), "x")


def test_metadata_must_belong_to_the_rows(tmp_path):
    path, about = write_npy(tmp_path / "packs.npy", ROWS), tmp_path / "about.json"
    about.write_text(json.dumps([{"max_samples_per_bin": 1, "pack_size": 8}, {"max_samples_per_bin": 2}]))
    assert len(load(path, metadata_path=about)) == 2
    for content, message in (
        ('[{"max_samples_per_bin": 1}]', "says max_samples_per_bin=1, but there are up to 2 samples in a row"),
        ('{"pack_size": 2}', "says pack_size=2, but there are up to 3 positions in a row"),
        ('{"pack_size": "2"}', "pack_size is .'2'.: expected whole numbers"),
        ("[]", "holds a list: expected the metadata of the packs"),
        ("[", "can't be read"),
    ):
        about.write_text(content)
        with pytest.raises(ValueError, match=message):
            load(path, metadata_path=about)
    with pytest.raises(FileNotFoundError, match="packed_metadata_path=.*: there is no such file"):
        load(path, metadata_path=tmp_path / "none.json")


def test_padded_samples_are_checked(tmp_path):
    padded = replace(FORM, multiple_of=2)
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "loss_mask": [1] * 6, "seq_start_id": [0, 3]}
    path = write_npy(tmp_path / "packs.npy", [row])
    assert load(path, padded)[0]["cu_seqlens"].tolist() == [0, 2, 4]
    path = write_npy(tmp_path / "packs.npy", [row | {"seq_start_id": [0, 2]}])
    with pytest.raises(ValueError, match="a sample has 1 positions: expected multiples of pad_seq_to_mult=2"):
        load(path, padded)
