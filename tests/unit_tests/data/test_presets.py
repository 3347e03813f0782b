# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
from megatron.bridge.data.presets import DATASETS
from tests.unit_tests.data.hf_data import ROWS


def test_each_preset_reads_its_rows():
    chat = {"messages": [{"role": "user", "content": "a"}], "prompt": "x"}
    rows = {
        "squad": ROWS[0],
        "gsm8k": {"question": "1+1?", "answer": "two #### 2"},
        "openmathinstruct2": {"problem": "1+1?", "generated_solution": "two", "expected_answer": "2"},
        "alpaca": {"instruction": "say", "input": "", "output": "b", "text": "..."},
        "dolly": {"instruction": "say", "context": "a", "response": "b", "category": "x"},
        "openhermes": {"conversations": [{"from": "human", "value": "a"}], "idx": 1},
    }
    made = {name: preset.process(rows.get(name, chat)) for name, preset in DATASETS.items()}
    assert made["gsm8k"]["original_answers"] == ["2"]
    assert made["dolly"]["input"].endswith("### Input:\na\n\n### Response:") and "Input" not in made["alpaca"]["input"]
    for name, row in made.items():
        assert set(row) - {"original_answers"} in ({"input", "output"}, {"messages"}, {"conversations"}), name
