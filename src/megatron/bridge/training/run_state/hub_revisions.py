# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""At which commits a run took model, tokenizer and data from the Hugging Face hub: recorded, compared on a resume."""

import logging

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.run_state.load_plan import LoadPlan
from megatron.bridge.utils.distributed import is_rank_0
from megatron.bridge.utils.hf_hub import commits_of

logger = logging.getLogger(__name__)

_OF_DATASETS = "datasets/"
"""Before the name of one."""


def record_hub_revisions(cfg: ConfigContainer, plan: LoadPlan | None) -> None:
    """Put the commits into `checkpoint.hub_revisions`, and warn (rank 0) of those that a resumed run had otherwise.

    What a resume didn't have to fetch, such as the pretrained weights, keeps the recorded commit.

    Args:
        cfg: The run's configuration, whose tokenizer, data and weights have been found.
        plan: What is loaded.
    """
    names = _names(cfg)
    now = commits_of(names)
    saved = {} if plan is None or not plan.train_state else plan.run_config.get("checkpoint") or {}
    was = {name: commit for name, commit in (saved.get("hub_revisions") or {}).items() if name in names}
    for name, commit in now.items():
        if was.get(name, commit) != commit and is_rank_0():
            kind = "--repo-type dataset " if name.startswith(_OF_DATASETS) else ""
            plain = name.removeprefix(_OF_DATASETS)
            logger.warning(
                "%s was saved by a run with %s at revision %s of the hub, and this one has it at %s: to continue with "
                "the former, run `hf download %s%s --revision %s` and name the directory that it prints",
                None if plan is None else plan.path,
                name,
                was[name],
                commit,
                kind,
                plain,
                was[name],
            )
    cfg.checkpoint.hub_revisions = {**was, **now} or None


def _names(cfg: ConfigContainer) -> set[str]:
    named = [
        getattr(cfg.model, "hf_model_id", None),
        cfg.tokenizer.tokenizer_model,
        cfg.checkpoint.pretrained_checkpoint,
    ]
    return {str(name) for name in named if name is not None} | _datasets(cfg)


def _datasets(cfg: ConfigContainer) -> set[str]:
    source = getattr(cfg.dataset, "source", None)  # Core's datasets have none
    return {f"{_OF_DATASETS}{source.dataset_name}"} if source is not None and source.dataset_name else set()
