# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a load restores, and why. It is decided once, before anything is read, from the configuration and the files.

`load_checkpoint` follows the plan. No option of the configuration is changed to carry a decision.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import read_run_config
from megatron.bridge.checkpoint.sharded_state import read_common_state, stored_content_metadata, stored_shapes
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer
from megatron.bridge.training.run_state.adapters import check_adapters
from megatron.bridge.training.run_state.local import CORE_RELEASE, LocalCheckpoint
from megatron.bridge.training.run_state.optimizer import changed_moments, check_kind_of_optimizer
from megatron.bridge.utils.distributed import world_size
from megatron.bridge.utils.hf_hub import find_hf_directory, is_hub_name
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, parallel_sizes

RunConfig = dict[str, Any]
"""The configuration of the run that saved, as plain data."""


class Source(Enum):
    """What kind of directory the weights come from."""

    MEGATRON = "a Megatron checkpoint"
    LOCAL = "a file of each rank"
    HUGGING_FACE = "a Hugging Face directory"


@dataclass(frozen=True)
class LoadPlan:
    """Where to load from and what to restore. The weights are always restored."""

    path: Path
    """The iteration's directory, this rank's file, or the Hugging Face directory."""

    source: Source
    optimizer: bool
    scheduler: bool
    rng: bool
    train_state: bool
    """Whether step and consumed samples are restored; otherwise they start at 0."""

    reasons: tuple[str, ...] = ()
    """Why something is not restored."""

    notes: tuple[str, ...] = ()
    """What is restored in another form than it was saved in."""

    adapters_only: bool = False
    """Whether the weights are adapters; the weights under them come from elsewhere."""

    content_metadata: dict[str, Any] = field(default_factory=dict)
    """How the checkpoint's state is sharded, as it says itself. Missing entries are as this run would save them."""

    run_config: RunConfig = field(default_factory=dict, repr=False, compare=False)
    """The checkpoint's configuration, of a resume or of its weights alone."""

    def __str__(self) -> str:
        parts = {"optimizer": self.optimizer, "schedule": self.scheduler, "rng": self.rng, "step": self.train_state}
        weights = "adapters" if self.adapters_only else "weights"
        restored = ", ".join([weights, *(name for name, is_restored in parts.items() if is_restored)])
        fresh = ", ".join(name for name, is_restored in parts.items() if not is_restored)
        because = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        not_restored = f"; not {fresh}{because}" if fresh else ""
        return "; ".join([f"{self.path}: restoring {restored}{not_restored}", *self.notes])


def plan_load(
    cfg: ConfigContainer, local: LocalCheckpoint | None = None, *, load_required: bool = False
) -> LoadPlan | None:
    """Decide what a run loads.

    `checkpoint.load` wins over `checkpoint.pretrained_checkpoint`, so that a restarted finetune resumes. A
    non-persistent checkpoint wins over both if it is at least as new as the newest iteration.

    Args:
        cfg: A checked configuration; only read.
        local: From `find_local`.
        load_required: The run must not start from its initial weights, as `finetune` says.

    Returns:
        None where the run starts from its initial weights: neither option is set, or `load` is the directory that the
        run itself will save to and holds nothing yet. With adapters `pretrained_checkpoint` is `plan_base`'s, and None
        means that they start as they are made.

    Raises:
        FileNotFoundError: A directory holds no checkpoint, and starting from random weights was not asked for.
        ValueError: A checkpoint is incomplete, of another vocabulary or layout, or is given to the wrong option.
    """
    checkpoint = cfg.checkpoint
    if checkpoint.load is not None:
        if iterations.is_hf_directory(checkpoint.load):
            raise ValueError(
                f"checkpoint.load={checkpoint.load!r} is a Hugging Face directory, which holds nothing to resume: "
                "set checkpoint.pretrained_checkpoint to it"
            )
    found = _to_resume(checkpoint, local)
    if isinstance(found, LocalCheckpoint):
        return _plan_local(cfg, found)
    if found is not None:
        root, option = found
        return _plan_resume(cfg, root, option=option)
    if cfg.peft is not None:
        return None
    if checkpoint.pretrained_checkpoint is not None:
        return _plan_pretrained(cfg, checkpoint.pretrained_checkpoint)
    _check_may_start_from_scratch(cfg, load_required=load_required)
    return None


