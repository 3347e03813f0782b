# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adapters out of a run and into Hugging Face: by themselves for the peft library, and merged into the weights."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.functional_tests.test_conversion_command import on_rank
from tests.rigs.families import MODELS
from tests.rigs.grouped_experts import grouped_layer_spec
from tests.rigs.on_ranks import Recorder
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.unit_tests.data.conftest import CHATML, write_tokenizer
from tests.unit_tests.models.tiny_llama import megatron_logits, save_tiny_model

VOCAB_SIZE = 337
"""More than the tokenizer's; two tensor-parallel ranks have padding beside it."""
TOKENS = torch.arange(24).reshape(2, 12)
IM_END = 279
TP2, PP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "pipeline_model"))
CELLS = {
    "deepseek_v2, LoRA of latent attention, TP 2": (
        "deepseek_v2",
        "lora",
        {**TP2, "sequence_parallel": True},
        {"target_modules": ["linear_qkv", "linear_proj"], "exclude_modules": ["*.layers.1.*.linear_kv_up_proj"]},
    ),
    "gemma3, LoRA, TP 2": ("gemma3", "lora", TP2, {}),
    "gpt_oss, LoRA of attention, EP 2": (
        "gpt_oss",
        "lora",
        {"expert_model_parallel_size": 2},
        {"target_modules": ["linear_qkv", "*.layers.1.*.linear_proj"]},
    ),
    "qwen2 with biases, LoRA in one layer, PP 2": ("qwen2", "lora", PP2, {"target_modules": ["*.layers.1.*.linear_*"]}),
    "qwen3_5, LoRA of gated attention and of Gated DeltaNet, TP 2": (
        "qwen3_5",
        "lora",
        TP2,
        {"target_modules": ["linear_qkv", "linear_proj", "in_proj", "out_proj"]},
    ),
    "qwen2 with biases, DoRA, TP 2": ("qwen2", "dora", TP2, {}),
    "qwen2 with biases, parts of fused layers, TP 2": ("qwen2", "canonical_lora", TP2, {}),
    "llama3, DoRA, of another kind in one layer": (
        "llama3",
        "dora",
        {},
        {"target_modules": ["linear_qkv", "*.layers.2.*.linear_fc1"]},
    ),
}


class LastLogits(Recorder):
    """What the model says after the last step, on the last pipeline stage."""

    def on_train_end(self, context):
        logits = megatron_logits(context.model, TOKENS)
        self.logits = None if logits is None else logits.cpu()


def _train(directory, scheme, layout, targets):
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.recipes.common import default_peft_config
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    cfg = tiny_config(directory, train_iters=2, optimizer={"lr": 1e-2})
    cfg.model = AutoBridge.from_hf_pretrained(directory / "hf").to_megatron_provider(load_weights=False)
    cfg.model.seq_length, cfg.model.calculate_per_token_loss = 16, True
    for name, value in layout.items():
        setattr(cfg.model, name, value)
    # A tokenizer of its own, with a chat template that the model's doesn't have.
    cfg.tokenizer = TokenizerConfig(tokenizer_model=str(directory / "tokenizer"))
    cfg.mixed_precision = "fp32"
    cfg.checkpoint.pretrained_checkpoint = str(directory / "hf")
    cfg.peft = default_peft_config(scheme, dim=4, alpha=8, lora_B_init_method="normal", **targets)
    recorder = LastLogits()
    finetune(cfg, forward_step, callbacks=[recorder])
    return recorder.logits


@torch.no_grad()
def _logits(model):
    return model.eval()(TOKENS).logits[..., :VOCAB_SIZE]


