# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What is applied to a checkout: this repository's files, the sync as it is defined here, and the calls around it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULE = "megatron.bridge.training.hybrid_param_copies"
"""The lifted module's name there: one file directly in `training/`."""

OUR_MODULE = "megatron.bridge.training.cpu_offload.param_copies"
SYNC = "sync_hybrid_optimizer_param_copies"
HELPER = "_bring_offloaded_masters_in_line"
DOOR = "sync_hybrid_device_optimizer_fp32_master_copies"

HELPER_SOURCE = f'''def {HELPER}(
    cfg: ConfigContainer, optimizer: MegatronOptimizer | None, state_dict: Mapping[str, object] | None = None
) -> None:
    """Let an offloaded optimizer's masters follow a load that restored no optimizer state.

    Call it after `optimizer.reload_model_params()`, which rebuilds the masters of what isn't offloaded.

    Args:
        cfg: The run's configuration.
        optimizer: Its optimizer, or None.
        state_dict: The loaded model state, whose values become the masters with `load_main_params_from_ckpt`.

    Raises:
        RuntimeError: The copies can't be refreshed, or don't equal the weights afterwards.
    """
    if optimizer is None or not cfg.optimizer.optimizer_cpu_offload or cfg.ddp.use_megatron_fsdp:
        return
    main_params = state_dict if cfg.checkpoint.load_main_params_from_ckpt else None
    if {SYNC}(optimizer, main_params):
        check_hybrid_optimizer_param_copies(optimizer, exact=main_params is None)
'''

DOOR_SOURCE = f'''def {DOOR}(optimizer: MegatronOptimizer | None) -> bool:
    """Do what `checkpointing.{SYNC}` does, under its earlier name.

    Returns:
        Whether anything was refreshed.
    """
    return bool(rebuild_param_copies(optimizer))
'''

DOCUMENT = """
## Masters after a load

An offloaded optimizer steps on copies of the weights that it makes when it is built. After a load they follow what was
loaded: the checkpoint's own FP32 masters where it restored optimizer state, else the weights (or, with
`load_main_params_from_ckpt`, the checkpoint's FP32 values). Code that loads weights by itself calls
`megatron.bridge.training.checkpointing.sync_hybrid_optimizer_param_copies(optimizer)` afterwards.
"""

TESTS_OF_THE_CALL = f'''"""When a load brings an offloaded optimizer's masters in line."""

from types import SimpleNamespace

import pytest

from megatron.bridge.training import checkpointing


@pytest.fixture
def calls(monkeypatch):
    made = []

    def sync(optimizer, state_dict):
        made.append(("sync", state_dict))
        return optimizer == "offloaded"

    monkeypatch.setattr(checkpointing, "{SYNC}", sync)
    monkeypatch.setattr(
        checkpointing,
        "check_hybrid_optimizer_param_copies",
        lambda optimizer, *, exact: made.append(("check", exact)),
    )
    return made


def configuration(*, offload=True, fsdp=False, main_params=False):
    return SimpleNamespace(
        optimizer=SimpleNamespace(optimizer_cpu_offload=offload),
        ddp=SimpleNamespace(use_megatron_fsdp=fsdp),
        checkpoint=SimpleNamespace(load_main_params_from_ckpt=main_params),
    )


def test_masters_follow_the_weights(calls):
    checkpointing.{HELPER}(configuration(), "offloaded", {{"model": {{}}}})
    assert calls == [("sync", None), ("check", True)]


def test_masters_take_fp32_values_that_were_asked_for(calls):
    state_dict = {{"model": {{}}}}
    checkpointing.{HELPER}(configuration(main_params=True), "offloaded", state_dict)
    assert calls == [("sync", state_dict), ("check", False)]


def test_an_optimizer_in_which_nothing_is_hybrid_is_not_compared(calls):
    checkpointing.{HELPER}(configuration(), "other")
    assert calls == [("sync", None)]


@pytest.mark.parametrize(
    ("options", "optimizer"), [({{"offload": False}}, "offloaded"), ({{"fsdp": True}}, "offloaded"), ({{}}, None)]
)
def test_nothing_is_called_where_nothing_is_offloaded(calls, options, optimizer):
    checkpointing.{HELPER}(configuration(**options), optimizer)
    assert calls == []
'''


def sync_source() -> str:
    """The sync as `training/checkpointing.py` defines it."""
    text = (ROOT / "src/megatron/bridge/training/checkpointing.py").read_text(encoding="utf-8")
    defined = [node for node in ast.parse(text).body if getattr(node, "name", None) == SYNC]
    return ast.get_source_segment(text, defined[0]) + "\n"


def lifted_module() -> str:
    """The lifted file, with the two blank lines after its imports that the other repository's linter asks for."""
    text = (ROOT / "src" / (OUR_MODULE.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    return re.sub(r"\n\nlogger = ", "\n\n\nlogger = ", text, count=1)


def mocked_tests() -> str:
    """The lifted file's tests, which import it alone."""
    text = (ROOT / "tests/unit_tests/training/cpu_offload/test_param_copies.py").read_text(encoding="utf-8")
    return re.sub(r"\n\nWEIGHT = ", "\n\n\nWEIGHT = ", text, count=1).replace(OUR_MODULE, MODULE)


def tests_of_the_call() -> str:
    """Tests of what the two call sites call, under the header of the file they come from."""
    header = mocked_tests().partition("\n")[0]
    return f"{header}\n{TESTS_OF_THE_CALL}"
