# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Ranks and printing by the names that scripts import."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron.bridge.utils import common_utils


@pytest.fixture
def third_of_four(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)


def test_ranks_before_the_process_group_are_the_launchers(third_of_four):
    assert (common_utils.get_rank_safe(), common_utils.get_world_size_safe()) == (2, 4)
    assert (common_utils.get_last_rank(), common_utils.get_local_rank_preinit()) == (3, 1)
    assert not common_utils.is_last_rank()
    assert common_utils.get_master_port_safe() == 1234


def test_without_a_launcher_this_is_the_only_rank(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert (common_utils.get_rank_safe(), common_utils.get_world_size_safe()) == (0, 1)
    assert (common_utils.get_last_rank(), common_utils.get_local_rank_preinit()) == (0, 0)
    assert common_utils.get_master_addr_safe() == "localhost"
    assert common_utils.maybe_initialize_distributed() is False and not dist.is_initialized()
    common_utils.print_rank_0("first")
    common_utils.print_rank_last({"last": 1})
    assert capsys.readouterr().out == "first\n{'last': 1}\n"


@pytest.mark.parametrize(("rank", "printed"), [("0", "zero\n"), ("1", ""), ("3", "last\n")])
def test_only_the_named_rank_prints(third_of_four, monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    common_utils.print_rank_0("zero")
    common_utils.print_rank_last("last")
    assert capsys.readouterr().out == printed


def test_a_launched_process_joins_its_group_once(monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        assert common_utils.maybe_initialize_distributed() is True
        assert dist.get_world_size() == 1
        assert common_utils.maybe_initialize_distributed() is False, "the caller's group is used"
    finally:
        dist.destroy_process_group()


def test_a_model_gives_the_next_token_alone():
    bare = SimpleNamespace(config=SimpleNamespace(mtp_num_layers=1, grad_scale_func=abs), mtp_process=True)
    common_utils.disable_mtp_for_inference([bare])
    assert bare.config.mtp_num_layers is None and bare.config.grad_scale_func is None
    assert bare.mtp_process is False


@pytest.mark.parametrize(("name", "number"), [("mlp.experts.linear_fc1.weight3", 3), ("experts.linear_fc2.bias12", 12)])
def test_the_expert_of_a_weight(name, number):
    assert common_utils.extract_expert_number_from_param(name) == number


def test_a_weight_of_no_expert_is_refused():
    with pytest.raises(ValueError, match="linear_proj.weight' is no weight of an expert"):
        common_utils.extract_expert_number_from_param("linear_proj.weight")


def test_paths_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert common_utils.resolve_path("~/a/../b") == common_utils.resolve_path("b") == tmp_path / "b"
