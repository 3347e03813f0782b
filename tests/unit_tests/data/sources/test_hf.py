# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets by name: short names, local copies, splits and parts of them, and the functions that rows go through."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron.bridge.data.builders import (
    ChatSFTPreprocessingConfig,
    DirectHFSFTDatasetConfig,
    GPTSFTDatasetConfig,
    HFDatasetSourceConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
from megatron.bridge.data.presets import DATASETS
from megatron.bridge.data.sources import hf_loading
from megatron.bridge.data.sources.hf import hf_dataset_supports_split, load_and_adapt_hf_dataset
from megatron.bridge.utils.hf_hub import commits_of
from megatron.bridge.utils.overrides import apply_overrides
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict

ROWS = [
    {"id": str(number), "context": f"the cat {number}", "question": "who?", "answers": {"text": ["the cat", "cat"]}}
    for number in range(20)
]


def text_of(sample, tokenizer):
    return tokenizer.ids_to_text([int(sample["tokens"][0]), *sample["labels"].tolist()])


def texts(dataset, tokenizer):
    return [text_of(dataset[place], tokenizer) for place in range(len(dataset))]


def build(tokenizer, hf_dataset, kind=GPTSFTDatasetConfig, **fields):
    return GPTSFTDatasetBuilder(kind(64, hf_dataset=hf_dataset, **{"do_test": False, **fields}), tokenizer).build()


@pytest.fixture
def squad(tmp_path):
    """A local copy of SQuAD as JSON lines: its directory."""
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "squad").mkdir(exist_ok=True)
        (tmp_path / "squad" / f"{split}.jsonl").write_text(lines)
    return tmp_path / "squad"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """SQuAD in the hub's cache, as `hf download` lays it out, on a machine without a network."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    commit = "7b6d24c440a36b6815f21b70d25016731768db1f"
    folder = tmp_path / "hub" / "datasets--rajpurkar--squad"
    snapshot = folder / "snapshots" / commit
    (snapshot / "plain_text").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        path = snapshot / "plain_text" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    files = "".join(f"  - split: {name}\n    path: plain_text/{name}-*\n" for name in ("train", "validation"))
    (snapshot / "README.md").write_text(f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{files}---\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_short_name_finds_what_was_fetched_before(hub_cache, tokenizer):
    for _ in range(2):  # the second time from the tokens that were kept
        train, valid, _ = build(tokenizer, "squad")
        assert (len(train), len(valid)) == (20, 3)
        assert text_of(train[7], tokenizer) == "Context: the cat 7 Question: who? Answer: the cat<|im_end|>"
        assert tokenizer.ids_to_text(train[7]["labels"][train[7]["loss_mask"] == 1].tolist()) == " the cat<|im_end|>"
        assert "original_answers" not in "".join(train.report.warnings)
    assert list((hub_cache.parents[3] / "datasets").rglob("*.npz")), "tokens are kept in the library's cache"
    assert commits_of(["datasets/rajpurkar/squad"]) == {"datasets/rajpurkar/squad": hub_cache.name}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("in_memory", "told", "why"),
    [
        (False, COMMIT, None),
        (True, COMMIT, None),
        (True, None, "the hub didn't tell: no network"),
        (True, "default-0123456789abcdef", "it was found as 'default-0123456789abcdef', which is no commit"),
        (False, "default-0123456789abcdef", "it was found as 'default-0123456789abcdef', which is no commit"),
    ],
)
def test_the_commit_is_known_wherever_the_library_puts_its_tables(tmp_path, monkeypatch, caplog, in_memory, told, why):
    """One that it reads into memory, by `keep_in_memory` or because it is empty, has no file that tells."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"question": "q", "context": "c", "answers": {"text": ["a"]}}])
    if not in_memory:
        rows.save_to_disk(str(tmp_path / told))
        rows = datasets.load_from_disk(str(tmp_path / told))
    asked = []

    class Library:
        @staticmethod
        def load_dataset(path, name=None, split=None, cache_dir=None, revision=None, keep_in_memory=None, **more):
            return {"train": rows.select([]) if in_memory else datasets.Dataset.from_list([]), "validation": rows}

        @staticmethod
        def load_dataset_builder(path, name=None, cache_dir=None, revision=None, **more):
            asked.append(more)
            if told is None:
                raise ConnectionError("no network")
            return SimpleNamespace(hash=told)

    monkeypatch.setattr(hf_loading, "_library", lambda where: Library)
    monkeypatch.setattr("megatron.bridge.utils.hf_hub._commits", {})
    options = {"keep_in_memory": True, "split": None, "encoding": "utf-8"}
    hf_loading.load_from_hub(HFDatasetSourceConfig(dataset_name="some/data", hf_kwargs=options))
    assert commits_of(["datasets/some/data"]) == ({} if why else {"datasets/some/data": COMMIT})
    said = [record.getMessage() for record in caplog.records]
    assert all("its commit isn't recorded" in line and f"({why})" in line for line in said)
    assert len(said) == (1 if why else 0)
    assert asked == ([{"encoding": "utf-8"}] if in_memory else [])


