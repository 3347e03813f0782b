# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a load restores, and why: decided once, from the configuration and what is on disk, before anything is read.

`load_checkpoint` follows the plan; no flag of the configuration is changed on the way.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.bridge.checkpoint import layout
from megatron.bridge.checkpoint.model_checkpoint import read_run_config
from megatron.bridge.checkpoint.sharded_state import stored_shapes
from megatron.bridge.training.config import ConfigContainer


class Source(Enum):
    """What kind of directory the weights come from."""

    MEGATRON = "a Megatron checkpoint"
    HUGGING_FACE = "a Hugging Face directory"


@dataclass(frozen=True)
class LoadPlan:
    """Where to load from and what to restore. The weights are always restored."""

    path: Path
    """The iteration's directory, or the Hugging Face directory."""

    source: Source
    optimizer: bool
    scheduler: bool
    rng: bool
    train_state: bool
    """Whether the step and the consumed samples go on; otherwise they start at 0."""

    reasons: tuple[str, ...] = ()
    """Why something is not restored."""

    def __str__(self) -> str:
        parts = {"optimizer": self.optimizer, "schedule": self.scheduler, "rng": self.rng, "step": self.train_state}
        restored = ", ".join(["weights", *(name for name, is_restored in parts.items() if is_restored)])
        fresh = ", ".join(name for name, is_restored in parts.items() if not is_restored)
        because = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"{self.path}: restoring {restored}" + (f"; not {fresh}{because}" if fresh else "")


def plan_load(cfg: ConfigContainer) -> LoadPlan | None:
    """Decide what a run loads.

    `checkpoint.load` wins over `checkpoint.pretrained_checkpoint`, so that a restarted finetune resumes.

    Args:
        cfg: A checked configuration; only read.

    Returns:
        None where the run starts from its initial weights: neither option is set, or `load` is the directory that the
        run itself will save to and holds nothing yet.

    Raises:
        FileNotFoundError: A directory holds no checkpoint, and starting from random weights was not asked for.
        ValueError: A checkpoint is incomplete, of another vocabulary or layout, or is given to the wrong option.
    """
    checkpoint = cfg.checkpoint
    if checkpoint.load is not None:
        if layout.is_hf_directory(checkpoint.load):
            raise ValueError(
                f"checkpoint.load={checkpoint.load!r} is a Hugging Face directory, which holds nothing to resume: "
                "set checkpoint.pretrained_checkpoint to it"
            )
        if layout.checkpoint_exists(checkpoint.load) or checkpoint.ckpt_step is not None:
            return _plan_resume(cfg)
    if checkpoint.pretrained_checkpoint is not None:
        return _plan_pretrained(cfg, checkpoint.pretrained_checkpoint)
    _check_may_start_from_scratch(cfg)
    return None


def _plan_resume(cfg: ConfigContainer) -> LoadPlan:
    checkpoint = cfg.checkpoint
    directory = layout.resolve_checkpoint(checkpoint.load, checkpoint.ckpt_step, option="checkpoint.load")
    check_vocabulary(cfg, directory)
    if checkpoint.finetune:
        return _weights_only(directory, "checkpoint.finetune=true")
    if directory.name == "release":
        return _weights_only(directory, "a release checkpoint")
    reasons = []
    holds_optimizer = any(key.startswith("optimizer.") for key in stored_shapes(directory))
    if not checkpoint.load_optim:
        reasons.append("optimizer: checkpoint.load_optim=false")
    elif not holds_optimizer:
        reasons.append("optimizer: the checkpoint has none")
    with_optimizer = checkpoint.load_optim and holds_optimizer
    if with_optimizer:
        _check_optimizer_layout(cfg, directory)
    why_not_rng = _why_not_rng(cfg, directory)
    if why_not_rng is not None:
        reasons.append(f"rng: {why_not_rng}")
    return LoadPlan(
        path=directory,
        source=Source.MEGATRON,
        optimizer=with_optimizer,
        scheduler=with_optimizer,
        rng=why_not_rng is None,
        train_state=True,
        reasons=tuple(reasons),
    )