def plan_base(cfg: ConfigContainer) -> LoadPlan:
    """Decide what the frozen weights under adapters are loaded from.

    Raises:
        FileNotFoundError, ValueError: As for `plan_load`.
    """
    assert cfg.checkpoint.pretrained_checkpoint is not None  # a rule refuses adapters without it
    return _plan_pretrained(cfg, cfg.checkpoint.pretrained_checkpoint)


def takes_pretrained(cfg: ConfigContainer, local: LocalCheckpoint | None = None) -> bool:
    """Whether a run reads `checkpoint.pretrained_checkpoint`: with adapters, or where it doesn't resume."""
    return cfg.peft is not None or _to_resume(cfg.checkpoint, local) is None


def _to_resume(checkpoint: CheckpointConfig, local: LocalCheckpoint | None) -> LocalCheckpoint | tuple[str, str] | None:
    """The checkpoint that a run resumes: one of each rank, or a directory and the option that names it."""
    if local is not None and not _names_its_start(checkpoint) and local.step >= _step_of(checkpoint.load):
        return local
    if (root := _newer_global_root(checkpoint)) is not None:
        return root, "checkpoint.non_persistent_global_ckpt_dir"
    if checkpoint.load is not None:
        if iterations.checkpoint_exists(checkpoint.load) or checkpoint.ckpt_step is not None:
            return checkpoint.load, "checkpoint.load"
    return None


def _names_its_start(checkpoint: CheckpointConfig) -> bool:
    """Whether the configuration names the checkpoint to start from, so that a newer one doesn't win."""
    is_iteration = checkpoint.load is not None and iterations.is_iteration_directory(checkpoint.load)
    return checkpoint.finetune or checkpoint.ckpt_step is not None or is_iteration


def _step_of(root: str | None) -> int:
    """The newest step in a directory; -1 if it has none."""
    tracker = None if root is None else iterations.read_tracker(root)
    return -1 if tracker is None else tracker.iteration


def _newer_global_root(checkpoint: CheckpointConfig) -> str | None:
    """The directory of global non-persistent checkpoints, if its newest one is to be loaded; else None."""
    if checkpoint.non_persistent_ckpt_type != "global" or _names_its_start(checkpoint):
        return None
    root = checkpoint.non_persistent_root(checkpoint.load)
    return root if _step_of(root) > -1 and _step_of(root) >= _step_of(checkpoint.load) else None


def _plan_resume(cfg: ConfigContainer, root: str, *, option: str) -> LoadPlan:
    checkpoint = cfg.checkpoint
    directory = iterations.resolve_checkpoint(root, checkpoint.ckpt_step, option=option)
    saved = read_run_config(directory)
    check_vocabulary(cfg, saved, directory)
    check_adapters(cfg, saved, directory)
    adapters_only = cfg.peft is not None
    if checkpoint.finetune:
        plan = _weights_only(directory, "checkpoint.finetune=true", adapters_only=adapters_only)
        return replace(plan, run_config=saved)
    if directory.name == "release":
        plan = _weights_only(directory, "a release checkpoint", adapters_only=adapters_only)
        return replace(plan, run_config=saved)
    content_metadata = stored_content_metadata(directory)
    # SGD without momentum has its param groups alone.
    holds_optimizer = "optimizer" in read_common_state(directory) or any(
        iterations.OPTIMIZER_KEY.match(key) for key in stored_shapes(directory)
    )
    if checkpoint.load_optim and holds_optimizer:
        check_kind_of_optimizer(cfg, saved, directory, content_metadata)
        if not content_metadata or "distrib_optim_sharding_type" in content_metadata:  # else it is stored by weight
            _check_optimizer_layout(cfg, saved, directory, content_metadata.get("distrib_optim_sharding_type"))
    plan = _whole_resume(cfg, directory, Source.MEGATRON, saved=saved, holds_optimizer=holds_optimizer)
    return replace(plan, content_metadata=content_metadata)


