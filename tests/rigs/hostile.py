# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a stranger may put into files: code that would make a directory, and little that would become much."""

import io
import json
import os
import zipfile
from pathlib import Path

import torch

from tests.unit_tests.data.conftest import write_tokenizer
from tests.unit_tests.models.tiny_llama import save_tiny_llama


class Payload:
    """Makes a directory when it is unpickled as pickle does it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def torch_saved(content):
    blob = io.BytesIO()
    torch.save(content, blob)
    return blob.getvalue()


def repacked(content, *, compression=zipfile.ZIP_STORED, **replaced):
    """An archive of torch's with entries replaced by the last part of their names, checksums right."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(Path(name).stem, old.read(name)))
    return packed.getvalue()


DOUBLED = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n + 1, n, n) for n in range(60)) + b"."
"""A pickle of 60 lists, each of which holds the one before twice."""

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
YAML_BOMBS = {"aliases": LAUGHS, "merges": MERGED, "a list that holds itself": "a: &a [*a]\n", "nesting": "[\n" * 3000}


CODE = """
import os

from transformers import PreTrainedTokenizerFast

os.mkdir({mark!r})


class T(PreTrainedTokenizerFast):
    pass
"""


def write_hostile_model(directory, mark):
    """A model whose code, pickled weights and names of classes all would run something."""
    save_tiny_llama(directory, vocab_size=384)
    write_tokenizer(directory)
    (directory / "evil.py").write_text(CODE.format(mark=str(mark)))
    torch.save(Payload(mark), directory / "pytorch_model.bin")
    named = {"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]}
    for file in ("config.json", "tokenizer_config.json"):
        content = {**json.loads((directory / file).read_text()), "auto_map": named, "tokenizer_class": "EvilTokenizer"}
        (directory / file).write_text(json.dumps(content))
    return directory