@pytest.mark.parametrize("cell", CELLS)
def test_peft_and_merged_weights_give_the_logits_of_the_run(tmp_path, cell):
    name, scheme, layout, targets = CELLS[cell]
    options = {**MODELS[name].options, "vocab_size": VOCAB_SIZE, "eos_token_id": [2, 7]}
    hf = save_tiny_model(tmp_path / "hf", MODELS[name].architecture, **options)
    write_tokenizer(hf, chat_template=None)
    write_tokenizer(tmp_path / "tokenizer")
    trained = run_on_ranks(_train, 2, tmp_path, scheme, layout, targets)[-1]

    adapters = tmp_path / "checkpoints"
    steps = (
        ("export-adapter", "--megatron-path", adapters, "--hf-path", tmp_path / "adapter", "--tp", 2),
        ("export", "--megatron-path", adapters, "--hf-path", tmp_path / "merged", "--pp", 2),
        ("merge", "--megatron-path", adapters, "--output", tmp_path / "megatron", "--tp", 2),
        ("export", "--megatron-path", tmp_path / "megatron", "--hf-path", tmp_path / "merged-twice"),
    )
    for step in steps:
        whole_experts = ("--etp", 1) if MODELS[name].has_biased_experts else ()
        status, output, errors = run_on_ranks(on_rank, 2, *step, *whole_experts, "--hf-model", hf, "--no-progress")[0]
        assert status == 0, errors
    files = [path for path in (tmp_path / "adapter").iterdir() if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1 < len(files), "permissions that the umask doesn't give"
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    before = _logits(base)
    with_adapters = _logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    twice = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged-twice", dtype=torch.float32))
    assert (with_adapters - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, with_adapters, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twice, merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_adapters, trained[..., :VOCAB_SIZE], rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 8, scheme == "dora")
    assert any(target.endswith("q_proj") for target in config["target_modules"])
    assert all(target.startswith("model.layers.") == bool(targets) for target in config["target_modules"])
    for directory in ("adapter", "merged", "merged-twice"):
        assert AutoTokenizer.from_pretrained(tmp_path / directory).chat_template == CHATML
        settings = json.loads((tmp_path / directory / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [2, 7, IM_END], "the model's end tokens, and the one that was learned"


ONE_LAYER = ("gemma4", "gemma4_e2b", "llama", "mixtral", "olmo2", "phi3")


@pytest.mark.parametrize("name", ONE_LAYER)
def test_one_adapted_layer_is_named_in_full(tmp_path, name):
    """By the short name peft would adapt every layer. The logits are the model's own, with peft and merged."""
    layer = 4 if name == "gemma4_e2b" else 1  # which takes another's keys
    options = {**MODELS[name].options, "vocab_size": VOCAB_SIZE}
    hf = save_tiny_model(tmp_path / "hf", MODELS[name].architecture, **options)
    ours = run_on_ranks(_export_one, 1, tmp_path, [f"*.layers.{layer}.*.linear_qkv"])[0][..., :VOCAB_SIZE]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    parts = {"phi3": ["qkv"], "gemma4": list("kq"), "gemma4_e2b": ["q"]}.get(name, list("kqv"))
    assert config["target_modules"] == [f"model.layers.{layer}.self_attn.{kind}_proj" for kind in parts]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * len(parts)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), tmp_path / "adapter")
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(parts)
    torch.testing.assert_close(_logits(loaded), ours, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), ours, rtol=1e-4, atol=1e-4)
    bare = _logits(AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32))
    assert (bare - ours).abs().max() > 1e-2


EXPERTS = {
    "mixtral": (["linear_qkv", "linear_fc1", "linear_fc2"], ["k_proj", "q_proj", "v_proj", "w1", "w2", "w3"]),
    "qwen3_moe": (["*.layers.1.*.local_experts.2.linear_fc1"], None),
    "qwen3_moe, shared": (["*.layers.1.*.experts.linear_fc*"], None),
}
"""By model: what is adapted, and the names that peft gets for it; None: names in full. Qwen3-MoE's are grouped."""


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_adapters_are_named_one_by_one_and_peft_stacks_them(tmp_path, case):
    """Zeros stand for what has no adapter: peft stacks whole layers of experts. Each has a copy of a shared one."""
    targets, expected = EXPERTS[case]
    name, _, is_shared = case.partition(", ")
    options = {**MODELS[name].options, "vocab_size": VOCAB_SIZE}
    hf = save_tiny_model(tmp_path / "hf", MODELS[name].architecture, **options)
    options = {"is_grouped": name == "qwen3_moe", "normalize_moe_lora": True, "share_expert_adapters": bool(is_shared)}
    ours = run_on_ranks(_export_one, 1, tmp_path, targets, **options)[0][..., :VOCAB_SIZE]
    block, matrices = ("block_sparse_moe", "w1 w2 w3") if name == "mixtral" else ("mlp", "gate_proj up_proj down_proj")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = {key for key in file.keys() if ".experts." in key}
    assert keys == {
        f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{matrix}.lora_{side}.weight"
        for layer in (range(4) if expected else [1])
        for expert in range(4)
        for matrix in matrices.split()
        for side in "AB"
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == (expected or sorted({key[17:-14] for key in keys}))
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    bare = _logits(base)
    loaded = _logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(loaded, ours, rtol=1e-4, atol=1e-4)
    assert (bare - ours).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), ours, rtol=1e-4, atol=1e-4)


BESIDE_EXPERTS = ("deepseek_v3", "gemma4_experts", "qwen3_next")


@pytest.mark.parametrize("name", BESIDE_EXPERTS)
def test_default_targets_beside_experts_give_peft_the_logits_of_the_run(tmp_path, name):
    """Latent attention or Gated DeltaNet, experts, shared ones and MLPs: peft adapts the last two as parameters."""
    hf = save_tiny_model(tmp_path / "hf", MODELS[name].architecture, **MODELS[name].options)
    vocab_size = MODELS[name].options["vocab_size"]
    defaults = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    ours = run_on_ranks(_export_one, 1, tmp_path, defaults, dropout=0.1)[0][..., :vocab_size]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0
    beside = ".mlp.gate_proj" if name == "gemma4_experts" else "shared_expert"
    assert any(beside in name for name in config["target_parameters"])
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    before = _logits(base)[..., :vocab_size]
    loaded = _logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))[..., :vocab_size]
    assert (loaded - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, ours, rtol=1e-4, atol=1e-4)


