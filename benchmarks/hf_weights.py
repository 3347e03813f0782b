# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What reading and writing a Hugging Face directory costs beside safetensors alone, and how much memory it takes.

    python -m benchmarks.hf_weights                                        # a random Llama, 0.6 GB in four shards
    python -m benchmarks.hf_weights --model data/smollm2-135m-instruct     # SmolLM2's shape, split the same way

One process, weights in bf16. safetensors opens each shard and copies each tensor once into existing memory
(`safe_open`, `get_tensor`, `copy_`), and writes the same tensors to the same shards (`save_file`). Ours are
`load_hf_weights` and `save_hf_pretrained`. The former also compares every shape with the model, refuses NaN and
infinite values, and puts query, key and value rows where Core needs them. Files that are read are in the page cache.
Files that are written go to a new directory, and are written back before the next turn, outside the measured time. Both
run without the simulated accelerator, as on a machine with a GPU: a conversion's model is in host memory.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.figures import Figure, interleaved, ratios, run
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.hf_config import read_hf_config
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.roundtrip import compare_with_files
from megatron.bridge.models.conversion.saved_provider import build_on_host
from megatron.bridge.utils.distributed import model_parallel_groups
from megatron.bridge.utils.simulated_accelerator import suspended

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory with the config.json to take; default: 0.3 billion")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Time both ways in turn, then take the peak memory of a process of its own."""
    logging.disable(logging.INFO)
    hf_config = read_hf_config(arguments.model) if arguments.model else LLAMA
    with tempfile.TemporaryDirectory() as directory, _model(hf_config) as (bridge, chunks):
        source, ours, theirs = (Path(directory, name) for name in ("source", "ours", "theirs"))
        limit = _fill(chunks) // arguments.shards
        bridge.save_hf_pretrained(chunks, source, show_progress=False, max_shard_bytes=limit)
        targets = {path: _empty_like(path) for path in sorted(source.glob("*.safetensors"))}

        def start_clean() -> None:
            for path in (ours, theirs):
                shutil.rmtree(path, ignore_errors=True)
            os.sync()

        rows = {
            "import": lambda: bridge.load_hf_weights(chunks, source, show_progress=False),
            "read": lambda: _read(targets),
            "export": lambda: bridge.save_hf_pretrained(chunks, ours, show_progress=False, max_shard_bytes=limit),
            "write": lambda: _write(targets, theirs),
        }
        with suspended():
            seconds = interleaved(rows, arguments.repeats, settle=start_clean)
        compared = compare_with_files(chunks, bridge.family, HFWeights(source), show_progress=False)
        if not all(result.is_equal for result in compared):
            raise RuntimeError("what was imported isn't what the files hold")
        peaks = _peaks(hf_config, source, ours, limit)
        shard = max(path.stat().st_size for path in targets)
        tensor = max(tensor.nbytes for tensors in targets.values() for tensor in tensors.values())
    sizes = {path.name: sum(tensor.nbytes for tensor in tensors.values()) for path, tensors in targets.items()}
    return [*_times(seconds, sizes), *_memory(peaks, shard, tensor)]


def _times(seconds: dict[str, tuple[float, ...]], sizes: dict[str, int]) -> list[Figure]:
    size = f"{sum(sizes.values()) / 1e6:.0f} MB in {len(sizes)} shards"
    notes = {"import": f"{size}; each value is read once more, to refuse NaN", "export": size}
    others = {
        "import": ("read", "safetensors: each tensor of the same shards read and copied once"),
        "export": ("write", "safetensors: the same tensors written to the same shards"),
    }
    return [
        Figure(f"HF {what}", against, ratios(seconds[what], seconds[other]), at_most=1.5, note=notes[what])
        for what, (other, against) in others.items()
    ]


def _memory(peaks: tuple[int, int], shard: int, tensor: int) -> list[Figure]:
    against = "the largest shard + the largest tensor"
    note = f"above the model's own memory; {shard / 1e6:.0f} + {tensor / 1e6:.0f} MB"
    return [
        Figure(f"HF {what}, peak memory", against, (peak / (shard + tensor),), at_most=1.0, fails_above=1.1, note=note)
        for what, peak in zip(("import", "export"), peaks, strict=True)
    ]


@contextmanager
def _model(hf_config: dict[str, Any]) -> Iterator[tuple[AutoBridge, list[Any]]]:
    """A bridge and its model in host memory, whose pages are all there."""
    bridge = AutoBridge.from_hf_config(hf_config)
    with model_parallel_groups():
        chunks = build_on_host(bridge.to_megatron_provider(load_weights=False), dtype="bfloat16")
        for parameter in chunks[0].parameters():
            parameter.data.zero_()
        yield bridge, chunks


@torch.no_grad()
def _fill(chunks: list[Any]) -> int:
    """Random weights; returns their size in bytes."""
    for parameter in chunks[0].parameters():
        parameter.uniform_(-1, 1)
    return sum(parameter.nbytes for parameter in chunks[0].parameters())


def _empty_like(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: torch.zeros_like(file.get_tensor(name)) for name in file.keys()}


def _read(targets: dict[Path, dict[str, torch.Tensor]]) -> None:
    for path, tensors in targets.items():
        with safe_open(path, framework="pt") as file:
            for name, target in tensors.items():
                target.copy_(file.get_tensor(name))


def _write(targets: dict[Path, dict[str, torch.Tensor]], directory: Path) -> None:
    directory.mkdir()
    for path, tensors in targets.items():
        save_file(tensors, directory / path.name, metadata={"format": "pt"})


def _peaks(hf_config: dict[str, Any], source: Path, target: Path, limit: int) -> tuple[int, int]:
    """Bytes above the model's own at the peaks of an import and of an export, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    process = context.Process(target=_take_peaks, args=(hf_config, source, target, limit, found))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the process that measures memory failed; its traceback is above")
    return found.get()


def _take_peaks(hf_config: dict[str, Any], source: Path, target: Path, limit: int, found: Any) -> None:
    logging.disable(logging.INFO)
    with _model(hf_config) as (bridge, chunks), suspended():
        before = _resident(reset=True)
        bridge.load_hf_weights(chunks, source, show_progress=False)
        imported = _resident() - before
        before = _resident(reset=True)
        bridge.save_hf_pretrained(chunks, target, show_progress=False, max_shard_bytes=limit)
        found.put((imported, _resident() - before))


def _resident(*, reset: bool = False) -> int:
    """Bytes of the largest resident set since the last reset, which makes it the present one; mapped files count."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


if __name__ == "__main__":
    run(measure, build_parser())
