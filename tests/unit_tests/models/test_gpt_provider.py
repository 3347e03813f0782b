# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import copy
import logging

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron.bridge.models import GPTModelProvider, Llama3ModelProvider, MixtralModelProvider, fusions, gpt_provider
from megatron.bridge.models.layer_specs import local_layer_spec
from megatron.bridge.models.llama import LlamaModelProvider
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict
from tests.rigs.ranks import run_on_ranks


def tiny(cls=LlamaModelProvider, **fields):
    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=96, seq_length=32)
    return cls(**{**sizes, **fields})


def test_nothing_is_checked_or_derived_before_finalize():
    provider = tiny(num_query_groups=None, tensor_model_parallel_size=3)
    assert provider.num_query_groups is None and provider.init_method is None
    with pytest.raises(ValueError, match="num_attention_heads"):
        provider.finalize()
    provider.tensor_model_parallel_size = 1
    provider.finalize()
    assert provider.num_query_groups == 4


def test_finalize_again_follows_changed_fields_and_keeps_given_ones():
    provider = tiny(init_method_std=0.5)
    provider.finalize()
    first = copy.copy(provider)
    provider.finalize()
    assert to_yaml_dict(provider) == to_yaml_dict(first)
    provider.init_method_std = 0.01
    provider.output_layer_init_method = torch.nn.init.zeros_
    provider.finalize()
    weight = torch.empty(1000)
    provider.init_method(weight)
    assert weight.std() < 0.02
    assert provider.output_layer_init_method is torch.nn.init.zeros_


def test_scaling_of_positions_that_are_not_rotary_is_refused():
    with pytest.raises(ValueError, match="rope_scaling=True.*position_embedding_type='none'"):
        tiny(rope_scaling=True, position_embedding_type="none").finalize()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_mlp_glu_interleave_size", 32),
        ("moe_shared_expert_glu_interleave_size", 32),
        ("use_grouped_gemm_for_shared_expert", True),
    ],
)
def test_gate_and_up_in_alternating_blocks_are_refused(option, value):
    provider = tiny(MixtralModelProvider, num_moe_experts=2)
    if option not in type(provider).__dataclass_fields__:
        pytest.skip("this Core has no such field")
    setattr(provider, option, value)
    with pytest.raises(ValueError, match=f"model.{option}={value}: .* leave it unset"):
        provider.finalize()


def test_a_grouped_product_that_no_layer_is_built_with_is_refused():
    provider = tiny()
    if not hasattr(provider, "use_grouped_gemm_for_dense_mlp"):
        pytest.skip("this Core has no such field")
    provider.use_grouped_gemm_for_dense_mlp = True
    with pytest.raises(ValueError, match="use_grouped_gemm_for_dense_mlp=True: .* no effect; leave it unset"):
        provider.finalize()


@pytest.mark.parametrize("cls", [LlamaModelProvider, MixtralModelProvider])
def test_fused_operations_without_grouped_experts_are_refused(cls):
    provider = tiny(cls, num_query_groups=2, transformer_impl="local")
    if not hasattr(provider, "use_transformer_engine_op_fuser"):
        pytest.skip("this Core has no such field")
    provider.use_transformer_engine_op_fuser = True
    with pytest.raises(ValueError, match="use_transformer_engine_op_fuser=True: .* no effect; leave it unset"):
        provider.finalize()


def test_pipeline_needs_no_dtype_of_its_own():
    provider = tiny(pipeline_model_parallel_size=2, params_dtype=torch.bfloat16, bf16=True)
    provider.finalize()
    assert provider.pipeline_dtype is torch.bfloat16


def test_unavailable_fusions_are_switched_off_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(fusions, "is_simulated", lambda: True)
    provider = tiny()
    with caplog.at_level(logging.INFO, logger=gpt_provider.logger.name):
        provider.finalize()
        provider.finalize()
    assert [record.getMessage() for record in caplog.records] == [
        "fusions off: bias_activation_fusion, bias_dropout_fusion, apply_rope_fusion, gradient_accumulation_fusion, "
        "masked_softmax_fusion (the accelerator is simulated)"
    ]
    assert not provider.apply_rope_fusion and not provider.bias_activation_fusion


