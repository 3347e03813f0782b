# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Several validation sets, each evaluated under its own name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.data.config import DatasetBuildContext

_TURN_IT_OFF = "set validation.multiple_validation_sets=false"


def names_of_sets(context: DatasetBuildContext, paths: Sequence[str]) -> list[str]:
    """The names of sets that lie at paths.

    Those of `validation_set_names`, or the file's, or the directory's where the file is called `validation.jsonl`.

    Raises:
        ValueError: There is another number of names, or two sets have the same one.
    """
    if context.validation_set_names is not None:
        _check_number(context.validation_set_names, len(paths))
        return list(context.validation_set_names)
    ends = (".jsonl", ".json", "/")
    bare = [Path(path.removesuffix(next((end for end in ends if path.endswith(end)), ""))) for path in paths]
    names = [path.parent.name if path.name == "validation" and path.parent.name else path.name for path in bare]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        where = ", ".join(path for path, name in zip(paths, names, strict=True) if name == doubled)
        raise ValueError(
            f"several validation sets would be called {doubled!r} ({where}): set validation.validation_set_names"
        )
    return names


def named_sets(valid: Any, context: DatasetBuildContext) -> dict[str, Any] | None:
    """The validation sets of a run by name; None where there is one set, or none.

    Args:
        valid: What the dataset's provider returned: a dataset, a dict of them by name, or, with
            `multiple_validation_sets`, a list of them, which are called by `validation_set_names` or their numbers.
        context: What the provider was told.

    Raises:
        ValueError: Several sets are asked for and there aren't, or their names are not those that are asked for.
    """
    if valid is None or not (context.multiple_validation_sets or isinstance(valid, dict)):
        return None
    if not isinstance(valid, dict | list | tuple):
        raise ValueError(
            "validation.multiple_validation_sets=true, but the data has one validation set: name several in "
            f"dataset.blend or dataset.blend_per_split, or {_TURN_IT_OFF}"
        )
    names = context.validation_set_names
    if names is not None:
        _check_number(names, len(valid))
    sets = valid if isinstance(valid, dict) else dict(zip(names or map(str, range(len(valid))), valid, strict=True))
    if names is not None and list(sets) != list(names):
        raise ValueError(f"validation.validation_set_names={list(names)}, but the data's sets are {list(sets)}")
    for name, dataset in sets.items():
        if not hasattr(dataset, "__len__") or isinstance(dataset, dict):
            raise ValueError(f"the validation set {name!r} is a {type(dataset).__name__}: expected a dataset")
    return sets


def _check_number(names: Sequence[str], sets: int) -> None:
    if len(names) != sets:
        raise ValueError(f"validation.validation_set_names={list(names)}: expected {sets} names, one for each set")
