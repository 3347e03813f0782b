# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Llamas of every kind give the logits and the bits of transformers; exports, checkpoints and what is refused.

`test_conversion_families.py` holds the other families and the layouts.
"""

import json

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.roundtrip import compare_with_files
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import LLAMA3_ROPE, hf_logits, megatron_logits, save_tiny_model, some_tokens

LOGIT_TOLERANCE = 1e-4
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one_query_group": {"num_key_value_heads": 1},
    "no_groups": {"num_key_value_heads": 4},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn_rope": {"rope_parameters": {**YARN_ROPE, "truncate": False}},
    "yarn_rope_with_its_factor": {"rope_parameters": {**YARN_ROPE, "attention_factor": 0.7}},
    "odd_vocabulary": {"vocab_size": 101},
    "odd_vocabulary_tied": {"vocab_size": 101, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
OTHER_FAMILIES = {
    "qk_norms": {"architecture": "Qwen3ForCausalLM", "head_dim": 8},
    "experts": {
        "architecture": "Qwen3MoeForCausalLM",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.0,
    },
    "sandwich": {"architecture": "Gemma3ForCausalLM", "head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 2},
}
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_virtual": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of each tiny model, written once."""
    root = tmp_path_factory.mktemp("models")
    written = {}

    def directory_of(name, dtype=torch.float32):
        if (name, dtype) not in written:
            options = {"architecture": "LlamaForCausalLM", **{**MODELS, **OTHER_FAMILIES}[name]}
            written[name, dtype] = save_tiny_model(root / f"{name}_{dtype}", dtype=dtype, **options)
        return written[name, dtype]

    return directory_of


def build_on_rank(directory, layout, **options):
    """The bridge and the model with its weights, at a layout."""
    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider()
    for name, value in layout.items():
        setattr(provider, name, value)
    provider.initialize_model_parallel()
    return bridge, provider.provide_distributed_model(**{"wrap_with_ddp": False, **options})


def logits_on_rank(directory, layout, tokens):
    logits = megatron_logits(build_on_rank(directory, layout)[1], tokens)
    return None if logits is None else logits.numpy()


def compare_logits(directory, layout, vocab_size):
    tokens = some_tokens(vocab_size)
    expected = hf_logits(directory, tokens)
    assert expected.std() > 0.1
    outputs = [torch.from_numpy(o) for o in run_on_ranks(logits_on_rank, 2, directory, layout, tokens) if o is not None]
    assert outputs
    for output in outputs:
        difference = (output[..., :vocab_size] - expected).abs().max()
        assert difference < LOGIT_TOLERANCE
        assert (output[..., vocab_size:] == -1e4).all()


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(models, model):
    compare_logits(models(model), {}, MODELS[model].get("vocab_size", 96))


def test_biases_at_tensor_parallel_size_2(models):
    compare_logits(models("biases"), LAYOUTS["tp2_sequence_parallel"], 96)


def outcome(results):
    """The number of equal tensors, and the others with what differs."""
    differing = [(one.name, one.found) for one in results if not one.is_equal]
    return len(results) - len(differing), differing


def roundtrip_on_rank(directory, layout, wrap_with_ddp):
    """Load, into the bare chunks and then again through the wrappers, and export."""
    bridge, chunks = build_on_rank(directory, layout, wrap_with_ddp=wrap_with_ddp)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7)
    bridge.load_hf_weights(chunks, show_progress=False)
    return outcome(compare_with_files(chunks, bridge.family, HFWeights(directory), show_progress=False))


@pytest.mark.parametrize("layout", ["tp2", "pp2_virtual"])
def test_wrapped_models_give_back_every_bit(models, layout):
    directory = models("odd_vocabulary_tied", torch.bfloat16)
    num_tensors = len(load_file(directory / "model.safetensors"))
    for num_equal, differing in run_on_ranks(roundtrip_on_rank, 2, directory, LAYOUTS[layout], True):
        assert differing == [] and num_equal == num_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dtype_survives(models, dtype):
    directory = models("untied", dtype)
    for num_equal, differing in run_on_ranks(roundtrip_on_rank, 2, directory, LAYOUTS["tp2"], False):
        assert differing == [] and num_equal == 4 * 9 + 3


def changed_weight_on_rank(directory):
    bridge, chunks = build_on_rank(directory, LAYOUTS["tp2"])
    if dist.get_rank() == 1:
        with torch.no_grad():
            dict(chunks[0].named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] += 1
    return outcome(compare_with_files(chunks, bridge.family, HFWeights(directory), show_progress=False))


