# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tokens kept on disk are taken again only if they are what tokenising would give."""

import json
import os

import numpy as np
import pytest

from megatron.bridge.data import sft
from megatron.bridge.data.config import SFTOptions, TokenizerConfig
from megatron.bridge.data.sft import load_sft_dataset
from megatron.bridge.data.tokenizer import build_tokenizer
from tests.rigs.ranks import run_on_ranks

pytestmark = pytest.mark.any_core

ROWS = [{"input": f"the cat {number}", "output": "sat " * (1 + number % 9)} for number in range(40)]


@pytest.fixture
def path(write_jsonl):
    return write_jsonl([*ROWS, {"input": "x", "output": ""}])


class Watched:
    """A tokenizer that keeps count of the batches that it was given, and may be slow or die of them."""

    def __init__(self, tokenizer, meanwhile=lambda: None):
        self._tokenizer, self._meanwhile, self.num_batches = tokenizer, meanwhile, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts):
        self.num_batches += 1
        self._meanwhile()
        return self._tokenizer.encode_batch(texts)


@pytest.fixture
def watched(tokenizer):
    return Watched(tokenizer)


def load(path, tokenizer, *, seq_length=64, cache=None, num_processes=1, max_samples=None, **options):
    return load_sft_dataset(
        path,
        tokenizer=tokenizer,
        seq_length=seq_length,
        options=SFTOptions.from_kwargs(options),
        num_processes=num_processes,
        max_samples=max_samples,
        cache_directory=cache or path.parent / "cache",
    )


def same(one, other):
    return one.report == other.report and all(
        np.array_equal(one.arrays[name], other.arrays[name]) for name in sft.ARRAYS
    )


def test_a_second_run_takes_the_tokens_of_the_first(path, watched):
    first, second = load(path, watched), load(path, watched)
    assert watched.num_batches == 1 and same(first, second)
    assert second.report.first_dropped == 41 and second.arrays["ids"].dtype == np.int32
    assert [file.suffix for file in (path.parent / "cache").iterdir()] == [".npz"], "nothing half-written is left"


@pytest.mark.parametrize(
    "change", [{"seq_length": 8}, {"max_samples": 5}, {"add_bos": True}, {"answer_only_loss": False}]
)
def test_another_way_to_tokenise_has_a_file_of_its_own(path, watched, change):
    load(path, watched)
    load(path, watched, **change)
    load(path, watched)
    load(path, watched, **change)
    assert watched.num_batches == 2


def test_another_template_or_vocabulary_is_another_tokenizer(tokenizer_directory, tokenizer):
    def fingerprint(**options):
        return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory), **options)).fingerprint

    assert fingerprint() == tokenizer.fingerprint
    assert fingerprint(chat_template="x") != tokenizer.fingerprint
    assert fingerprint(hf_tokenizer_kwargs={"eos_token": "<|begin|>"}) != tokenizer.fingerprint
    tokens = {"additional_special_tokens": ["<|new|>"]}
    assert fingerprint(hf_tokenizer_kwargs=tokens) != tokenizer.fingerprint


def test_changed_data_is_tokenised_anew_though_size_and_time_are_the_same(path, watched):
    load(path, watched)
    times = path.stat()
    path.write_text(path.read_text().replace("cat 1", "dog 1"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = load(path, watched)
    assert watched.num_batches == 2
    assert "dog 1" in watched.ids_to_text(changed[1]["tokens"].tolist())
    assert len(list((path.parent / "cache").iterdir())) == 1


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = content.index(b"ids.npy") + 300
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b"", lambda content: b"not a cache"])
def test_a_damaged_file_is_never_trusted(path, watched, damage):
    first = load(path, watched)
    [file] = (path.parent / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(load(path, watched), first) and watched.num_batches == 2
    assert same(load(path, watched), first) and watched.num_batches == 2, "and is replaced"


@pytest.mark.parametrize(
    "foreign",
    [
        {"ids": np.arange(3)},
        {"about": np.array("{}")},
        {"about": np.array(json.dumps({"version": 1, "recipe": {}, "report": {}}))},
        {"about": np.array([{"a": 1}], dtype=object)},
    ],
)
def test_a_foreign_file_is_never_trusted(path, watched, foreign):
    first = load(path, watched)
    [file] = (path.parent / "cache").iterdir()
    np.savez(file, **foreign)
    assert same(load(path, watched), first) and watched.num_batches == 2


def test_an_older_format_is_never_trusted(path, watched):
    first = load(path, watched)
    [file] = (path.parent / "cache").iterdir()
    with np.load(file) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays["about"]))
    np.savez(file, **{**arrays, "about": np.array(json.dumps({**about, "version": about["version"] - 1}))})
    assert same(load(path, watched), first) and watched.num_batches == 2
    assert same(load(path, watched), first) and watched.num_batches == 2, "and is replaced"