def test_without_a_network_the_error_says_what_to_fetch_and_where(hub_cache, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_and_adapt_hf_dataset("gsm8k")
    message = str(caught.value)
    for part in (
        "openai/gsm8k",
        "hf download --repo-type dataset openai/gsm8k",
        str(hub_cache.parents[2]),
        "a local copy",
    ):
        assert part in message
    assert "\n" not in message


def test_a_part_of_the_files_is_refused(hub_cache):
    whole = hub_cache / "plain_text" / "train-00000-of-00001.parquet"
    whole.rename(whole.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(ValueError, match=r"plain_text/train-\*: 1 of 2 files are there: fetch the others"):
        load_and_adapt_hf_dataset("squad")


def test_a_local_copy_takes_the_same_function(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad), process_example_fn="squad")
    train, valid, _ = build(tokenizer, source)
    assert (len(train), len(valid)) == (20, 3)
    assert text_of(train[0], tokenizer) == "Context: the cat 0 Question: who? Answer: the cat<|im_end|>"


def test_a_directory_of_the_datasets_name_is_a_local_copy(squad, tokenizer, monkeypatch):
    monkeypatch.chdir(squad.parent)
    train, _, _ = build(tokenizer, "squad")
    assert text_of(train[0], tokenizer).startswith("Context: the cat 0")


def test_one_file_is_the_training_data(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad / "train.jsonl"), process_example_fn="squad", val_proportion=0.1)
    train, valid, _ = build(tokenizer, source)
    assert (len(train), len(valid)) == (18, 2)
    assert sorted(texts(train, tokenizer) + texts(valid, tokenizer)) == sorted(
        f"Context: the cat {number} Question: who? Answer: the cat<|im_end|>" for number in range(20)
    )


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[90%:]", [18, 19]),
        ("train[-2:]", [18, 19]),
        ("train[5:7]", [5, 6]),
        ("validation", [0, 1, 2]),
    ],
)
def test_parts_of_splits(squad, split, numbers):
    source = HFDatasetSourceConfig(str(squad), split=split)
    assert [int(row["id"]) for row in load_and_adapt_hf_dataset(source)] == numbers
    assert [int(row["id"]) for row in load_and_adapt_hf_dataset(str(squad), split=split)] == numbers


def test_which_splits_there_are(squad):
    for split, expected in (("train", True), ("training", True), ("validation", True), ("test", False), ("dev", False)):
        assert hf_dataset_supports_split(str(squad), split) == expected


def test_rows_are_filtered_and_adapted(squad, caplog):
    source = HFDatasetSourceConfig(
        path=str(squad),
        process_example_fn=lambda row, tokenizer: {"input": row["question"], "output": f"{tokenizer}{row['id']}"},
        filter_fn=lambda row: int(row["id"]) < 2,
    )
    with caplog.at_level(logging.INFO):
        rows = load_and_adapt_hf_dataset(source, tokenizer="T")
    assert rows == [{"input": "who?", "output": "T0"}, {"input": "who?", "output": "T1"}]
    assert "filter_fn left out 18 rows" in caplog.text


def test_another_function_makes_other_tokens(squad, tokenizer):
    def build_with(said):
        source = HFDatasetSourceConfig(str(squad), process_example_fn=lambda row: {"input": "a", "output": said})
        return texts(build(tokenizer, source)[0], tokenizer)[0]

    assert [build_with(said) for said in ("b", "c", "b")] == ["a b<|im_end|>", "a c<|im_end|>", "a b<|im_end|>"]


WORD = "b"


def answer():
    return WORD


