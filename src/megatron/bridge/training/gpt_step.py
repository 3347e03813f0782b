# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The forward step of a GPT model: a micro-batch in, per-token losses out.

Shapes: B micro-batch, S sequence.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch

from megatron.bridge.models.context_parallel import context_ranks, cut_for_this_rank
from megatron.bridge.models.packed_attention import attention_arguments
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.device import current_device

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def get_batch(data_iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Take the next micro-batch and put this rank's part of it on its device: with context parallelism, 1 / CP of S.

    Args:
        data_iterator: Yields dicts with `tokens`, `labels`, `position_ids` ([B, S] int64), `loss_mask` ([B, S] float32)
            and `attention_mask` (None for causal attention); rows that pack samples have `cu_seqlens` ([B, N + 1]
            int32).

    Returns:
        The tensors by name, on the device; `cu_seqlens`, of the whole rows, on the host, or None.

    Raises:
        ValueError: With context parallelism, the ranks can't share a row.
    """
    return cut_for_this_rank(_next_batch(data_iterator))


def _next_batch(data_iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
    batch = next(data_iterator)
    device = current_device()
    on_device = {
        key: batch[key].to(device, non_blocking=True) if isinstance(batch.get(key), torch.Tensor) else None
        for key in BATCH_KEYS
    }
    return on_device | {"cu_seqlens": batch.get("cu_seqlens")}


def get_batch_from_iterator(
    data_iterator: Iterator[dict[str, Any]],
    use_mtp: bool = False,
    skip_getting_attention_mask_from_dataset: bool = True,
    *,
    is_first_pp_stage: bool = True,
    is_last_pp_stage: bool = True,
) -> dict[str, Any]:
    """Take the next micro-batch in whole: scripts cut it themselves, by Core's `get_batch_on_this_cp_rank`.

    Args:
        data_iterator: As for `get_batch`.
        use_mtp: Accepted: every stage gets tokens and labels.
        skip_getting_attention_mask_from_dataset: Leave the attention mask None, for causal attention.
        is_first_pp_stage: Accepted, as `is_last_pp_stage`: every stage gets the whole micro-batch.
        is_last_pp_stage: Accepted.
    """
    batch = _next_batch(data_iterator)
    return batch | {"attention_mask": None} if skip_getting_attention_mask_from_dataset else batch


def forward_step_modelopt(*args: Any, **options: Any) -> NoReturn:
    """Refused: distilled by NVIDIA's ModelOpt, which isn't supported."""
    raise NotImplementedError("forward_step_modelopt: ModelOpt is not supported; take forward_step")


def forward_step(
    state: GlobalState,
    data_iterator: Iterator[dict[str, Any]],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch.

    Args:
        state: The run.
        data_iterator: Micro-batches.
        model: This stage's chunk.
        return_schedule_plan: Not supported; kept in the signature that scripts use.

    Returns:
        The stage's output ([B, S] per-token losses on the last stage) and the loss function to call on it.

    Raises:
        ValueError: `return_schedule_plan` is set.
    """
    if return_schedule_plan:
        raise ValueError("return_schedule_plan=True needs comm_overlap of MoE layers, which is not supported: unset it")
    timer = state.timers("batch-generator", log_level=2)
    timer.start()
    batch = get_batch(data_iterator)
    timer.stop()
    attention = {"attention_mask": batch["attention_mask"]}
    if batch["cu_seqlens"] is not None:
        length = batch["tokens"].shape[1] * context_ranks()[1]
        attention = attention_arguments(model, batch["cu_seqlens"], seq_length=length)
    output = model(batch["tokens"], batch["position_ids"], labels=batch["labels"], **attention)
    loss_function = partial(
        masked_next_token_loss,
        batch["loss_mask"],
        # `check_loss` does that on all ranks. An error here would end one rank and leave the others waiting.
        check_for_nan_in_loss=False,
        check_for_spiky_loss=state.cfg.rerun_state_machine.check_for_spiky_loss,
    )
    return output, loss_function
