# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Families with layers of their own, from Hugging Face through training, offload and a checkpoint to an export.

DeepSeek-V3 has latent attention and a biased router; GLM-4.5 the router too, shared experts and a dense first layer;
Gemma 3 has norms around attention and MLP, Gemma 4's E2B keys that layers share and inputs of each layer's own, its
26B-A4B experts beside each MLP; GPT-OSS has sinks, and experts with biases that come as MXFP4.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron.bridge import AutoBridge
from megatron.bridge.utils.simulated_accelerator import suspended
from tests.functional_tests.test_conversion_finetune import loss_of
from tests.rigs.families import LAYOUTS, MODELS
from tests.rigs.on_ranks import differing, finetune_from_hf
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import VOCAB_SIZE
from tests.unit_tests.models.tiny_llama import save_tiny_model, some_tokens

PROMPT, NEW_TOKENS = [5, 17, 40, 3, 88], 20
"""More than the window together."""
TP2_EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
FAMILIES = {
    "deepseek_v3": (TP2_EP2, ("norm", "router"), 4 * 4 + 1 + 3),
    "gemma3": ({}, ("norm",), 4 * 6 + 1),
    "gemma4_e2b": ({}, ("norm", "layer_input.", "per_layer_inputs.projection"), 6 * 9 - 3 + 3),
    "gemma4_experts": (TP2_EP2, ("norm", "router"), 4 * (9 + 3) + 1),
    "glm4_moe": (TP2_EP2, ("norm", "router"), 4 * 4 + 1 + 3),
    "gpt_oss": (TP2_EP2, ("norm", "router", "linear_proj.bias"), 4 * 5 + 1),
}
"""By the tiny model: its sizes beside TP 2, the weights that both ranks hold whole, and how many they are."""
OTHERS = ("gemma4", "glm4", "granite", "granite4_nope", "ministral3", "olmo3", "phi3", "seed_oss", "smollm3")
"""Trained with and without offload alone."""
LOUD = {"deepseek_v3": 0.2, "glm4_moe": 0.5}
"""The spread of the weights of models with biased routers. Smaller ones would say one word again and again."""


def _train_and_export(directory, sizes, on_both_ranks):
    plain = finetune_from_hf(directory, offload=False, save=False, sizes=sizes)
    offloaded = finetune_from_hf(directory, offload=True, save=True, sizes=sizes)
    drift = differing(offloaded.weights_after, plain.weights_after)
    moved = [
        name for name in plain.weights_after if not torch.equal(plain.weights_before[name], plain.weights_after[name])
    ]
    whole = {name: one for name, one in plain.weights_after.items() if any(part in name for part in on_both_ranks)}
    bridge = AutoBridge.from_hf_pretrained(directory / "hf")
    bridge.export_ckpt(directory / "megatron", directory / "exported", False, dtype="float32")
    return plain.losses, offloaded.losses, drift, set(plain.weights_after) - set(moved), whole


def _generated(directory, sizes):
    from megatron.bridge.models.generation import generate_tokens, load_for_generation
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(*sizes):
        model = load_for_generation(directory / "megatron", dtype="float32")
        return list(generate_tokens(model, PROMPT, max_new_tokens=NEW_TOKENS))


def _train_other(directory):
    plain, offloaded = (
        finetune_from_hf(directory, offload=offload, save=False, recompute=False) for offload in (False, True)
    )
    moved = any(not torch.equal(plain.weights_before[key], one) for key, one in plain.weights_after.items())
    return plain.losses, offloaded.losses, differing(offloaded.weights_after, plain.weights_after), moved


def _router_biases(directory):
    tensors = load_file(directory / "model.safetensors")
    return {name: bias.float() for name, bias in tensors.items() if name.endswith("e_score_correction_bias")}


def _transformers(directory):
    with suspended():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = torch.tensor([PROMPT])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        return model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[0, len(PROMPT) :].tolist()