def test_another_word_in_the_functions_module_makes_other_tokens(squad, tokenizer, monkeypatch):
    def build_with(function):
        return texts(build(tokenizer, HFDatasetSourceConfig(str(squad), process_example_fn=function))[0], tokenizer)[0]

    def by_keyword(word):
        def function(row, *, said=word):
            return {"input": "a", "output": said}

        return function

    assert [build_with(by_keyword(word)) for word in "bc"] == ["a b<|im_end|>", "a c<|im_end|>"]
    for function in (lambda row: {"input": "d", "output": WORD}, lambda row: {"input": "e", "output": answer()}):
        before = build_with(function)
        monkeypatch.setitem(globals(), "WORD", WORD + "f")
        assert build_with(function) == before.replace("<", "f<")


def test_a_second_argument_with_a_value_is_not_the_tokenizer(squad):
    source = HFDatasetSourceConfig(str(squad), filter_fn=lambda row, most=2: int(row["id"]) < most)
    assert len(load_and_adapt_hf_dataset(source)) == 2
    source.process_example_fn = lambda row, given=None: {"given": given}
    assert load_and_adapt_hf_dataset(source, tokenizer="T") == [{"given": "T"}] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda row: row["txt"],
            r"train.jsonl:1: process_example_fn <lambda> raised KeyError: 'txt' \(the row has: id",
        ),
        (lambda row: "text", "train.jsonl:1: process_example_fn returned str: expected a dict such as input, output"),
        (lambda row: {"input": "a"}, r"train.jsonl:1: no field 'output' \(found: 'input'\)"),
    ],
)
def test_a_function_that_fails_names_the_row(squad, tokenizer, function, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, HFDatasetSourceConfig(str(squad), process_example_fn=function))


def test_rows_that_a_script_has_already(tokenizer):
    rows = [{"input": f"cat {number}", "output": "sat"} for number in range(4)]
    train, valid, _ = build(tokenizer, HFDatasetSourceConfig(dataset_dict={"train": rows, "validation": rows[:1]}))
    assert (len(train), len(valid)) == (4, 1)


def test_columns_by_their_names(tokenizer):
    rows = [{"prompt": "the cat", "completion": "sat"}]
    columns = PromptCompletionSFTPreprocessingConfig(prompt_column="prompt", completion_column="completion")
    source = HFDatasetSourceConfig(dataset_dict=rows)
    train, _, _ = build(tokenizer, source, preprocessing=columns, do_validation=False)
    assert text_of(train[0], tokenizer) == "the cat sat<|im_end|>"
    assert tokenizer.ids_to_text(train[0]["labels"][train[0]["loss_mask"] == 1].tolist()) == " sat<|im_end|>"


def test_named_columns_of_a_known_dataset_are_its_own(squad, tokenizer, monkeypatch):
    monkeypatch.chdir(squad.parent)
    columns = PromptCompletionSFTPreprocessingConfig(prompt_column="question", completion_column="context")
    train, _, _ = build(tokenizer, "squad", preprocessing=columns)
    assert text_of(train[0], tokenizer) == "who? the cat 0<|im_end|>"


def test_conversations_in_a_column_of_their_own(tokenizer):
    turns = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}]
    template = "{% for m in messages %}{{ style }}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    chat = ChatSFTPreprocessingConfig(
        messages_column="chat", chat_template=template, chat_template_kwargs={"style": "* "}
    )
    source = HFDatasetSourceConfig(
        dataset_dict=[{"chat": turns}, {"chat": turns, "chat_template_kwargs": {"style": "- "}}]
    )
    train, _, _ = build(tokenizer, source, preprocessing=chat, do_validation=False)
    assert texts(train, tokenizer) == [
        f"{style}user:the cat?<|im_end|>{style}assistant:sat<|im_end|>" for style in ("* ", "- ")
    ]
    with pytest.raises(ValueError, match=r"dataset_dict \(alone\):1: no field 'talk' \(found: 'chat'\)"):
        build(tokenizer, source, preprocessing=replace(chat, messages_column="talk"), do_validation=False)


