# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `--share` leaves to another run: `.ci/run` tests two versions of Core, and divides what takes long between them.

Of each test that reaches ranks or other programs and has several cases, 1/2 runs every other case, whatever parameter
one goes along, and 2/2 the others. Cases of one `xdist_group` share what they start, and stay together. Tests with one
case run in both, and a test that doesn't depend on the version (`any_core`) runs whole.
"""

from collections import defaultdict
from typing import Any

from tests.rigs import quick

SHARES = ("1/2", "2/2")


def left_to_the_other(items: list[Any], share: str) -> list[Any]:
    """Those of the collected tests that the other share runs."""
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("any_core") and not quick.is_quick(item):
            cases[item.nodeid.partition("[")[0]].append(item)
    parities = {case: parity for of_test in cases.values() for case, parity in _parities(of_test).items()}
    return [case for case, parity in parities.items() if parity != SHARES.index(share)]


def _parities(cases: list[Any]) -> dict[Any, int]:
    """Of cases of one test: 0 or 1, in turn."""
    marks = [case.get_closest_marker("xdist_group") for case in cases]
    if all(marks):
        names = [mark.args[0] for mark in marks]
        number_of = {name: at for at, name in enumerate(dict.fromkeys(names))}
        return {case: number_of[name] % 2 for case, name in zip(cases, names, strict=True)}
    parities = dict.fromkeys(cases, 0)
    for names in _parameters(cases[0]):
        number_of: dict[str, int] = {}
        for case in cases:
            value = repr([case.callspec.params[name] for name in names])
            parities[case] += number_of.setdefault(value, len(number_of))
    return {case: parity % 2 for case, parity in parities.items()}


def _parameters(case: Any) -> list[list[str]]:
    """The names that each parameter of a test sets: those of one `parametrize` together."""
    together = [mark.args[0] for mark in case.iter_markers("parametrize")]
    named = [names.replace(",", " ").split() if isinstance(names, str) else list(names) for names in together]
    rest = [[name] for name in case.callspec.params if name not in sum(named, [])]
    return [[name for name in names if name in case.callspec.params] for names in named] + rest
