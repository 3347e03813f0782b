# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The conversion script: import and export as subcommands."""

import argparse
from pathlib import Path

import torch

from megatron.bridge import AutoBridge

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def import_hf_to_megatron(hf_model: str, megatron_path: str, torch_dtype: str | None, device_map: str | None) -> None:
    kwargs = {}
    if torch_dtype:
        kwargs["torch_dtype"] = DTYPES[torch_dtype]
    if device_map:
        kwargs["device_map"] = device_map
    AutoBridge.import_ckpt(hf_model_id=hf_model, megatron_path=megatron_path, **kwargs)
    assert list(Path(megatron_path).iterdir())


def export_megatron_to_hf(hf_model: str, megatron_path: str, hf_path: str, strict: bool) -> None:
    assert [path for path in Path(megatron_path).rglob("run_config.yaml")]
    bridge = AutoBridge.from_hf_pretrained(hf_model, trust_remote_code=False)
    bridge.export_ckpt(megatron_path=megatron_path, hf_path=hf_path, show_progress=False, strict=strict)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    import_parser = commands.add_parser("import")
    export_parser = commands.add_parser("export")
    for command in (import_parser, export_parser):
        command.add_argument("--hf-model", required=True)
        command.add_argument("--megatron-path", required=True)
    import_parser.add_argument("--torch-dtype", choices=list(DTYPES))
    import_parser.add_argument("--device-map")
    export_parser.add_argument("--hf-path", required=True)
    export_parser.add_argument("--not-strict", action="store_true")
    args = parser.parse_args()
    if args.command == "import":
        import_hf_to_megatron(args.hf_model, args.megatron_path, args.torch_dtype, args.device_map)
    else:
        export_megatron_to_hf(args.hf_model, args.megatron_path, args.hf_path, not args.not_strict)
