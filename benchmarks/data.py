# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What data costs: tokenising and packing beside `datasets.map`, iterating beside torch's DataLoader, and a step.

    make model                                    # SmolLM2's tokenizer and the data
    pip install datasets
    python -m benchmarks.data                     # 20,000 pairs and 5,000 conversations

Ours is `build_datasets`: it reads JSONL, checks, renders and tokenises it, marks what is learned, packs it, and caches
the tokens in a file. `datasets` is `load_dataset("json")`, one batched `map` that makes the same ids and the same mask
with the same tokenizer and the same threads, and a second `map` that joins them end to end in rows, in their order.
Both begin with empty caches, and the benchmark checks that they give the same tokens. The samples are those of `make
model`, numbered and repeated.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.figures import Figure, interleaved, ratios, run
from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, PackedSequenceSpecs, TokenizerConfig
from megatron.bridge.data.loaders import Padding, build_datasets, build_iterator
from megatron.bridge.data.tokenizer import build_tokenizer
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.utils.distributed import model_parallel_groups

SEQ_LENGTH = 1024
ROWS = 8
LAYERS = 4


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--conversations", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data/chatterbot/training.jsonl"))
    parser.add_argument("--tokenizer", default="data/smollm2-135m-instruct")
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Tokenise both ways in turn, then iterate over the results, then time steps of a model."""
    import datasets  # late, so that `--help` comes without it

    logging.disable(logging.INFO)
    datasets.disable_progress_bars()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=arguments.tokenizer))
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        for name, count, make, map_rows in (
            ("conversations", arguments.conversations, _as_messages, _conversations(tokenizer)),
            ("pairs", arguments.pairs, _as_pair, _pairs(tokenizer)),
        ):
            work = _Work(Path(directory, name), tokenizer, map_rows)
            _write(work.file, arguments.data, count, make)
            seconds = interleaved({"ours": work.ours, "map": work.theirs}, arguments.repeats, settle=work.clean)
            figures.append(
                Figure(
                    f"data: tokenise and pack {count} {name}",
                    "datasets.map with the same tokenizer, and one that packs",
                    ratios(seconds["ours"], seconds["map"]),
                    at_most=1.0,
                    note=f"{work.samples.report.tokens} tokens; one process each, its tokenizer on all threads; ours "
                    "checks each row",
                )
            )
            work.check()
        figures += [_iteration(work, arguments.repeats), _starvation(work)]
    return figures


def _as_pair(question: str, answer: str) -> dict[str, Any]:
    return {"input": question, "output": answer}


def _as_messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path: Path, source: Path, count: int, make: Callable[[str, str], dict]) -> None:
    """Makes a file of as many samples as asked for, of those in another."""
    rows = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as file:
        for number, messages in enumerate(islice(cycle(rows), count)):
            question, answer = (message["content"].strip() for message in messages[:2])
            file.write(json.dumps(make(f"{number}. {question}", answer)) + "\n")


class _Work:
    """One file, tokenised in both ways."""

    def __init__(self, directory: Path, tokenizer: Any, map_rows: Callable[[dict], dict]) -> None:
        directory.mkdir()
        self.file, self.caches = directory / "training.jsonl", directory / "caches"
        self.tokenizer, self.map_rows = tokenizer, map_rows
        self.config = GPTSFTDatasetConfig(
            seq_length=SEQ_LENGTH,
            dataset_root=str(directory),
            path_to_cache=str(self.caches / "ours"),
            do_validation=False,
            do_test=False,
            packed_sequence_specs=PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH),
        )

    def clean(self) -> None:
        """Forgets all tokens."""
        shutil.rmtree(self.caches, ignore_errors=True)
        os.sync()

    def ours(self) -> None:
        """The packed rows of the file; their samples are kept."""
        self.packed, _, _ = build_datasets(self.config, DatasetBuildContext(0, 0, 0, self.tokenizer))
        self.samples = self.packed.samples

    def theirs(self) -> None:
        """The mapped rows of the file."""
        from datasets import load_dataset

        loaded = load_dataset("json", data_files=str(self.file), split="train", cache_dir=str(self.caches / "theirs"))
        self.mapped = loaded.map(self.map_rows, batched=True, remove_columns=loaded.column_names)
        self.mapped.map(_pack, batched=True, remove_columns=self.mapped.column_names)

    def check(self) -> None:
        """Raises RuntimeError if the two differ."""
        if len(self.mapped) != len(self.samples):
            raise RuntimeError(f"{len(self.samples)} samples, and {len(self.mapped)} rows of datasets.map")
        for index in range(0, len(self.mapped), 97):
            row, sample = self.mapped[index], self.samples[index]
            same = row["ids"][:-1] == sample["tokens"].tolist() and row["ids"][1:] == sample["labels"].tolist()
            if not same or row["learned"][1:] != sample["loss_mask"].bool().tolist():
                raise RuntimeError(f"sample {index} differs from what datasets.map made of it")


def _pairs(tokenizer: Any) -> Callable[[dict], dict]:
    """What `datasets.map` applies to pairs: ids with EOS, and which of them stand for the answer."""
    hf_tokenizer, eos = tokenizer.hf_tokenizer, tokenizer.eos_id

    def map_rows(rows: dict) -> dict:
        texts = [f"{question} {answer}" for question, answer in zip(rows["input"], rows["output"], strict=True)]
        encoded = _encoded(hf_tokenizer, texts)
        learned = [
            [end > len(question) for _, end in offsets] + [True]
            for question, offsets in zip(rows["input"], encoded["offset_mapping"], strict=True)
        ]
        return {"ids": [[*ids, eos] for ids in encoded["input_ids"]], "learned": learned}

    return map_rows


def _conversations(tokenizer: Any) -> Callable[[dict], dict]:
    """What `datasets.map` applies to conversations of two turns: ids, and which of them stand for the second."""
    hf_tokenizer = tokenizer.hf_tokenizer

    def map_rows(rows: dict) -> dict:
        prompts = [messages[:-1] for messages in rows["messages"]]
        texts = hf_tokenizer.apply_chat_template(rows["messages"], tokenize=False)
        before = hf_tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        encoded = _encoded(hf_tokenizer, texts)
        learned = [
            [end > len(prompt) and start < len(text.rstrip()) for start, end in offsets]
            for prompt, text, offsets in zip(before, texts, encoded["offset_mapping"], strict=True)
        ]
        return {"ids": encoded["input_ids"], "learned": learned}

    return map_rows


def _pack(rows: dict) -> dict:
    """What `datasets.map` applies to tokenised samples: they fill rows in their order."""
    packs: list[dict[str, list]] = []
    room = 0
    for ids, learned in zip(rows["ids"], rows["learned"], strict=True):
        if len(ids) > room:
            packs.append({"ids": [], "learned": [], "lengths": []})
            room = SEQ_LENGTH
        packs[-1]["ids"] += ids
        packs[-1]["learned"] += learned
        packs[-1]["lengths"].append(len(ids))
        room -= len(ids)
    return {name: [pack[name] for pack in packs] for name in ("ids", "learned", "lengths")}


def _encoded(hf_tokenizer: Any, texts: list[str]) -> Any:
    return hf_tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)


def _iteration(work: _Work, repeats: int) -> Figure:
    """Batches of samples, padded to the longest: ours beside a DataLoader over the mapped rows."""
    count = min(4096, len(work.samples)) // ROWS
    padding = Padding(seq_length=SEQ_LENGTH, per_micro_batch=True, pad_id=work.tokenizer.pad_id)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        length = -(-(max(len(row["ids"]) for row in rows) - 1) // 16) * 16
        ids = torch.full((len(rows), length + 1), padding.pad_id)
        mask = torch.zeros(len(rows), length)
        for place, row in enumerate(rows):
            ids[place, : len(row["ids"])] = row["ids"]
            mask[place, : len(row["ids"]) - 1] = row["learned"][1:]
            ids[place, len(row["ids"]) :] = padding.pad_id
        positions = torch.arange(length).expand(len(rows), -1)
        return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "position_ids": positions}

    loader = DataLoader(work.mapped.with_format("torch"), batch_size=ROWS, shuffle=True, collate_fn=collate)
    rows = {
        "ours": lambda: list(islice(_batches(work.samples, padding, rows=ROWS), count)),
        "theirs": lambda: list(islice(loader, count)),
    }
    seconds = interleaved(rows, repeats)
    per_second = count * ROWS / sorted(seconds["ours"])[len(seconds["ours"]) // 2]
    return Figure(
        "data: iterate, batches of 8 samples",
        "torch's DataLoader over the rows of datasets.map, same padding",
        ratios(seconds["ours"], seconds["theirs"]),
        at_most=1.0,
        fails_above=1.25,
        note=f"{per_second:.0f} samples a second, read in the training process",
    )


def _starvation(work: _Work) -> Figure:
    """A packed batch's time in the loader beside a forward and a backward pass over it."""
    provider = smollm2_135m_sft_config().model
    provider.num_layers, provider.seq_length = LAYERS, SEQ_LENGTH
    padding = Padding(seq_length=SEQ_LENGTH, pad_id=work.tokenizer.pad_id)
    batches = _batches(work.packed, padding, rows=1)
    shares, loading = [], []
    with model_parallel_groups():
        model = provider.provide_distributed_model(wrap_with_ddp=False)[0]
        for _ in range(6):
            started = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().backward()
            shares.append((loaded - started) / (time.perf_counter() - loaded))
            loading.append(loaded - started)
    return Figure(
        "data: loader's time, a packed batch",
        "a step's forward and backward on it",
        tuple(shares[1:]),
        at_most=0.05,
        note=f"{1e3 * sorted(loading)[len(loading) // 2]:.2f} ms for {SEQ_LENGTH} positions, in the training process; "
        f"SmolLM2-135M's shape with {LAYERS} of its 30 layers",
    )


def _batches(dataset: Any, padding: Padding, *, rows: int) -> Iterator[dict]:
    layout = {"micro_batch_size": rows, "global_batch_size": rows, "data_parallel_rank": 0, "data_parallel_size": 1}
    return build_iterator(dataset, consumed_samples=0, seed=1, shuffle=True, padding=padding, **layout)


if __name__ == "__main__":
    run(measure, build_parser())
