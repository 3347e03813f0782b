# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""After the run: draw the loss curve with and without the sync, and show answers of both models side by side."""

import argparse
import json
from pathlib import Path

from megatron.bridge.utils.command_options import local_path


def main() -> None:
    """Draw, then ask both models the same questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=local_path, required=True, help="Hugging Face directory before finetuning")
    parser.add_argument("--finetuned", type=local_path, required=True, help="Hugging Face directory after it")
    parser.add_argument(
        "--data", type=local_path, required=True, help="holds validation.jsonl, whose questions are asked"
    )
    parser.add_argument("--metrics", type=local_path, required=True)
    parser.add_argument(
        "--stock-metrics", type=local_path, required=True, help="of the run without the sync, if it was made"
    )
    parser.add_argument("--picture", type=local_path, required=True)
    arguments = parser.parse_args()
    ours = read_metrics(arguments.metrics)
    stock = read_metrics(arguments.stock_metrics) if arguments.stock_metrics.exists() else []
    draw(ours, stock, arguments.picture)
    report_losses(ours, stock)
    questions = held_out_questions(arguments.data / "validation.jsonl", count=2)
    answers = {name: answer(getattr(arguments, name), questions) for name in ("base", "finetuned")}
    for index, (question, expected) in enumerate(questions):
        print(f"\n   {'question':10} {question}\n   {'data':10} {expected}")
        for name in ("base", "finetuned"):
            print(f"   {name:10} {answers[name][index]}")


def read_metrics(path: Path) -> list[dict]:
    """The lines that `MetricsFile` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(metrics: list[dict], split: str) -> tuple[list[int], list[float]]:
    """Steps and losses of one split."""
    points = [(line["step"], line["lm loss"]) for line in metrics if line["split"] == split]
    return [step for step, _ in points], [loss for _, loss in points]


def draw(ours: list[dict], stock: list[dict], path: Path) -> None:
    """Save the picture of the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    if stock:
        axes.plot(*curve(stock, "train"), color="#c0392b", marker="x", label="stock Megatron-Core: copies left stale")
    axes.plot(*curve(ours, "train"), color="#1f6f8b", alpha=0.6, marker=".", label="with the sync: batches of 8")
    held_out = {"linestyle": "--", "marker": "s", "linewidth": 2, "label": "with the sync: held-out answers"}
    axes.plot(*curve(ours, "validation"), color="#0b3c49", **held_out)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    axes.set_title("SmolLM2-135M-Instruct, optimizer offloaded to the CPU, weights loaded after it was built")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def report_losses(ours: list[dict], stock: list[dict]) -> None:
    """Print the losses of the first steps, and the held-out loss before and after."""
    _, train = curve(ours, "train")
    _, held_out = curve(ours, "validation")
    print(f"   training loss       step 1 {train[0]:.2f}, step 2 {train[1]:.2f}, last {train[-1]:.2f}")
    if stock:
        _, losses = curve(stock, "train")
        print(f"   without the sync    step 1 {losses[0]:.2f}, step 2 {losses[1]:.2f}, last {losses[-1]:.2f}")
    print(f"   held-out loss       {held_out[0]:.3f} -> {held_out[-1]:.3f} ({held_out[-1] / held_out[0] - 1:+.0%})")


def held_out_questions(path: Path, *, count: int) -> list[tuple[str, str]]:
    """The first questions and answers of the held-out set, one from each category."""
    chosen: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, expected = (" ".join(message["content"].split()) for message in row["messages"][:2])
        chosen.setdefault(row.get("category", question), (question, expected))
    return list(chosen.values())[:count]


def answer(directory: Path, questions: list[tuple[str, str]]) -> list[str]:
    """What a Hugging Face model says, greedily, to each question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    # FP32 holds the same weights, and a CPU without bf16 arithmetic multiplies them more than twice as fast.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for question, _ in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(text.split()))
    return answers


if __name__ == "__main__":
    main()
