# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `--quick` runs: the tests that, with their fixtures, reach neither ranks nor another Python nor a real model.
`--slow-below` runs these, and of the others those in the paths that it names.

Found by following the names in a test's code through the functions and classes of tests/, so nothing is listed. A test
that gets at ranks in a way that this doesn't see ends with an error (`run_on_ranks`).
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

IGNORED = {"functional_tests"}
SLOW_MODULES = {"subprocess", "multiprocessing"}
SLOW_NAMES = {"run_on_ranks"}
SLOW_MARKERS = ("real_model", "gpu")


def is_quick(item: Any) -> bool:
    """Whether a collected test is one of these."""
    if any(item.get_closest_marker(name) for name in SLOW_MARKERS) or IGNORED & set(item.path.parts):
        return False
    fixtures = [definition.func for used in item._fixtureinfo.name2fixturedefs.values() for definition in used]
    return not any(reaches_slow(_code_of(function)) for function in (item.function, *fixtures))


def slow_elsewhere(items: list[Any], paths: list[Path]) -> list[Any]:
    """The collected tests that are neither quick nor in one of these files and directories."""
    return [item for item in items if not is_quick(item) and not any(map(item.path.is_relative_to, paths))]


@functools.cache
def reaches_slow(function: types.FunctionType | None, above: frozenset = frozenset()) -> bool:
    """Whether a function, or what it calls in tests/, names ranks or starts a program."""
    if function is None or function in above:
        return False
    for name in _names(function.__code__):
        found = function.__globals__.get(name)
        if name in SLOW_NAMES or (inspect.ismodule(found) and found.__name__ in SLOW_MODULES):
            return True
        if any(reaches_slow(part, above | {function}) for part in _functions_of(found)):
            return True
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _functions_of(found: Any) -> list[types.FunctionType | None]:
    """The code behind a name, where it is code of tests/."""
    if not str(getattr(found, "__module__", "")).startswith("tests."):
        return []
    return [_code_of(part) for part in vars(found).values()] if inspect.isclass(found) else [_code_of(found)]


def _code_of(function: Callable) -> types.FunctionType | None:
    function = inspect.unwrap(function) if callable(function) else function
    return function if isinstance(function, types.FunctionType) else None
