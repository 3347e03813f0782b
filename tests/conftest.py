# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Counts of matrix cells, printed at the end of a test run; what several modules load: checkpoints, a model, data.

Which tests see CUDA is in rigs/gpus.py, which are quick in rigs/quick.py, which two runs divide in
rigs/shares.py. Nothing heavy is imported here.
"""

import importlib.metadata
import json
import logging
import tempfile
from collections import Counter

import pytest

from tests.rigs import gpus, quick, ranks, shares

_COUNTS: dict[str, "CellCounts"] = {}


class CellCounts:
    """How many cells of a matrix passed, were refused by name, and failed."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self.refused: Counter[str] = Counter()

    def add(self, *, passed: int = 0, failed: int = 0, refused: int = 0, because: str = "") -> None:
        self.passed += passed
        self.failed += failed
        if refused:
            self.refused[because] += refused


def pytest_addoption(parser):
    parser.addoption("--resume-matrix", choices=("cut", "whole"), default="cut", help="how much of it runs")
    parser.addoption("--sync-matrix", choices=("half", "whole"), default="half", help="how much of it runs")
    parser.addoption("--streams", default="", help="late or random:SEED: both matrices on adversarial streams")
    parser.addoption("--quick", action="store_true", help="only tests without ranks, other programs and models")
    parser.addoption(
        "--slow-below", action="append", metavar="PATH", help="of the tests that --quick leaves out, only those in PATH"
    )
    parser.addoption("--share", type=shares.share, help="1/2, 2/2, 1/4, ...: that part of the cases of long tests")


def pytest_configure(config):
    gpus.hide_from_tests()
    if config.getoption("--quick") and config.getoption("--slow-below"):
        raise pytest.UsageError("--quick leaves all slow tests out, those of --slow-below too: choose one")


def pytest_ignore_collect(collection_path, config):
    """Whole runs are never quick, and their modules import the most."""
    return True if config.getoption("--quick") and collection_path.name in quick.IGNORED else None


def pytest_collection_modifyitems(config, items):
    left_out = set()
    paths = [] if config.getoption("--quick") else config.getoption("--slow-below")
    if paths is not None:
        left_out |= set(quick.slow_elsewhere(items, [config.rootpath / path for path in paths]))
    if share := config.getoption("--share"):
        left_out |= set(shares.left_to_others(items, share))
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    ranks.is_quick = quick.is_quick(item)
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with gpus.gpu_test():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    if fixturedef.scope == "function":
        return (yield)
    with gpus.shared_fixture():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before its fixtures: a test marked gpu that asks for no ranks needs one device."""
    if item.get_closest_marker("gpu") is not None:
        gpus.device_of_ranks(1)


@pytest.fixture(scope="session", autouse=True)
def temporary_files():
    """What the programs that tests start leave in the system's temporary folder ends with the session.

    Not below pytest's own folder: the name of a socket can't be that long. This process keeps the system's, where
    multiprocessing clears up only after the session.
    """
    tempfile.gettempdir()  # remembered from here on
    with tempfile.TemporaryDirectory(prefix="tests_", ignore_cleanup_errors=True) as directory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", directory)
            yield


@pytest.fixture(autouse=True)
def heard_records():
    """A test's `caplog` hears this package, whatever commands and libraries that ran in this process set before."""
    _hear_records()
    yield
    _hear_records()


def _hear_records():
    logging.getLogger().setLevel(logging.WARNING)  # NeMo-Run's launchers leave it at ERROR
    ours = logging.getLogger("megatron.bridge")
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
    for handler in [handler for handler in ours.handlers if type(handler) is logging.StreamHandler]:
        ours.removeHandler(handler)  # it holds the last test's standard error


@pytest.fixture(scope="session")
def written_model(tmp_path_factory):
    """The directory of a model's weights in every form, written on that many ranks when first asked for."""
    import torch

    from tests.rigs.ranks import run_on_ranks
    from tests.rigs.sync import LAYOUTS, SIZES
    from tests.rigs.sync_checkpoints import write_checkpoints
    from tests.unit_tests.models.tiny_llama import save_tiny_llama

    written = {}

    def directory_of(model, world_size):
        if (model, world_size) not in written:
            directory = written[model, world_size] = tmp_path_factory.mktemp("model")
            sizes = {**SIZES, **LAYOUTS[model.layout]}
            if model.kind == "dense":
                save_tiny_llama(
                    directory / "hf",
                    dtype=torch.bfloat16,
                    hidden_size=sizes["hidden_size"],
                    intermediate_size=sizes["ffn_hidden_size"],
                    num_hidden_layers=sizes["num_layers"],
                    vocab_size=sizes["vocab_size"],
                    tie_word_embeddings=sizes["share_embeddings_and_output_weights"],
                    initializer_range=0.02,
                )
            run_on_ranks(write_checkpoints, world_size, directory, model)
        return written[model, world_size]

    return directory_of


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """What a script is given: my-model, a tiny one with its tokenizer, and my-data, a few samples."""
    from tests.unit_tests.data.conftest import write_tokenizer
    from tests.unit_tests.models.tiny_llama import save_tiny_llama

    directory = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(directory / "my-model", vocab_size=328)
    write_tokenizer(directory / "my-model")
    (directory / "my-data").mkdir()
    row = json.dumps({"input": "the cat sat on", "output": "the mat"})
    for split in ("training", "validation"):
        (directory / "my-data" / f"{split}.jsonl").write_text(f"{row}\n" * 8)
    return directory


@pytest.fixture(scope="module")
def cell_counts(request):
    """The counts of this module's matrix."""
    return _COUNTS.setdefault(request.module.__name__.rpartition(".")[2], CellCounts())


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its counts to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["cell_counts"] = {
            name: {**vars(counts), "refused": dict(counts.refused)} for name, counts in _COUNTS.items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, fields in getattr(node, "workeroutput", {}).get("cell_counts", {}).items():
        counts = _COUNTS.setdefault(name, CellCounts())
        counts.add(passed=fields["passed"], failed=fields["failed"])
        counts.refused.update(fields["refused"])


def pytest_terminal_summary(terminalreporter):
    for name, counts in _COUNTS.items():
        terminalreporter.section(f"{name} on megatron-core {importlib.metadata.version('megatron-core')}")
        refused = sum(counts.refused.values())
        terminalreporter.line(f"cells: {counts.passed} passed, {refused} refused by name, {counts.failed} failed")
        for because, number in counts.refused.items():
            terminalreporter.line(f"  refused: {number} x {because}")
