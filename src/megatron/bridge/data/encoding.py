# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Turn rows into tokens: render, tokenise, mark the learned tokens, and shorten to the length limit."""

import contextlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatron.bridge.data.row_notes import Note
from megatron.bridge.data.samples import Offsets, RenderedSample, SampleFormat
from megatron.bridge.data.sft_options import SFTOptions
from megatron.bridge.data.sources import Row
from megatron.bridge.data.tokenizer import Tokenizer

ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class TokenisedSample:
    """One sample as arrays of one length: token ids (int32) and which of them are learned (bool)."""

    ids: np.ndarray
    learned: np.ndarray
    truncated: bool


Encoded = tuple[int, TokenisedSample | None, tuple[Note, ...]]
"""A row's number, its sample (None if the row has no learned token), and notes on what is ignored or lost."""

NO_LEARNED_TOKEN = "no answer token within {limit}"
"""The reason for dropping a sample whose answers are all beyond the limit."""

NO_END = Note(
    "a learned answer ends in no special token",
    "the model doesn't learn to stop there; set a tokenizer.chat_template that writes the EOS token after each answer",
)


class SampleEncoder:
    """Renders rows and turns rendered samples into tokens within the length limit."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sample_format: SampleFormat,
        *,
        seq_length: int,
        options: SFTOptions,
        limit: str = "seq_length",
    ) -> None:
        """Keeps what all samples of a file have in common.

        Args:
            tokenizer: As made by `build_tokenizer`.
            sample_format: As chosen by `choose_format`.
            seq_length: Most positions of a sample.
            options: Format of the lines.
            limit: The option that `seq_length` comes from, for messages.

        Raises:
            ValueError: BOS or EOS is asked for, and the tokenizer has none.
        """
        self.tokenizer = tokenizer
        self.format = sample_format
        self.max_tokens = seq_length + 1
        self.beyond_limit = Note(f"dropped: {NO_LEARNED_TOKEN.format(limit=f'{limit}={seq_length}')}")
        self.without_prompt = Note(
            "an answer has lost all of its prompt",
            f"it fills {limit}={seq_length} alone: raise it, or take the row out",
        )
        self.cuts_left = options.truncation_method == "left"
        self.special_ids = tokenizer.special_ids
        for name, wanted, token in (
            ("add_bos", sample_format.adds_bos, tokenizer.bos_id),
            ("add_eos", sample_format.adds_eos, tokenizer.eos_id),
        ):
            if wanted and token is None:
                raise ValueError(
                    f"dataset.dataset_kwargs.{name}=true, but tokenizer {tokenizer.name} has no such token"
                )
        self.prefix = np.array([tokenizer.bos_id] if sample_format.adds_bos else [], dtype=np.int32)
        self.suffix = np.array([tokenizer.eos_id] if sample_format.adds_eos else [], dtype=np.int32)

    def encode_rows(self, rows: list[Row], where: str) -> list[Encoded]:
        """Returns the tokenised sample of each row.

        Args:
            rows: Numbers and objects.
            where: What the rows are rows of, for errors.

        Raises:
            ValueError: Names the first row that has not the format, or that the tokenizer refuses.
        """
        rendered: list[RenderedSample] = []
        for number, row in rows:
            with _named(f"{where}:{number}"):
                rendered.append(self.render(row))
        try:
            encoded = self.encode(rendered)
        except ValueError:
            for (number, _), sample in zip(rows, rendered, strict=True):
                with _named(f"{where}:{number}"):
                    self.encode([sample])
            raise
        numbers = (number for number, _ in rows)
        return [(number, *became) for number, became in zip(numbers, encoded, strict=True)]

    def render(self, row: dict[str, Any]) -> RenderedSample:
        """Renders one row; ValueError if it has not the format or is no valid text."""
        sample = self.format.render(row)
        try:
            sample.text.encode("utf-8")
        except UnicodeEncodeError as error:
            character = sample.text[error.start]
            raise ValueError(f"the text holds {character!r}, half a character: remove or replace it") from error
        return sample

    def encode(self, rendered: list[RenderedSample]) -> list[tuple[TokenisedSample | None, tuple[Note, ...]]]:
        """Returns the tokens of each sample, None where nothing is learned, and notes on it."""
        present = [sample for sample in rendered if not sample.dropped]
        encoded = self._tokens(present)
        # Samples are concatenated: a NumPy call has more overhead than a short sample takes.
        bounds = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in encoded), dtype=np.int32, count=bounds[-1])
        numbers = chain.from_iterable(chain.from_iterable(offsets for _, offsets in encoded))
        spans = np.fromiter(numbers, dtype=np.int64, count=2 * bounds[-1]).reshape(-1, 2)
        learned, without_end = self._learned_tokens(present, ids, spans, bounds)
        parts = (slice(*pair) for pair in pairwise(bounds.tolist()))
        fitted = (
            self._noted(sample, self._fit(sample, ids[part], spans[part], learned[part]), place in without_end)
            for place, (sample, part) in enumerate(zip(present, parts, strict=True))
        )
        return [_dropped(sample) if sample.dropped else next(fitted) for sample in rendered]

    def _tokens(self, samples: list[RenderedSample]) -> list[tuple[list[int], Offsets]]:
        """Ids and offsets of each sample; those that came with them are not tokenised again."""
        texts = [sample.text for sample in samples if sample.tokens is None]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else ())
        return [next(encoded) if sample.tokens is None else sample.tokens for sample in samples]

    def _noted(
        self, sample: RenderedSample, fitted: TokenisedSample | None, lacks_end: bool
    ) -> tuple[TokenisedSample | None, tuple[Note, ...]]:
        if fitted is None:
            return None, (*sample.notes, self.beyond_limit)
        if fitted.truncated:
            has_lost_prompt = sample.learned[0][0] > 0 and bool(fitted.learned[len(self.prefix) :].all())
            return fitted, (*sample.notes, self.without_prompt) if has_lost_prompt else sample.notes
        return fitted, (*sample.notes, NO_END) if lacks_end else sample.notes

    def _fit(
        self, sample: RenderedSample, ids: np.ndarray, spans: np.ndarray, learned: np.ndarray
    ) -> TokenisedSample | None:
        """Applies BOS and EOS and the length limit to one sample."""
        excess = len(self.prefix) + len(ids) + len(self.suffix) - self.max_tokens
        truncated = excess > 0
        if truncated:
            keep = self._shorten(sample, spans, excess)
            ids, learned = ids[keep], learned[keep]
        tokens = np.concatenate([self.prefix, ids, self.suffix])[: self.max_tokens]
        unlearned, end = np.zeros(len(self.prefix), dtype=bool), np.ones(len(self.suffix), dtype=bool)
        marks = np.concatenate([unlearned, learned, end])[: self.max_tokens]
        return TokenisedSample(tokens, marks, truncated) if marks[1:].any() else None

    def _learned_tokens(
        self, samples: list[RenderedSample], ids: np.ndarray, spans: np.ndarray, bounds: np.ndarray
    ) -> tuple[np.ndarray, set[int]]:
        """Marks the tokens that contain at least one learned character, in each turn up to its end token.

        A token that crosses the start of a learned span counts, since its last characters would otherwise never be
        learned. A token without characters counts if it is inside a span.

        Args:
            samples: N of them.
            ids: Of all their tokens, int32 [T].
            spans: First character and end of each token in its sample's text, int64 [T, 2].
            bounds: Where each sample's tokens begin, and T, int64 [N + 1].

        Returns:
            Which tokens are learned, bool [T], and the samples of which a learned span should end in a special token
            and doesn't.
        """
        # Characters are counted through all texts, with one position after each text for tokens without characters.
        texts = np.cumsum([0, *(len(sample.text) + 1 for sample in samples)])
        shifts = np.repeat(texts[:-1], np.diff(bounds))
        starts = spans[:, 0] + shifts
        ends = np.maximum(spans[:, 1] + shifts, starts + 1)
        in_texts = zip(texts[:-1].tolist(), samples, strict=True)
        of_texts = [(text + start, text + end) for text, sample in in_texts for start, end in sample.learned]
        wanted = np.array([*of_texts, (texts[-1] + 1, texts[-1] + 1)])  # and one behind all tokens
        # Learned spans stand in order and apart: of those that end after a token's start, the first begins first.
        span = np.searchsorted(wanted[:, 1], starts, side="right")
        learned = wanted[span, 0] < ends
        marked = np.flatnonzero(learned)
        lasts = marked[np.diff(span[marked], append=-1) != 0]
        # "<|im_end|>\n": generation stops at the end token, so the line break after it is not learned.
        owners = np.searchsorted(bounds, lasts, side="right") - 1
        without_end = set()
        for last, owner in zip(lasts.tolist(), owners.tolist(), strict=True):
            text, end = samples[owner].text, last
            while text[slice(*spans[end])].isspace() and end > 0 and learned[end - 1] and span[end - 1] == span[last]:
                end -= 1
            is_special = ids[end] in self.special_ids
            if samples[owner].should_end and not is_special:
                without_end.add(owner)
            if end < last and is_special and not samples[owner].has_exact_spans:
                cut = slice(end + 1, last + 1)
                learned[cut] = ends[cut] > wanted[span[last] + 1, 0]  # in the next span, too
        return learned, without_end

    def _shorten(self, sample: RenderedSample, spans: np.ndarray, excess: int) -> np.ndarray:
        """Returns which tokens to keep after cutting up to `excess` tokens out of the cuttable spans."""
        keep = np.ones(len(spans), dtype=bool)
        for start, end in sample.cuttable:
            inside = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= end) & keep)
            cut = inside[:excess] if self.cuts_left else inside[max(0, len(inside) - excess) :]
            keep[cut] = False
            excess -= len(cut)
        return keep


def encode_all(
    rows: Iterable[Row], encoder: SampleEncoder, *, where: str, num_processes: int = 1
) -> Generator[Encoded, None, None]:
    """Yields the tokenised sample of each row, in order.

    Args:
        rows: Numbers and objects.
        encoder: What to do with them.
        where: What the rows are rows of, for errors.
        num_processes: 1: this process, whose tokenizer uses all threads. More: processes that also render, which pays
            for conversations, where the chat template takes longer than the tokenizer.

    Raises:
        ValueError: Names the first row that can't be used.
        RuntimeError: A process ended before its work was done.
    """
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, ROWS_PER_BATCH)), [])
    if num_processes == 1:
        for batch in batches:
            yield from encoder.encode_rows(batch, where)
        return
    # Forked, not spawned: a spawned process would import the user's script. They use neither device nor process group.
    pool = ProcessPoolExecutor(num_processes, mp_context=get_context("fork"), initializer=_enter, initargs=(encoder,))
    with pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_encode, batch, where))
                if len(pending) >= 2 * num_processes:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that tokenises {where} ended before it was done: lower dataset.memmap_workers="
                f"{num_processes} if memory ran out"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_encoder: SampleEncoder
"""The encoder of a process in `encode_all`'s pool."""


def _enter(encoder: SampleEncoder) -> None:
    """Initialise a process of the pool: keep the encoder, and give its tokenizer a single thread."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode(rows: list[Row], where: str) -> list[Encoded]:
    return _encoder.encode_rows(rows, where)


def _dropped(sample: RenderedSample) -> tuple[None, tuple[Note, ...]]:
    return None, (*sample.notes, Note(f"dropped: {sample.dropped}"))


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts `where` before the text of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