def test_comparison_can_fail(models):
    for num_equal, differing in run_on_ranks(changed_weight_on_rank, 2, models("untied")):
        assert differing == [("model.layers.1.mlp.down_proj.weight", "max difference 1")]
        assert num_equal == 4 * 9 + 3 - 1


def import_on_rank(directory, checkpoint, sizes):
    return str(AutoBridge.import_ckpt(directory, checkpoint, show_progress=False, **sizes))


def export_on_rank(directory, checkpoint, exported, sizes):
    AutoBridge.from_hf_pretrained(directory).export_ckpt(checkpoint, exported, show_progress=False, **sizes)


@pytest.mark.parametrize(("imported_at", "exported_at"), [("tp1", "tp2"), ("tp2", "pp2"), ("pp2", "tp1")])
def test_checkpoint_at_one_layout_exports_at_another(models, tmp_path, imported_at, exported_at):
    """Through a Megatron checkpoint on disk, written at one layout and read at another."""
    directory = models("odd_vocabulary_tied", torch.bfloat16)
    (directory / "tokenizer.json").write_text("{}")
    iteration, _ = run_on_ranks(import_on_rank, 2, directory, tmp_path / "megatron", LAYOUTS[imported_at])
    assert iteration == str(tmp_path / "megatron" / "iter_0000000")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert (tmp_path / "megatron" / "iter_0000000" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "megatron") == str(directory)
    run_on_ranks(export_on_rank, 2, directory, tmp_path / "megatron", tmp_path / "hf", LAYOUTS[exported_at])
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((directory / name).read_text())
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


def save_on_rank(directory, exported, layout, options):
    bridge, chunks = build_on_rank(directory, layout)
    try:
        bridge.save_hf_pretrained(chunks, exported, show_progress=False, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def test_sharded_export_loads_in_transformers(models, tmp_path):
    directory = models("tied")
    options = {"max_shard_bytes": 20_000}
    assert run_on_ranks(save_on_rank, 2, directory, tmp_path / "hf", LAYOUTS["tp2"], options) == [None, None]
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    tokens = some_tokens(96)
    assert torch.equal(hf_logits(tmp_path / "hf", tokens), hf_logits(directory, tokens))


def test_config_names_the_dtype_that_the_weights_have(models, tmp_path):
    directory = models("untied", torch.float16)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    run_on_ranks(save_on_rank, 2, directory, tmp_path / "hf", {}, {})
    (directory / "config.json").write_text(json.dumps(config))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.float32}


def test_targets_that_would_lose_something_are_refused(models, tmp_path):
    directory = models("untied")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for target, message in [
        (directory, "is the source of the conversion"),
        (tmp_path / "mine", "holds something else than a Hugging Face model"),
        (tmp_path / "file", "is a file"),
    ]:
        for error in run_on_ranks(save_on_rank, 2, directory, target, {}, {}):
            assert message in error
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_older_export_is_replaced_whole(models, tmp_path):
    run_on_ranks(save_on_rank, 2, models("tied"), tmp_path / "hf", {}, {"max_shard_bytes": 20_000})
    run_on_ranks(save_on_rank, 2, models("untied"), tmp_path / "hf", {}, {})
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors*")] == ["model.safetensors"]


def test_export_that_differs_from_its_source_is_refused(models, tmp_path):
    options = {"source_path": str(models("tied"))}
    for error in run_on_ranks(save_on_rank, 2, models("untied"), tmp_path / "hf", {}, options):
        assert "only the export holds 'lm_head.weight' (1 differ)" in error
    assert not (tmp_path / "hf").exists()


def large_export_on_rank(directory, exported):
    bridge, chunks = build_on_rank(directory, {})
    with torch.no_grad():
        dict(chunks[0].named_parameters())["decoder.final_layernorm.weight"][5] = 70_000
    try:
        bridge.save_hf_pretrained(chunks, exported, show_progress=False, dtype="float16", max_shard_bytes=20_000)
    except ValueError as error:
        return str(error)
    return None


def test_failed_export_leaves_nothing(models, tmp_path):
    """The value that float16 can't hold comes after the first files are written."""
    (error,) = run_on_ranks(large_export_on_rank, 1, models("untied"), tmp_path / "hf")
    assert error == "'model.norm.weight' holds values that float16 can't: choose dtype bfloat16 or float32"
    assert list(tmp_path.iterdir()) == []