def _plan_pretrained(cfg: ConfigContainer, path: str) -> LoadPlan:
    if layout.is_hf_directory(path):
        if cfg.checkpoint.load_main_params_from_ckpt:
            raise ValueError(
                f"checkpoint.load_main_params_from_ckpt=true with checkpoint.pretrained_checkpoint={path!r}, a Hugging "
                "Face directory: its values are read in the model's precision; import it first "
                "(python -m megatron.bridge.convert import), or set load_main_params_from_ckpt=false"
            )
        return _weights_only(Path(path), "pretrained weights", source=Source.HUGGING_FACE)
    directory = layout.resolve_checkpoint(path, option="checkpoint.pretrained_checkpoint")
    check_vocabulary(cfg, directory)
    return _weights_only(directory, "pretrained weights")


def _weights_only(path: Path, reason: str, *, source: Source = Source.MEGATRON) -> LoadPlan:
    return LoadPlan(path, source, optimizer=False, scheduler=False, rng=False, train_state=False, reasons=(reason,))


def _why_not_rng(cfg: ConfigContainer, directory: Path) -> str | None:
    """Why the random states can't be restored, or None where they can."""
    if not cfg.checkpoint.load_rng:
        return "checkpoint.load_rng=false"
    if not _entry(read_run_config(directory), "checkpoint", "save_rng", default=True):
        return "the checkpoint has none"
    return _changed_layout(cfg, directory)


def _changed_layout(cfg: ConfigContainer, directory: Path) -> str | None:
    """How the tensor or pipeline layout differs from the checkpoint's, or None where it is the same."""
    saved = read_run_config(directory)
    for size, short in (("tensor_model_parallel_size", "TP"), ("pipeline_model_parallel_size", "PP")):
        was, now = _entry(saved, "model", size, default=1), getattr(cfg.model, size)
        if was != now:
            return f"{short} {was} -> {now}"
    return None


def _check_optimizer_layout(cfg: ConfigContainer, directory: Path) -> None:
    """The optimizer's state is stored by bucket: it can be spread over other data ranks, not cut in another way.

    Raises:
        ValueError: The tensor or pipeline layout changed.
    """
    changed = _changed_layout(cfg, directory)
    if changed is not None:
        raise ValueError(
            f"{directory} (checkpoint.load) holds optimizer state of another layout ({changed}), which can't be "
            "resharded: use the checkpoint's parallel sizes, or load its weights alone with checkpoint.load_optim=false"
        )


def check_vocabulary(cfg: ConfigContainer, directory: Path) -> None:
    """A checkpoint of another vocabulary would load: Core lets the embedding's padded rows differ.

    Raises:
        ValueError: The vocabularies differ.
    """
    saved = _entry(read_run_config(directory), "model", "vocab_size", default=cfg.model.vocab_size)
    if saved != cfg.model.vocab_size:
        raise ValueError(
            f"{directory} was saved by a model with vocab_size={saved}, this model has {cfg.model.vocab_size}: "
            "set model.vocab_size to the checkpoint's, and use its tokenizer"
        )


def _entry(run_config: dict[str, Any], section: str, name: str, *, default: Any) -> Any:
    value = (run_config.get(section) or {}).get(name)
    return default if value is None else value


def _check_may_start_from_scratch(cfg: ConfigContainer) -> None:
    """Refuse to train random weights where the configuration names a checkpoint.

    Raises:
        FileNotFoundError: See `plan_load`.
    """
    load, save = cfg.checkpoint.load, cfg.checkpoint.save
    if load is None:
        if cfg._checkpoint_load_required:
            raise FileNotFoundError(
                "finetune needs weights to start from, and neither checkpoint.load nor "
                "checkpoint.pretrained_checkpoint is set: set one of them"
            )
        return
    missing = f"checkpoint.load={load!r} holds no checkpoint ({layout.TRACKER_FILE} is missing)"
    if cfg._checkpoint_load_required:
        raise FileNotFoundError(
            f"{missing}, and checkpoint.pretrained_checkpoint is not set: "
            "set it, or point checkpoint.load at a directory that a save wrote"
        )
    if cfg.checkpoint.exit_on_missing_checkpoint:
        raise FileNotFoundError(f"{missing}, and checkpoint.exit_on_missing_checkpoint=true")
    if save is None or Path(save).resolve() != Path(load).resolve():
        raise FileNotFoundError(
            f"{missing}: the run would start from random weights; correct the path, or, to start from scratch, "
            "leave checkpoint.load unset or equal to checkpoint.save"
        )
