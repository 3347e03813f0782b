# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""After a run with adapters: sizes, held-out loss, answers, and the same logits from Megatron and from peft."""

import argparse

import torch
from report import answer, curve, held_out_questions, read_metrics

from megatron.bridge.utils.command_options import local_path

TOLERANCE = 1e-3
"""Between logits that two programs compute in FP32, in other orders, through 30 layers; they are around 20."""


def main() -> None:
    """Print the figures; fail where peft and Megatron disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=local_path, required=True, help="Hugging Face directory under the adapters")
    parser.add_argument("--adapter", type=local_path, required=True, help="what export-adapter wrote")
    parser.add_argument("--merged", type=local_path, required=True, help="what export wrote")
    parser.add_argument("--megatron-path", type=local_path, required=True, help="the adapters' checkpoint")
    parser.add_argument(
        "--data", type=local_path, required=True, help="holds validation.jsonl, whose questions are asked"
    )
    parser.add_argument("--metrics", type=local_path, required=True)
    arguments = parser.parse_args()
    megabytes = (arguments.adapter / "adapter_model.safetensors").stat().st_size / 1e6
    _, held_out = curve(read_metrics(arguments.metrics), "validation")
    print(f"   adapter             {megabytes:.1f} MB")
    print(f"   held-out loss       {held_out[0]:.3f} -> {held_out[-1]:.3f} ({held_out[-1] / held_out[0] - 1:+.0%})")
    questions = held_out_questions(arguments.data / "validation.jsonl", count=2)
    compare_logits(arguments, questions[0][0])
    answers = {name: answer(getattr(arguments, name), questions) for name in ("base", "merged")}
    for index, (question, expected) in enumerate(questions):
        print(f"\n   {'question':10} {question}\n   {'data':10} {expected}")
        for name in ("base", "merged"):
            print(f"   {name:10} {answers[name][index]}")


@torch.no_grad()
def compare_logits(arguments: argparse.Namespace, question: str) -> None:
    """Ask both programs for the logits of a question, in FP32."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(arguments.base)(question, return_tensors="pt")["input_ids"]
    of_peft, before = peft_logits(arguments, tokens)
    of_megatron = megatron_logits(arguments, tokens)
    difference = (of_peft - of_megatron[..., : of_peft.shape[-1]]).abs().max().item()
    print(f"   peft and Megatron   logits differ by {difference:.1e} at most, those of the base by {before:.1f}")
    if difference > TOLERANCE:
        raise SystemExit(f"peft and Megatron disagree by {difference}: expected at most {TOLERANCE}")


def peft_logits(arguments: argparse.Namespace, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What peft computes [B, S, V], and how far that is from the base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()
    without = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, arguments.adapter).eval()(tokens).logits
    return adapted, (adapted - without).abs().max().item()


def megatron_logits(arguments: argparse.Namespace, tokens: torch.Tensor) -> torch.Tensor:
    """What Megatron computes [B, S, V], from the checkpoint of the run."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.utils.distributed import model_parallel_groups

    in_fp32 = {"params_dtype": torch.float32, "bf16": False, "fp16": False}
    bridge = AutoBridge.from_hf_pretrained(arguments.base)
    with model_parallel_groups():
        (model,) = bridge.load_megatron_model(
            arguments.megatron_path, base=arguments.base, mp_overrides=in_fp32, use_cpu_initialization=True
        )
        positions = torch.arange(tokens.shape[1])[None]
        return model.eval()(tokens, positions, None).cpu()


if __name__ == "__main__":
    main()
