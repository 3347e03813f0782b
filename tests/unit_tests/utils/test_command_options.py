# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Paths on command lines may begin with `~`, where no shell expands it: `--output=~/x`."""

import argparse
import importlib
import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
SCRIPTS_WITH_PATHS = {"run_recipe": "training/run_recipe.py", "generate_text": "inference/generate_text.py"}
DEMONSTRATION = SCRIPTS / "finetune_smollm2"
LINES = {
    "convert import": "--hf-model=~/x --megatron-path=~/x",
    "convert export": "--megatron-path=~/x --hf-model=~/x --base=~/x --hf-path=~/x",
    "convert export-adapter": "--megatron-path=~/x --hf-model=~/x --hf-path=~/x",
    "convert merge": "--megatron-path=~/x --hf-model=~/x --base=~/x --output=~/x",
    "convert roundtrip": "--hf-model=~/x",
    "generate": "--megatron-path=~/x --hf-model=~/x --base=~/x --prompt=y",
    "memory": "y --hf-path=~/x",
    "checkpoint.__main__ inspect": "~/x",
    "checkpoint.__main__ verify": "~/x",
    "plot": "~/x --output=~/x",
    "generate_text": "--hf-model-path=~/x --megatron-model-path=~/x --base=~/x --prompt-file=~/x --output-file=~/x",
    "run_recipe": "--recipe=y --hf-path=~/x --config-file=~/x",
}


def test_a_home_of_nobody_is_said(capsys):
    from megatron.bridge.plot import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["~nobody-at-all/x"])
    assert "there is no user 'nobody-at-all' whose home it could be" in capsys.readouterr().err


@pytest.mark.parametrize("command", LINES)
def test_every_path_of_a_command_may_begin_at_home(monkeypatch, command):
    monkeypatch.setenv("HOME", "/home/me")
    module, *words = command.split()
    if module in SCRIPTS_WITH_PATHS:
        build_parser = runpy.run_path(str(SCRIPTS / SCRIPTS_WITH_PATHS[module]))["build_parser"]
    else:
        build_parser = importlib.import_module(f"megatron.bridge.{module}").build_parser
    values = vars(build_parser().parse_args([*words, *LINES[command].split()])).values()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    assert texts.count("/home/me/x") == LINES[command].count("~/x")
    assert not any("~" in str(text) for text in texts)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("prepare_data", "--output=~/x --wheel=~/x"),
        ("prepare_model", "--output=~/x --wheel=~/x"),
        ("run", "--output=~/x --model=~/x --data=~/x"),
        ("run_lora", "--output=~/x --model=~/x --data=~/x"),
        ("train", "--output=~/x --model=~/x --data=~/x --pretrained-checkpoint=~/x"),
        ("report", "--base=~/x --finetuned=~/x --data=~/x --metrics=~/x --stock-metrics=~/x --picture=~/x"),
        ("report_lora", "--base=~/x --adapter=~/x --merged=~/x --megatron-path=~/x --data=~/x --metrics=~/x"),
    ],
)
def test_every_path_of_the_demonstration_may_begin_at_home(monkeypatch, script, line):
    class Parsed(Exception):
        pass

    def parse(self, *, whole=argparse.ArgumentParser.parse_args):
        raise Parsed(whole(self, line.split()))

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.syspath_prepend(DEMONSTRATION)
    main = runpy.run_path(str(DEMONSTRATION / f"{script}.py"))["main"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        main()
    values = list(vars(parsed.value.args[0]).values())
    assert values.count(Path("/home/me/x")) == line.count("~/x") == sum(isinstance(value, Path) for value in values)
