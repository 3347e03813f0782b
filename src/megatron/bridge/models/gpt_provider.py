# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`GPTModelProvider`: Core's transformer configuration plus what it takes to build a GPT from it."""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.family_sizes import FamilySizes
from megatron.bridge.models.fusions import COMPILED_FUSIONS, KERNEL_FUSIONS, why_unavailable
from megatron.bridge.models.layer_specs import (
    choose_layer_spec,
    default_layer_spec,
    local_layer_spec,
    mtp_block_spec,
    transformer_engine_layer_spec,
)
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.models.rope import (
    Llama3RopeScaling,
    YarnRopeScaling,
    mscale_of_attention_factor,
    yarn_attention_factor,
)
from megatron.bridge.models.rope_by_length import BY_LENGTH, scale_by_length, scaling_by_length
from megatron.bridge.models.router_gemm import repair_router_gemm
from megatron.bridge.models.vocab_padding import mask_padding_logits, padded_vocab_size
from megatron.bridge.utils.replaced import replaced
from megatron.bridge.utils.section import open_to_all_names
from megatron.bridge.utils.set_fields import RemembersSetFields, writes_that_nobody_set

__all__ = [
    "GPTModelProvider",
    "LayerSpec",
    "PositionEmbeddingType",
    "default_layer_spec",
    "local_layer_spec",
    "mtp_block_spec",
    "transformer_engine_layer_spec",
]

logger = logging.getLogger(__name__)

LayerSpec: TypeAlias = ModuleSpec | TransformerBlockSubmodules
PositionEmbeddingType: TypeAlias = Literal["learned_absolute", "rope", "yarn", "dynamic", "longrope", "none"]
_SCALED = ("yarn", *BY_LENGTH)
"""Kinds of positions that Core is told are plain rotary ones."""
_INIT_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
_INTERLEAVED = (
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "use_grouped_gemm_for_shared_expert",
)
"""Options of Core after 0.16 for kernels that take gate and up in alternating blocks of rows."""
_UNSEEN = ("use_grouped_gemm_for_dense_mlp",)
"""Options of Core's that its layer specs take as arguments, and that nothing hands to them."""