def _quantize_experts(directory):
    """Put MXFP4 of other values in place of the experts' matrices; a twin of the directory has these in bf16."""
    tensors, plain, generator = load_file(directory / "hf" / "model.safetensors"), {}, torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 123, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with suspended():
            plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    config = json.loads((directory / "hf" / "config.json").read_text())
    (directory / "twin").mkdir()
    (directory / "twin" / "config.json").write_text(json.dumps(config))
    others = {name: one for name, one in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    save_file(others | plain, directory / "twin" / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "hf" / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "hf" / "model.safetensors", metadata={"format": "pt"})
    return directory / "twin"


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """The run's directory, one that transformers reads as its start, its results, and the whole weights' number."""
    directory, model = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    sizes, on_both_ranks, num_whole = FAMILIES[request.param]
    options = {**model.options, "vocab_size": VOCAB_SIZE, "initializer_range": LOUD.get(request.param, 0.05)}
    if model.has_biased_experts:
        options |= {"intermediate_size": 64, "initializer_range": 0.2}  # a multiple of 32, as MXFP4 needs
    start = save_tiny_model(directory / "hf", model.architecture, dtype=torch.bfloat16, **options)
    if model.has_biased_experts:
        start = _quantize_experts(directory)
    return directory, start, run_on_ranks(_train_and_export, 2, directory, sizes, on_both_ranks), num_whole


def test_offload_changes_no_bit_and_ranks_keep_the_same_weights(trained):
    _, start, runs, num_whole = trained
    tolerance = 0.05 if "gemma" in str(start) else 0.4  # of samples other than the first step's, with louder weights
    unmoved = {name for name in runs[0][3] if ".experts." not in name}  # to which no token may have gone
    assert unmoved == set(), "rank 1 has the embedding's padding, which isn't trained"
    for losses, offloaded, drift, _, whole in runs:
        assert offloaded == losses and drift == {}
        assert abs(losses[0] - loss_of(start)) < tolerance
        assert losses[-1] < losses[0] or "deepseek" in str(start), "whose weights are too loud to learn in 3 steps"
        assert len(whole) == num_whole and differing(whole, runs[0][-1]) == {}


def test_checkpoint_and_export_say_the_same(trained):
    directory, start, *_ = trained
    assert "quantization_config" not in json.loads((directory / "exported" / "config.json").read_text())
    if any(model in str(start) for model in LOUD):
        before, after = (_router_biases(one) for one in (start, directory / "exported"))
        assert differing(after, before) == {}, "a finetune doesn't move them"
    expected = _transformers(directory / "exported")
    assert len(set(expected)) > 3, "a text of one word would show little"
    sizes = (2, 1) if "gemma4_e2b" in str(start) else (1, 2)  # tensor-parallel ranks, pipeline stages
    for generated in run_on_ranks(_generated, 2, directory, sizes):
        assert generated == expected


@pytest.mark.parametrize("family", OTHERS)
def test_offload_changes_no_bit_of_other_families(tmp_path, family):
    options = {**MODELS[family].options, "vocab_size": VOCAB_SIZE, "initializer_range": 0.05}
    save_tiny_model(tmp_path / "hf", MODELS[family].architecture, dtype=torch.bfloat16, **options)
    for losses, offloaded, drift, moved in run_on_ranks(_train_other, 2, tmp_path):
        assert offloaded == losses and drift == {} and moved
        assert abs(losses[0] - loss_of(tmp_path / "hf")) < 0.1


def _gradients_on_rank(directory, sizes, tokens):
    """The gradient of each weight by its Hugging Face name, after one backward pass, reduced as in training."""
    from megatron.core.distributed import finalize_model_grads

    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider()
    provider.moe_aux_loss_coeff = 0.0
    for name, value in sizes.items():
        setattr(provider, name, value)
    chunks = provider.provide_distributed_model()
    positions = torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)
    chunks[0](tokens, positions, None, labels=tokens).float().mean().backward()
    finalize_model_grads(chunks)
    for parameter in chunks[0].parameters():
        parameter.data.copy_(parameter.main_grad)
    return {name: one.numpy() for name, one in bridge.export_hf_weights(chunks, cpu=True, show_progress=False)}


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("gpt_oss", ("TP2 EP2 ETP1", "TP2 SP")),
        ("mixtral", ("TP1 ETP2",)),
        ("olmo2", ("TP2 SP",)),
        ("gemma4_e2b", ("TP2", "TP2 SP")),
        ("gemma4_experts", ("TP2 EP2 ETP1",)),
    ],
)
def test_every_weight_gets_the_gradient_of_one_rank(tmp_path, model, layouts):
    """Sums over ranks that Core makes by the marks on weights: each where it belongs, none where it doesn't."""
    options = {"num_hidden_layers": 2, **MODELS[model].options}
    hf = save_tiny_model(tmp_path, MODELS[model].architecture, **options)
    tokens = some_tokens(options.get("vocab_size", 96))
    (expected,) = run_on_ranks(_gradients_on_rank, 1, hf, {}, tokens)
    assert all(abs(gradient).max() > 1e-5 for gradient in expected.values())
    for layout in layouts:
        for gradients in run_on_ranks(_gradients_on_rank, 2, hf, LAYOUTS[layout].sizes, tokens):
            rounding = {name: max(1e-6, 1e-4 * abs(one).max()) for name, one in expected.items()}
            distances = {name: abs(gradients[name] - one).max() for name, one in expected.items()}
            assert [name for name in expected if distances[name] > rounding[name]] == [], layout
