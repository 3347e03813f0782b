# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Files that keep one tensor for all experts of a layer: taken apart when they are read, put together when written.

In between, each expert's matrices and biases go by names of their own, as in other families.

Shapes: E experts, I input features, O output features, P parts.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.mxfp4 import dequantize

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of a quantised stack's two tensors end with."""


@dataclass(frozen=True)
class ExpertStack:
    """The tensor of all experts of a layer: a matrix each, [E, I, P * O], or a bias each, [E, P * O].

    The output features of the parts alternate. A quantised stack is [E, P * O, I / 32, 16], with scales beside it.
    """

    name: str
    """Its name in a file, with `{layer}`."""
    parts: tuple[str, ...]
    """The name of each part of one expert, with `{layer}` and `{expert}`."""
    part_after_part: bool = False
    """Whether the matrices are [E, P * O, I], with one part's output features after the other's."""


class _Part(NamedTuple):
    """Where a part lies."""

    stack: str
    """The stack's name, in files with what it ends with there."""
    expert: int
    position: int
    of: int
    """How many parts of an expert the stack holds."""
    part_after_part: bool
    """As `ExpertStack` has it."""


class UnstackedWeights(HFWeights):
    """A directory's tensors, with those of its stacks expert by expert, dequantised where they are MXFP4.

    Args:
        directory: As for `HFWeights`.
        stacks: What its files may hold.
    """

    def __init__(self, directory: str | Path, stacks: Sequence[ExpertStack]) -> None:
        super().__init__(directory)
        self._whole = HFWeights(directory)
        self._stacks = stacks

    @cached_property
    def _parts(self) -> dict[str, _Part]:
        """The parts by their names."""
        found = {}
        for stored in self._whole.files:
            stack, layer = _stack_named(stored.removesuffix(BLOCKS), self._stacks)
            if stack is not None:
                if stored.endswith(BLOCKS):
                    self._check_blocks(stored)
                for expert in range(self._whole.shape(stored)[0]):
                    for index, part in enumerate(stack.parts):
                        name = part.replace("{layer}", layer).replace("{expert}", str(expert))
                        found[name] = _Part(stored, expert, index, len(stack.parts), stack.part_after_part)
        return found

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, as `HFWeights` has it; of a part that is quantised, the one with its blocks."""
        whole = self._whole.files
        stacks = {part.stack for part in self._parts.values()}
        stacks |= {_scales_of(name) for name in stacks if name.endswith(BLOCKS)}
        others = {name: path for name, path in whole.items() if name not in stacks}
        return {**others, **{name: whole[part.stack] for name, part in self._parts.items()}}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor: of a part, [O, I] or [O]."""
        part = self._parts.get(name)
        if part is None:
            return self._whole.shape(name)
        _, *sizes = self._whole.shape(part.stack)
        if part.stack.endswith(BLOCKS):
            return sizes[0] // part.of, sizes[1] * sizes[2] * 2
        outputs, *inputs = sizes if part.part_after_part else (sizes[-1], *sizes[:-1])
        return (len(range(part.position, outputs, part.of)), *inputs)

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as it is read."""
        part = self._parts.get(name)
        if part is None:
            return self._whole.dtype(name)
        return "BF16" if part.stack.endswith(BLOCKS) else self._whole.dtype(part.stack)

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the host: a view of the mapped file, unless it is dequantised."""
        part = self._parts.get(name)
        if part is None:
            return self._whole.read(name)
        stack, rows = self._whole.read(part.stack)[part.expert], slice(part.position, None, part.of)
        if part.part_after_part:
            return stack.chunk(part.of)[part.position]
        if part.stack.endswith(BLOCKS):
            return dequantize(stack[rows], self._whole.read(_scales_of(part.stack))[part.expert][rows])
        return stack[..., rows].movedim(-1, 0)

    def close(self, path: Path) -> None:
        """As for `HFWeights`."""
        self._whole.close(path)

    def _check_blocks(self, stored: str) -> None:
        """Refuse blocks without their scales, and sizes that don't belong together.

        Raises:
            ValueError: Names the file and the tensor.
        """
        path, scales = self._whole.files[stored], _scales_of(stored)
        if scales not in self._whole.files:
            raise ValueError(f"{path} holds {stored!r}, and no file holds {scales!r}: take another copy of the model")
        shapes = self._whole.shape(stored), self._whole.shape(scales)
        dtypes = {self._whole.dtype(stored), self._whole.dtype(scales)}
        if len(shapes[1]) != 3 or shapes[0] != (*shapes[1], 16) or dtypes != {"U8"}:
            raise ValueError(
                f"{path}: {stored!r} has shape {shapes[0]} and {scales!r} has {shapes[1]}, dtypes {sorted(dtypes)}: "
                "expected MXFP4 in U8, [experts, rows, blocks, 16] with [experts, rows, blocks]"
            )


