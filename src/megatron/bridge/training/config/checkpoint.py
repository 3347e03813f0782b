# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on checkpoints: what is saved and loaded, when and where, and which of it is not built yet.

Scripts import `CheckpointConfig` from `megatron.bridge.training.config`. Whether the copies of an offloaded
optimizer are rebuilt after a load follows from what was loaded; there is no field for it.
"""

from dataclasses import dataclass
from typing import Literal, overload

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class CheckpointConfig(BridgeSection):
    """What is saved and loaded, when and where."""

    _section = "checkpoint"

    save: str | None = None
    """Directory into which checkpoints are written. None: nothing is saved."""

    save_interval: int | None = None
    """Steps between checkpoints. None: only at the end of the run."""

    save_retain_interval: int | None = None
    """Keep each checkpoint whose step this divides, whatever most_recent_k says. None: no such rule."""

    most_recent_k: int | None = -1
    """Newest checkpoints to keep; older ones are deleted. -1 or None: all are kept."""

    custom_manager_class: str | None = None
    """Saves and loads in place of the default manager: `module.Class`, with the methods of CheckpointManager. The
    script that starts the run imports it. None: the default one."""

    save_optim: bool = True
    """Write the optimizer's state."""

    save_rng: bool = True
    """Write the states of the random number generators."""

    load: str | None = None
    """Checkpoint directory from which a run resumes. None, or a directory without one: nothing to resume."""

    load_optim: bool = True
    """Load the optimizer's state. False: weights only, and the optimizer follows them."""

    load_main_params_from_ckpt: bool = False
    """Take the optimizer's FP32 weights from the checkpoint's weights (with load_optim=False)."""

    load_rng: bool = True
    """Load the states of the random number generators."""

    non_persistent_save_interval: int | None = None
    """Steps between checkpoints that replace each other. None: there are none."""

    non_persistent_ckpt_type: Literal["global", "local", "in_memory", "None"] | None = None
    """Where those are kept: `global`, as the others; `local`, each rank's on its own machine. None: there are none."""

    non_persistent_global_ckpt_dir: str | None = None
    """Directory for those of type global. None: the folder non_persistent in `save`, and in `load` on a resume."""

    non_persistent_local_ckpt_dir: str | None = None
    """Directory on each machine for those of type local. None: there are none."""

    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = "fully_parallel"
    """How ranks share the writing of those of type local."""

    finetune: bool = False
    """Load the weights of `load` only, and start at step 0."""

    pretrained_checkpoint: str | None = None
    """Checkpoint (root or iter_N folder), or Hugging Face directory or hub name, whose weights a run starts from,
    unless `load` holds a checkpoint. None: no pretrained weights."""

    ckpt_step: int | None = None
    """Step to load from `load`. None: the newest."""

    exit_on_missing_checkpoint: bool = False
    """End with an error when `load` holds no checkpoint, instead of starting from scratch."""

    fully_parallel_save: bool = True
    """All data-parallel ranks share the writing of a checkpoint."""

    async_save: bool = False
    """Copy what is saved and write it while training continues; one checkpoint at a time."""

    fully_parallel_load: bool = False
    """Each data-parallel rank reads a part of the checkpoint and gives it to the others."""

    ckpt_fully_parallel_load_exchange_algo: Literal["broadcast", "gather_rounds", "gather_object"] = "broadcast"
    """How the ranks give each other their parts (with fully_parallel_load)."""

    ckpt_load_validate_sharding_integrity: bool = True
    """Check that the parts in a checkpoint cover each tensor exactly once."""

    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = "assume_ok_unexpected"
    """What happens when model and checkpoint differ in names of tensors."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Write the optimizer so that tensor and pipeline parallel sizes may change too, not only the data-parallel one."""

    save_tokenizer_assets: bool = True
    """Write the tokenizer's files into each checkpoint."""

    hub_revisions: dict[str, str] | None = None
    """Written by the run: the commit of each model, tokenizer and dataset that it took from the Hugging Face hub, by
    name. A resume that finds another one warns. None: it took none."""

    verify_integrity: bool = True
    """Compare the files of tensors with their checksums before they are loaded. Checksums are always written."""

    @overload
    def non_persistent_root(self, root: str) -> str: ...

    @overload
    def non_persistent_root(self, root: None) -> str | None: ...

    def non_persistent_root(self, root: str | None) -> str | None:
        """The directory of non-persistent checkpoints of type global, for `save` or for `load`; None: there is none."""
        if self.non_persistent_global_ckpt_dir is not None or root is None:
            return self.non_persistent_global_ckpt_dir
        return f"{root}/non_persistent"

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        for name in ("save_interval", "save_retain_interval", "non_persistent_save_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}: it is a number of steps; set 1 or more, or null")
        if self.most_recent_k is not None and self.most_recent_k != -1 and self.most_recent_k < 1:
            raise ValueError(
                f"checkpoint.most_recent_k is {self.most_recent_k}: "
                "it counts checkpoints to keep; set 1 or more, or -1 for all"
            )
        if self.load_main_params_from_ckpt and self.load_optim:
            raise ValueError(
                "checkpoint.load_main_params_from_ckpt=true with checkpoint.load_optim=true: the FP32 weights would "
                "come from two places; set checkpoint.load_optim=false"
            )
        if self.ckpt_step is not None and self.ckpt_step < 0:
            raise ValueError(
                f"checkpoint.ckpt_step is {self.ckpt_step}: it is the number of an iteration; set 0 or more, or null "
                "for the newest"
            )
        if self.ckpt_step is not None and self.load is None:
            raise ValueError(
                f"checkpoint.ckpt_step={self.ckpt_step} without checkpoint.load: it picks a step in that directory; "
                "set checkpoint.load, or point checkpoint.pretrained_checkpoint at the iter_N folder"
            )
        if self.async_save and self.save is None:
            raise ValueError("checkpoint.async_save=true without checkpoint.save: set the directory to save into")