def reshard_on_rank(directory, checkpoint, layout, tokens):
    bridge = AutoBridge.from_hf_pretrained(directory)
    chunks = bridge.load_megatron_model(checkpoint, mp_overrides=layout)
    logits = megatron_logits(chunks, tokens)
    return None if logits is None else logits.numpy()


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    """A checkpoint of the llama3_rope model, written at tensor-parallel size 2."""
    path = tmp_path_factory.mktemp("checkpoint")
    run_on_ranks(import_on_rank, 2, models("llama3_rope"), path, LAYOUTS["tp2"])
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_computes_the_same_at_any_layout(models, checkpoint, layout):
    directory, tokens = models("llama3_rope"), some_tokens(96)
    outputs = run_on_ranks(reshard_on_rank, 2, directory, checkpoint, LAYOUTS[layout], tokens)
    outputs = [torch.from_numpy(output) for output in outputs if output is not None]
    assert outputs and all((o[..., :96] - hf_logits(directory, tokens)).abs().max() < LOGIT_TOLERANCE for o in outputs)


def edit_run_config(checkpoint, edit):
    path = checkpoint / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    edit(config["model"])
    path.write_text(yaml.safe_dump(config))


def load_error_on_rank(directory, checkpoint):
    try:
        AutoBridge.from_hf_pretrained(directory).load_megatron_model(checkpoint)
    except ValueError as error:
        return str(error)
    return None


def test_configuration_of_another_version_is_read(models, tmp_path):
    """Classes and fields that are not known here don't matter to the weights."""
    directory = models("tied")
    run_on_ranks(import_on_rank, 2, directory, tmp_path, {})

    def as_elsewhere(model):
        model["_target_"] = "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B"
        model.update(field_of_tomorrow=1, num_moe_experts="many", tp_comm_overlap=True, recompute_granularity="full")

    edit_run_config(tmp_path, as_elsewhere)
    (tmp_path / "iter_0000000" / "manifest.json").unlink()  # it tells that the file was changed
    assert run_on_ranks(load_error_on_rank, 2, directory, tmp_path) == [None, None]
    edit_run_config(tmp_path, lambda model: model.update(vocab_size="os.system"))
    for error in run_on_ranks(load_error_on_rank, 2, directory, tmp_path):
        assert "model.vocab_size" in error and "\n" not in error


def test_checkpoint_of_another_model_is_refused(models, checkpoint):
    for error in run_on_ranks(load_error_on_rank, 2, models("one_query_group"), checkpoint):
        assert "was saved with model.num_query_groups=2, but the Hugging Face configuration says 1" in error


def norm_gradients_on_rank(directory, layout, tokens):
    """Each norm's gradient after one backward, reduced as in training."""
    from megatron.core.distributed import finalize_model_grads

    _, (chunk,) = build_on_rank(directory, layout, wrap_with_ddp=True)
    positions = torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)
    chunk(tokens, positions, None, labels=tokens).float().mean().backward()
    finalize_model_grads([chunk])
    return {name: p.main_grad.numpy() for name, p in chunk.named_parameters() if "norm" in name or "router" in name}


@pytest.mark.parametrize(
    ("model", "layout", "num_weights"),
    [
        ("untied", "tp2_sequence_parallel", 4 * 2 + 1),
        ("qk_norms", "tp2", 4 * 4 + 1),  # each rank normalises its own heads
        ("experts", "tp2_sequence_parallel", 4 * 5 + 1),
        ("sandwich", "tp2_sequence_parallel", 4 * 6 + 1),
    ],
)
def test_weights_that_every_rank_holds_get_the_whole_gradient(models, model, layout, num_weights):
    """Each rank sees half of the sequence, or half of the heads: without the reduction gradients would be halves."""
    directory, tokens = models(model), some_tokens(96)
    expected = run_on_ranks(norm_gradients_on_rank, 2, directory, {}, tokens)[0]
    assert len(expected) == num_weights
    for gradients in run_on_ranks(norm_gradients_on_rank, 2, directory, LAYOUTS[layout], tokens):
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                torch.from_numpy(gradient), torch.from_numpy(expected[name]), rtol=1e-4, atol=1e-6
            )
            assert abs(gradient).max() > 1e-4
