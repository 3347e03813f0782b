# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What reads a command line or a stranger's data and models, with valid inputs and the words that damage them best."""

import copy
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Reader:
    """Something that reads a stranger's input."""

    name: str
    read: Callable[[Path], Any]
    """Takes the input as a file of this name, in a directory of its own."""

    seeds: tuple[bytes, ...]
    """Valid inputs."""

    words: tuple[bytes, ...]
    """Of the format, and of what would do harm."""

    share: float = 1.0
    """Of the inputs, against the other readers'; slow ones get fewer."""

    accepted: int = 0
    refused: int = 0


def fast_disk() -> str | None:
    """Where many small files are best written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


NUMBERS = (b"-1", b"1e400", b"NaN", b"0x7f", b"99999999999999999999", b"1_000")
TARGET = b"{_target_: os.system, command: 'touch hacked'}"
NESTED = (b'{"a":' * 400 + b"1" + b"}" * 400, b"[" * 400 + b"]" * 400)
TAGS = (b"!!bool x", b"!!int x", b"!!int ''", b"!!timestamp x", b"!!omap [1]", b"!!binary x", b"!!set {a, b}", b"!x ")
LAUGHS = b"{a: &a [1,2], b: &b [*a,*a], c: &c [*b,*b], d: [*c,*c], e: {<<: [{x: 1}, {y: 2}]}}"


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
    words = (*words, *TAGS, *NESTED, LAUGHS)
    return Reader("overrides", read, seeds, (*words, TARGET, *NUMBERS, b".__class__=", b"\n", b"~", b"+", b"++"))


def _yaml() -> Reader:
    from megatron.bridge.recipes import smollm2_135m_peft_config
    from megatron.bridge.training.config import ConfigContainer

    text = smollm2_135m_peft_config().to_yaml()
    short = "train: {train_iters: 3, micro_batch_size: 1}\nmodel: {num_layers: 2}\n"
    words = (b"_target_: ", b"os.system", b"- ", b": ", b"\n  ", b"&a ", b"*a", b"<<: *a", b"!!python/object:os.x {}")
    words = (*words, TARGET, b"_call_: true\n", b"_partial_: true\n", b"megatron.bridge.training.config.", *NUMBERS)
    words = (*words, *TAGS, *NESTED, LAUGHS, b"megatron.bridge.models..", b"torch.nn.functional.silu")
    return Reader("YAML", ConfigContainer.from_yaml, (text.encode(), short.encode()), words)


def _jsonl() -> Reader:
    from megatron.bridge.data.formats import choose_format
    from megatron.bridge.data.jsonl import read_rows
    from megatron.bridge.data.sft_options import SFTOptions

    tokenizer = _tiny_tokenizer()

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
    return Reader(
        "JSONL",
        read,
        seeds,
        (*words, *NUMBERS, *NESTED, b'"role": "tool"', b'"tools": [', b'"from": 3', b"{" * 2000, b"true"),
    )


def _tiny_tokenizer() -> Any:
    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.data.tokenizer import build_tokenizer
    from tests.unit_tests.data.conftest import write_tokenizer

    directory = write_tokenizer(Path(tempfile.mkdtemp(dir=fast_disk())))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(directory)))
    shutil.rmtree(directory)
    return tokenizer


def _tokenizers() -> list[Reader]:
    from transformers import logging

    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.data.tokenizer import build_tokenizer
    from tests.unit_tests.data.conftest import CHATML, write_tokenizer

    logging.set_verbosity_error()
    directory = write_tokenizer(Path(tempfile.mkdtemp(dir=fast_disk())))
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    tokenizer = _tiny_tokenizer()
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]

    def built(path: Path) -> Any:
        for name in files.keys() - {path.name}:
            (path.parent / name).write_bytes(files[name])
        return build_tokenizer(TokenizerConfig(tokenizer_model=str(path.parent))).text_to_ids("the cat")

    def rendered(path: Path) -> Any:
        tokenizer.hf_tokenizer.chat_template = path.read_bytes().decode("utf-8", errors="replace")
        return tokenizer.apply_chat_template(messages)

    words = (b'"', b"{", b"}", b"[", b"]", b"null", b"true", b"\\ud800", *NUMBERS, *NESTED)
    kinds = (
        b'"type": "WordPiece"',
        b'"type": "Unigram"',
        b'"Split"',
        b'"pattern": {"Regex": "(a+)+"}',
        b'"merges": []',
    )
    classes = (b'"BertTokenizer"', b'"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}', b'"model_type": "llama"')
    jinja = (
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"messages",
        b".__class__",
        b"|tojson",
        b"cycler.__init__",
        b"lipsum",
        b"namespace()",
    )
    jinja = (
        *jinja,
        b"{% for m in messages %}",
        b"{% endfor %}",
        b"raise_exception('x')",
        b"[0]",
        b"'",
        b"strftime_now('%')",
    )
    return [
        Reader("tokenizer.json", built, (files["tokenizer.json"],), (*words, *kinds), share=0.2),
        Reader("tokenizer_config.json", built, (files["tokenizer_config.json"],), (*words, *classes), share=0.2),
        Reader("chat_template.jinja", rendered, (CHATML.encode(), b"{{ messages[0].content }}"), jinja),
    ]


def _tokens() -> Reader:
    from megatron.bridge.data.cache import read_cache, write_cache

    path = Path(tempfile.mkdtemp(dir=fast_disk())) / "tokens.npz"
    write_cache(path, {"ids": np.arange(3, dtype=np.int32)}, recipe={"a": 1}, report={"samples": 1})

    def read(path: Path) -> Any:
        found = read_cache(path, ("ids",), recipe={"a": 1})
        if found is None:
            raise ValueError("not believed: the data is tokenised again")
        return found

    compressed = io.BytesIO()
    np.savez_compressed(compressed, about=np.array("{}"), ids=np.zeros(100))
    words = (b"'descr': '|O'", b"'shape': (99999999999,)", b"PK\x01\x02", b"\x08\x00", b"\xff" * 8, b"\x93NUMPY")
    return Reader("tokens.npz", read, (path.read_bytes(), compressed.getvalue()), words)


def _gpt_index() -> Reader:
    from megatron.bridge.data.config import GPTDatasetConfig
    from megatron.bridge.data.gpt import check_blend_files

    def read(path: Path) -> Any:
        path.with_suffix(".bin").write_bytes(b"abc")
        return check_blend_files(
            GPTDatasetConfig(random_seed=1, seq_length=8, blend=([str(path.with_suffix(""))], None), split="1,0,0")
        )

    seed = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 1, 2) + struct.pack("<iqqq", 3, 0, 0, 1)
    return Reader("data.idx", read, (seed,), (b"\xff" * 8, b"\x00" * 8, b"MMIDIDX"))


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
    return Reader("config.json", read, tuple(json.dumps(seed).encode() for seed in seeds), (*words, *NUMBERS, *NESTED))


def _index() -> Reader:
    from safetensors.torch import save

    from megatron.bridge.models.conversion.hf_weights import HFWeights

    shard = save({"a": torch.ones(2)})

    def read(path: Path) -> Any:
        (path.parent / "model-00001-of-00001.safetensors").write_bytes(shard)
        return HFWeights(path.parent).files

    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    names = (b'"../../etc/passwd"', b'"/etc/passwd"', b'"a/b"', b'"."', b'".."', b'""', b'"\\u0000"')
    words = (*names, b"null", b"[]", b"{}")
    words = (*words, b'"weight_map"', b'"' + b"x" * 300 + b'"', b"[" * 2000, *NUMBERS, *NESTED)
    return Reader("model.safetensors.index.json", read, (json.dumps(index).encode(),), words)


def _safetensors() -> Reader:
    from safetensors.torch import save

    from megatron.bridge.models.conversion.hf_weights import HFWeights

    def read(path: Path) -> Any:
        weights = HFWeights(path.parent)
        return [weights.read(name) for name in weights.files]

    seeds = (save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}), save({}))
    words = (b'"dtype":"F64"', b'"shape":[-1]', b'"shape":[99999999999]', b'"data_offsets":[0,0]', b"\xff" * 8, b"\x00")
    return Reader("model.safetensors", read, seeds, (*words, b"__metadata__", *NUMBERS))


def readers() -> list[Reader]:
    """All but those of checkpoints. What they import takes seconds."""
    return [
        *(_overrides(), _yaml(), _jsonl(), *_tokenizers(), _tokens(), _gpt_index()),
        *(_hf_config(), _index(), _safetensors()),
    ]
