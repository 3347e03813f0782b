# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Feed damaged and invented input to everything that reads a stranger's file or a command line.

    make fuzz                                     # 100,000 inputs
    make fuzz ARGS="--inputs 2000 -k index"       # fewer, of the readers with this word in their names

Whatever comes in, a reader gives what it read, or one of its documented errors, in one line, soon. Inputs are valid
ones that were damaged (bytes flipped, cut out, doubled, words of the format put in), and invented ones. What breaks the
rule is made small and printed.
"""

import argparse
import copy
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

SECONDS_FOR_ONE = 5
DOCUMENTED = (ValueError, FileNotFoundError)


@dataclass
class Reader:
    """Something that reads a stranger's input."""

    name: str
    read: Callable[[Path], Any]
    """Takes the input as a file."""

    seeds: tuple[bytes, ...]
    """Valid inputs."""

    words: tuple[bytes, ...]
    """Of the format, and of what would do harm."""

    accepted: int = 0
    refused: int = 0


@st.composite
def damaged(draw: Any, seeds: tuple[bytes, ...], words: tuple[bytes, ...]) -> bytes:
    """A valid input with some damage."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 6)))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(("flip", "cut", "double", "word", "bytes", "end")))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:end]
        elif kind == "double":
            content[at:at] = content[at:end]
        elif kind == "word":
            content[at:end] = draw(st.sampled_from(words))
        elif kind == "bytes":
            content[at:end] = draw(st.binary(max_size=8))
        elif kind == "end":
            del content[at:]
    return bytes(content)


def inputs_for(reader: Reader) -> st.SearchStrategy[bytes]:
    """Mostly damaged inputs: invented ones seldom get past the first check."""
    joined = st.lists(st.sampled_from(reader.words), max_size=8).map(b"".join)
    return st.one_of(damaged(reader.seeds, reader.words), damaged(reader.seeds, reader.words), joined, st.binary())


def readers() -> list[Reader]:
    """All of them. What they import takes seconds."""
    return [_overrides(), _yaml(), _jsonl(), _hf_config(), _index(), _safetensors(), *_checkpoint_files(), *_pickles()]


_NUMBERS = (b"-1", b"1e400", b"NaN", b"0x7f", b"99999999999999999999", b"1_000")
_TARGET = b"{_target_: os.system, command: 'touch hacked'}"


def _overrides() -> Reader:
    from megatron.bridge.recipes import smollm2_135m_peft_config
    from megatron.bridge.utils.overrides import apply_overrides

    fresh = smollm2_135m_peft_config()

    def read(path: Path) -> Any:
        text = path.read_bytes().decode("utf-8", errors="replace")
        return apply_overrides(copy.deepcopy(fresh), [text])

    seeds = (
        b"train.train_iters=50",
        b"optimizer.lr=1e-5",
        b"model.window_size=[128,0]",
        b"+dataset.dataset_kwargs.chat=true",
        b"~dataset.dataset_kwargs.pad_seq_length_to_mult",
        b"profiling={use_pytorch_profiler: true, profile_ranks: [0, 1]}",
        b"peft.target_modules=[linear_qkv]",
        b"mixed_precision=bf16_mixed",
        b"env_vars.NCCL_DEBUG=INFO",
        b"model.activation_func=torch.nn.functional.silu",
        b"train.exit_signal=SIGUSR1",
    )
    words = (b"train.", b"model.", b"=", b"null", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!python/name:os.system ")
    return Reader("overrides", read, seeds, (*words, _TARGET, *_NUMBERS, b".__class__=", b"\n", b"~", b"+", b"++"))


def _yaml() -> Reader:
    from megatron.bridge.recipes import smollm2_135m_peft_config
    from megatron.bridge.training.config import ConfigContainer

    text = smollm2_135m_peft_config().to_yaml()
    short = "train: {train_iters: 3, micro_batch_size: 1}\nmodel: {num_layers: 2}\n"
    words = (b"_target_: ", b"os.system", b"- ", b": ", b"\n  ", b"&a ", b"*a", b"<<: *a", b"!!python/object:os.x {}")
    words = (*words, _TARGET, b"_call_: true\n", b"_partial_: true\n", b"megatron.bridge.training.config.", *_NUMBERS)
    return Reader("YAML", ConfigContainer.from_yaml, (text.encode(), short.encode()), words)


def _jsonl() -> Reader:
    from megatron.bridge.data.formats import choose_format
    from megatron.bridge.data.jsonl import read_rows
    from megatron.bridge.data.sft_options import SFTOptions
    from megatron.bridge.data.tokenizer import build_tokenizer
    from tests.unit_tests.data.conftest import write_tokenizer

    directory = Path(tempfile.mkdtemp(dir=_fast_disk()))
    write_tokenizer(directory)
    from megatron.bridge.data.config import TokenizerConfig

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(directory)))

    def read(path: Path) -> Any:
        rows = list(read_rows(path))
        if not rows:
            return None
        chosen = choose_format(rows[0][1], SFTOptions(), tokenizer)
        return [chosen.render(row) for _, row in rows]

    seeds = (
        b'{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}\n',
        b'{"text": "a b c"}\n',
    )
    words = (b'"', b"{", b"}", b"[", b"]", b"null", b"\\ud800", b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{{")
    return Reader("JSONL", read, seeds, (*words, *_NUMBERS, b'"role": "tool"', b'"from": 3', b"{" * 2000, b"true"))


def _hf_config() -> Reader:
    from megatron.bridge.models.conversion.hf_config import read_hf_config
    from megatron.bridge.models.families import check_supported, provider_fields

    def read(path: Path) -> Any:
        config = read_hf_config(path.parent)
        check_supported(config, "the model")
        return provider_fields(config)

    common = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    seeds = (
        {"architectures": ["LlamaForCausalLM"], **common, "rope_scaling": scaling},
        {"architectures": ["MistralForCausalLM"], **common, "sliding_window": 8},
        {"architectures": ["Qwen3MoeForCausalLM"], **common, **experts, "head_dim": 8, "mlp_only_layers": []},
    )
    words = (b'"', b":", b",", b"null", b"true", b"{}", b"[]", b'"silu"', b'"rope_type": "yarn"', b'"auto_map": {}')
    return Reader("config.json", read, tuple(json.dumps(seed).encode() for seed in seeds), (*words, *_NUMBERS))


def _index() -> Reader:
    from safetensors.torch import save

    from megatron.bridge.models.conversion.hf_weights import HFWeights

    shard = save({"a": torch.ones(2)})

    def read(path: Path) -> Any:
        (path.parent / "model-00001-of-00001.safetensors").write_bytes(shard)
        return HFWeights(path.parent).files

    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    words = (
        b'"../../etc/passwd"',
        b'"/etc/passwd"',
        b'"a/b"',
        b'"."',
        b'".."',
        b'""',
        b'"\\u0000"',
        b"null",
        b"[]",
        b"{}",
    )
    words = (*words, b'"weight_map"', b'"' + b"x" * 300 + b'"', b"[" * 2000, *_NUMBERS)
    return Reader("model.safetensors.index.json", read, (json.dumps(index).encode(),), words)


def _safetensors() -> Reader:
    from safetensors.torch import save

    from megatron.bridge.models.conversion.hf_weights import HFWeights

    def read(path: Path) -> Any:
        weights = HFWeights(path.parent)
        return [weights.read(name) for name in weights.files]

    seeds = (save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}), save({}))
    words = (b'"dtype":"F64"', b'"shape":[-1]', b'"shape":[99999999999]', b'"data_offsets":[0,0]', b"\xff" * 8, b"\x00")
    return Reader("model.safetensors", read, seeds, (*words, b"__metadata__", *_NUMBERS))


def _checkpoint_files() -> list[Reader]:
    from megatron.bridge.checkpoint import layout
    from megatron.bridge.checkpoint.manifest import check_files_of, read_manifest
    from megatron.bridge.checkpoint.model_checkpoint import read_run_config

    manifest = {"algorithm": "crc32", "files": {"metadata.json": [3, "352441c2"]}}
    odd = (b"null", b"[]", b"{}", b'"', b"-", b"\n", b"release", b"\x00", b"\xd9\xa3", b"..", b"/", b"{" * 3000)

    def tracked(path: Path) -> Any:
        return layout.resolve_checkpoint(path.parent)

    def described(path: Path) -> Any:
        return layout.what_is_missing(path.parent)

    def listed(path: Path) -> Any:
        (path.parent / layout.METADATA_FILE).write_bytes(b"abc")
        return read_manifest(path.parent), check_files_of(path.parent, lambda _: True)

    def configured(path: Path) -> Any:
        return read_run_config(path.parent)

    words = (*odd, *_NUMBERS)
    path_words = (b'"../../../etc/passwd"', b'"/dev/zero"', b'"/dev/stdin"', b'"."', b'""')
    return [
        Reader(layout.TRACKER_FILE, tracked, (b"6", b"release", b"0000012"), words),
        Reader(layout.METADATA_FILE, described, (b'{"sharded_backend": "torch_dist"}',), words),
        Reader("manifest.json", listed, (json.dumps(manifest).encode(),), (*words, *path_words)),
        Reader(
            layout.CONFIG_FILE,
            configured,
            (b"model:\n  _target_: x.Y\n  num_layers: 2\ntrain: {train_iters: 3}\n",),
            (*words, b"&a ", b"*a", b"!!python/object/apply:os.system ['touch hacked']", _TARGET),
        ),
    ]


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


def _pickles() -> list[Reader]:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    from megatron.bridge.checkpoint.safe_pickle import read_blob, read_dcp_metadata

    saved = Path(tempfile.mkdtemp(dir=_fast_disk())) / "blob"
    torch.save({"step": torch.tensor(3), "names": ["a", (1, None)]}, saved)
    harm = pickle.dumps(_Payload())
    words = (b"cposix\nmkdir\n(Vhacked\ntR.", b"cbuiltins\neval\n", harm, b"\x80\x04", b".", b"R", b"(", b"\xff" * 8)
    described = pickle.dumps(Metadata({"a": BytesStorageMetadata()}, {}, {}))
    return [
        Reader("train_state.pt", read_blob, (saved.read_bytes(), pickle.dumps({"a": 1}), harm), words),
        Reader(".metadata", read_dcp_metadata, (described, harm), words),
    ]


def _fast_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def feed(reader: Reader, *, inputs: int, seed: int) -> None:
    """Feed inputs to a reader; what breaks the rule is raised, made small by hypothesis.

    Raises:
        AssertionError: An error that isn't documented, or of several lines, or something was executed.
    """
    folder = Path(tempfile.mkdtemp(dir=_fast_disk()))
    before = os.getcwd()
    os.chdir(folder)

    @settings(
        max_examples=inputs,
        deadline=SECONDS_FOR_ONE * 1000,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs_for(reader))
    def holds(content: bytes) -> None:
        path = folder / "input" / reader.name
        path.write_bytes(content)
        try:
            reader.read(path)
            reader.accepted += 1
        except DOCUMENTED as error:
            reader.refused += 1
            assert not isinstance(error, UnicodeError), f"a bare {type(error).__name__}: {error}"
            assert str(error) and "\n" not in str(error), f"not one line: {error!r}"
        assert not list(folder.rglob("hacked")), "the input was executed"

    (folder / "input").mkdir()
    try:
        with_seed(seed)(holds)()
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def main() -> int:
    """Parse, feed, print; 1 where a reader broke the rule."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs (default: the time)")
    parser.add_argument("-k", dest="word", default="", help="only the readers with this in their names")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    chosen = [reader for reader in readers() if arguments.word in reader.name]
    print(f"seed {seed}\n{'reader':<38}{'read':>8}{'refused':>9}{'seconds':>9}")
    broken = 0
    for reader in chosen:
        started = time.monotonic()
        verdict = ""
        try:
            feed(reader, inputs=-(-arguments.inputs // len(chosen)), seed=seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            broken += 1
            notes = "\n    ".join(getattr(error, "__notes__", []))
            verdict = f"  BROKEN: {type(error).__name__}: {error}\n    {notes}"
        seconds = time.monotonic() - started
        print(f"{reader.name:<38}{reader.accepted:>8}{reader.refused:>9}{seconds:>9.1f}{verdict}", flush=True)
    total = sum(reader.accepted + reader.refused for reader in chosen)
    print(f"{total} inputs, {broken} readers broke the rule")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