def _plan_local(cfg: ConfigContainer, local: LocalCheckpoint) -> LoadPlan:
    check_vocabulary(cfg, local.run_config, local.path)
    check_adapters(cfg, local.run_config, local.path)
    _check_local_layout(cfg, local)
    return _whole_resume(cfg, local.path, Source.LOCAL, saved=local.run_config, holds_optimizer=local.holds_optimizer)


def _whole_resume(
    cfg: ConfigContainer, path: Path, source: Source, *, saved: RunConfig, holds_optimizer: bool
) -> LoadPlan:
    """A plan for all state in a checkpoint, except what the configuration excludes or the layout doesn't fit."""
    reasons = []
    if not cfg.checkpoint.load_optim:
        reasons.append("optimizer: checkpoint.load_optim=false")
    elif not holds_optimizer:
        reasons.append("optimizer: the checkpoint has none")
    with_optimizer = cfg.checkpoint.load_optim and holds_optimizer
    why_not_rng = _why_not_rng(cfg, saved)
    if why_not_rng is not None:
        reasons.append(f"rng: {why_not_rng}")
    return LoadPlan(
        path=path,
        source=source,
        optimizer=with_optimizer,
        scheduler=with_optimizer,
        rng=why_not_rng is None,
        train_state=True,
        reasons=tuple(reasons),
        notes=tuple(changed_moments(cfg, saved)) if with_optimizer else (),
        adapters_only=cfg.peft is not None,
        run_config=saved,
    )


def _plan_pretrained(cfg: ConfigContainer, name: str) -> LoadPlan:
    path = str(find_hf_directory(name)) if is_hub_name(name) else name
    if iterations.is_hf_directory(path):
        if cfg.checkpoint.load_main_params_from_ckpt:
            raise ValueError(
                f"checkpoint.load_main_params_from_ckpt=true with checkpoint.pretrained_checkpoint={path!r}, a Hugging "
                "Face directory: its values are read in the model's precision; import it first "
                "(python -m megatron.bridge.convert import), or set load_main_params_from_ckpt=false"
            )
        return _weights_only(Path(path), "pretrained weights", source=Source.HUGGING_FACE)
    directory = iterations.resolve_checkpoint(path, option="checkpoint.pretrained_checkpoint")
    saved = read_run_config(directory)
    check_vocabulary(cfg, saved, directory)
    if saved.get("peft") is not None:
        raise ValueError(
            f"{directory} (checkpoint.pretrained_checkpoint) holds adapters only: expected the weights that they "
            "adapt, or adapters merged into them (python -m megatron.bridge.convert export)"
        )
    return replace(_weights_only(directory, "pretrained weights"), run_config=saved)


def _weights_only(
    path: Path, reason: str, *, source: Source = Source.MEGATRON, adapters_only: bool = False
) -> LoadPlan:
    nothing_else: dict[str, Any] = {"optimizer": False, "scheduler": False, "rng": False, "train_state": False}
    return LoadPlan(path, source, **nothing_else, reasons=(reason,), adapters_only=adapters_only)


def _why_not_rng(cfg: ConfigContainer, saved: RunConfig) -> str | None:
    """Why the random states can't be restored; None if they can."""
    if not cfg.checkpoint.load_rng:
        return "checkpoint.load_rng=false"
    if not _entry(saved, "checkpoint", "save_rng", default=True):
        return "the checkpoint has none"
    return _changed_layout(cfg, saved)


def _changed_layout(cfg: ConfigContainer, saved: RunConfig, sizes: tuple[str, ...] = ("TP", "PP")) -> str | None:
    """How the layout differs from the checkpoint's in one of `sizes`; None if it is the same."""
    for short in sizes:
        size = PARALLEL_SIZES[short].field
        was, now = _entry(saved, "model", size, default=1), getattr(cfg.model, size)
        if now is not None and was != now:
            return f"{short} {was} -> {now}"
    return None


