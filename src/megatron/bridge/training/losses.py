# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The finetuning loss: next-token cross entropy over the tokens that the mask keeps.

Shapes: B batch, S sequence.
"""

from collections.abc import Callable
from functools import partial

import torch


def masked_next_token_loss(
    loss_mask: torch.Tensor,
    output_tensor: torch.Tensor,
    check_for_nan_in_loss: bool = True,
    check_for_spiky_loss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the per-token losses that the mask keeps. Core's schedule divides by the number of tokens.

    Args:
        loss_mask: [B, S] float, 1 where a token counts.
        output_tensor: [B, S] per-token losses from the model's last stage.
        check_for_nan_in_loss: Raise where the sum is not finite.
        check_for_spiky_loss: Not supported; kept in the signature that scripts use.

    Returns:
        The loss sum (scalar, float32), the number of tokens (scalar, int32), and `{"lm loss": [sum, count]}`,
        a float32 tensor of two to be added up over micro-batches and ranks.

    Raises:
        ValueError: `check_for_spiky_loss` is set.
        FloatingPointError: The loss is NaN or infinite.
    """
    if check_for_spiky_loss:
        raise ValueError(
            "check_for_spiky_loss=True is not supported: set rerun_state_machine.check_for_spiky_loss=False"
        )
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * mask)
    num_tokens = loss_mask.sum().to(torch.int)
    if check_for_nan_in_loss and not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss over {int(num_tokens)} tokens is {loss.item()}: check the data and the learning rate"
        )
    reported = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": reported}


def create_masked_next_token_loss_function(
    loss_mask: torch.Tensor, check_for_nan_in_loss: bool = True, check_for_spiky_loss: bool = False
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """What a forward step returns beside the output: `masked_next_token_loss` of the output alone."""
    return partial(
        masked_next_token_loss,
        loss_mask,
        check_for_nan_in_loss=check_for_nan_in_loss,
        check_for_spiky_loss=check_for_spiky_loss,
    )
