# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layer norms in plain torch for Core's local layers, with sequence parallelism.

Core's own torch norm refuses sequence parallelism. There, each tensor-parallel rank normalises its part of the
sequence, so the ranks' weight gradients are partial sums; Core adds up the gradients of every weight that carries
`sequence_parallel=True`, and these norms set that mark.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """An RMSNorm that multiplies by 1 + weight, in FP32: a weight of 0 changes nothing."""

    def reset_parameters(self) -> None:
        """Start at 0."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; same shape and dtype."""
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """A LayerNorm that multiplies by 1 + weight, in FP32."""

    def reset_parameters(self) -> None:
        """Start at 0, weight and bias."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; same shape and dtype."""
        scale, shift = 1.0 + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, scale, shift, self.eps).type_as(x)


_FROM_1: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
_FROM_0: dict[str, type[torch.nn.Module]] = {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}


class TorchNorm:
    """Builds a LayerNorm or an RMSNorm where a layer spec names a norm class; its weight counts from 1 or from 0."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """Build the norm that `config.normalization` names.

        Args:
            config: The model's configuration.
            hidden_size: Length of the normalised (last) axis.
            eps: Added to the variance.

        Raises:
            ValueError: The configuration asks for a norm that torch lacks.
        """
        norms = _FROM_0 if config.layernorm_zero_centered_gamma else _FROM_1
        if config.normalization not in norms:
            raise ValueError(
                f"model.normalization={config.normalization!r}: without Transformer Engine expected one of "
                f"{sorted(norms)}"
            )
        norm: Any = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
