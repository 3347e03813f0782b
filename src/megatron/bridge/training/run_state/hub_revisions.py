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
_BETWEEN = ", "
"""Between commits of one name: its tokenizer and its weights, say, were taken at different ones."""


def record_hub_revisions(cfg: ConfigContainer, *plans: LoadPlan | None) -> None:
    """Put the commits into `checkpoint.hub_revisions`, and warn (rank 0) of those that a checkpoint had otherwise.

    What this run didn't have to fetch, such as the weights of an imported checkpoint, keeps the recorded commit.

    Args:
        cfg: The run's configuration, whose tokenizer, data and weights have been found.
        plans: What is loaded; later ones go before earlier ones.
    """
    names = _names(cfg)
    now = commits_of(names)
    kept: dict[str, str] = {}
    for plan in plans:
        saved = {} if plan is None else plan.run_config.get("checkpoint") or {}
        for name, was in (saved.get("hub_revisions") or {}).items():
            # The weights of another run may have been trained on other data.
            if plan is None or name not in names or not (plan.train_state or not name.startswith(_OF_DATASETS)):
                continue
            before, found = set(was.split(_BETWEEN)), set(now.get(name, was).split(_BETWEEN))
            if found <= before:
                kept[name] = was
            else:
                kept.pop(name, None)
                _warn(plan, name, was=was, now=now[name])
    cfg.checkpoint.hub_revisions = {**now, **kept} or None


def _warn(plan: LoadPlan, name: str, *, was: str, now: str) -> None:
    """Say what differs, and how to get what was."""
    if not is_rank_0():
        return
    kind = "--repo-type dataset " if name.startswith(_OF_DATASETS) else ""
    fetch = f"hf download {kind}{name.removeprefix(_OF_DATASETS)} --revision"
    logger.warning(
        "%s was saved with %s at revision %s of the hub, and this run has it at %s: to continue with the former, run "
        "%s and name the directory that it prints",
        plan.path,
        name,
        was,
        now,
        " and ".join(f"`{fetch} {commit}`" for commit in was.split(_BETWEEN)),
    )


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
