# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Mixed precision: one name or object that sets the number formats of model, optimizer and gradients together."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch

from megatron.bridge.utils.field_types import nearest
from megatron.bridge.utils.set_fields import RemembersSetFields, forget_set_fields, writes_that_nobody_set

_FORMAT_FIELDS = (
    "params_dtype pipeline_dtype grad_reduce_in_fp32 loss_scale initial_loss_scale min_loss_scale loss_scale_window "
    "hysteresis".split()
)
"""Fields written as they are."""

_FP8_FIELDS = (
    "fp8 fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention "
    "fp8_multi_head_attention fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag first_last_layers_bf16 "
    "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16".split()
)
"""Fields written when `fp8` is set."""

_OTHER_NAMES = {"enable_autocast": "autocast_enabled", "fp8_param": "fp8_param_gather"}
"""Fields of the sections whose names are others here."""


@dataclass(kw_only=True)
class MixedPrecisionConfig(RemembersSetFields):
    """Number formats. A field that is None leaves what model, optimizer or ddp say."""

    fp32: bool = False
    """Everything in FP32."""

    fp16: bool | None = None
    """Weights and activations in FP16, with loss scaling. None: unchanged."""

    bf16: bool | None = None
    """Weights and activations in BF16. None: unchanged."""

    params_dtype: torch.dtype | None = None
    """Number format of the weights. None: unchanged."""

    pipeline_dtype: torch.dtype | None = None
    """Number format of what pipeline stages send each other. None: unchanged."""

    autocast_dtype: torch.dtype | None = None
    """Number format inside torch's autocast. None: params_dtype."""

    autocast_enabled: bool = False
    """Run the model under torch's autocast."""

    grad_reduce_in_fp32: bool | None = None
    """Sum gradients over ranks in FP32. None: unchanged."""

    first_last_layers_bf16: bool = False
    """Keep first and last layers in BF16 when the others compute in FP8."""

    num_layers_at_start_in_bf16: int = 0
    """Layers at the start kept in BF16, with first_last_layers_bf16."""

    num_layers_at_end_in_bf16: int = 0
    """Layers at the end kept in BF16, with first_last_layers_bf16."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of matrix products (needs Transformer Engine). None: no FP8."""

    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """How FP8 scales are found, with fp8."""

    fp8_margin: int = 0
    """Margin of the FP8 scale, in powers of two."""

    fp8_amax_history_len: int = 1
    """Steps of history behind a delayed scale."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """How a delayed scale follows from its history."""

    fp8_wgrad: bool = True
    """Weight gradients in FP8 too."""

    fp8_dot_product_attention: bool = False
    """Attention in FP8 too."""

    fp8_multi_head_attention: bool = False
    """The whole attention block in FP8 too."""

    fp8_param: bool | None = None
    """Keep the weights themselves in FP8. None: as fp8_param_gather says."""

    fp8_param_gather: bool = False
    """Keep the weights in FP8 and gather them in FP8."""

    reuse_grad_buf_for_mxfp8_param_ag: bool = False
    """Gather MXFP8 weights into the gradients' memory."""

    fp4: Literal["e2m1"] | None = None
    """FP4 format of matrix products (needs Transformer Engine and a Blackwell GPU). None: no FP4."""

    fp4_recipe: Literal["nvfp4"] = "nvfp4"
    """How FP4 scales are found, with fp4."""

    loss_scale: float | None = None
    """Fixed loss scale for FP16. None: it adapts."""

    initial_loss_scale: float | None = 2**32
    """First value of an adapting loss scale."""

    min_loss_scale: float = 1.0
    """Smallest value of an adapting loss scale."""

    loss_scale_window: float = 1000
    """Steps without overflow after which the scale doubles."""

    hysteresis: int = 2
    """Overflows before the scale is halved."""

    @staticmethod
    def from_name(name: str) -> "MixedPrecisionConfig":
        """As `get_mixed_precision_config`: `mixed_precision.hysteresis=4` changes one field of a named one."""
        return get_mixed_precision_config(name)

    @staticmethod
    def source_of(name: str) -> str:
        """The field here that decides a section's field."""
        return _OTHER_NAMES.get(name, name)

    def with_values(self, **values: Any) -> "MixedPrecisionConfig":
        """A copy with other values, which don't count as set here."""
        changed = copy.copy(self)
        with writes_that_nobody_set(changed):
            for name, value in values.items():
                setattr(changed, name, value)
        return changed

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        on = [name for name in ("fp32", "fp16", "bf16") if getattr(self, name)]
        if len(on) > 1:
            raise ValueError(f"mixed_precision: {' and '.join(on)} are all true: weights have one format; keep one")
        if self.fp8_param is not None and self.fp8_param != self.fp8_param_gather:
            raise ValueError(
                f"mixed_precision.fp8_param={self.fp8_param} and fp8_param_gather={self.fp8_param_gather} disagree: "
                "they are one choice; set both alike, or fp8_param to null"
            )

    def setup(self, model_config: Any, optimizer_config: Any | None = None, ddp_config: Any | None = None) -> None:
        """Write the formats into the sections that Core reads.

        Args:
            model_config: The model provider.
            optimizer_config: The optimizer's section. None: left alone.
            ddp_config: The data-parallel section. None: left alone.
        """
        self.finalize()
        for section in (model_config, optimizer_config, ddp_config):
            if section is not None:
                self._write(section)

    def _write(self, section: Any) -> None:
        """Set each field of `section` that a format here decides."""
        fields = section.__dataclass_fields__
        for name, value in self.written_values().items():
            if name in fields:
                setattr(section, name, value)

    def written_values(self) -> dict[str, Any]:
        """Field names of model, optimizer and ddp with their values; what this object leaves open is left out."""
        values = {name: getattr(self, name) for name in _FORMAT_FIELDS}
        values["fp16"] = False if self.fp32 or self.bf16 else self.fp16
        values["bf16"] = False if self.fp32 or self.fp16 else self.bf16
        values["enable_autocast"] = self.autocast_enabled
        values["autocast_dtype"] = self.autocast_dtype or self.params_dtype
        if self.fp8 is not None:
            values |= {name: getattr(self, name) for name in _FP8_FIELDS}
            values["fp8_param"] = self.fp8_param_gather
        if self.fp4 is not None:
            values |= {name: getattr(self, name) for name in ("fp4", "fp4_recipe")}
        return {name: value for name, value in values.items() if value is not None}


