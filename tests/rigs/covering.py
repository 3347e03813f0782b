# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A few cells of a product that have all its pairs of values: most defects need no more than two options to meet."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Cell = TypeVar("Cell")


def pairs_of(values: Mapping[str, Any]) -> set[Any]:
    """Each two values of different axes."""
    return set(itertools.combinations(values.items(), 2))


def covering(
    product: list[Cell],
    pairs: Callable[[Cell], set[Any]],
    *,
    besides: list[Cell] | None = None,
    rather: Callable[[Cell, list[Cell]], Any] = lambda cell, chosen: False,
) -> list[Cell]:
    """Choose cells in which each pair is that any cell has.

    Args:
        product: All cells.
        pairs: What a cell covers.
        besides: Cells that are there anyway.
        rather: Given a cell and those chosen so far, which of two that add as much is taken: the greater.
    """
    left = {pair for cell in product for pair in pairs(cell)}
    left -= {pair for cell in besides or () for pair in pairs(cell)}
    chosen: list[Cell] = []
    while left:
        best = max(product, key=lambda cell: (len(left & pairs(cell)), rather(cell, chosen)))
        chosen.append(best)
        left -= pairs(best)
    return chosen