STACKED = {
    "gpt_oss": ("lora", ["linear_qkv", "linear_fc1", "linear_fc2"], ["experts.down_proj", "experts.gate_up_proj"], 2),
    "gpt_oss, gate and up apart, in one layer": (
        "canonical_lora",
        ["linear_q", *(f"*.layers.1.*.linear_fc{kind}" for kind in ("1_gate", "1_up", "2"))],
        ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"],
        4,
    ),
    "gpt_oss, shared by experts": (
        "lora",
        ["linear_fc1", "linear_fc2"],
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        2,
    ),
    "qwen3_5_moe": (
        "lora",
        ["linear_qkv", "*.layers.1.*.local_experts.2.linear_fc1", "*.layers.2.*.linear_fc2"],
        [f"model.layers.{layer}.mlp.experts.{kind}_proj" for layer in (1, 2) for kind in ("down", "gate_up")],
        2,
    ),
}
"""By model: the kind of adapters, what is adapted, the ends of the parameters that peft gets for the experts, and the
rank beside gate and up, whose A is one where they were trained with one."""


@pytest.mark.parametrize("case", STACKED)
def test_adapters_of_experts_in_one_tensor_are_in_one_too(tmp_path, case):
    """The form of peft beside stacked experts, which it doesn't make out of single ones' for these models."""
    scheme, targets, parameters, rank = STACKED[case]
    model = MODELS[case.partition(",")[0]]
    hf = save_tiny_model(tmp_path / "hf", model.architecture, **{**model.options, "vocab_size": VOCAB_SIZE})
    options = {"scheme": scheme, "normalize_moe_lora": scheme == "lora", "share_expert_adapters": "shared" in case}
    ours = run_on_ranks(_export_one, 1, tmp_path, targets, **options)[0][..., :VOCAB_SIZE]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    of_experts = [name for name in config["target_parameters"] if ".shared_expert." not in name]
    assert len(of_experts) == len(parameters) and all(map(str.endswith, of_experts, parameters))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        stacked = file.get_tensor("base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight")
    assert stacked.shape == (4 * rank, model.options.get("hidden_size", 32))
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    bare = _logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded), ours, rtol=1e-4, atol=1e-4)
    assert (bare - ours).abs().max() > 1e-2
    torch.testing.assert_close(_logits(loaded.merge_and_unload()), ours, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), ours, rtol=1e-4, atol=1e-4)


def _export_one(directory, targets, is_grouped=False, scheme="lora", **options):
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.common import default_peft_config
    from megatron.bridge.utils.distributed import model_parallel_groups

    bridge = AutoBridge.from_hf_pretrained(directory / "hf")
    options = {"dim": 2, "alpha": 32, "target_modules": targets, "lora_B_init_method": "normal", **options}
    lora = default_peft_config(scheme, **options)
    provider = bridge.to_megatron_provider()
    if is_grouped:
        provider.transformer_layer_spec = grouped_layer_spec
    provider.finalize()
    with model_parallel_groups():
        chunks = lora(provider.provide_distributed_model(wrap_with_ddp=False))
        bridge.save_hf_adapter(chunks, directory / "adapter", lora, show_progress=False)
        bridge.save_hf_pretrained(chunks, directory / "merged", show_progress=False)
        base = dict(bridge.export_hf_weights(chunks, show_progress=False, merge_adapter_weights=False))
        assert not any("lora" in name for name in base)
        return megatron_logits(chunks, TOKENS).cpu()


BAD = {
    "a whole model": (
        ("export-adapter", "--hf-path", "new"),
        "holds a whole model, not adapters: convert it with export",
    ),
    "nothing to merge": (("merge", "--output", "new"), "holds a whole model: there are no adapters to merge"),
    "a model that was moved": (
        ("export", "--hf-path", "new"),
        "which isn't there any more: pass --hf-model (hf_model in Python) with the directory where it is now",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path, case):
    (command, option, target), message = BAD[case]
    hf = save_tiny_model(tmp_path / "hf", "LlamaForCausalLM")
    assert run_on_ranks(on_rank, 2, "import", "--hf-model", hf, "--megatron-path", tmp_path / "megatron")[0][0] == 0
    if "moved" in case:
        hf.rename(tmp_path / "elsewhere")
    arguments = (command, "--megatron-path", tmp_path / "megatron", option, tmp_path / target)
    for status, _, errors in run_on_ranks(on_rank, 2, *arguments):
        assert status == 1 and message in errors.splitlines()[-1]
    assert not (tmp_path / target).exists()
