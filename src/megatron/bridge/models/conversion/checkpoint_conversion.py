# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `AutoBridge` does with Megatron checkpoints. Cheap to import, as `auto_bridge` is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.checkpoint.iterations import is_hf_directory
from megatron.bridge.models.conversion.bridge_base import BridgeBase, as_chunks
from megatron.bridge.models.conversion.hf_config import check_tokenizer, check_whole_model
from megatron.bridge.models.families import provider_fields

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule
    from typing_extensions import Self

    from megatron.bridge.models.conversion.bridge_base import Model


class CheckpointConversion(BridgeBase):
    """The part of `AutoBridge` that reads and writes Megatron checkpoints."""

    @classmethod
    def from_megatron_checkpoint(cls, path: "str | Path", hf_model: "str | Path | None" = None) -> "Self":
        """Bridge the model that a Megatron checkpoint came from.

        Args:
            path: Root, or `iter_N` directory.
            hf_model: Directory or hub name of the model; None: the one that the checkpoint names.

        Raises:
            FileNotFoundError: No checkpoint there, or no longer a model where the checkpoint says.
            ValueError: The checkpoint names no model.
        """
        if hf_model is not None:
            return cls.from_hf_pretrained(hf_model)
        named = cls.get_hf_model_id_from_checkpoint(path)
        if named is None:
            raise ValueError(f"{path} doesn't say which model it came from: pass --hf-model (hf_model in Python)")
        try:
            return cls.from_hf_pretrained(named)
        except FileNotFoundError as error:
            found = "which isn't there any more" if Path(named).is_absolute() else f"which can't be had ({error})"
            raise FileNotFoundError(
                f"{path} came from the model {named}, {found}: pass --hf-model (hf_model in Python) with the directory "
                "where it is now"
            ) from error

    @classmethod
    def from_auto_config(
        cls, megatron_path: "str | Path", hf_model_id: "str | Path", trust_remote_code: bool | None = None
    ) -> "Self":
        """Bridge a Megatron checkpoint by the configuration of a Hugging Face model, to export it.

        Args:
            megatron_path: Root, or `iter_N` directory.
            hf_model_id: Directory, or hub name, of which only the configuration and the tokenizer are fetched.
            trust_remote_code: As for `from_hf_pretrained`.

        Raises:
            FileNotFoundError: No checkpoint there, or no such model.
            ValueError: The checkpoint is damaged, or the architecture is not supported.
        """
        from megatron.bridge.checkpoint.iterations import resolve_checkpoint

        resolve_checkpoint(megatron_path)
        return cls.from_hf_pretrained(hf_model_id, trust_remote_code=trust_remote_code)

    @staticmethod
    def get_hf_model_id_from_checkpoint(path: "str | Path") -> str | None:
        """The Hugging Face directory or hub name that a Megatron checkpoint came from; None: it doesn't say."""
        from megatron.bridge.models.conversion.saved_provider import read_model_section

        return read_model_section(path).get("hf_model_id")

    def save_megatron_model(
        self,
        model: "Model",
        path: "str | Path",
        hf_tokenizer_path: "str | Path | None" = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: Mapping[str, Any] | None = None,
        *,
        checkpoint: "str | Path | None" = None,
    ) -> Path:
        """Write a weights-only Megatron checkpoint, iteration 0. Collective.

        Args:
            model: This rank's chunks, wrapped or not.
            path: Root directory of the checkpoint.
            hf_tokenizer_path: Directory whose tokenizer is stored with it; None: `checkpoint`'s, or the model's own.
            low_memory_save: Accepted: a save makes no second copy of the model.
            hf_tokenizer_kwargs: Not supported: the tokenizer's files are copied as they are.
            checkpoint: Megatron checkpoint whose tokenizer and end tokens are stored with it; None: the model's own.

        Returns:
            The iteration's directory.

        Raises:
            ValueError: `generation_config.json` is damaged, or there are arguments for the tokenizer; nothing is
                written then.
        """
        check_no_tokenizer_options(hf_tokenizer_kwargs)
        from megatron.bridge.models.conversion.saved_provider import save_model
        from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles
        from megatron.bridge.utils.distributed import raise_on_all_ranks

        with raise_on_all_ranks("reading the model's tokenizer"):
            text = TokenizerFiles.of(self.directory, checkpoint=checkpoint, tokenizer=hf_tokenizer_path)
        return save_model(as_chunks(model), path, text=text)

    def load_megatron_model(
        self,
        path: "str | Path",
        *,
        mp_overrides: Mapping[str, Any] | None = None,
        base: "str | Path | None" = None,
        **options: Any,
    ) -> "list[MegatronModule]":
        """Build the model of a Megatron checkpoint and load its weights, with adapters if it holds those. Collective.

        Brings up a process group and model-parallel state where there are none, and leaves them up.

        Args:
            path: Root, or `iter_N` directory.
            mp_overrides: Parallel sizes and other provider fields that differ from the checkpoint's; by default the
                sizes of the model-parallel state, or 1.
            base: With adapters: the weights they stand beside, a Megatron checkpoint or Hugging Face directory; None:
                those that they were trained on.
            options: For `provide_distributed_model`; not wrapped for training by default.

        Raises:
            FileNotFoundError: No checkpoint there, or no weights under the adapters.
            ValueError: Not complete, or of another model than this bridge's.
        """
        from megatron.bridge.checkpoint.model_checkpoint import load_model_weights
        from megatron.bridge.models.conversion.saved_adapters import check_base, find_saved_adapters, load_adapters
        from megatron.bridge.models.conversion.saved_provider import build_saved_model

        provider = self.to_megatron_provider(load_weights=False)
        saved = find_saved_adapters(path)
        model = self.directory if self.download is None else self.name
        weights = path if saved is None else check_base(saved, base, model=model)
        chunks = build_saved_model(
            provider, path, provider_fields(self.hf_config), mp_overrides=mp_overrides or {}, **options
        )
        if is_hf_directory(weights):
            self.load_hf_weights(chunks, weights)
        else:
            load_model_weights(chunks, weights)
        if saved is not None:
            load_adapters(chunks, saved)
        return chunks

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: "str | Path",
        megatron_path: "str | Path",
        *,
        dtype: "str | torch.dtype | None" = None,
        show_progress: bool = True,
        **options: Any,
    ) -> Path:
        """Convert a Hugging Face model to a Megatron checkpoint, in host memory. Collective under torchrun.

        Args:
            hf_model_id: Directory, or hub name.
            megatron_path: Root directory of the checkpoint.
            dtype: Of the checkpoint's weights; None: the one that `config.json` names.
            show_progress: Whether rank 0 shows a bar.
            options: Parallel sizes while converting, by their names in a provider; the others are for the hub.

        Returns:
            The iteration's directory.

        Raises:
            FileNotFoundError: No such model, or a shard is missing.
            ValueError: The model can't be read or expressed, or its tokenizer is too large for it.
        """
        from megatron.bridge.models.conversion.generation_config import generation_config_of_model
        from megatron.bridge.models.conversion.saved_provider import SIZES_TO_CONVERT_AT, build_on_host
        from megatron.bridge.utils.distributed import model_parallel_groups, raise_on_all_ranks, run_while_others_wait

        sizes = {name: options.pop(name) for name in SIZES_TO_CONVERT_AT if name in options}
        with model_parallel_groups(**sizes):
            bridge = run_while_others_wait(
                lambda: cls.from_hf_pretrained(hf_model_id, **options), doing="finding the model"
            )
            assert bridge is not None  # every rank has work
            with raise_on_all_ranks("reading the model's configuration"):
                # refuse now rather than after the weights are read
                provider = bridge.to_megatron_provider(load_weights=False)
                assert bridge.directory is not None  # the model was named
                check_whole_model(bridge.directory)
                check_tokenizer(bridge.directory, provider.required_vocab_size())
                generation_config_of_model(bridge.directory)
            chunks = build_on_host(provider, dtype=dtype)
            bridge.load_hf_weights(chunks, show_progress=show_progress)
            return bridge.save_megatron_model(chunks, megatron_path)

    def export_ckpt(
        self,
        megatron_path: "str | Path",
        hf_path: "str | Path",
        show_progress: bool = True,
        strict: bool = True,
        *,
        dtype: "str | torch.dtype | None" = None,
        base: "str | Path | None" = None,
        **sizes: int,
    ) -> None:
        """Convert a Megatron checkpoint to a Hugging Face directory, in host memory. Collective under torchrun.

        Adapters are merged into the weights that they stand beside. The tokenizer and the end tokens are the
        checkpoint's, where it has them.

        Args:
            megatron_path: Root, or `iter_N` directory.
            hf_path: New directory, or an earlier export to replace.
            show_progress: Whether rank 0 shows a bar.
            strict: Refuse an export whose tensor names differ from the source's.
            dtype: Of the tensors in the files; None: the checkpoint's.
            base: As for `load_megatron_model`.
            sizes: Parallel sizes while converting, by their names in a provider.
        """
        from megatron.bridge.utils.distributed import model_parallel_groups

        with model_parallel_groups(**sizes):
            chunks = self.load_megatron_model(megatron_path, base=base, use_cpu_initialization=True)
            self.save_hf_pretrained(
                chunks, hf_path, show_progress, strict=strict, dtype=dtype, checkpoint=megatron_path
            )


def check_no_tokenizer_options(options: Mapping[str, Any] | None) -> None:
    """Refuse `hf_tokenizer_kwargs` that would change a tokenizer on its way into a checkpoint.

    Raises:
        ValueError: There are some.
    """
    changing = {name: value for name, value in (options or {}).items() if name != "trust_remote_code"}  # no code is run
    if changing:
        raise ValueError(
            f"hf_tokenizer_kwargs={changing!r} is not supported: the tokenizer's files are copied as they are; "
            "save the tokenizer as it is wanted (save_pretrained) and pass that directory as hf_tokenizer_path"
        )