@pytest.mark.parametrize("place", ["dataset_root", "hf_dataset", "blend"])
def test_the_column_that_is_named_is_learned_wherever_rows_lie(write_jsonl, tokenizer, place):
    def talk(answer):
        return [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": answer}]

    spoken = [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "spoken"}]
    row = {"chosen": talk("good"), "rejected": talk("bad"), "messages": talk("other"), "conversation": spoken}
    path = str(write_jsonl([row]))
    where = {"dataset_root": path, "hf_dataset": path, "blend": ([path], None)}[place]
    fields = {"do_validation": False, place: where}
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    answers = {None: "other", "chosen": "good", "rejected": "bad", "messages": "other", "conversation": "spoken"}
    for column, answer in answers.items():  # tokens are kept: each column has its own
        chat = ChatSFTPreprocessingConfig(messages_column=column, chat_template=template)
        train, _, _ = build(tokenizer, fields.pop("hf_dataset", None), preprocessing=chat, **fields)
        assert texts(train, tokenizer) == [f"user:the cat?<|im_end|>assistant:{answer}<|im_end|>"]
        fields[place] = where


def test_named_tools_go_before_others():
    chat = ChatSFTPreprocessingConfig(messages_column="conversations", tools_column="functions")
    row = {"tools": ["a"], "functions": ["b"], "conversations": [{"from": "human"}], "messages": [], "id": 1}
    assert chat.renamed(row) == {"id": 1, "tools": ["b"], "conversations": [{"from": "human"}]}
    assert chat.renamed({"messages": [], "tools": ["a"]}) == {"messages": [], "tools": ["a"]}


def test_preprocessing_and_dataset_kwargs_must_agree(tokenizer):
    with pytest.raises(ValueError, match=r"dataset_kwargs.add_bos=True and dataset.preprocessing, which means False"):
        build(
            tokenizer,
            "squad",
            preprocessing=PromptCompletionSFTPreprocessingConfig(),
            dataset_kwargs={"add_bos": True},
        )


def test_a_direct_dataset_writes_nothing(squad, tokenizer):
    source = HFDatasetSourceConfig(str(squad), process_example_fn="squad")
    train, _, _ = build(tokenizer, source, kind=DirectHFSFTDatasetConfig)
    assert len(train) == 20 and not (squad / ".tokens").exists()
    assert len(build(tokenizer, source)[0]) == 20 and (squad / ".tokens").exists()
    with pytest.raises(ValueError, match="hf_dataset is not set"):
        DirectHFSFTDatasetConfig(64).finalize()


def test_a_directory_of_lines_goes_before_the_recipes_dataset(squad, write_jsonl, tokenizer, caplog):
    root = str(write_jsonl([{"input": "a", "output": "b"}]).parent)
    caplog.set_level(logging.INFO)
    train, _, _ = build(tokenizer, "squad", dataset_root=root, do_validation=False)
    assert len(train) == 1 and "dataset.hf_dataset isn't read: dataset.dataset_root=" in caplog.text


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


def test_a_split_that_is_not_there_is_named(squad, tokenizer):
    with pytest.raises(FileNotFoundError, match="has no training split: expected 'train', or .* in hf_dataset.split"):
        build(tokenizer, HFDatasetSourceConfig(dataset_dict={"train_sft": ROWS}))
    with pytest.raises(FileNotFoundError, match=r"has no split 'dev' \(found: 'train', 'validation'\)"):
        load_and_adapt_hf_dataset(HFDatasetSourceConfig(str(squad), split="dev"))
    source = HFDatasetSourceConfig(str(squad), validation_split="dev", process_example_fn="squad")
    with pytest.raises(FileNotFoundError, match="has no split 'dev' .*: set hf_dataset.validation_split"):
        build(tokenizer, source)
    assert len(build(tokenizer, source, do_validation=False)[0]) == 20


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


def test_each_preset_reads_its_rows():
    chat = {"messages": [{"role": "user", "content": "a"}], "prompt": "x"}
    rows = {
        "squad": ROWS[0],
        "gsm8k": {"question": "1+1?", "answer": "two #### 2"},
        "openmathinstruct2": {"problem": "1+1?", "generated_solution": "two", "expected_answer": "2"},
        "alpaca": {"instruction": "say", "input": "", "output": "b", "text": "..."},
        "dolly": {"instruction": "say", "context": "a", "response": "b", "category": "x"},
        "openhermes": {"conversations": [{"from": "human", "value": "a"}], "idx": 1},
    }
    made = {name: preset.process(rows.get(name, chat)) for name, preset in DATASETS.items()}
    assert made["gsm8k"]["original_answers"] == ["2"]
    assert made["dolly"]["input"].endswith("### Input:\na\n\n### Response:") and "Input" not in made["alpaca"]["input"]
    for name, row in made.items():
        assert set(row) - {"original_answers"} in ({"input", "output"}, {"messages"}, {"conversations"}), name