@dataclass
class GPTModelProvider(RemembersSetFields, TransformerConfig, FamilySizes, ModelProviderMixin):
    """A GPT's configuration, which builds the GPT.

    Fields may be changed until the model is built: nothing is checked or derived before `finalize()`.
    """

    seq_length: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int | None = None
    """Tokens of the tokenizer's vocabulary, without padding. Needed to build the model."""
    should_pad_vocab: bool = False
    """Whether the embedding may get more rows than the vocabulary has tokens, so that ranks share it evenly."""
    make_vocab_size_divisible_by: int = 128
    """With `should_pad_vocab`: the padded vocabulary is a multiple of this times the tensor-parallel size."""
    share_embeddings_and_output_weights: bool = True
    """Whether the output layer uses the embedding's weight (tied embeddings)."""
    position_embedding_type: PositionEmbeddingType = "learned_absolute"
    """How a token knows its position. yarn, dynamic, longrope: rotary positions, scaled as the fields of that name say.
    """
    rotary_base: float = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Part of each head's channels that is rotated."""
    rope_scaling: bool = False
    """Whether the rotary frequencies are scaled as in Llama 3."""
    rope_scaling_factor: float = 8.0
    """How many times longer the slow frequencies become."""
    rope_scaling_low_freq_factor: float = 1.0
    """Frequencies with fewer turns than this in the original length are scaled in full."""
    rope_scaling_high_freq_factor: float = 4.0
    """Frequencies with more turns than this in the original length stay as they are."""
    rope_scaling_original_max_position_embeddings: int = 8192
    """Length pretrained on, in tokens."""
    yarn_rotary_scaling_factor: float = 1.0
    """YaRN: how many times longer the slow frequencies become."""
    yarn_original_max_position_embeddings: int = 4096
    """YaRN: length pretrained on, in tokens."""
    yarn_beta_fast: float = 32.0
    """YaRN: frequencies with more turns than this in the original length stay as they are."""
    yarn_beta_slow: float = 1.0
    """YaRN: frequencies with fewer turns than this in the original length are scaled in full."""
    yarn_mscale: float | None = None
    """YaRN: with yarn_mscale_all_dim, what cosine and sine are multiplied by, as Core reckons it. None: 1."""
    yarn_mscale_all_dim: float | None = None
    """YaRN: see yarn_mscale. None: 0."""
    yarn_correction_range_round_to_int: bool = True
    """YaRN: whether the channels between which the scaling sets in are whole ones."""
    dynamic_rope_factor: float = 1.0
    """Dynamic: how much faster than the length of a sequence the rotary base grows."""
    dynamic_rope_max_position_embeddings: int = 4096
    """Dynamic: longest sequence without scaling, in tokens."""
    longrope_short_factor: list[float] | None = None
    """LongRoPE: how many times longer each frequency becomes in sequences up to the original length."""
    longrope_long_factor: list[float] | None = None
    """LongRoPE: the same in longer sequences."""
    longrope_original_max_position_embeddings: int = 4096
    """LongRoPE: length pretrained on, in tokens."""
    longrope_attention_factor: float = 1.0
    """LongRoPE: what cosine and sine are multiplied by."""
    seq_len_interpolation_factor: float | None = None
    """Linear scaling of the positions; None: none."""
    scatter_embedding_sequence_parallel: bool = True
    """With sequence parallelism: whether the embedding's output is cut along the sequence."""
    parallel_output: bool = True
    """Whether logits stay split over the tensor-parallel ranks."""
    fp16_lm_cross_entropy: bool = False
    """Whether the loss is computed in half precision."""
    transformer_layer_spec: LayerSpec | Callable[..., LayerSpec] = default_layer_spec
    """The layers, or a function of the provider (and `vp_stage`, if it takes it) that returns them."""
    hf_model_id: str | None = None
    """Where the weights came from: a Hugging Face directory or hub name; None: nowhere."""

    def __post_init__(self) -> None:
        """Core's checks and derived fields wait for `finalize()`."""
        self._pre_wrap_hooks = []
        self._post_wrap_hooks = []
        self._derived_init_methods: dict[str, Callable] = {}

    def finalize(self) -> None:
        """Switch off the fusions that can't run here, then run Core's checks and derive what is left open.

        Raises:
            ValueError: Fields that contradict each other.
            NotImplementedError: `mtp_num_layers`, which the model would be built without.
        """
        mtp_block_spec(self)
        for name in _INTERLEAVED:
            if getattr(self, name, None):
                raise ValueError(
                    f"model.{name}={getattr(self, name)}: weights of gate and up are read, adapted and exported as two "
                    "matrices on top of each other, and never in alternating blocks; leave it unset"
                )
        for name in _UNSEEN:
            if getattr(self, name, None):
                raise ValueError(
                    f"model.{name}={getattr(self, name)}: Core's layers are built without it, so it would have no "
                    "effect; leave it unset"
                )
        if self.rope_scaling and self.position_embedding_type != "rope":
            raise ValueError(
                f"model.rope_scaling=True scales rotary positions, and model.position_embedding_type="
                f"{self.position_embedding_type!r}: set it to 'rope', or model.rope_scaling=False"
            )
        with writes_that_nobody_set(self):
            self._check_scaling()
        open_to_all_names(self)
        with writes_that_nobody_set(self):
            self._derive()

    def _check_scaling(self) -> None:
        kind = self.position_embedding_type
        if kind == "longrope":  # Core multiplies by what YaRN's fields say
            self.yarn_rotary_scaling_factor, self.yarn_mscale_all_dim = math.e, 0.0
            self.yarn_mscale = mscale_of_attention_factor(math.e, self.longrope_attention_factor)
        elif self.yarn_rotary_scaling_factor != 1 and kind != "yarn":
            raise ValueError(
                f"model.yarn_rotary_scaling_factor={self.yarn_rotary_scaling_factor} with "
                f"model.position_embedding_type={kind!r}: set it to 'yarn', or the factor to 1"
            )
        if kind in _SCALED and self.seq_len_interpolation_factor is not None:
            raise ValueError(
                f"model.seq_len_interpolation_factor={self.seq_len_interpolation_factor} with "
                f"model.position_embedding_type={kind!r}: positions are scaled in one way; set it to null"
            )
        if kind in BY_LENGTH and self.flash_decode:
            raise ValueError(
                f"model.flash_decode=True with model.position_embedding_type={kind!r}: it has one table of positions "
                "for all lengths; set it to false"
            )

    def _derive(self) -> None:
        for name, derived in self._derived_init_methods.items():
            if getattr(self, name) is derived:  # else it was set since
                setattr(self, name, None)
        left_open = [name for name in _INIT_METHODS if getattr(self, name) is None]
        self._switch_off_fusions()
        self._check_op_fuser()
        if self.pipeline_model_parallel_size > 1 and self.pipeline_dtype is None:
            self.pipeline_dtype = self.params_dtype
        super().__post_init__()  # Core's, of the configuration class that comes next
        if self.position_embedding_type in BY_LENGTH:
            scaling_by_length(self)
        self._derived_init_methods = {name: getattr(self, name) for name in left_open}

    def _switch_off_fusions(self) -> None:
        reasons: dict[str, list[str]] = {}
        for name in (*COMPILED_FUSIONS, *KERNEL_FUSIONS):
            reason = why_unavailable(name) if getattr(self, name) else None
            if reason is not None:
                setattr(self, name, False)
                reasons.setdefault(reason, []).append(name)
        if self.moe_grouped_gemm and choose_layer_spec(self)[0] == "local":
            self.moe_grouped_gemm = False
            reasons.setdefault("Core's local layers have none", []).append("moe_grouped_gemm")
        multiplied = ("apply_rope_fusion",) if self._yarn_attention_factor() != 1 else ()
        for name in (name for name in multiplied if getattr(self, name)):
            setattr(self, name, False)
            reasons.setdefault("it has no factor for cosine and sine", []).append(name)
        if reasons:
            logger.info("fusions off: %s", "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()))

    def _check_op_fuser(self) -> None:
        """Core's specs of dense layers take it as an argument that nothing hands them; grouped experts look it up."""
        if getattr(self, "use_transformer_engine_op_fuser", False) and not (
            self.num_moe_experts and self.moe_grouped_gemm
        ):
            raise ValueError(
                "model.use_transformer_engine_op_fuser=True: of Core's layers only grouped experts are built with it, "
                "and the model has none, so it would have no effect; leave it unset"
            )

    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks.

        Raises:
            ValueError: No vocabulary size, or one that the ranks can't share and that must not be padded.
        """
        vocab_size, tensor_parallel_size = self.required_vocab_size(), self.tensor_model_parallel_size
        if self.should_pad_vocab:
            return padded_vocab_size(vocab_size, self.make_vocab_size_divisible_by, tensor_parallel_size)
        if vocab_size % tensor_parallel_size:
            raise ValueError(
                f"model.vocab_size={vocab_size} is no multiple of "
                f"model.tensor_model_parallel_size={tensor_parallel_size}: set model.should_pad_vocab=true"
            )
        return vocab_size

    def required_vocab_size(self) -> int:
        """`vocab_size`.

        Raises:
            ValueError: It is not set.
        """
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set: set it to the number of tokens of the tokenizer")
        return self.vocab_size

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk of a finalized provider. Core's model-parallel state must be up.

        Args:
            pre_process: Whether the chunk has the embedding; None: whether it is the first one.
            post_process: Whether the chunk has the output layer; None: whether it is the last one.
            vp_stage: The chunk's virtual pipeline stage; None without virtual pipelining.
        """
        if self.num_moe_experts:
            repair_router_gemm()
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        positions = "rope" if self.position_embedding_type in _SCALED else self.position_embedding_type
        # Core reads the kind of positions from the configuration as well.
        with writes_that_nobody_set(self), replaced(self, position_embedding_type=positions):
            model = self._model_class()(
                config=self,
                transformer_layer_spec=self._layer_spec(vp_stage),
                vocab_size=self.padded_vocab_size(),
                max_sequence_length=self.seq_length,
                pre_process=is_first if pre_process is None else pre_process,
                post_process=is_last if post_process is None else post_process,
                fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
                parallel_output=self.parallel_output,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                position_embedding_type=positions,
                rotary_percent=self.rotary_percent,
                rotary_base=self.rotary_base,
                scatter_embedding_sequence_parallel=self.scatter_embedding_sequence_parallel,
                seq_len_interpolation_factor=self.seq_len_interpolation_factor,
                vp_stage=vp_stage,
            )
        self._scale_positions(model)
        if model.post_process and self.padded_vocab_size() > self.required_vocab_size():
            mask_padding_logits(
                model.output_layer,
                vocab_size=self.required_vocab_size(),
                tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
                tensor_parallel_size=self.tensor_model_parallel_size,
            )
        return model

    def _model_class(self) -> type[GPTModel]:
        return GPTModel

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        spec = self.transformer_layer_spec
        if isinstance(spec, (ModuleSpec, TransformerBlockSubmodules)):
            return spec
        takes_stage = "vp_stage" in inspect.signature(spec).parameters
        return spec(self, vp_stage=vp_stage) if takes_stage else spec(self)

    def _scale_positions(self, model: GPTModel) -> None:
        """Put scaled frequencies in place of the model's plain ones."""
        if self.rope_scaling:
            # Core's own scaling knows only the factor; the other three numbers differ between models.
            model.rotary_pos_emb.inv_freq = self._rope_scaling().scale(model.rotary_pos_emb.inv_freq)
        elif self.position_embedding_type in BY_LENGTH:
            scale_by_length(model, self)
        elif self.position_embedding_type == "yarn":
            # Core's own class rotates all channels, whatever rotary_percent says. Cosine and sine are multiplied in
            # Core's attention, which reads the numbers from the configuration.
            plain = model.rotary_pos_emb.inv_freq
            model.rotary_pos_emb.inv_freq = self._yarn_scaling().frequencies(
                2 * plain.numel(), self.rotary_base, plain.device
            )

    def _rope_scaling(self) -> Llama3RopeScaling:
        return Llama3RopeScaling(
            factor=self.rope_scaling_factor,
            low_freq_factor=self.rope_scaling_low_freq_factor,
            high_freq_factor=self.rope_scaling_high_freq_factor,
            original_max_position_embeddings=self.rope_scaling_original_max_position_embeddings,
        )

    def _yarn_scaling(self) -> YarnRopeScaling:
        return YarnRopeScaling(
            factor=self.yarn_rotary_scaling_factor,
            original_max_position_embeddings=self.yarn_original_max_position_embeddings,
            beta_fast=self.yarn_beta_fast,
            beta_slow=self.yarn_beta_slow,
            round_to_int=self.yarn_correction_range_round_to_int,
        )

    def _yarn_attention_factor(self) -> float:
        return yarn_attention_factor(self.yarn_rotary_scaling_factor, self.yarn_mscale, self.yarn_mscale_all_dim)