def test_a_directory_that_cannot_be_written_costs_only_the_cache(path, tokenizer):
    (path.parent / "file").write_text("")
    assert len(load(path, tokenizer, cache=path.parent / "file" / "cache")) == 40


def test_processes_give_what_one_gives(write_jsonl, tokenizer):
    path = write_jsonl(ROWS * 26)  # two batches
    one = load(path, tokenizer, cache=path.parent / "one")
    assert same(load(path, tokenizer, cache=path.parent / "two", num_processes=2), one)
    first = load(path, tokenizer, cache=path.parent / "three", num_processes=2, max_samples=3)
    assert len(first) == 3 and first[2]["tokens"].tolist() == one[2]["tokens"].tolist()


def test_a_bad_line_in_a_process_is_named(write_jsonl, tokenizer):
    path = write_jsonl([*ROWS * 25, {"input": "a"}])
    with pytest.raises(ValueError, match=r"training\.jsonl:1001: no field 'output'"):
        load(path, tokenizer, num_processes=2)


def test_a_process_that_dies_ends_the_run(path, tokenizer):
    tokenizer = Watched(tokenizer, lambda: os._exit(9))
    with pytest.raises(RuntimeError, match=r"a process that tokenises .*: lower dataset.memmap_workers=2"):
        load(path, tokenizer, num_processes=2)


def _load_on_ranks(path, tokenizer_directory, *, slow=False, own_disks=False):
    """What each of two ranks of a machine does: which tokenised, and how long the data is."""
    import time

    from megatron.bridge.utils import distributed
    from megatron.bridge.utils.replaced import replaced

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory)))
    watched = Watched(tokenizer, lambda: time.sleep(1.0 if slow else 0))
    cache = path.parent / (f"cache{distributed.rank()}" if own_disks else f"cache{slow}")
    with replaced(distributed, SECONDS_BETWEEN_MEETINGS=0.1):
        try:
            return len(load(path, watched, cache=cache)), watched.num_batches
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def test_the_first_process_of_a_machine_tokenises_and_the_others_wait(path, tokenizer_directory):
    for slow in (False, True):
        results = run_on_ranks(_load_on_ranks, 2, path, tokenizer_directory, slow=slow)
        assert results == [(40, 1), (40, 0)]


def test_a_rank_that_sees_no_cache_tokenises_for_itself(path, tokenizer_directory):
    results = run_on_ranks(_load_on_ranks, 2, path, tokenizer_directory, own_disks=True)
    assert results == [(40, 1), (40, 1)]


def _load_own_rows(directory, tokenizer_directory):
    """What a rank says whose file differs from the others' in one letter."""
    from megatron.bridge.utils.distributed import rank

    path = directory / f"{rank()}.jsonl"
    path.write_text(json.dumps({"input": "the cat", "output": "abc"[rank()]}))
    try:
        return load(path, build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory))), cache=None)
    except ValueError as error:
        return str(error)


def test_ranks_with_other_samples_end_together(tmp_path, tokenizer_directory):
    for rank, error in enumerate(run_on_ranks(_load_own_rows, 2, tmp_path, tokenizer_directory)):
        assert f"{rank}.jsonl: rank 1 made other samples of it than rank 0: give every machine the same data" in error


def test_a_bad_line_ends_the_waiting_too(write_jsonl, tokenizer_directory):
    path = write_jsonl([*ROWS * 25, {"input": "a"}])  # behind a whole batch
    first, second = run_on_ranks(_load_on_ranks, 2, path, tokenizer_directory, slow=True)
    assert first.startswith("ValueError: ") and ":1001: no field 'output'" in first
    assert second.startswith("RuntimeError: reading ") and "failed on rank 0: ValueError" in second
    assert ":1001: no field 'output'" in second
