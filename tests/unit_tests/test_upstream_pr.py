# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The pull request, applied to a made-up checkout that has the places it looks for, and undone."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.bridge.training.cpu_offload import param_copies

ROOT = Path(__file__).parents[2]
TRAINING = "src/megatron/bridge/training"
TESTS = "tests/unit_tests/training"
PAGE = "docs/training/cpu-offloading.md"
HELPER = "_bring_offloaded_masters_in_line"

CHECKPOINTING = '''"""Load."""
from __future__ import annotations

import os
from collections.abc import Callable

from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
)

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.state import GlobalState


def load_checkpoint(state, model, optimizer):
    return _load_checkpoint_from_path("there", state, model, optimizer)


def _load_hf_pretrained_checkpoint(state, model, optimizer):
    cfg = state.cfg
    model.append("HF")
    if optimizer is not None and not cfg.ddp.use_megatron_fsdp:
        optimizer.reload_model_params()


def _load_checkpoint_from_path(path, state, model, optimizer, release=False):
    cfg = state.cfg
    state_dict = {"model": {}}
    if not release and not cfg.checkpoint.finetune and cfg.checkpoint.load_optim:
        optimizer.load_state_dict(state_dict)
    else:
        if (cfg.model.fp16 or cfg.model.bf16) and optimizer is not None and not cfg.ddp.use_megatron_fsdp:
            if cfg.checkpoint.load_main_params_from_ckpt:
                optimizer.reload_model_params(state_dict=state_dict)
            else:
                optimizer.reload_model_params()
    return 0
'''
SETUP = """from megatron.bridge.training.optim import (
    setup_optimizer,
    sync_hybrid_device_optimizer_fp32_master_copies,
)


def setup(cfg, manager):
    optimizer = setup_optimizer(cfg)
    if cfg.checkpoint.load:
        manager.load(optimizer)

    # Copies follow
    # every load.
    if optimizer is not None and cfg.optimizer.optimizer_cpu_offload:
        synced = sync_hybrid_device_optimizer_fp32_master_copies(optimizer)
        if synced:
            print("synced")

    return optimizer
"""
OPTIM = '''import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def setup_optimizer(cfg):
    return get_megatron_optimizer(cfg)


@torch.no_grad()
def sync_hybrid_device_optimizer_fp32_master_copies(optimizer):
    """Copy."""
    return isinstance(optimizer, HybridDeviceOptimizer)
'''
FILES = {
    f"{TRAINING}/checkpointing.py": CHECKPOINTING,
    f"{TRAINING}/setup.py": SETUP,
    f"{TRAINING}/optim.py": OPTIM,
    f"{TESTS}/test_optim.py": "def test_nothing(): ...\n",
    PAGE: "# Offload\n\nNo newline at the end",
}


def make_checkout(root):
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    (root / ".git").mkdir()
    return root


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path / "checkout")


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """A checkout that it was applied to."""
    root = make_checkout(tmp_path_factory.mktemp("applied") / "checkout")
    assert apply(root)[0] == 0
    return root


