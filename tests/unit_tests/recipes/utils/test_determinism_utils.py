# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What makes a run repeat itself."""

from megatron.bridge.recipes import find_recipe
from megatron.bridge.recipes.utils.determinism_utils import apply_determinism_overrides


def test_core_is_told_and_so_are_the_libraries_below_it():
    cfg = find_recipe("smollm2_135m_sft_config")()
    cfg.env_vars = {"NCCL_ALGO": "Tree", "MINE": "1"}
    assert apply_determinism_overrides(cfg) is cfg
    assert cfg.model.deterministic_mode and not cfg.model.cross_entropy_loss_fusion
    assert cfg.env_vars["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert cfg.env_vars["NCCL_ALGO"] == "Tree" and cfg.env_vars["MINE"] == "1", "the script's own stay"
    cfg.model.finalize()
    assert cfg.model.deterministic_mode
