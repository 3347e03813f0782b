# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which part of a row is whose, in Core's order; which attention may share one."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron.bridge.models import context_parallel, layer_specs, packed_attention
from megatron.bridge.models.context_parallel import (
    CUT,
    check_attention_can_share_rows,
    check_holds_whole_rows,
    cut_for_this_rank,
    positions_of_rank,
)
from megatron.bridge.models.layer_specs import local_layer_spec
from megatron.bridge.models.llama import LlamaModelProvider
from tests.rigs.gathered_attention import gathered_layer_spec


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [(1,), (2, 1, 3)])
def test_positions_are_those_that_core_rotates_by(size, samples):
    """Core turns the queries of a packed row by positions of its own, so the tokens must be those."""
    lengths = [2 * size * chunk for chunk in samples]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    for rank in range(size):
        own = positions_of_rank(ends, rank=rank, size=size)
        parts = own.split([length // size for length in lengths])
        for start, part in zip(ends[:-1].tolist(), parts, strict=True):
            whole = torch.arange(len(part) * size)
            assert torch.equal(part - start, _get_thd_freqs_on_this_cp_rank(rank, size, part, whole))
    everyone = torch.cat([positions_of_rank(ends, rank=rank, size=size) for rank in range(size)])
    assert torch.equal(everyone.sort().values, torch.arange(sum(lengths)))


def test_a_sample_that_can_not_be_shared_is_named():
    with pytest.raises(ValueError, match="takes 6 positions .* expected a multiple of 4; set pad_seq_to_mult=4"):
        positions_of_rank(torch.tensor([0, 4, 10]), rank=0, size=2)


def _ranks(monkeypatch, rank, size):
    for module in (context_parallel, packed_attention):
        monkeypatch.setattr(module, "context_ranks", lambda: (rank, size))


def _batch(rows, length, **others):
    numbers = torch.arange(rows * length).reshape(rows, length)
    whole = {name: numbers + 1000 * place for place, name in enumerate(CUT)}
    return {**whole, "attention_mask": None, "cu_seqlens": None, **others}


def test_each_row_is_cut_where_its_samples_end(monkeypatch):
    _ranks(monkeypatch, 1, 2)
    ends = torch.tensor([[0, 4, 12], [0, 8, 12]], dtype=torch.int32)  # the rest of the row is a sample, too
    batch = _batch(2, 16, cu_seqlens=ends)
    cut = cut_for_this_rank(batch)
    expected = [[1, 2, 6, 7, 8, 9, 13, 14], [2, 3, 4, 5, 9, 10, 13, 14]]
    for name in CUT:
        assert torch.equal(cut[name], batch[name].gather(1, torch.tensor(expected))), name
    assert cut["cu_seqlens"] is ends


def test_nothing_is_cut_for_one_rank_and_a_missing_tensor_stays_missing(monkeypatch):
    batch = _batch(2, 6, labels=None)
    assert cut_for_this_rank(batch) is batch  # no process groups
    _ranks(monkeypatch, 0, 3)
    cut = cut_for_this_rank(batch)
    assert cut["labels"] is None and cut["tokens"].tolist() == [[0, 5], [6, 11]]


def test_a_mask_of_the_data_is_refused(monkeypatch):
    _ranks(monkeypatch, 0, 2)
    with pytest.raises(ValueError, match="the data has an attention_mask, and model.context_parallel_size=2"):
        cut_for_this_rank(_batch(1, 4, attention_mask=torch.ones(1, 1, 4, 4)))


def test_transformer_engine_is_told_that_padding_counts(monkeypatch):
    ends = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert packed_attention.packed_seq_params(ends, seq_length=16).cu_seqlens_q_padded is None
    _ranks(monkeypatch, 0, 2)
    params = packed_attention.packed_seq_params(ends, seq_length=16)
    assert params.cu_seqlens_q_padded is params.cu_seqlens_q
    assert (params.cu_seqlens_q.tolist(), params.max_seqlen_q) == ([0, 4, 12, 16], 8)


@pytest.mark.parametrize("fields", [{}, {"transformer_impl": "local"}, {"transformer_layer_spec": local_layer_spec}])
def test_cores_own_attention_is_refused_by_name(monkeypatch, fields):
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: bool(fields))
    monkeypatch.setattr(layer_specs, "is_simulated", lambda: False)
    reason = next(iter(fields), "Transformer Engine is not installed")
    with pytest.raises(ValueError, match=f"context_parallel_size=2 needs Transformer Engine's .*{reason}") as caught:
        check_attention_can_share_rows(LlamaModelProvider(context_parallel_size=2, **fields))
    assert "\n" not in str(caught.value)
    check_attention_can_share_rows(LlamaModelProvider(**fields))


def test_transformer_engines_and_a_scripts_own_attention_may_share_rows(monkeypatch):
    check_attention_can_share_rows(
        LlamaModelProvider(context_parallel_size=2, transformer_layer_spec=gathered_layer_spec)
    )
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(layer_specs, "is_simulated", lambda: False)
    check_attention_can_share_rows(LlamaModelProvider(context_parallel_size=2))


def test_what_reads_token_by_token_needs_whole_rows():
    check_holds_whole_rows(SimpleNamespace(context_parallel_size=1), doing="generating")
    with pytest.raises(ValueError, match="generating with model.context_parallel_size=4"):
        check_holds_whole_rows(SimpleNamespace(context_parallel_size=4), doing="generating")
