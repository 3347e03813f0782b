# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layer norms in plain torch for Core's local layers, with sequence parallelism.

Core's own torch norm refuses sequence parallelism. There, each tensor-parallel rank normalises its part of the
sequence, so the ranks' weight gradients are partial sums; Core adds up the gradients of every weight that carries
`sequence_parallel=True`, and these norms set that mark.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

_TORCH_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """Builds a `torch.nn.LayerNorm` or `torch.nn.RMSNorm` where a layer spec names a norm class."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """Build the norm that `config.normalization` names.

        Args:
            config: The model's configuration.
            hidden_size: Length of the normalised (last) axis.
            eps: Added to the variance.

        Raises:
            ValueError: The configuration asks for a norm that torch lacks.
        """
        if config.normalization not in _TORCH_NORMS:
            raise ValueError(
                f"model.normalization={config.normalization!r}: without Transformer Engine expected one of "
                f"{sorted(_TORCH_NORMS)}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "model.layernorm_zero_centered_gamma=True needs Transformer Engine: install it, or set it to False"
            )
        norm: Any = _TORCH_NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
