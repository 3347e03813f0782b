# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gated DeltaNet layers in place of attention, for Core's local layers and Transformer Engine's, on any device.

Core has a module of this name too. It can't be built without flash-linear-attention, whose kernels need a GPU.

The projection's rows, and the channels of the convolution, are in the order of the key heads: of each one its query,
key, values, gates, betas and decays. So tensor-parallel ranks share them as any matrix, and a checkpoint reads at any
size.

Shapes: S sequence, B batch, H hidden, K and V channels of a key and of a value head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from megatron.bridge.models.delta_rule import causal_convolution, gated_delta_rule, sample_numbers, unit_length
from megatron.bridge.utils.device import current_device


@dataclass
class GatedDeltaNetSubmodules:
    """The linear layers, as of the attention that it stands in for."""

    in_proj: Any
    out_proj: Any


class GatedDeltaNet(MegatronModule):
    """The layer that stands in for attention.

    Args:
        config: The model's configuration, whose `linear_` fields are its sizes.
        submodules: Its linear layers.
        layer_number: From 1, over all pipeline stages.
        pg_collection: Core's process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        *,
        pg_collection: Any,
        **_of_attention: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_heads = config.linear_num_key_heads // self.tp_group.size()
        self.values_per_key = config.linear_num_value_heads // config.linear_num_key_heads
        values = self.values_per_key * self.value_size
        self.sections = [2 * self.key_size + values, values, self.values_per_key, self.values_per_key]
        """Rows of a key head: what is convolved (query, key, values), gates, betas, decays."""
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            config.linear_num_key_heads * sum(self.sections),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            config.linear_num_value_heads * self.value_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )
        self.conv_weight = self._parameter(self.key_heads * self.sections[0], 1, config.linear_conv_kernel_dim)
        self.dt_bias = self._parameter(self.key_heads * self.values_per_key)
        self.A_log = self._parameter(self.key_heads * self.values_per_key)
        self.norm_weight = self._parameter(self.value_size, is_split=False)
        if config.perform_initialization:
            self._initialize()

    def _parameter(self, *shape: int, is_split: bool = True) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype, device=current_device()))
        if is_split:
            set_tensor_model_parallel_attributes(made, True, 0, 1)
        return made

    def _initialize(self) -> None:
        with torch.no_grad(), get_cuda_rng_tracker().fork():
            width = self.conv_weight.shape[-1]
            self.conv_weight.uniform_(-(width**-0.5), width**-0.5)
            self.A_log.uniform_(0.01, 16).log_()
        torch.nn.init.ones_(self.dt_bias)
        torch.nn.init.ones_(self.norm_weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **_of_attention: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As attention's.

        Args:
            hidden_states: [S, B, H]; with sequence parallelism this rank's part of S.
            attention_mask: Of it, where samples begin counts. See `sample_numbers`.
            inference_context: Core's static context, which keeps the state of each row.
            packed_seq_params: Where samples begin, in place of the mask.

        Returns:
            [S, B, H] like `hidden_states`, and the bias, None.

        Raises:
            NotImplementedError: Another context for inference.
        """
        projected, _ = self.in_proj(hidden_states)
        length, batch, _ = projected.shape
        by_head = projected.transpose(0, 1).reshape(batch, length, self.key_heads, -1)
        mixed, gate, beta, decay = by_head.split(self.sections, -1)
        memory = None
        sample_of = None
        if inference_context is None:
            bounds = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
            sample_of = sample_numbers(attention_mask, bounds, batch=batch, length=length)
        else:
            memory = _Memory(inference_context, self.layer_number, batch=batch)
        query, key, value = self._convolved(mixed.flatten(2), sample_of, memory)
        output, state = gated_delta_rule(
            unit_length(query) * self.key_size**-0.5,
            unit_length(key),
            value,
            decay=-(self.A_log.float().exp() * F.softplus(decay.flatten(2).float() + self.dt_bias)).transpose(1, 2),
            beta=beta.flatten(2).float().sigmoid().transpose(1, 2),
            state=None if memory is None else memory.state,
            sample_of=sample_of,
        )
        if memory is not None:
            memory.state = state
        return self.out_proj(self._gated_norm(output, gate))

    def _convolved(
        self, mixed: torch.Tensor, sample_of: torch.Tensor | None, memory: "_Memory | None"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key [B, value heads, S, K] and value [B, value heads, S, V], float32."""
        before = None if memory is None else memory.inputs
        convolved = F.silu(causal_convolution(mixed, self.conv_weight, before=before, sample_of=sample_of))
        if memory is not None:
            memory.keep_inputs(mixed, self.conv_weight.shape[-1] - 1)
        batch, length, _ = mixed.shape
        by_head = convolved.view(batch, length, self.key_heads, -1).transpose(1, 2)
        query, key, value = by_head.split([self.key_size, self.key_size, self.sections[1]], -1)
        query, key = (one.repeat_interleave(self.values_per_key, 1) for one in (query, key))
        value = value.unflatten(-1, (self.values_per_key, self.value_size)).transpose(2, 3).flatten(1, 2)
        return query, key, value

    def _gated_norm(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Outputs [B, value heads, S, V] normalised, times their gates [B, S, key heads, -1]: [S, B, channels]."""
        # Each rank normalises its own heads: the gradients of the weight are added up over the ranks.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight.float(), group=self.tp_group)
        normed = F.rms_norm(output, (self.value_size,), eps=self.config.layernorm_epsilon) * weight
        gated = normed.transpose(1, 2).flatten(2) * F.silu(gate.flatten(2).float())
        return gated.transpose(0, 1).contiguous().to(gate.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Core's description of the weights in a checkpoint."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        split = {name: 0 for name, parameter in own.items() if getattr(parameter, "tensor_model_parallel", False)}
        found = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            split,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group") or _data_parallel_group(),
        )
        for name, module in self.named_children():
            found |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return found


def _data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


class _Memory:
    """What a layer keeps of the rows that are being continued, where Core's static context keeps keys and values.

    Core exchanges rows along the second axis: inputs are kept as [width - 1, B, channels], states as [heads, B, K, V].
    """

    def __init__(self, context: Any, layer_number: int, *, batch: int) -> None:
        if not context.is_static_batching():
            raise NotImplementedError(
                "Gated DeltaNet layers keep a state for each row, which Core's dynamic batching has no place for: use "
                "a static inference context"
            )
        self._kept = context.key_value_memory_dict
        self._layer, self._batch = layer_number, batch
        self._rows = slice(context.batch_size_offset, context.batch_size_offset + batch)
        self._max_batch = context.max_batch_size
        self._is_start = context.sequence_len_offset == 0

    @property
    def inputs(self) -> torch.Tensor | None:
        """[B, width - 1, channels] before the first new position; None at the start."""
        return None if self._is_start else self._kept[self._layer][0][:, self._rows].transpose(0, 1)

    def keep_inputs(self, new: torch.Tensor, number: int) -> None:
        """Keep the last of what went in: `new` is [B, S, channels]."""
        before = new.new_zeros(self._batch, number, new.shape[2]) if self.inputs is None else self.inputs
        self._new_inputs = torch.cat([before, new], 1)[:, new.shape[1] :].transpose(0, 1)

    @property
    def state(self) -> torch.Tensor | None:
        """[B, heads, K, V] before the first new position; None at the start."""
        return None if self._is_start else self._kept[self._layer][1][:, self._rows].transpose(0, 1)

    @state.setter
    def state(self, new: torch.Tensor) -> None:
        """Keep the state, and the inputs with it."""
        states = new.transpose(0, 1)
        if self._layer not in self._kept:
            self._kept[self._layer] = tuple(
                one.new_zeros(one.shape[0], self._max_batch, *one.shape[2:]) for one in (self._new_inputs, states)
            )
        for kept, fresh in zip(self._kept[self._layer], (self._new_inputs, states), strict=True):
            kept[:, self._rows] = fresh
