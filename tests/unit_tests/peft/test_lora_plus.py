# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA+: which parameters get which learning rate, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.peft.lora import get_lora_plus_config_overrides
from megatron.bridge.training.config import (
    LoRAPlusOverrideProvider,
    OptimizerConfig,
    OptimizerConfigOverrideProviderContext,
    SchedulerConfig,
)
from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict

QKV = "module.decoder.layers.0.self_attention.linear_qkv"
RATES = {
    f"{QKV}.adapter.linear_out.weight": (16e-4, 16e-5),
    f"{QKV}.adapter.adapter_q.linear_out.weight": (16e-4, 16e-5),  # CanonicalLoRA's
    f"{QKV}.adapter.linear_in.weight": None,
    f"{QKV}.adapter.magnitude": None,  # DoRA's
    f"{QKV}.weight": None,
}


def _build(provider, *names, **rates):
    chunk = SimpleNamespace(named_parameters=lambda: [(name, None) for name in names])
    config = OptimizerConfig(**{"lr": 1e-4, "min_lr": 1e-5, **rates})
    return provider.build_config_overrides(
        OptimizerConfigOverrideProviderContext(
            scheduler_config=SchedulerConfig(), optimizer_config=config, model=[chunk]
        )
    )


@pytest.mark.parametrize("name", RATES)
def test_b_alone_learns_faster(name):
    overrides = _build(LoRAPlusOverrideProvider(), *RATES)
    param = torch.nn.Parameter(torch.empty(2) if name.endswith("magnitude") else torch.empty(2, 2))
    (found,) = [value for key, value in overrides.items() if key.matches(param, name)] or [None]
    if RATES[name]:
        assert (found["max_lr"], found["min_lr"]) == pytest.approx(RATES[name]) and found["is_decoupled_lr"]
    else:
        assert found == ({"wd_mult": 0.0} if param.dim() == 1 else None)  # Core's usual ones hold


def test_without_a_lowest_rate_core_chooses_it():
    (override,) = get_lora_plus_config_overrides(OptimizerConfig(lr=1e-3), 4).values()
    assert override == {"max_lr": 4e-3, "is_decoupled_lr": True}


@pytest.mark.parametrize(
    ("ratio", "rates", "names", "message"),
    [
        (16, {}, [f"{QKV}.weight"], "the model has no adapters: expected peft to be a LoRA"),
        (0, {}, RATES, "lr_ratio=0: expected a number above 0"),
        (float("nan"), {}, RATES, "lr_ratio=nan: expected a number above 0"),
        (16, {"lr": None}, RATES, "optimizer.lr=None: expected the learning rate of A"),
    ],
)
def test_what_cannot_be_right_is_refused(ratio, rates, names, message):
    with pytest.raises(ValueError, match=message):
        _build(LoRAPlusOverrideProvider(lr_ratio=ratio), *names, **rates)


def test_it_is_recorded_with_a_run():
    recorded = to_yaml_dict(LoRAPlusOverrideProvider(lr_ratio=8.0))
    assert recorded["_target_"] == "megatron.bridge.training.config.LoRAPlusOverrideProvider"
    assert from_yaml_dict(recorded) == LoRAPlusOverrideProvider(lr_ratio=8.0)
