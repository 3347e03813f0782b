# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The house keeps its floors: who imports whom, and who may speak of the device, read from the source."""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron.bridge"
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "megatron" / "bridge"

FLOORS = {
    "utils": 1,
    "checkpoint": 2,
    "models": 3,
    "data": 3,
    "peft": 3,
    "offload_engine": 3,
    "core_repairs": 4,
    "inference": 4,
    "training/config": 5.1,
    "training/cpu_offload": 5.1,
    "training/run_state": 5.2,
    "training/monitoring/hang_watchdog": 5.2,
    "training/monitoring/preemption": 5.2,
    "training/state": 5.3,
    "training/callbacks": 5.4,
    "training/monitoring": 5.5,
    "training": 5.6,
    "training/utils": 5.6,  # doors
    "training/tokenizers": 5.6,
    "planning": 6,
    "recipes": 7,
    "convert": 7,
    "generate": 7,
    "plot": 7,
    "memory": 8,  # a command that knows the recipes
}
"""Each room imports from lower floors and from itself; rooms on one floor don't know each other."""

THE_RUN = (
    "finetune pretrain setup initialize train eval gpt_step losses micro_batches shared_rows two_value_losses optim "
    "checkpointing state callbacks"
).split()
"""The files of `training/` itself; all else has a room."""

PUBLIC_DOORS = ["comm_overlap", "mixed_precision"]
"""Files of `training/` that only re-export what scripts for Megatron Bridge import there."""

DOORS = {"__init__.py"}
"""The package's own `__init__.py` opens lazily onto any floor."""

NAMES_THE_DEVICE = {
    "utils/device.py": "chooses it",
    "utils/simulated_accelerator.py": "simulates it",
    "utils/other_cores.py": "lists options of Core, some of which are named after its graphs",
    "models/fusions.py": "names the packages of fused kernels, which end in _cuda",
    "training/config/dist.py": "lists the values of dist.device",
    "inference/options.py": "lists the values of --device, and names an option of Core's engine",
    "training/cpu_offload/param_copies.py": "imports only torch and megatron-core, so that it can be lifted as it is",
}
"""The files that may say "cuda" in code, and why."""


TEST_ROOMS = {
    "unit_tests": "one module each",
    "functional_tests": "whole runs",
    "rigs": "what tests share",
    "soak": "`make soak`",
    "fuzz": "`make fuzz`",
    "mutants": "`make mutants`",
}
"""The folders of tests/, and what for."""

TESTS_OF_SEVERAL_MODULES = {
    "checkpoint/test_interpreters.py": "what other versions of Python pickled",
    "checkpoint/test_plain_reader.py": "tensors, straight from a checkpoint's files",
    "data/test_build_datasets.py": "from a configuration to the datasets of a run",
    "data/test_conversations.py": "chats, from their rows to where the loss is taken",
    "data/test_prepare_scripts.py": "the scripts that fetch the demonstration's model and data",
    "data/test_smollm2_data.py": "the demonstration's own data",
    "models/test_dense_families.py": "what OLMo, Seed-OSS and Granite ask for and Core lacks",
    "recipes/test_launch_paths.py": "paths, from this machine to where a job runs",
    "recipes/test_launching_docs.py": "the commands and examples of docs/launching.md",
    "recipes/test_recipes.py": "all recipes, and the table of them",
    "recipes/test_sizes.py": "published numbers of parameters",
    "training/config/test_config.py": "the configuration as a whole",
    "training/config/test_options_have_an_effect.py": "that each option is read, refused or said to do nothing",
    "training/test_masters_after_load.py": "whose masters a load rebuilds, over the files that load",
    "training/test_what_is_there_later.py": "what a run's objects hold from some moment on",
}
"""Unit tests that are named after what they test, where that isn't one module."""


def source_files() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def room_of(path: str) -> str:
    """The room of a file or a module's path: the longest name in `FLOORS`; of the whole package, an empty one."""
    parts = path.removesuffix(".py").split("/")
    names = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), "")