def test_local_layers_run_experts_one_by_one(caplog):
    provider = tiny(
        MixtralModelProvider, num_moe_experts=4, num_query_groups=2, moe_ffn_hidden_size=16, transformer_impl="local"
    )
    assert provider.moe_grouped_gemm
    with caplog.at_level(logging.INFO):
        provider.finalize()
    assert not provider.moe_grouped_gemm
    assert "moe_grouped_gemm (Core's local layers have none)" in caplog.text


def test_fusions_without_their_package_are_unavailable_on_a_gpu_too(monkeypatch, tmp_path):
    monkeypatch.setattr(fusions, "is_simulated", lambda: False)
    monkeypatch.setattr(fusions.importlib.util, "find_spec", lambda name: None)
    assert fusions.why_unavailable("apply_rope_fusion") == "transformer_engine is not installed"
    assert fusions.why_unavailable("bias_dropout_fusion") == "triton is not installed"
    monkeypatch.setattr(fusions.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fusions.shutil, "which", lambda name: None)
    assert fusions.why_unavailable("apply_rope_fusion") is None
    assert fusions.why_unavailable("bias_dropout_fusion") == "there is no C compiler"
    monkeypatch.setattr(fusions.shutil, "which", lambda name: "cc")
    monkeypatch.setattr(fusions.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert fusions.why_unavailable("bias_dropout_fusion") == "Python's C headers are missing"
    (tmp_path / "Python.h").touch()
    assert fusions.why_unavailable("bias_dropout_fusion") is None


def test_vocabulary_must_be_known_and_fit_the_ranks():
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        tiny(vocab_size=None).padded_vocab_size()
    with pytest.raises(ValueError, match="vocab_size=97 is no multiple of model.tensor_model_parallel_size=2"):
        tiny(vocab_size=97, tensor_model_parallel_size=2).padded_vocab_size()
    assert tiny(vocab_size=97, should_pad_vocab=True, tensor_model_parallel_size=2).padded_vocab_size() == 256


def test_defaults_of_the_plain_provider():
    provider = GPTModelProvider()
    assert (provider.seq_length, provider.make_vocab_size_divisible_by) == (1024, 128)
    assert provider.vocab_size is None and not provider.should_pad_vocab
    assert provider.share_embeddings_and_output_weights and provider.parallel_output
    assert provider.position_embedding_type == "learned_absolute"
    assert Llama3ModelProvider().rotary_base == 500_000


@pytest.mark.parametrize("finalized", [False, True])
def test_yaml_keeps_every_field(finalized):
    provider = tiny(bf16=True, params_dtype=torch.bfloat16, rope_scaling=True, transformer_layer_spec=local_layer_spec)
    if finalized:
        provider.finalize()
    again = from_yaml_dict(to_yaml_dict(provider))
    assert type(again) is LlamaModelProvider
    assert to_yaml_dict(again) == to_yaml_dict(provider)
    assert again.transformer_layer_spec is local_layer_spec


def wrapped_model_on_rank():
    provider = tiny(bf16=True, params_dtype=torch.bfloat16)
    calls = []
    provider.register_pre_wrap_hook(lambda chunks: calls.append(("second", type(chunks[0]).__name__)))
    provider.register_pre_wrap_hook(lambda chunks: calls.append(("first", type(chunks[0]).__name__)), prepend=True)
    provider.register_post_wrap_hook(lambda chunks: calls.append(("last", type(chunks[0]).__name__)))
    provider.initialize_model_parallel()
    (chunk,) = provider.provide_distributed_model(
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        pre_wrap_hook=lambda chunks: calls.append(("third", type(chunks[0]).__name__)),
    )
    assert isinstance(chunk, DistributedDataParallel) and isinstance(chunk.module, Float16Module)
    assert chunk.ddp_config.use_distributed_optimizer
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}
    assert all(parameter.is_cuda for parameter in chunk.parameters())
    tokens = torch.arange(16)[None]
    loss = chunk(tokens, tokens, None, labels=tokens).float().mean()
    loss.backward()
    chunk.finish_grad_sync()
    norms = [float(parameter.main_grad.abs().sum()) for parameter in chunk.parameters()]
    return calls, float(loss), norms


