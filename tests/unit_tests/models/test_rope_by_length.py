# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rotary frequencies that depend on the length of what is read: those of transformers, bit-exact."""

import pytest
import torch

from megatron.bridge.data.padded_rows import pad_sample
from megatron.bridge.models.families import provider_fields
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.rope_by_length import DynamicRopeScaling, RotaryByLength, reads_again, scaling_by_length
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import SMALL, hf_logits, save_tiny_model, some_tokens

FACTORS = {"short_factor": [1.0 + 0.01 * i for i in range(32)], "long_factor": [1.1 + 0.9 * i for i in range(32)]}
CASES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic, a whole factor": {"rope_type": "dynamic", "factor": 8},
    "longrope": {"rope_type": "longrope", **FACTORS},
    "longrope with a factor": {"rope_type": "longrope", "factor": 16.0, **FACTORS},
    "longrope with an attention factor": {"rope_type": "longrope", "attention_factor": 1.3, "factor": 2.0, **FACTORS},
}
ORIGINAL = {"dynamic": 2048, "longrope": 512}


def config_of(case, theta, **others):
    from transformers import LlamaConfig

    rope = {"rope_theta": theta, **CASES[case]}
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = ORIGINAL["longrope"]
    sizes = dict(hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, **others)
    return LlamaConfig(rope_parameters=rope, **sizes), rope


def provider_of(case, theta=1e4):
    config, rope = config_of(case, theta)
    read = provider_fields({**config.to_dict(), "architectures": ["LlamaForCausalLM"], "rope_parameters": rope})
    provider = GPTModelProvider(**{**read, "num_layers": 2})
    provider.finalize()
    return provider


@pytest.mark.parametrize("theta", [1e4, 2.5e5])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case, theta):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    provider = provider_of(case, theta)
    scaling, original = scaling_by_length(provider), ORIGINAL[CASES[case]["rope_type"]]
    found = {}
    for length in (1, original, original + 1, 2 * original + 17, 40 * original):
        rotary = LlamaRotaryEmbedding(config_of(case, theta)[0])
        rotary(torch.zeros(1), torch.arange(length)[None])
        found[length] = scaling.frequencies(64, provider.rotary_base, length, torch.device("cpu"))
        assert torch.equal(found[length], rotary.inv_freq), length
        assert provider._yarn_attention_factor() == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert not torch.equal(found[original], found[original + 1])


def test_a_cache_is_read_anew_where_its_keys_would_be_turned_otherwise():
    dynamic, longrope = (reads_again(provider_of(case)) for case in ("dynamic", "longrope"))
    pairs = [(1, 512), (512, 513), (513, 514), (2047, 2048), (2048, 2049), (2049, 2050)]
    assert [longrope(*pair) for pair in pairs] == [False, True, False, False, False, False]
    assert [dynamic(*pair) for pair in pairs] == [False, False, False, False, True, True]
    plain = GPTModelProvider(num_layers=2, hidden_size=16, num_attention_heads=2, position_embedding_type="rope")
    assert not any(reads_again(plain)(*pair) for pair in pairs)


def test_padding_makes_no_sample_longer():
    row = {name: torch.zeros(7) for name in ("tokens", "labels", "loss_mask")}
    packed = pad_sample({**row, "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2])}, 12, pad_id=0)
    assert packed["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0]
    assert pad_sample(row, 12, pad_id=0)["position_ids"].tolist() == [*range(7), 0, 0, 0, 0, 0]


def _angles_of_shared_row():
    """Of a packed row of 40 with samples up to 20, which two ranks share; and of 20 and 40 positions by one rank."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.parallel_state import get_context_parallel_group

    from megatron.bridge.utils.distributed import destroy_model_parallel, model_parallel_groups

    destroy_model_parallel()
    with model_parallel_groups(context_parallel_size=2):
        group = get_context_parallel_group()
        plain = RotaryEmbedding(8, 1.0, rotary_base=500, use_cpu_initialization=True, cp_group=group)
        rotary = RotaryByLength(plain, DynamicRopeScaling(4.0, 16), base=500)
        rotary.position_ids = torch.tensor([[0, 1, 18, 19], [4, 5, 14, 15]])[group.rank()][None]
        found = rotary(40, packed_seq=True)
        rotary.position_ids = None
        return found.numpy(), *(rotary._of(length)(40, packed_seq=True).numpy() for length in (20, 40))


def test_ranks_that_share_rows_turn_by_the_longest_sample_of_all():
    for found, of_sample, of_row in run_on_ranks(_angles_of_shared_row, 2):
        assert (found == of_sample).all() and not (of_sample == of_row).all()


def logits_on_rank(directory, texts):
    """Of whole texts, then of the first two in one row; then what follows the second."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.generation import generate_together, generate_tokens
    from megatron.bridge.models.packed_attention import attention_arguments

    provider = AutoBridge.from_hf_pretrained(directory).to_megatron_provider()
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    model = chunks[0].eval()
    positions = [torch.arange(len(text))[None] for text in texts]
    with torch.no_grad():
        alone = [model(torch.tensor([text]), at, None).numpy() for text, at in zip(texts, positions, strict=True)]
        ends = torch.tensor([[0, len(texts[0]), len(texts[0]) + len(texts[1])]], dtype=torch.int32)
        row = torch.tensor([texts[0] + texts[1]])
        packed = model(
            row, torch.cat(positions[:2], 1), **attention_arguments(model, ends, seq_length=row.shape[1])
        ).numpy()
        new = list(generate_tokens(chunks, texts[1], max_new_tokens=12))
        together = list(generate_together(chunks, [texts[0], texts[1]], max_new_tokens=[12, 12]))
    return alone, packed, new, [[step[row] for step in together if step[row] is not None] for row in (0, 1)]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_logits_and_new_tokens_are_those_of_transformers_on_both_sides_of_the_length(kind, tmp_path):
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [1.5, 3.0, 5.0, 9.0]}
    rope = {"rope_type": kind, "rope_theta": 500.0, **({"factor": 4.0} if kind == "dynamic" else factors)}
    longest = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    if kind == "longrope":
        rope["original_max_position_embeddings"] = 16
    directory = save_tiny_model(tmp_path, "LlamaForCausalLM", **longest, num_hidden_layers=2, rope_parameters=rope)
    tokens = some_tokens(SMALL["vocab_size"]).tolist()
    texts = [tokens[0][:10], tokens[1][:14], tokens[0][:16], tokens[0][:17], tokens[0]]
    expected = [hf_logits(directory, torch.tensor([text])) for text in texts]
    ((alone, packed, new, together),) = run_on_ranks(logits_on_rank, 1, directory, texts)
    for found, wanted in zip(alone, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
    both = torch.cat(expected[:2], 1)  # the row is longer than the length, and no sample is
    torch.testing.assert_close(torch.from_numpy(packed), both, rtol=0, atol=1e-4)
    text = list(texts[1])
    for token in new:  # as reading the whole text again says
        assert token == hf_logits(directory, torch.tensor([text]))[0, -1].argmax()
        text.append(token)
    assert together[1] == new
