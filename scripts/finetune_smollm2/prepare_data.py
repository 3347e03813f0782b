# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Makes chat training data (training.jsonl, validation.jsonl) from the English part of `chatterbot-corpus`.

Each line is {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}: the first question and answer of a
conversation. A prompt appears once, and a digest of it decides the file, so no validation prompt is trained on.

Usage: python scripts/finetune_smollm2/prepare_data.py --output data/chatterbot
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from wheel_files import PreparationError, download_wheel, is_prepared, run_script, sha256_of, write_directory

from megatron.bridge.utils.command_options import local_path

WHEEL = "chatterbot-corpus==1.3.3"
WHEEL_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
LANGUAGE_FOLDER = "chatterbot_corpus/data/english/"
SOURCE = {"wheel": WHEEL, "format": "1"}
VALIDATION_ONE_IN = 10


def normalized_prompt(prompt: str) -> str:
    """Returns `prompt` without case, punctuation and spacing: two prompts that read the same are one."""
    return " ".join(re.findall(r"\w+", prompt.casefold())) or prompt.strip()


def clean_text(text: object, *, keep_spacing: bool) -> str:
    """Returns `text` stripped; runs of spaces become one, except where spacing carries meaning (code)."""
    stripped = str(text).strip()
    return stripped if keep_spacing else re.sub(r"[ \t]+", " ", stripped)


def split_of(prompt_key: str) -> str:
    """Returns "validation" or "training": a fixed function of the normalised prompt."""
    number = int(hashlib.sha256(prompt_key.encode("utf-8")).hexdigest(), 16)
    return "validation" if number % VALIDATION_ONE_IN == 0 else "training"


def read_conversations(wheel: Path) -> list[tuple[str, list]]:
    """Reads (category, conversation) pairs from the YAML files in `wheel`, in file name order."""
    import yaml
    from tqdm import tqdm

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    conversations = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(LANGUAGE_FOLDER) and name.endswith(".yml")]
            for name in tqdm(sorted(names), desc="reading", unit="file", disable=None):
                content = yaml.load(archive.read(name).decode("utf-8"), Loader=loader)
                category = Path(name).stem
                conversations += [(category, conversation) for conversation in content["conversations"]]
    except (zipfile.BadZipFile, yaml.YAMLError, KeyError, TypeError) as error:
        raise PreparationError(f"{wheel} is not the wheel of {WHEEL}: {error}") from error
    if not conversations:
        raise PreparationError(f"{wheel} has no conversations in {LANGUAGE_FOLDER}: expected the wheel of {WHEEL}")
    return conversations


def first_pairs(conversations: list[tuple[str, list]]) -> dict[str, dict]:
    """Keeps the first answer to each prompt; returns normalised prompt -> JSONL row."""
    rows: dict[str, dict] = {}
    for category, conversation in conversations:
        lines = [clean_text(line, keep_spacing=category == "coding") for line in conversation if line is not None]
        lines = [line for line in lines if line]
        if len(lines) < 2:
            continue
        prompt, answer = lines[:2]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows.setdefault(normalized_prompt(prompt), {"messages": messages, "category": category})
    return rows


def write_data(wheel: Path, folder: Path) -> dict:
    """Writes the two JSONL files into `folder`; returns figures for the marker file."""
    conversations = read_conversations(wheel)
    splits: dict[str, list[dict]] = {"training": [], "validation": []}
    for key, row in first_pairs(conversations).items():
        splits[split_of(key)].append(row)
    for name, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = {name: len(rows) for name, rows in splits.items()}
    return counts | {"conversations_read": len(conversations), "wheel_sha256": sha256_of(wheel)}


def main() -> None:
    """Parses the command line and makes the directory, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=local_path, default=Path("data/chatterbot"), help="directory to make")
    parser.add_argument(
        "--wheel", type=local_path, help=f"an already downloaded wheel of {WHEEL} (default: download it)"
    )
    args = parser.parse_args()
    if is_prepared(args.output, SOURCE):
        print(f"{args.output} is ready")
        return
    with tempfile.TemporaryDirectory(prefix="chatterbot-") as work:
        wheel = args.wheel or download_wheel(WHEEL, sha256=WHEEL_SHA256, directory=Path(work))
        record = write_directory(args.output, SOURCE, lambda folder: write_data(wheel, folder))
    figures = record["figures"]
    print(f"wrote {args.output}: {figures['training']} training and {figures['validation']} validation pairs")


if __name__ == "__main__":
    sys.exit(run_script(main, "prepare_data"))
