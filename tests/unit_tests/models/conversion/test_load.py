# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Loading checks everything first: a wrong file is named in one line and leaves the model as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.load import load_weights
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def changed(llama, tmp_path):
    """A copy of the model whose tensors a test changes."""

    def change(edit):
        directory = tmp_path / "changed"
        shutil.copytree(llama, directory)
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return change


def load_on_rank(llama, changed, overrides=(), allowed=None):
    """Build the model of `llama`, with its weights unless sizes are overridden, then load `changed` into it.

    Returns the error, and the weights that changed.
    """
    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider(load_weights=not overrides)
    for name, value in dict(overrides).items():
        setattr(provider, name, value)
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    before = {name: parameter.clone() for name, parameter in chunks[0].named_parameters()}
    error = None
    try:
        bridge.load_hf_weights(chunks, changed, allowed, show_progress=False)
    except (ValueError, FileNotFoundError) as raised:
        error = str(raised)
    differing = [name for name, parameter in chunks[0].named_parameters() if not torch.equal(parameter, before[name])]
    return error, differing


def remove(name):
    return lambda tensors: tensors.pop(name)


def reshape(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def retype(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            retype("model.layers.2.mlp.up_proj.weight", torch.float8_e4m3fn),
            "'model.layers.2.mlp.up_proj.weight' has dtype F8_E4M3, expected one of ['BF16', 'F16', 'F32']",
        ),
        (
            remove("model.layers.3.mlp.up_proj.weight"),
            "holds no tensor 'model.layers.3.mlp.up_proj.weight', which the model needs with shape (48, 32)",
        ),
        (remove("lm_head.weight"), "holds no tensor 'lm_head.weight'"),
        (
            reshape("model.layers.0.self_attn.k_proj.weight", 32, 32),
            "model.safetensors: 'model.layers.0.self_attn.k_proj.weight' has shape (32, 32), expected (16, 32)",
        ),
        (
            reshape("model.layers.1.mlp.down_proj.weight", 32, 50),
            "'model.layers.1.mlp.down_proj.weight' has shape (32, 50), expected (32, 48)",
        ),
        (
            reshape("model.embed_tokens.weight", 200, 32),
            "'model.embed_tokens.weight' has shape (200, 32), expected (96, 32) for model.vocab_size=96 (padded to 96)",
        ),
        (
            reshape("model.layers.4.input_layernorm.weight", 32),
            "holds 'model.layers.4.input_layernorm.weight', for which the model has no place (1 such tensors)",
        ),
    ],
)
def test_wrong_tensor_is_named_and_the_model_untouched(llama, changed, edit, message):
    error, differing = run_on_ranks(load_on_rank, 1, llama, changed(edit))[0]
    assert message in error and "changed" in error and "\n" not in error
    assert differing == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_named(llama, changed, value):
    def spoil(tensors):
        tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] = value

    error, _ = run_on_ranks(load_on_rank, 1, llama, changed(spoil))[0]
    assert "model.safetensors: 'model.layers.2.self_attn.k_proj.weight' holds NaN or infinite values" in error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_the_last_value_of_an_odd_number_is_looked_at(dtype, value):
    from megatron.bridge.models.conversion import load

    largest = torch.finfo(dtype).max
    for values in (torch.full((3, 131071), largest, dtype=dtype), torch.full((7,), -largest, dtype=dtype)):
        target = torch.zeros_like(values)
        load._copy_checked(target, values, "w", Path("a.safetensors"))
        assert torch.equal(target, values)
        values.view(-1)[-1] = value
        with pytest.raises(ValueError, match="a.safetensors: 'w' holds NaN or infinite values"):
            load._copy_checked(target, values, "w", Path("a.safetensors"))


def test_vocabulary_larger_than_the_embedding_is_refused(llama):
    overrides = {"vocab_size": 60, "make_vocab_size_divisible_by": 64}
    error, differing = run_on_ranks(load_on_rank, 1, llama, llama, overrides)[0]
    assert (
        "has shape (96, 32), expected (60, 32) for model.vocab_size=60 (padded to 64): set model.vocab_size=96" in error
    )
    assert differing == []


def test_half_written_file_is_refused(llama, changed):
    directory = changed(lambda tensors: None)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    error, differing = run_on_ranks(load_on_rank, 1, llama, directory)[0]
    assert "model.safetensors is damaged or half-written" in error and differing == []


def test_allowed_mismatch_keeps_its_values_and_the_rest_is_loaded(llama, changed):
    directory = changed(reshape("model.layers.1.mlp.down_proj.weight", 32, 50))

    def double(tensors):
        for tensor in tensors.values():
            tensor *= 2

    tensors = load_file(directory / "model.safetensors")
    double(tensors)
    save_file(tensors, directory / "model.safetensors")
    error, differing = run_on_ranks(load_on_rank, 1, llama, directory, (), ["*.down_proj.weight"])[0]
    assert error is None
    assert "decoder.layers.1.mlp.linear_fc2.weight" not in differing
    assert "decoder.layers.2.mlp.linear_fc2.weight" in differing and "output_layer.weight" in differing


def test_old_buffers_in_the_file_are_ignored(llama, changed):
    directory = changed(reshape("model.layers.0.self_attn.rotary_emb.inv_freq", 4))
    assert run_on_ranks(load_on_rank, 1, llama, directory)[0] == (None, [])


