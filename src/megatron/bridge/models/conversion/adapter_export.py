# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `AutoBridge` does with adapters. Cheap to import, as `auto_bridge` is."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.bridge_base import BridgeBase, as_chunks
from megatron.bridge.models.families import provider_fields

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.conversion.bridge_base import Model


class AdapterExport(BridgeBase):
    """The part of `AutoBridge` that writes adapters for the peft library."""

    def export_adapter_weights(
        self, model: "Model", cpu: bool = False, show_progress: bool = True
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield the adapters' (name, whole tensor) pairs, named as the peft library does. Collective.

        Those of experts come one by one, also where a file has them in one tensor.

        Args:
            model: This rank's adapted chunks, wrapped or not.
            cpu: Yield tensors in host memory.
            show_progress: Whether rank 0 shows a bar.
        """
        from megatron.bridge.models.conversion.adapters import export_adapter_weights

        return export_adapter_weights(as_chunks(model), self.family, cpu=cpu, show_progress=show_progress)

    def save_hf_adapter(
        self,
        model: "Model",
        path: "str | Path",
        peft: Any,
        *,
        show_progress: bool = True,
        checkpoint: "str | Path | None" = None,
    ) -> None:
        """Write the adapters of a model as a directory that the peft library loads. Collective.

        Args:
            model: This rank's adapted chunks, wrapped or not.
            path: New directory, or an earlier export of adapters to replace.
            peft: What adapted the model.
            show_progress: Whether rank 0 shows a bar.
            checkpoint: Megatron checkpoint whose tokenizer and end tokens are written too; None: none are.

        Raises:
            ValueError: `path` is taken, peft has no place for an adapter, or the run changed the model under them.
        """
        from megatron.bridge.models.conversion.adapters import save_hf_adapter
        from megatron.bridge.models.conversion.hf_config import check_language_model_alone
        from megatron.bridge.models.conversion.tasks import model_config
        from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
        from megatron.bridge.models.conversion.trained_config import check_base_is_as_trained
        from megatron.bridge.utils.distributed import raise_on_all_ranks

        chunks = as_chunks(model)
        with raise_on_all_ranks("preparing the adapters' export"):
            if self.directory is not None:
                check_language_model_alone(self.directory)
            check_base_is_as_trained(self.hf_config, model_config(chunks), self.name)
            text = (
                TokenizerFiles.of(self.directory, checkpoint=checkpoint) if checkpoint else TokenizerFiles(None, None)
            )
        save_hf_adapter(
            chunks,
            self.family,
            path,
            options=asdict(peft),
            base=self.directory,
            base_name=None if self.download is None else self.name,
            text=text,
            show_progress=show_progress,
        )

    def export_adapter_ckpt(
        self, megatron_path: "str | Path", hf_path: "str | Path", *, show_progress: bool = True, **sizes: int
    ) -> None:
        """Convert a checkpoint of adapters to a directory that the peft library loads. Collective under torchrun.

        The weights that they stand beside are not read. The checkpoint's tokenizer is written beside the adapters.

        Args:
            megatron_path: Root, or `iter_N` directory.
            hf_path: New directory, or an earlier export of adapters to replace.
            show_progress: Whether rank 0 shows a bar.
            sizes: `SIZES_TO_CONVERT_AT` while converting.

        Raises:
            ValueError: The checkpoint holds a whole model, or peft has no place for an adapter.
        """
        from megatron.bridge.models.conversion.saved_adapters import find_saved_adapters, load_adapters
        from megatron.bridge.models.conversion.saved_provider import build_saved_model
        from megatron.bridge.utils.distributed import model_parallel_groups

        saved = find_saved_adapters(megatron_path)
        if saved is None:
            raise ValueError(
                f"{megatron_path} holds a whole model, not adapters: convert it with export (AutoBridge.export_ckpt)"
            )
        with model_parallel_groups(**sizes):
            provider = self.to_megatron_provider(load_weights=False)
            fields: Mapping[str, Any] = provider_fields(self.hf_config)
            chunks = build_saved_model(provider, megatron_path, fields, mp_overrides={}, use_cpu_initialization=True)
            load_adapters(chunks, saved)
            self.save_hf_adapter(chunks, hf_path, saved.peft, show_progress=show_progress, checkpoint=megatron_path)