_RECIPES: dict[str, Callable[[], MixedPrecisionConfig]] = {}


def register(make: Callable[[], MixedPrecisionConfig]) -> Callable[[], MixedPrecisionConfig]:
    """Make a function's name usable as `mixed_precision`; the function returns a new configuration each time."""
    _RECIPES[make.__name__] = make
    return make


@register
def fp32() -> MixedPrecisionConfig:
    """Everything in FP32."""
    return MixedPrecisionConfig(
        fp32=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        grad_reduce_in_fp32=True,
    )


@register
def bf16_mixed() -> MixedPrecisionConfig:
    """Weights and activations in BF16; masters and gradient sums in FP32."""
    return MixedPrecisionConfig(
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        grad_reduce_in_fp32=True,
    )


@register
def fp16_mixed() -> MixedPrecisionConfig:
    """Weights and activations in FP16 with loss scaling; masters in FP32."""
    return MixedPrecisionConfig(
        fp16=True,
        params_dtype=torch.float16,
        pipeline_dtype=torch.float16,
        grad_reduce_in_fp32=False,
    )


@register
def bf16_with_fp8_delayed_scaling_mixed() -> MixedPrecisionConfig:
    """BF16 with matrix products in FP8, scales from the last 1024 steps, weights gathered in FP8."""
    return replace(
        bf16_mixed(),
        fp8="hybrid",
        fp8_recipe="delayed",
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        fp8_param_gather=True,
    )


@register
def bf16_with_fp8_current_scaling_mixed() -> MixedPrecisionConfig:
    """BF16 with matrix products in FP8, scales from the tensor itself; first and last layer in BF16."""
    return replace(
        bf16_mixed(),
        fp8="hybrid",
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
        fp8_param_gather=True,
    )


@register
def bf16_with_mxfp8_mixed() -> MixedPrecisionConfig:
    """BF16 with matrix products in FP8, one scale for each block of 32 numbers."""
    return replace(bf16_mixed(), fp8="e4m3", fp8_recipe="mxfp8", fp8_param_gather=False)


@register
def bf16_with_fp8_subchannel_scaling_mixed() -> MixedPrecisionConfig:
    """BF16 with matrix products in FP8, one scale for each block of a channel."""
    return replace(bf16_mixed(), fp8="hybrid", fp8_recipe="blockwise", fp8_param_gather=False)


@register
def bf16_with_nvfp4_mixed() -> MixedPrecisionConfig:
    """BF16 with matrix products in FP4, one scale for each block of 16 numbers."""
    return replace(bf16_mixed(), fp4="e2m1", fp4_recipe="nvfp4")


def is_mixed_precision(value: Any) -> TypeGuard[str | MixedPrecisionConfig]:
    """Whether a value of `mixed_precision` can be resolved."""
    return isinstance(value, MixedPrecisionConfig) or (isinstance(value, str) and value in _RECIPES)


def name_of_preset(mixed_precision: MixedPrecisionConfig) -> str | None:
    """The name under which an equal one is registered; None: it is none's."""
    return next((name for name, make in _RECIPES.items() if make() == mixed_precision), None)


def get_mixed_precision_config(name: str | MixedPrecisionConfig) -> MixedPrecisionConfig:
    """The mixed precision of that name, as a new object; an object is returned as it is.

    Raises:
        ValueError: No mixed precision has that name.
    """
    if isinstance(name, MixedPrecisionConfig):
        return name
    if name not in _RECIPES:
        raise ValueError(
            f"mixed_precision={name}: unknown name; {nearest(name, _RECIPES)}set one of {sorted(_RECIPES)}"
        )
    preset = _RECIPES[name]()
    forget_set_fields(preset)  # the name was chosen, not each of its values
    return preset