def test_model_is_wrapped_for_training_around_the_hooks():
    calls, loss, norms = run_on_ranks(wrapped_model_on_rank, 1)[0]
    assert calls == [
        ("first", "GPTModel"),
        ("second", "GPTModel"),
        ("third", "GPTModel"),
        ("last", "DistributedDataParallel"),
    ]
    assert 3 < loss < 7
    assert all(norm > 0 for norm in norms)


def replaced_model_on_rank():
    provider = tiny()
    provider.initialize_model_parallel()
    other = torch.nn.Linear(2, 2)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=lambda chunks: [other])
    return len(chunks), chunks[0] is other


def test_hook_may_put_other_chunks_in_place():
    assert run_on_ranks(replaced_model_on_rank, 1)[0] == (1, True)


def spec_on_rank(as_object):
    provider = tiny(normalization="LayerNorm", add_bias_linear=True)
    provider.initialize_model_parallel()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec()
    assert isinstance(spec, ModuleSpec)
    provider.transformer_layer_spec = spec if as_object else lambda config: spec
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return len(chunk.decoder.layers)


@pytest.mark.parametrize("as_object", [True, False])
def test_layer_spec_may_be_core_s_own(as_object):
    assert run_on_ranks(spec_on_rank, 1, as_object)[0] == 2


def sizes_that_differ_on_rank():
    tiny().initialize_model_parallel()
    with pytest.raises(
        ValueError, match=r"model.tensor_model_parallel_size=2, but the process groups were built for 1"
    ):
        tiny(tensor_model_parallel_size=2).provide_distributed_model()


def test_sizes_other_than_the_process_groups_are_refused():
    run_on_ranks(sizes_that_differ_on_rank, 1)


def seeds_on_rank(data_parallel_random_init):
    torch.manual_seed(100 + torch.distributed.get_rank())
    provider = tiny(use_cpu_initialization=True)
    provider.initialize_model_parallel()
    torch.manual_seed(100 + torch.distributed.get_rank())
    (chunk,) = provider.provide_distributed_model(data_parallel_random_init=data_parallel_random_init)
    return [float(parameter.double().sum()) for parameter in chunk.parameters()]


def test_random_start_is_shared_by_data_parallel_ranks():
    first, second = run_on_ranks(seeds_on_rank, 2, True)
    assert first == second
    first, second = run_on_ranks(seeds_on_rank, 2, False)
    assert first != second


def _marks(**fields):
    provider = tiny(MixtralModelProvider, num_moe_experts=2, bf16=True, params_dtype=torch.bfloat16, **fields)
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    marks = ("tensor_model_parallel", "partition_dim")
    return {name: tuple(getattr(parameter, mark) for mark in marks) for name, parameter in chunk.named_parameters()}


def _marks_with_and_without_initialization(on_host):
    return [_marks(perform_initialization=made, use_cpu_initialization=on_host) for made in (True, False)]


@pytest.mark.parametrize("on_host", [False, True])
def test_the_gradient_norm_counts_each_ranks_part_of_a_weight_that_nothing_initialized(on_host):
    """As where a provider loads weights itself. A weight that isn't marked counts on the first rank alone."""
    (marks,) = run_on_ranks(_marks_with_and_without_initialization, 1, on_host)
    initialized, loaded = marks
    assert loaded == initialized and sum(is_cut for is_cut, _ in loaded.values()) > len(loaded) / 2