def open_weights(directory: str | Path, stacks: Sequence[ExpertStack]) -> HFWeights:
    """The tensors of a directory of a family, by the names that its table has."""
    return UnstackedWeights(directory, stacks) if stacks else HFWeights(directory)


def names_when_exported(
    stored: Iterable[str],
    stacks: Sequence[ExpertStack],
    *,
    read_stacks: Sequence[ExpertStack] = (),
    num_experts: int | None = None,
) -> set[str]:
    """The names that the tensors of files have in an export, where nothing is quantised.

    Args:
        stored: The names in the files.
        stacks: Those that an export has too.
        read_stacks: Those whose experts an export has one by one.
        num_experts: E.
    """
    names = set(stored)
    for name in list(names):
        stack, layer = _stack_named(name, read_stacks)
        if stack is not None:
            parts = [part.replace("{layer}", layer) for part in stack.parts]
            names.remove(name)
            names |= {part.replace("{expert}", str(expert)) for part in parts for expert in range(num_experts or 0)}
    for blocks in [name for name in names if name.endswith(BLOCKS)]:
        if _stack_named(blocks.removesuffix(BLOCKS), stacks)[0] is not None:
            names -= {blocks, _scales_of(blocks)}
            names.add(blocks.removesuffix(BLOCKS))
    return names


def stacked_sizes(sizes_bytes: Iterable[tuple[str, int]], stacks: Sequence[ExpertStack]) -> list[tuple[str, int]]:
    """(name, size) pairs with each stack in place of its parts, in the order in which `stack_experts` gives them."""
    sizes: dict[str, int] = {}
    for name, size in sizes_bytes:
        part = _part_named(name, stacks)
        whole = name if part is None else part.stack
        sizes[whole] = sizes.pop(whole, 0) + size  # at the end: a stack is whole when its last part has come
    return list(sizes.items())


def stack_experts(
    tensors: Iterable[tuple[str, torch.Tensor]], stacks: Sequence[ExpertStack], *, num_experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put the parts of each stack together.

    Args:
        tensors: (name, tensor) pairs.
        stacks: Those of the family.
        num_experts: E.

    Yields:
        The pairs, with each stack in place of its parts, once all of them have come.

    Raises:
        ValueError: At the end, if a part of a stack is missing.
    """
    begun: dict[str, tuple[torch.Tensor, set[str]]] = {}
    for name, tensor in tensors:
        part = _part_named(name, stacks)
        if part is None:
            yield name, tensor
            continue
        if part.stack not in begun:
            outputs, *inputs = tensor.shape
            rows = (*inputs, outputs * part.of)
            rows = (rows[-1], *inputs) if part.part_after_part else rows
            begun[part.stack] = tensor.new_empty((num_experts, *rows)), set()
        stack, found = begun[part.stack]
        if part.part_after_part:
            stack[part.expert].chunk(part.of)[part.position].copy_(tensor)
        else:
            stack[part.expert, ..., part.position :: part.of] = tensor.movedim(0, -1)
        found.add(name)
        if len(found) == num_experts * part.of:
            del begun[part.stack]
            yield part.stack, stack
    for name, (_, found) in begun.items():
        raise ValueError(
            f"{name} is one tensor of all {num_experts} experts, and {len(found)} of their weights were asked for, "
            f"such as {min(found)}: export all of them"
        )


def _scales_of(blocks: str) -> str:
    return blocks.removesuffix(BLOCKS) + SCALES


def _stack_named(name: str, stacks: Sequence[ExpertStack]) -> tuple[ExpertStack | None, str]:
    """The stack of this name, and its layer."""
    for stack in stacks:
        found = _pattern(stack.name).fullmatch(name)
        if found:
            return stack, found["layer"]
    return None, ""


def _part_named(name: str, stacks: Sequence[ExpertStack]) -> _Part | None:
    """The place of the part of this name."""
    for stack in stacks:
        for index, part in enumerate(stack.parts):
            found = _pattern(part).fullmatch(name)
            if found:
                whole = stack.name.replace("{layer}", found["layer"])
                return _Part(whole, int(found["expert"]), index, len(stack.parts), stack.part_after_part)
    return None


@lru_cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for number in ("layer", "expert"):
        escaped = escaped.replace(re.escape(f"{{{number}}}"), rf"(?P<{number}>\d+)", 1)
    return re.compile(escaped)
