# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows of well-known datasets as rows of `input` and `output`, or of `messages`.

Each function takes a row of the dataset, and a tokenizer that none of these needs. `original_answers` are what an
evaluation compares with; training doesn't read them.
"""

from typing import Any

__all__ = [
    "process_alpaca_example",
    "process_dolly_example",
    "process_gsm8k_example",
    "process_messages_example",
    "process_openmathinstruct2_example",
    "process_squad_example",
]

Example = dict[str, Any]


def process_squad_example(example: Example, tokenizer: Any = None) -> Example:
    """A passage and a question as the input, the first answer as the output; no answer gives an empty output."""
    answers = list(example["answers"]["text"])
    text = f"Context: {example['context']} Question: {example['question']} Answer:"
    return {"input": text, "output": answers[0] if answers else "", "original_answers": answers}


def process_gsm8k_example(example: Example, tokenizer: Any = None) -> Example:
    """A word problem, and its solution with the result after `####`."""
    answer = example["answer"]
    result = answer.rpartition("####")[2].strip()
    return {"input": f"Question: {example['question']} Answer:", "output": answer, "original_answers": [result]}


def process_openmathinstruct2_example(example: Example, tokenizer: Any = None) -> Example:
    """A problem, and its generated solution."""
    return {
        "input": f"Problem: {example['problem']} Solution:",
        "output": example["generated_solution"],
        "original_answers": [example["expected_answer"]],
    }


def process_alpaca_example(example: Example, tokenizer: Any = None) -> Example:
    """An instruction, with its input where it has one, in the form that Alpaca was trained in."""
    given = (example.get("input") or "").strip()
    ask = f"### Instruction:\n{example['instruction']}"
    text = f"{ask}\n\n### Input:\n{given}\n\n### Response:" if given else f"{ask}\n\n### Response:"
    return {"input": text, "output": example["output"]}


def process_dolly_example(example: Example, tokenizer: Any = None) -> Example:
    """An instruction, with its context where it has one, in Alpaca's form."""
    renamed = {"instruction": example["instruction"], "input": example.get("context"), "output": example["response"]}
    return process_alpaca_example(renamed, tokenizer)


def process_messages_example(example: Example, tokenizer: Any = None) -> Example:
    """A conversation without what stands beside it."""
    return {key: example[key] for key in ("messages", "conversations", "system", "tools") if example.get(key)}