def test_head_of_a_tied_model_is_ignored(tmp_path):
    tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors")
    assert run_on_ranks(load_on_rank, 1, tied, tied)[0] == (None, [])


def error_on_every_rank(llama, changed, rank_with_bad_file):
    directory = changed if torch.distributed.get_rank() == rank_with_bad_file else llama
    try:
        load_on_rank_result = load_on_rank(llama, directory)
    except RuntimeError as raised:
        return str(raised)
    return load_on_rank_result[0]


def test_error_on_one_rank_ends_all(llama, changed):
    directory = changed(remove("model.norm.weight"))
    first, second = run_on_ranks(error_on_every_rank, 2, llama, directory, 1)
    assert "failed on rank 1: ValueError" in first and "holds no tensor 'model.norm.weight'" in first
    assert second.startswith(str(directory)) or "holds no tensor 'model.norm.weight'" in second


def elements_read_on_rank(llama, tensor_parallel_size, pipeline_parallel_size):
    sizes = []

    class Watched(torch.Tensor):
        """A view of a mapped file: what is mapped is read when it is copied."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                sizes.append(args[1].numel())
            return super().__torch_function__(function, types, args, kwargs)

    class WatchedWeights(HFWeights):
        def read(self, name):
            return super().read(name).as_subclass(Watched)

    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = tensor_parallel_size
    provider.pipeline_model_parallel_size = pipeline_parallel_size
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    weights = WatchedWeights(llama)
    load_weights(chunks, bridge.family, weights, show_progress=False)
    assert weights._files == {}  # closed: what is mapped of a file is memory
    return sum(sizes), max(sizes), sum(p.numel() for p in chunks[0].parameters())


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_each_rank_reads_only_what_it_holds(tmp_path, sizes):
    llama = save_tiny_llama(tmp_path, vocab_size=256)  # no padding
    total = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    for num_read, largest, num_held in run_on_ranks(elements_read_on_rank, 2, llama, *sizes):
        assert num_read == num_held < 0.6 * total
        assert largest <= 256 * 32


def dtype_on_rank(llama, dtype):
    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider()
    provider.params_dtype, provider.bf16 = dtype, dtype is torch.bfloat16
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    exported = dict(bridge.export_hf_weights(chunks, cpu=True, show_progress=False))
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()  # what was exported is a copy
    original = load_file(llama / "model.safetensors")
    return [name for name, tensor in original.items() if not torch.equal(exported[name], tensor.to(dtype))]


def test_weights_are_rounded_to_the_model_s_dtype(llama):
    assert run_on_ranks(dtype_on_rank, 1, llama, torch.bfloat16)[0] == []


def unknown_weight_on_rank(llama):
    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.initialize_model_parallel()
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    tasks = bridge.get_conversion_tasks(chunk)
    chunk.decoder.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'decoder.layers.0.mlp.extra.weight' has no mapping"):
        bridge.load_hf_weights([chunk])
    return {task.megatron_name: task.hf_names for task in tasks}


def test_tasks_name_both_sides(llama):
    tasks = run_on_ranks(unknown_weight_on_rank, 1, llama)[0]
    assert len(tasks) == 3 + 4 * 6
    assert tasks["decoder.layers.2.mlp.linear_fc1.weight"] == (
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    )


def test_config_of_another_size_is_named(llama, tmp_path):
    directory = tmp_path / "other"
    shutil.copytree(llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    error, differing = run_on_ranks(load_on_rank, 1, directory, llama, {"num_layers": 2})[0]
    assert "for which the model has no place (18 such tensors)" in error and differing == []


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_of_its_own_in_a_tied_model(tmp_path, shards):
    """Transformers 5 doesn't tie an embedding and a head that differ: dropping the head would lose what was trained."""
    llama = save_tiny_llama(tmp_path / "llama", tie_word_embeddings=True)
    tensors = load_file(llama / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    other = embedding.clone()
    other[95, 31] += 1
    heads = {
        "own": other,
        "smaller": embedding[:90].clone(),
        "equal": embedding.clone(),
        "equal in bf16": None,
        "none": None,
    }
    for name, head in heads.items():
        directory = tmp_path / name
        shutil.copytree(llama, directory)
        changed = {**tensors, **({} if head is None else {"lm_head.weight": head})}
        if name == "equal in bf16":
            rounded = embedding.bfloat16()
            changed |= {"lm_head.weight": rounded, "model.embed_tokens.weight": rounded.float()}
        if shards == 2:
            _write_two_shards(directory, changed)
        else:
            save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    found = {name: run_on_ranks(load_on_rank, 1, llama, tmp_path / name)[0] for name in heads}
    for name in ("own", "smaller"):
        error, differing = found[name]
        assert "'lm_head.weight', which differs from 'model.embed_tokens.weight'" in error and "\n" not in error
        assert "tie_word_embeddings=true" in error and differing == []
    assert found["equal"][0] is found["equal in bf16"][0] is found["none"][0] is None


def _write_two_shards(directory, tensors):
    (directory / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[list(shards)[number % 2]][name] = tensor
    for file, held in shards.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    # Half-way through an edit: the index doesn't name the head.
    weight_map = {name: file for file, held in shards.items() for name in held if name != "lm_head.weight"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