def _check_optimizer_layout(cfg: ConfigContainer, saved: RunConfig, directory: Path, sharding_type: str | None) -> None:
    """Refuse state that is stored by bucket at another layout. Only the data-parallel size may differ.

    Raises:
        ValueError: The checkpoint's format can't be read, or can't be loaded at this layout.
    """
    weights_alone = "load its weights alone with checkpoint.load_optim=false"
    if sharding_type not in (None, "dp_reshardable", "fully_reshardable"):
        raise ValueError(
            f"{directory} (checkpoint.load) holds optimizer state in the format {sharding_type}, which can't be read: "
            f"expected dp_reshardable or fully_reshardable; {weights_alone}"
        )
    if sharding_type == "fully_reshardable":
        return
    changed = _changed_layout(cfg, saved, ("TP", "PP", "EP", "ETP") if cfg.model.num_moe_experts else ("TP", "PP"))
    if changed is not None:
        raise ValueError(
            f"{directory} (checkpoint.load) holds optimizer state of another layout ({changed}), which can't be "
            "resharded: use the checkpoint's parallel sizes (saved from there with "
            f"checkpoint.dist_ckpt_optim_fully_reshardable=true it fits any), or {weights_alone}"
        )


def _check_local_layout(cfg: ConfigContainer, local: LocalCheckpoint) -> None:
    """Check that a local checkpoint has this run's layout: each rank reads back its own file.

    Raises:
        ValueError: The number of ranks or a parallel size changed, or Core's version did.
    """
    differing = []
    if local.num_ranks != world_size():
        differing.append(f"ranks {local.num_ranks} -> {world_size()}")
    for name, size in parallel_sizes(cfg.model).items():
        was, now = _entry(local.run_config, "model", name, default=1), size or 1
        if was != now:
            differing.append(f"model.{name} {was} -> {now}")
    if local.core_version != CORE_RELEASE:
        differing.append(f"megatron-core {local.core_version} -> {CORE_RELEASE}")
    if differing:
        raise ValueError(
            f"{local.path} (checkpoint.non_persistent_local_ckpt_dir) was saved under {', '.join(differing)}, and a "
            "local checkpoint can't be resharded: start as before, or remove the directory's files to resume from the "
            "newest persistent checkpoint"
        )


def check_vocabulary(cfg: ConfigContainer, run_config: RunConfig, path: Path) -> None:
    """A checkpoint of another vocabulary would load: Core lets the embedding's padded rows differ.

    Raises:
        ValueError: The vocabularies differ.
    """
    saved = _entry(run_config, "model", "vocab_size", default=cfg.model.vocab_size)
    if saved != cfg.model.vocab_size:
        raise ValueError(
            f"{path} was saved by a model with vocab_size={saved}, this model has {cfg.model.vocab_size}: "
            "set model.vocab_size to the checkpoint's, and use its tokenizer"
        )


def _entry(run_config: dict[str, Any], section: str, name: str, *, default: Any) -> Any:
    value = (run_config.get(section) or {}).get(name)
    return default if value is None else value


def _check_may_start_from_scratch(cfg: ConfigContainer, *, load_required: bool) -> None:
    """Refuse to train random weights where the configuration names a checkpoint.

    Raises:
        FileNotFoundError: See `plan_load`.
    """
    load, save = cfg.checkpoint.load, cfg.checkpoint.save
    if load is None:
        if load_required:
            raise FileNotFoundError(
                "finetune needs weights to start from, and neither checkpoint.load nor "
                "checkpoint.pretrained_checkpoint is set: set one of them (the second may be a hub name)"
            )
        return
    missing = f"checkpoint.load={load!r} holds no checkpoint ({iterations.TRACKER_FILE} is missing)"
    if load_required:
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