def imported_modules(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, inside functions too; `from x import y` gives `x.y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = [*PACKAGE.split("."), *file.split("/")[:-1]]
                base = package[: len(package) - node.level + 1] + base
            yield from ((node.lineno, ".".join([*base, name.name])) for name in node.names)


def floor_violations(source: str, file: str) -> list[str]:
    """What a file imports that it must not, one line each."""
    room, found = room_of(file), []
    for line, module in imported_modules(ast.parse(source), file):
        if not module.startswith(f"{PACKAGE}."):
            continue
        other = room_of("/".join(module.split(".")[2:]))
        if other == room or FLOORS.get(other, 99) < FLOORS[room]:
            continue
        found.append(f"{file}:{line} imports {module}: {room} (floor {FLOORS[room]}) must not know {other or 'it'}")
    return found


def import_graph() -> dict[str, set[str]]:
    """The modules of ours that each file imports, inside functions and under TYPE_CHECKING too."""
    names = {
        file: ".".join([PACKAGE, *file.removesuffix(".py").removesuffix("/__init__").split("/")])
        for file in source_files()
    }
    modules = {name: file for file, name in names.items()}
    graph = {}
    for file in source_files():
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        imported = {name for _, name in imported_modules(tree, file)}
        graph[file] = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in imported} - {None, file}
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The files that import each other, over any number of others."""
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def mentions_of_the_device(source: str) -> list[int]:
    """Lines of code that say "cuda": names, attributes and strings; comments and docstrings are free to."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            text = node.value
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.alias):
            text = node.name
        else:
            continue
        if re.search(r"\b(is_)?cuda\b|_cuda$", text):
            lines.add(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("file", [file for file in source_files() if file not in DOORS])
def test_each_file_imports_from_its_own_room_or_from_below(file):
    assert room_of(file) in FLOORS, f"{file} is in no room of the house: give it a floor"
    assert floor_violations((SOURCE / file).read_text(encoding="utf-8"), file) == []


def test_no_import_goes_in_a_circle():
    graph = {file: imported - DOORS for file, imported in import_graph().items() if file not in DOORS}
    assert circles(graph) == []
    assert circles({"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"a.py"}})


def test_training_itself_holds_the_run_alone():
    files = {path.stem for path in (SOURCE / "training").glob("*.py")} - {"__init__"}
    assert files == {*THE_RUN, *PUBLIC_DOORS}


@pytest.mark.parametrize("name", PUBLIC_DOORS)
def test_a_door_only_re_exports(name):
    tree = ast.parse((SOURCE / "training" / f"{name}.py").read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "ImportFrom", "Assign"], "a docstring, an import and __all__"


@pytest.mark.parametrize("file", source_files())
def test_only_the_device_layer_speaks_of_cuda(file):
    lines = mentions_of_the_device((SOURCE / file).read_text(encoding="utf-8"))
    if file in NAMES_THE_DEVICE:
        assert lines, f"{file} no longer says cuda: take it off the list"
    else:
        assert lines == [], f"{file} says cuda in lines {lines}: ask megatron.bridge.utils.device instead"


def test_the_lifted_file_imports_nothing_of_ours_and_its_tests_only_that():
    file = "training/cpu_offload/param_copies.py"
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    roots = {module.split(".")[0] for _, module in imported_modules(tree, file)}
    assert [module for _, module in imported_modules(tree, file) if module.startswith(PACKAGE)] == []
    assert roots - sys.stdlib_module_names == {"torch", "megatron"}
    tests = ast.parse((Path(__file__).parent / "training/cpu_offload/test_param_copies.py").read_text(encoding="utf-8"))
    imported = {module for _, module in imported_modules(tests, "test_param_copies.py")}
    ours = f"{PACKAGE}.training.cpu_offload.param_copies"
    others = {name for name in imported if not name.startswith((ours, "megatron.core"))}
    assert others == {"pytest", "torch", "unittest.mock.MagicMock"}


def test_the_namespace_is_shared_with_megatron_core():
    assert not (SOURCE.parent / "__init__.py").exists()
    folders = {(SOURCE / file).parent for file in source_files()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_each_file_of_tests_is_in_a_room():
    files = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert {file for file in files if "/" not in file} == {"__init__.py", "conftest.py"}, "the others go into a room"
    assert {file.split("/")[0] for file in files if "/" in file} == set(TEST_ROOMS)


def test_unit_tests_stand_in_the_room_of_their_module_under_its_name():
    root = ROOT / "tests" / "unit_tests"
    found = {path.relative_to(root).as_posix() for path in root.rglob("test_*.py") if path.parent != root}
    modules = {file.removesuffix("/__init__.py").removesuffix(".py") for file in source_files()}
    unnamed = {file for file in found if file.replace("/test_", "/").removesuffix(".py") not in modules}
    assert unnamed == set(TESTS_OF_SEVERAL_MODULES), "name it after its module, or say what it tests"
    assert {file.rpartition("/")[0] for file in found} <= modules, "the folders are rooms of the house"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("utils/files.py", "from megatron.bridge.training.train import train"),
        ("utils/files.py", "from megatron.bridge import AutoBridge"),
        ("checkpoint/iterations.py", "import megatron.bridge.models.llama"),
        ("checkpoint/iterations.py", "from ..models import llama"),
        ("data/sft.py", "from megatron.bridge.models.llama import FAMILY"),
        ("data/sft.py", "def late():\n    from megatron.bridge import peft"),
        ("models/conversion/load.py", "from ...training import train"),
        ("convert.py", "from megatron.bridge.recipes.common import sft_common"),
        ("training/config/train.py", "from megatron.bridge.training.state import TrainState"),
        ("training/run_state/rng.py", "from megatron.bridge.training.checkpointing import save_checkpoint"),
        ("offload_engine/step.py", "from megatron.bridge.core_repairs.repair import Repair"),
    ],
)
def test_the_checker_finds_an_import_from_above_or_beside(file, line):
    assert len(floor_violations(line, file)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("training/train.py", "from megatron.bridge.utils.device import current_device"),
        ("training/train.py", "from megatron.bridge.training.setup import setup"),
        ("recipes/smollm2.py", "from megatron.bridge.models.llama import LlamaModelProvider"),
        ("models/conversion/load.py", "from . import mapping\nfrom .. import rope\nfrom ...utils import files"),
        ("convert.py", "from megatron.bridge.models.conversion.auto_bridge import AutoBridge"),
        ("utils/files.py", "import os\nfrom megatron.core import mpu"),
    ],
)
def test_the_checker_lets_imports_from_below_pass(file, line):
    assert floor_violations(line, file) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        "from torch import cuda",
        "import torch.cuda",
        "tensor.to('cuda')",
        "device = f'cuda:{rank}'",
        "if tensor.is_cuda: pass",
        "tensor.cuda()",
    ],
)
def test_the_checker_hears_cuda_in_code(line):
    assert mentions_of_the_device(f'"""The docstring says cuda."""\n# so does a comment: cuda\n{line}\n') == [3]


@pytest.mark.parametrize("line", ["tracker = get_cuda_rng_tracker()", "key = 'cuda_rng_state'", "x = 1  # cuda", "1"])
def test_the_checker_lets_megatron_cores_names_and_prose_pass(line):
    assert mentions_of_the_device(f'"""cuda"""\n{line}\nclass A:\n    x: int = 0\n    """On cuda."""\n') == []
