# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `--share` leaves to other runs: `.ci/run` tests two versions of Core, and divides what takes long between them.

Of each test that reaches ranks or other programs and has several cases, 1/2 runs every other case, whatever parameter
one goes along, and 2/2 the others; 1/4 to 4/4 run every fourth. Cases of one `xdist_group` share what they start, and
stay together. Tests with one case run in all, and a test that doesn't depend on the version (`any_core`) runs whole.
"""

import argparse
from collections import defaultdict
from typing import Any

from tests.rigs import quick


def share(text: str) -> tuple[int, int]:
    """`1/4` as (1, 4)."""
    at, _, count = text.partition("/")
    if not (at.isdecimal() and count.isdecimal() and 1 <= int(at) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share such as 1/2 or 3/4")
    return int(at), int(count)


def left_to_others(items: list[Any], share: tuple[int, int]) -> list[Any]:
    """Those of the collected tests that the other shares run."""
    at, count = share
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("any_core") and not quick.is_quick(item):
            cases[item.nodeid.partition("[")[0]].append(item)
    several = [of_test for of_test in cases.values() if len(of_test) > 1]
    return [case for of_test in several for case, place in _places(of_test).items() if place % count != at - 1]


def _places(cases: list[Any]) -> dict[Any, int]:
    """Of cases of one test: numbers that go up by 1 along each parameter."""
    marks = [case.get_closest_marker("xdist_group") for case in cases]
    if all(marks):
        names = [mark.args[0] for mark in marks]
        number_of = {name: at for at, name in enumerate(dict.fromkeys(names))}
        return {case: number_of[name] for case, name in zip(cases, names, strict=True)}
    places = dict.fromkeys(cases, 0)
    for names in _parameters(cases[0]):
        number_of: dict[str, int] = {}
        for case in cases:
            value = repr([case.callspec.params[name] for name in names])
            places[case] += number_of.setdefault(value, len(number_of))
    return places


def _parameters(case: Any) -> list[list[str]]:
    """The names that each parameter of a test sets: those of one `parametrize` together."""
    together = [mark.args[0] for mark in case.iter_markers("parametrize")]
    named = [names.replace(",", " ").split() if isinstance(names, str) else list(names) for names in together]
    rest = [[name] for name in case.callspec.params if name not in sum(named, [])]
    return [[name for name in names if name in case.callspec.params] for names in named] + rest
