# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The reference of all options, written from the dataclasses: name, type, default, and the text under each field."""

import ast
import dataclasses
import enum
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from megatron.bridge.data.config import (
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
    PackedSequenceSpecs,
    TokenizerConfig,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    ProfilingConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.config.mixed_precision import MixedPrecisionConfig
from megatron.bridge.utils.field_types import describe, field_hints
from megatron.bridge.utils.unbuilt_options import OF_NO_USE, UNSUPPORTED

SECTIONS: dict[str, tuple[type, ...]] = {
    "train": (TrainingConfig,),
    "validation": (ValidationConfig,),
    "optimizer": (OptimizerConfig,),
    "scheduler": (SchedulerConfig,),
    "checkpoint": (CheckpointConfig,),
    "dataset": (GPTSFTDatasetConfig, PackedSequenceSpecs, GPTDatasetConfig, MockGPTDatasetConfig),
    "tokenizer": (TokenizerConfig,),
    "peft": (LoRA, DoRA),
    "logger": (LoggerConfig,),
    "dist": (DistributedInitConfig,),
    "rng": (RNGConfig,),
    "profiling": (ProfilingConfig,),
    "rerun_state_machine": (RerunStateMachineConfig,),
    "mixed_precision": (MixedPrecisionConfig,),
    "ddp": (DistributedDataParallelConfig,),
    "model": (GPTModelProvider,),
}
"""Sections of `ConfigContainer` in the order in which people look for them, and the classes that one may hold."""


def options_page() -> str:
    """The page, in Markdown."""
    parts = [
        "# All options\n",
        f"{inspect.getdoc(ConfigContainer)} Each option can be set on the command line as `section.option=value`; "
        "[configuration](../configuration.md) says how values are written and checked. "
        f"{len(UNSUPPORTED)} options of Megatron Bridge are refused, each with the way out: they are marked, or "
        "stand in [the last table](#options-of-megatron-bridge-that-arent-here).\n",
    ]
    for section, classes in SECTIONS.items():
        parts.append(f"## {section}\n")
        parts.extend(_table(section, cls) for cls in classes)
    return "\n".join([*parts, _absent_options()])


def _absent_options() -> str:
    """What Megatron Bridge has and no class here."""
    fields = {
        f"{section}.{name}" for section, classes in SECTIONS.items() for cls in classes for name in field_hints(cls)
    }
    rows = [
        "## Options of Megatron Bridge that aren't here\n",
        "They can be given, set and read like the others. What isn't neutral is refused when the configuration is "
        "checked, or, where the table says so, accepted without effect and named in the log.\n",
        "| option | neutral | instead |",
        "|---|---|---|",
    ]
    absent = [(row.option, row.accepted[0], row.instead) for row in UNSUPPORTED if row.option not in fields]
    absent += [(row.option, row.neutral, "accepted without effect") for row in OF_NO_USE]
    for option, neutral, instead in absent:
        text = {None: "null", True: "true", False: "false"}[neutral] if _is_word(neutral) else str(neutral)
        rows.append("| " + " | ".join(_cell(cell) for cell in (f"`{option}`", f"`{text}`", instead)) + " |")
    return "\n".join(rows) + "\n"


def _table(section: str, cls: type) -> str:
    """A class: its one-line description and a row for each of its options."""
    texts, refused = field_texts(cls), {row.option: row.instead for row in UNSUPPORTED}
    rows = [
        f"### {cls.__name__}\n",
        f"{(inspect.getdoc(cls) or '').splitlines()[0]}\n",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
    ]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in field_hints(cls).items():
        text = texts.get(name, "")
        option = f"{section}.{name}"
        if option in refused:
            text = (
                text.replace("Not built yet", "**Not built yet**")
                if "Not built yet" in text
                else f"{text} **Not built yet.**"
            )
            text += f" Instead: {refused[option]}." if refused[option] else ""
        cells = (f"`{name}`", f"`{_type(hint)}`", f"`{_default(fields[name])}`", text)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def field_texts(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, those of its bases included, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts.update(_texts_in(base))
    return texts


def _texts_in(cls: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for node, following in zip(body, body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield node.target.id, " ".join(str(following.value.value).split())


def _type(hint: Any) -> str:
    """A type in words; an enum of many, such as a signal, by the name that it is known by."""
    is_long = isinstance(hint, type) and issubclass(hint, enum.Enum) and len(hint) > 8
    return f"name in {hint.__module__}.{hint.__name__}" if is_long else describe(hint)


def _default(field: dataclasses.Field) -> str:
    """A default as an override would say it."""
    if field.default_factory is not dataclasses.MISSING:
        made: Any = field.default_factory()
        return str(made) if isinstance(made, list | dict | tuple | str | int) else f"{type(made).__name__}()"
    if field.default is dataclasses.MISSING:
        return "must be set"
    value = field.default
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Callable):
        return str(getattr(value, "__qualname__", value))
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _is_word(value) else str(value)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _cell(text: str) -> str:
    """Text that a row of a table can hold."""
    return text.replace("|", "\\|").replace("<", "&lt;") if not text.startswith("`") else text.replace("|", "\\|")