def apply(checkout, *options):
    """(status, what was printed) of the script."""
    run = subprocess.run(
        [ROOT / "scripts/make_upstream_pr.sh", checkout, *options],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.returncode, run.stdout + run.stderr


def contents(checkout):
    files = (path for path in checkout.rglob("*") if path.is_file())
    return {path.relative_to(checkout).as_posix(): path.read_bytes() for path in files}


def text_of(checkout, name):
    return (checkout / TRAINING / f"{name}.py").read_text()


def test_all_is_applied_where_it_belongs_and_nothing_else_is_touched(checkout):
    before = contents(checkout)
    status, output = apply(checkout)
    assert status == 0 and "didn't fit" not in output, output
    after = contents(checkout)
    new = {f"{TRAINING}/hybrid_param_copies.py"}
    new |= {f"{TESTS}/test_{name}.py" for name in ("hybrid_param_copies", "masters_after_load")}
    assert set(after) - set(before) == new | {".git/.upstream_pr_undo.json"}
    assert after[f"{TESTS}/test_optim.py"] == before[f"{TESTS}/test_optim.py"]
    for path in new:
        assert b"cpu_offload.param_copies" not in after[path] and f"applied: {path}: new, " in output
    assert after[PAGE].decode().startswith(f"{FILES[PAGE]}\n\n## Masters after a load\n")
    assert "to look at: src/megatron/bridge/training/optim.py: HybridDeviceOptimizer has no use left" in output


def test_each_load_calls_the_helper_after_its_reload_and_not_where_the_optimizer_was_restored(applied):
    added = [line for line in text_of(applied, "checkpointing").splitlines() if line.strip().startswith(f"{HELPER}(")]
    assert added == [f"    {HELPER}(cfg, optimizer)", f"        {HELPER}(cfg, optimizer, state_dict)"]
    assert text_of(applied, "checkpointing").endswith(
        f"                optimizer.reload_model_params()\n        {HELPER}(cfg, optimizer, state_dict)\n    return 0\n"
    )


class Notes:
    """An optimizer that takes notes of who asks what of it."""

    def __init__(self):
        self.calls = []

    def load_state_dict(self, state_dict):
        self.calls.append("restored")

    def reload_model_params(self, state_dict=None):
        self.calls.append(("reload", state_dict))


@pytest.mark.parametrize(
    ("load", "options", "expected"),
    [
        ("path", {}, ["restored"]),
        ("path", {"load_optim": False}, [("reload", None), ("sync", None), ("check", True)]),
        ("path", {"finetune": True}, [("reload", None), ("sync", None), ("check", True)]),
        ("path", {"finetune": True, "bf16": False}, [("sync", None), ("check", True)]),
        ("path", {"finetune": True, "offload": False}, [("reload", None)]),
        ("path", {"finetune": True, "fsdp": True}, []),
        ("path", {"finetune": True, "main": True}, [("reload", "state"), ("sync", "state"), ("check", False)]),
        ("HF", {}, [("reload", None), ("sync", None), ("check", True)]),
    ],
)
def test_what_a_load_there_does(applied, monkeypatch, load, options, expected):
    monkeypatch.setitem(sys.modules, "megatron.bridge.training.hybrid_param_copies", param_copies)
    module = {"__name__": "applied"}
    exec(text_of(applied, "checkpointing"), module)
    named = {repr({"model": {}}): "state"}
    monkeypatch.setitem(
        module,
        "sync_hybrid_optimizer_param_copies",
        lambda optimizer, state_dict: optimizer.calls.append(("sync", state_dict)) or True,
    )
    monkeypatch.setitem(
        module,
        "check_hybrid_optimizer_param_copies",
        lambda optimizer, *, exact: optimizer.calls.append(("check", exact)),
    )
    given = {"load_optim": True, "finetune": False, "bf16": True, "offload": True, "fsdp": False, "main": False}
    given |= options
    cfg = SimpleNamespace(
        model=SimpleNamespace(fp16=False, bf16=given["bf16"]),
        optimizer=SimpleNamespace(optimizer_cpu_offload=given["offload"]),
        ddp=SimpleNamespace(use_megatron_fsdp=given["fsdp"]),
        checkpoint=SimpleNamespace(
            finetune=given["finetune"], load_optim=given["load_optim"], load_main_params_from_ckpt=given["main"]
        ),
    )
    optimizer, state = Notes(), SimpleNamespace(cfg=cfg)
    if load == "HF":
        module["_load_hf_pretrained_checkpoint"](state, [], optimizer)
    else:
        module["_load_checkpoint_from_path"]("there", state, [], optimizer)
    calls = [call if call == "restored" else (call[0], named.get(repr(call[1]), call[1])) for call in optimizer.calls]
    assert calls == expected


def test_the_helper_and_the_sync_stand_beside_the_load_with_what_they_need(applied):
    tree = ast.parse(text_of(applied, "checkpointing"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert names[:3] == ["load_checkpoint", "sync_hybrid_optimizer_param_copies", HELPER]
    assert "from collections.abc import Callable, Mapping\n" in text_of(applied, "checkpointing")
    assert "import ChainedOptimizer, MegatronOptimizer\n" in text_of(applied, "checkpointing")
    imported = text_of(applied, "checkpointing").partition("hybrid_param_copies import (")[2].partition(")")[0]
    assert imported.split() == ["HybridParamSync,", "check_hybrid_optimizer_param_copies,", "rebuild_param_copies,"]


def test_the_sync_after_every_load_goes_and_its_name_is_a_door(applied):
    assert text_of(applied, "setup") == SETUP.replace(
        "    sync_hybrid_device_optimizer_fp32_master_copies,\n", ""
    ).replace(SETUP[SETUP.index("    # Copies") : SETUP.index("    return optimizer")], "")
    assert "isinstance" not in text_of(applied, "optim") and "@torch" not in text_of(applied, "optim")
    assert text_of(applied, "optim").endswith("    return bool(rebuild_param_copies(optimizer))\n")
    imports = text_of(applied, "optim").partition("\n\n\n")[0].splitlines()[-3:]
    assert imports == [
        "from megatron.core.optimizer.optimizer import MegatronOptimizer",
        "",
        "from megatron.bridge.training.hybrid_param_copies import rebuild_param_copies",
    ]


def test_undo_restores_the_bytes(checkout):
    (checkout / TRAINING / "setup.py").write_bytes(SETUP.replace("\n", "\r\n").encode())
    before = contents(checkout)
    assert apply(checkout)[0] == 0
    applied = (checkout / TRAINING / "setup.py").read_bytes()
    assert applied.count(b"\r\n") == applied.count(b"\n") > 5
    assert apply(checkout, "--undo")[0] == 0
    assert contents(checkout) == before
    assert apply(checkout, "--undo") == (
        2,
        f"error: {checkout} has nothing to undo: .upstream_pr_undo.json is missing\n",
    )


def test_a_second_time_changes_nothing(checkout):
    apply(checkout)
    applied = contents(checkout)
    status, output = apply(checkout)
    assert (status, output) == (2, f"error: {checkout} has it already: take it out first, with --undo\n")
    (checkout / ".git" / ".upstream_pr_undo.json").unlink()
    status, output = apply(checkout)
    assert status == 2 and "hybrid_param_copies.py already, and not from this script" in output
    applied.pop(".git/.upstream_pr_undo.json")
    assert contents(checkout) == applied


def test_what_was_changed_since_is_not_undone(checkout):
    apply(checkout)
    with (checkout / TRAINING / "optim.py").open("a") as file:
        file.write("# mine\n")
    changed = contents(checkout)
    status, output = apply(checkout, "--undo")
    assert status == 2 and output.startswith(f"error: changed since: {TRAINING}/optim.py; ")
    assert contents(checkout) == changed


@pytest.mark.parametrize(
    ("name", "text", "replacement", "said"),
    [
        (
            "checkpointing",
            "_load_hf_pretrained_checkpoint",
            "_load_hf",
            "_load_hf_pretrained_checkpoint is there 0 times",
        ),
        ("checkpointing", "        optimizer.reload_model_params()\n\n", "        pass\n\n", "in 0 places, not one"),
        ("checkpointing", "def load_checkpoint(", "def load(", "the function load_checkpoint is there 0 times"),
        ("checkpointing", "    else:\n        if (cfg", "    elif (cfg", "reloads in an elif (line 31)"),
        (
            "setup",
            "if optimizer is not None and cfg.optimizer.optimizer_cpu_offload:",
            "if True:",
            "statement of its own",
        ),
        ("setup", "synced = sync_hybrid_device_optimizer_fp32_master_copies", "synced = sync", "is called 0 times"),
        ("optim", "def sync_hybrid_device_optimizer_fp32_master_copies", "def sync", "is there 0 times"),
        ("optim", "import torch\n", "import torch (\n", "invalid syntax"),
    ],
)
def test_what_does_not_fit_is_said_and_the_rest_is_laid(checkout, name, text, replacement, said):
    path = checkout / TRAINING / f"{name}.py"
    source = path.read_text().replace(text, replacement)
    if "elif" in replacement:
        head, condition, tail = source.partition(replacement)
        first, _, body = tail.removesuffix("    return 0\n").partition("\n")
        source = f"{head}{condition}{first}\n{textwrap.indent(textwrap.dedent(body), ' ' * 8)}    return 0\n"
    path.write_text(source)
    status, output = apply(checkout)
    lines = [line for line in output.splitlines() if line.startswith("didn't fit: ")]
    assert status == 1 and len(lines) == 1, output
    assert lines[0].startswith(f"didn't fit: {TRAINING}/{name}.py: ") and said in lines[0]
    assert (checkout / TRAINING / "hybrid_param_copies.py").is_file()
    for file in (checkout / TRAINING).glob("*.py"):
        if said != "invalid syntax" or file != path:
            compile(file.read_text(), str(file), "exec")


def test_another_directory_is_refused(tmp_path):
    status, output = apply(tmp_path)
    assert status == 2 and output.startswith(f"error: {tmp_path} is no checkout of Megatron Bridge: ")
    assert contents(tmp_path) == {}


def test_conditions_other_than_precision_are_kept(checkout):
    path = checkout / TRAINING / "checkpointing.py"
    source = path.read_text().replace(
        "and optimizer is not None and not cfg", "and optimizer and (model or path) and not cfg"
    )
    path.write_text(source)
    assert apply(checkout)[0] == 0
    assert (
        f"        if (model or path):\n            {HELPER}(cfg, optimizer, state_dict)\n    return 0\n"
        in path.read_text()
    )


def test_what_is_applied_fits_the_other_repositorys_lines(applied):
    for path in [*(applied / TRAINING).glob("*.py"), *(applied / TESTS).glob("test_*s*.py")]:
        lines = path.read_text().splitlines()
        assert [line for line in lines if len(line) > 119] == [], path
