# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A newer Megatron-Core is said in one line; a tested one is not."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.bridge.training import initialize
from megatron.bridge.training.config import DistributedInitConfig, LoggerConfig
from megatron.bridge.utils import core_version
from megatron.bridge.utils.core_version import NEWEST_TESTED_CORE, warn_of_an_untested_core

MAKEFILE = Path(__file__).parents[3] / "Makefile"


@pytest.mark.parametrize("installed", ["0.19.3", "0.20.0", "0.20.0rc1+3f2c", "1.0", "0.100.0"])
def test_a_newer_one_is_said_in_one_line(caplog, installed):
    caplog.set_level(logging.WARNING, logger="megatron.bridge")
    logging.getLogger("megatron.bridge").propagate = True
    assert warn_of_an_untested_core(installed)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(f"megatron-core {installed} is newer than the newest tested (0.19.2): ")
    assert "\n" not in text


@pytest.mark.parametrize("installed", ["0.16.1", "0.19.2", "0.19.2+1a2b3c", "0.9.9", "main"])
def test_a_tested_one_is_not(caplog, installed):
    assert not warn_of_an_untested_core(installed)
    assert caplog.records == []


def test_a_run_says_it_as_it_starts(monkeypatch, caplog):
    monkeypatch.setattr(core_version, "core_version", "0.20.0")
    monkeypatch.setattr(initialize.distributed, "init_process_group", lambda *arguments: False)
    initialize.initialize_distributed(SimpleNamespace(logger=LoggerConfig(), dist=DistributedInitConfig()))
    assert "megatron-core 0.20.0 is newer than the newest tested" in caplog.text


def test_the_newest_tested_is_what_make_installs():
    assert re.search(r"^NEWEST_CORE := (\S+)$", MAKEFILE.read_text(), re.MULTILINE)[1] == NEWEST_TESTED_CORE
