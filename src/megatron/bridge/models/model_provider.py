# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How a provider becomes the model chunks of this rank: hooks, precision wrapper, data-parallel wrapper.

A *chunk* is the part of the model between two pipeline hand-overs: one a rank, or one a virtual pipeline stage.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.models.expert_bias import in_16_bits
from megatron.bridge.models.input_gradients import enable_input_gradients
from megatron.bridge.models.weight_marks import mark_weights
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.parallel_sizes import parallel_sizes, sizes_of_groups

ChunkHook = Callable[[list[MegatronModule]], list[MegatronModule] | None]
"""Gets the chunks; returns them, others in their place, or None to keep them."""


class ModelProviderMixin(abc.ABC):
    """What every provider can do, given `provide` and `finalize`."""

    if TYPE_CHECKING:  # of Core's TransformerConfig, which a provider is too
        fp16: bool
        bf16: bool
        params_dtype: torch.dtype
        pipeline_dtype: torch.dtype | None
        fp32_residual_connection: bool
        pipeline_model_parallel_size: int
        virtual_pipeline_model_parallel_size: int | None
        use_cpu_initialization: bool
        num_moe_experts: int | None
        moe_grouped_gemm: bool

    _pre_wrap_hooks: list[ChunkHook]
    _post_wrap_hooks: list[ChunkHook]

    @abc.abstractmethod
    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> MegatronModule:
        """Build one bare chunk."""

    @abc.abstractmethod
    def finalize(self) -> None:
        """Check the fields and fill the derived ones; may be called again after a change."""

    def register_pre_wrap_hook(self, hook: ChunkHook, prepend: bool = False) -> None:
        """Have `hook` called with the bare chunks, before the precision and data-parallel wrappers.

        Args:
            hook: Loads weights, freezes them, or adds adapters.
            prepend: Call it before the hooks registered so far.
        """
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)

    def register_post_wrap_hook(self, hook: ChunkHook, prepend: bool = False) -> None:
        """Have `hook` called with the wrapped chunks.

        Args:
            hook: What to do with them.
            prepend: Call it before the hooks registered so far.
        """
        self._post_wrap_hooks.insert(0 if prepend else len(self._post_wrap_hooks), hook)

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        *,
        wrap_with_ddp: bool = True,
        use_cpu_initialization: bool = False,
        data_parallel_random_init: bool = False,
        overlap_param_gather_with_optimizer_step: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        pre_wrap_hook: ChunkHook | None = None,
        post_wrap_hook: ChunkHook | None = None,
    ) -> list[MegatronModule]:
        """Build this rank's chunks. Core's model-parallel state is brought up at the provider's sizes, if it isn't.

        Args:
            ddp_config: For Core's data-parallel wrapper; None takes its defaults.
            wrap_with_ddp: Wrap for training. Without it the chunks have no gradient buffers.
            use_cpu_initialization: Build in host memory; moved to the device only if `wrap_with_ddp`.
            data_parallel_random_init: Ranks started from different weights: take those of the first data-parallel rank.
            overlap_param_gather_with_optimizer_step: As in Core: no gradient buckets.
            pg_collection: Core's process groups; None takes those of its global state.
            pre_wrap_hook: One more hook, called after the registered ones.
            post_wrap_hook: One more hook, called after the registered ones.

        Returns:
            One chunk, or one a virtual pipeline stage.
        """
        self.use_cpu_initialization = self.use_cpu_initialization or use_cpu_initialization
        self.finalize()
        if not parallel_state.is_initialized():
            self.initialize_model_parallel()
        self._check_parallel_sizes()
        self._check_pipeline_dtype()
        chunks = self._build_chunks()
        chunks = _call_hooks([*self._pre_wrap_hooks, *([pre_wrap_hook] if pre_wrap_hook else [])], chunks)
        for chunk in chunks:
            enable_input_gradients(chunk)
            mark_weights(chunk)
            for parameter in chunk.parameters():
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            if wrap_with_ddp or not self.use_cpu_initialization:
                chunk.to(current_device())
        if self.fp16 or self.bf16:
            chunks = in_16_bits(chunks, self)
        if wrap_with_ddp:
            chunks = [
                DistributedDataParallel(
                    config=self,
                    ddp_config=ddp_config or DistributedDataParallelConfig(),
                    module=chunk,
                    # Only the first chunk's backward ends late enough for its buckets to be worth overlapping.
                    disable_bucketing=index > 0 or overlap_param_gather_with_optimizer_step,
                    pg_collection=pg_collection,
                )
                for index, chunk in enumerate(chunks)
            ]
            if data_parallel_random_init:
                for chunk in chunks:
                    chunk.broadcast_params()
        return _call_hooks([*self._post_wrap_hooks, *([post_wrap_hook] if post_wrap_hook else [])], chunks)

    def initialize_model_parallel(
        self, seed: int | None = 1234, seed_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Bring up the process group, Core's model-parallel state with this provider's sizes, and the seeds.

        Args:
            seed: For every random generator; None leaves them as they are.
            seed_kwargs: Options of Core's `model_parallel_cuda_manual_seed`.
            options: Further arguments of Core's `initialize_model_parallel`.
        """
        from megatron.bridge.utils.device import enter_device
        from megatron.bridge.utils.distributed import (
            init_process_group,
            initialize_model_parallel,
            seed_everything,
        )

        init_process_group(enter_device())
        initialize_model_parallel(**{**parallel_sizes(self), **options})
        if seed is not None:
            seed_everything(seed, **(seed_kwargs or {}))

    def _build_chunks(self) -> list[MegatronModule]:
        num_stages = self.virtual_pipeline_model_parallel_size
        if num_stages is None or self.pipeline_model_parallel_size == 1:
            return [self.provide()]
        return [self.provide(vp_stage=stage) for stage in range(num_stages)]

    def _check_parallel_sizes(self) -> None:
        """Compare the provider's parallel sizes with Core's process groups.

        Raises:
            ValueError: They differ, so the model would be cut otherwise than the ranks are grouped.
        """
        for name, size in sizes_of_groups().items():
            concerns_model = self.num_moe_experts or not name.startswith("expert")
            if concerns_model and getattr(self, name) != size:
                raise ValueError(
                    f"model.{name}={getattr(self, name)}, but the process groups were built for {size}: "
                    "initialize model parallelism with the model's sizes"
                )

    def _check_pipeline_dtype(self) -> None:
        """Compare what stages expect of each other with what they send.

        Raises:
            ValueError: They differ: stages would wait for each other, or read garbage.
        """
        sent = torch.float32 if self.fp32_residual_connection else self.params_dtype
        if self.pipeline_model_parallel_size > 1 and self.pipeline_dtype not in (None, sent):
            raise ValueError(
                f"model.pipeline_dtype={self.pipeline_dtype}, but stages send each other {sent}: set "
                f"model.pipeline_dtype={sent}, or leave it open"
            )


def _call_hooks(hooks: list[ChunkHook], chunks: list[Any]) -> list[Any]:
    for hook in hooks:
        replaced = hook(chunks)
        chunks = chunks if replaced is None else replaced
    return chunks


def get_model(
    model_provider: ModelProviderMixin,
    ddp_config: DistributedDataParallelConfig | None = None,
    model_type: Any = None,
    *,
    fp16: bool | None = None,
    bf16: bool | None = None,
    use_megatron_fsdp: bool = False,
    use_torch_fsdp2: bool = False,
    init_model_with_meta_device: bool = False,
    **options: Any,
) -> list[MegatronModule]:
    """Build this rank's chunks, as `provide_distributed_model` does.

    Args:
        model_provider: The model.
        ddp_config: For Core's data-parallel wrapper; None takes its defaults.
        model_type: Accepted: a GPT is an encoder or a decoder alone.
        fp16: Compute in FP16; None: as the provider says.
        bf16: Compute in bf16; None: as the provider says.
        use_megatron_fsdp: Not supported, as the next two.
        use_torch_fsdp2: Not supported.
        init_model_with_meta_device: Not supported.
        options: As for `provide_distributed_model`.

    Raises:
        ValueError: Something that isn't supported.
    """
    refused = {
        "use_megatron_fsdp": use_megatron_fsdp,
        "use_torch_fsdp2": use_torch_fsdp2,
        "init_model_with_meta_device": init_model_with_meta_device,
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"{name}=True is not supported: leave it off; weights are shared out by tensor and stage")
    for name, is_used in {"fp16": fp16, "bf16": bf16}.items():
        if is_used is not None:
            setattr(model_provider, name, is_used)
    return model_provider.provide_distributed_model(ddp_config, **options)
