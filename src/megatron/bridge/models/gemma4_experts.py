# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Experts beside the MLP of each layer, as in Gemma 4's 26B-A4B. They are Core's, and the MLP is their shared expert.

    output = norm( norm(MLP(norm(x))) + norm(experts(norm(x), router(x))) )

x is the residual: router, MLP and experts each normalise it in their own way. The outermost norm is that of all layers
of the family.

Shapes: S sequence, B batch, H hidden, T tokens (S * B), E experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.biased_router import shared_expert_mappings
from megatron.bridge.models.conversion.expert_stacks import ExpertStack
from megatron.bridge.models.conversion.mapping import replicated
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import HF_LAYER, LAYER, expert_mappings
from megatron.bridge.models.layer_specs import with_each_layer


class ScaledRouter(TopKRouter):
    """A router that normalises and scales its input, and multiplies each expert's weight by a number of its own.

    Args:
        config: The model's configuration.
        options: Core's.
    """

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.scale = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.per_expert_scale = torch.nn.Parameter(torch.ones(self.num_experts, dtype=config.params_dtype))
        for parameter in (self.scale, self.per_expert_scale):  # as Core's router marks its own
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """The experts' scores [S, B, E] of the residual [S, B, H]."""
        normed = F.rms_norm(input.float(), input.shape[-1:], eps=self.config.layernorm_epsilon).to(input.dtype)
        return super().gating(normed * self.scale * self.config.hidden_size**-0.5)

    def routing(self, logits: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice of the experts, [T, E] each. Arguments as for Core's."""
        weights, chosen = super().routing(logits, *args, **options)
        return weights * self.per_expert_scale, chosen


class ExpertsBesideMLP(MoELayer):
    """Core's layer of experts, given the residual itself; with a norm before and after the experts and the MLP.

    Args:
        config: The model's configuration.
        submodules: Core's. The shared experts are the MLP.
        norm: The class of norms.
        options: Core's.
    """

    def __init__(self, config: TransformerConfig, submodules: Any = None, *, norm: Any, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.mlp_norm, self.mlp_output_norm = build_module(norm, **sizes), build_module(norm, **sizes)
        self.experts_norm, self.experts_output_norm = build_module(norm, **sizes), build_module(norm, **sizes)

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP gives [S, B, H] for the residual [S, B, H], normalised."""
        return self.mlp_output_norm(super().shared_experts_compute(self.mlp_norm(hidden_states)))

    def preprocess(self, hidden_states: torch.Tensor, *routed: Any) -> Any:
        """What is dispatched of the residual [S, B, H]. The other arguments are as for Core's."""
        return super().preprocess(self.experts_norm(hidden_states), *routed)

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor) -> torch.Tensor:
        """The sum [S, B, H] of what the experts give, normalised, and what the MLP gives."""
        return self.experts_output_norm(super().postprocess(output, None)) + shared_expert_output


def experts_beside_mlp_spec(block: Any) -> TransformerBlockSubmodules:
    """The layers of a block with experts as `ExpertsBesideMLP`, which get the residual as it is.

    Args:
        block: The spec of layers with experts, Core's local ones or Transformer Engine's, and of the final norm. It
            isn't changed.

    Raises:
        ValueError: A spec of another form, or layers without Core's experts.
    """
    return with_each_layer(block, partial(_with_experts_beside_mlp, norm=getattr(block, "layer_norm", None)))


def _with_experts_beside_mlp(layer: ModuleSpec, norm: Any) -> ModuleSpec:
    given = layer.submodules.mlp
    is_spec = isinstance(given, ModuleSpec)  # a function in later Cores
    found = given.module if is_spec else getattr(given, "func", given)
    if found is not MoELayer:
        raise ValueError(f"model.transformer_layer_spec has {found} in place of the MLP: expected {MoELayer}")
    submodules = replace(given.submodules if is_spec else given.keywords["submodules"], router=ScaledRouter)
    mlp: Any = partial(ExpertsBesideMLP, submodules=submodules, norm=norm)
    if is_spec:  # no ModuleSpec: Core 0.16 warns at each one whose class it doesn't know
        mlp = SimpleNamespace(module=ExpertsBesideMLP, submodules=submodules, params={"norm": norm})
    return replace(layer, submodules=replace(layer.submodules, pre_mlp_layernorm=IdentityOp, mlp=mlp))


def check_experts_beside_mlp(config: Any) -> None:
    """Refuse what layers with experts beside the MLP aren't built with.

    Args:
        config: A provider with `num_moe_experts`.

    Raises:
        ValueError: Names the field.
    """
    why = {
        "moe_shared_expert_overlap": (False, "the MLP's output is normalised before the experts' is added"),
        "moe_shared_expert_gate": (False, "the MLP has no gate of its own"),
        "moe_layer_freq": (1, "all layers have experts"),
        "num_kv_shared_layers": (0, "layers with experts have keys of their own"),
        "hidden_size_per_layer_input": (0, "layers with experts have no input of their own"),
    }
    for name, (needed, reason) in why.items():
        found = getattr(config, name)
        if found != needed and found != [needed] * config.num_layers:
            raise ValueError(
                f"model.{name}={found} with model.num_moe_experts={config.num_moe_experts}: in Gemma 4 {reason}; set "
                f"it to {needed}"
            )
    if not config.moe_shared_expert_intermediate_size:
        raise ValueError(
            f"model.moe_shared_expert_intermediate_size={config.moe_shared_expert_intermediate_size} with "
            f"model.num_moe_experts={config.num_moe_experts}: the MLP beside the experts is built as their shared one; "
            "set it to the MLP's width"
        )


def fields_of_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The router, the experts and the MLP beside them; none without `enable_moe_block`.

    Args:
        hf: From `as_read_by_transformers`.

    Raises:
        ValueError: The configuration lacks a size, or asks for what can't be expressed.
    """
    if not hf["enable_moe_block"]:
        return {}
    for key, least in (("num_experts", 2), ("top_k_experts", 2), ("moe_intermediate_size", 1)):
        if (hf[key] or 0) < least:
            raise ValueError(
                f"config.json: {key}={hf[key]} with enable_moe_block=true is not supported for {hf['architectures']}: "
                f"need {least} or more"
            )
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        expect_value({**hf, key: hf[key] or 0}, key, 0)
    return {
        "num_moe_experts": hf["num_experts"],
        "moe_router_topk": hf["top_k_experts"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": hf["intermediate_size"],
        "moe_grouped_gemm": True,
    }


_MLP = f"{LAYER}mlp."
EXPERT_MAPPINGS = (
    *shared_expert_mappings("mlp"),
    *expert_mappings("", gate="gate_proj", up="up_proj", down="down_proj", router="router.proj"),
    replicated(f"{_MLP}router.scale", f"{HF_LAYER}router.scale"),
    replicated(f"{_MLP}router.per_expert_scale", f"{HF_LAYER}router.per_expert_scale"),
    replicated(f"{_MLP}mlp_norm.weight", f"{HF_LAYER}pre_feedforward_layernorm.weight"),
    replicated(f"{_MLP}mlp_output_norm.weight", f"{HF_LAYER}post_feedforward_layernorm_1.weight"),
    replicated(f"{_MLP}experts_norm.weight", f"{HF_LAYER}pre_feedforward_layernorm_2.weight"),
    replicated(f"{_MLP}experts_output_norm.weight", f"{HF_LAYER}post_feedforward_layernorm_2.weight"),
)
_STACK = f"{HF_LAYER}experts."
_EXPERT = f"{_STACK}{{expert}}."
EXPERT_STACKS = (
    ExpertStack(
        f"{_STACK}gate_up_proj", (f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight"), part_after_part=True
    ),
    ExpertStack(f"{_STACK}down_proj", (f"{_EXPERT}down_proj.weight",), part_after_part=True),
)
