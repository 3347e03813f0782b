# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The end tokens of the trained model: those of the weights that it starts from, and those that it learns."""

import logging
from typing import Any

from megatron.bridge.models.conversion.generation_config import end_ids, learned_end_ids, with_end_ids
from megatron.bridge.models.conversion.tokenizer_files import find_generation_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.run_state.load_plan import LoadPlan, Source

logger = logging.getLogger(__name__)


def generation_config_to_save(cfg: ConfigContainer, tokenizer: Any, plan: LoadPlan | None) -> dict[str, Any] | None:
    """The content of the `generation_config.json` that a save writes.

    It is that of the loaded checkpoint, or else of the pretrained model, plus the end tokens of the run's tokenizer.

    Args:
        cfg: A checked configuration.
        tokenizer: The run's tokenizer.
        plan: The load plan; None if nothing is loaded.

    Returns:
        The content; None if the tokenizer is one of numbers, not text.

    Raises:
        ValueError: A `generation_config.json` is damaged.
    """
    hf_tokenizer = getattr(tokenizer, "hf_tokenizer", None)
    if hf_tokenizer is None:
        return None
    loaded = None if plan is None or plan.source is Source.LOCAL else plan.path
    places = (loaded, cfg.checkpoint.pretrained_checkpoint, getattr(cfg.model, "hf_model_id", None))
    found = next((content for place in places if (content := find_generation_config(place)) is not None), {})
    content = with_end_ids(found, learned_end_ids(hf_tokenizer))
    added = [token for token in end_ids(content) if token not in end_ids(found)]
    if added and end_ids(found):
        names = hf_tokenizer.convert_ids_to_tokens(added)
        logger.info("end tokens: %s of the tokenizer and its chat template are added to %s", names, end_ids(found))
    return content
