# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Continue texts with a Megatron model, one token at a time, with Core's cache of keys and values.

Shapes: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.bridge.utils.device import current_device

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

_NOT_A_NUMBER = "the model's logits are NaN: look at the training that made the checkpoint"
_NOTHING, _NAN = -1, -2
"""In place of a token: none is awaited, or none can be chosen."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Logits are divided by this before a token is drawn. 0: the likeliest token is taken, nothing is drawn."""

    top_k: int = 0
    """Draw among this many of the likeliest tokens. 0: among all."""

    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    seed: int = 1234
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected more than 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p choose among tokens to draw from: set a temperature above 0 with them")

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Choose a token.

        Args:
            logits: [V] float32, on the host.
            generator: Of the host.

        Raises:
            FloatingPointError: The logits are not numbers.
        """
        if logits.isnan().any():
            raise FloatingPointError(_NOT_A_NUMBER)
        if self.temperature == 0:
            return int(logits.argmax())
        logits, tokens = (logits / self.temperature).sort(descending=True)
        probabilities = logits.softmax(0)
        # A token is kept while those before it have less than top_p together, so the first always is.
        kept = probabilities.cumsum(0) - probabilities < self.top_p
        if self.top_k:
            kept[self.top_k :] = False
        return int(tokens[torch.multinomial(probabilities * kept, 1, generator=generator)])


def load_for_generation(
    path: str | Path,
    *,
    hf_model: str | Path | None = None,
    base: str | Path | None = None,
    sizes: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> "list[MegatronModule]":
    """Build the model of a checkpoint, with adapters if it holds those, in evaluation mode. Collective.

    Brings up a process group and model-parallel state where there are none, and leaves them up.

    Args:
        path: Root, or `iter_N` directory.
        hf_model: Directory or hub name of the Hugging Face model whose configuration counts. None: what the checkpoint
            says of its model; with adapters, the model that it says they were trained on.
        base: With adapters: the weights that they stand beside; None: those that they were trained on.
        sizes: Parallel sizes, by their names in a provider.
        dtype: To compute in; None: the checkpoint's.

    Raises:
        FileNotFoundError: No checkpoint there, or no longer the model that adapters were trained on.
        ValueError: Not complete, or its model isn't one of Megatron Bridge's.
    """
    from megatron.bridge.checkpoint.iterations import resolve_checkpoint
    from megatron.bridge.checkpoint.model_checkpoint import load_model_weights, read_run_config
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.conversion.hf_config import precision_fields
    from megatron.bridge.models.conversion.saved_provider import read_model_section, set_parallel_sizes
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.utils.yaml_io import from_yaml_dict

    overrides = {**(sizes or {}), **(precision_fields(dtype) if dtype else {})}
    section = read_model_section(path)
    has_adapters = read_run_config(resolve_checkpoint(path)).get("peft") is not None
    if base is not None and not has_adapters:
        raise ValueError(f"--base: {path} holds a whole model, not adapters; leave it out")
    if hf_model is not None or has_adapters:
        bridge = AutoBridge.from_megatron_checkpoint(path, hf_model)
        chunks = bridge.load_megatron_model(path, mp_overrides=overrides, base=base)
        return [chunk.eval() for chunk in chunks]
    # Not strict: how another version of Core trained it doesn't count here.
    provider = from_yaml_dict(section, expected=GPTModelProvider, strict=False, where=f"{path}: model")
    set_parallel_sizes(provider, overrides)
    provider.perform_initialization = False
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    load_model_weights(chunks, path)
    return [chunk.eval() for chunk in chunks]


def generate_tokens(
    model: "Sequence[MegatronModule]",
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    end_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield the tokens that follow a prompt. Collective: every rank must take every token, and gets the same ones.

    Args:
        model: This rank's chunk, without virtual stages.
        prompt: Token ids.
        max_new_tokens: Stop after this many.
        sampling: How tokens are chosen; None: the likeliest.
        end_ids: Stop after one of these, which is yielded too.

    Raises:
        ValueError: The prompt is empty or holds an unknown token, or the model can't continue it.
        FloatingPointError: The logits are not numbers. Raised on all ranks.
    """
    limits: dict[str, Any] = {"max_new_tokens": [max_new_tokens], "end_ids": end_ids}
    for (token,) in generate_together(model, [prompt], sampling=sampling, **limits):
        assert token is not None  # a single prompt is read in one pass, and its end ends all
        yield token


def generate_together(
    model: "Sequence[MegatronModule]",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    sampling: Sampling | None = None,
    end_ids: Collection[int] = (),
    is_end: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts in one batch. Collective, as `generate_tokens`.

    The first pass reads what all prompts have, up to the end of the shortest; each later one reads one token of every
    row. Prompts of similar length take the fewest passes. Where rotary frequencies change with the length, a pass reads
    the rows from their start.

    Args:
        model: As for `generate_tokens`.
        prompts: Token ids of each row.
        max_new_tokens: Of each row, 1 or more.
        sampling: As for `generate_tokens`. Each row has its own draws, which don't depend on the others.
        end_ids: A row ends with one of these.
        is_end: Called with the new tokens of a row: whether it ends with them.

    Yields:
        After each pass the new token of each row; None for a row that is still being read, or that has ended.

    Raises:
        ValueError, FloatingPointError: As for `generate_tokens`.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.utils import get_model_config

    from megatron.bridge.models.rope_by_length import reads_again

    _check_prompts(model, prompts, max_new_tokens)
    sampling = sampling or Sampling()
    size = max(map(len, prompts)) + max(max_new_tokens)
    cache = StaticInferenceContext(len(prompts), size)
    again = reads_again(get_model_config(model[0]))
    generators = [torch.Generator(device="cpu").manual_seed(sampling.seed) for _ in prompts]
    rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    start, end = 0, min(map(len, prompts))
    while not all(ended):
        if start and again(start, end):
            start, cache = 0, StaticInferenceContext(len(prompts), size)
        logits = _next_logits(model[0], [row[start:end] for row in rows], cache)
        awaited = [not done and len(row) == end for row, done in zip(rows, ended, strict=True)]
        chosen = [
            _chosen(sampling, logits[index], generators[index]) if awaits and logits is not None else _NOTHING
            for index, awaits in enumerate(awaited)
        ]
        chosen = _from_last_stage(chosen)
        if _NAN in chosen:
            raise FloatingPointError(_NOT_A_NUMBER)
        for index, row in enumerate(rows):
            if len(row) > end:
                continue
            row.append(chosen[index] if awaited[index] else row[-1])
            made = row[len(prompts[index]) :]
            at_end = len(made) == max_new_tokens[index] or row[-1] in end_ids or (is_end is not None and is_end(made))
            ended[index] = ended[index] or at_end
        start, end = end, end + 1
        yield [token if awaits else None for token, awaits in zip(chosen, awaited, strict=True)]


def _chosen(sampling: Sampling, logits: torch.Tensor, generator: torch.Generator) -> int:
    """A token, or `_NAN`: only the last stage sees the logits, and the error is one of all."""
    try:
        return sampling.choose(logits, generator)
    except FloatingPointError:
        return _NAN


def _check_prompts(
    model: "Sequence[MegatronModule]", prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> None:
    """Refuse what the model can't continue."""
    from megatron.core.utils import get_model_config

    from megatron.bridge.models.context_parallel import check_holds_whole_rows

    if len(model) != 1:
        raise ValueError(f"the model has {len(model)} virtual stages: load it without them to generate")
    config = get_model_config(model[0])
    check_holds_whole_rows(config, doing="generating")
    for prompt, number in zip(prompts, max_new_tokens, strict=True):
        if not prompt or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            found = f"ids {min(prompt)} to {max(prompt)}" if prompt else "none"
            raise ValueError(f"the prompt has token {found}: expected at least one of 0 to {config.vocab_size - 1}")
        if number < 1:
            raise ValueError(f"max_new_tokens={number}: expected 1 or more")
        if config.position_embedding_type == "learned_absolute" and len(prompt) + number > config.seq_length:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {number} new ones exceed the model's {config.seq_length} positions: "
                "shorten the prompt or lower max_new_tokens"
            )


@torch.no_grad()
def _next_logits(chunk: "MegatronModule", rows: Sequence[list[int]], cache: Any) -> torch.Tensor | None:
    """Run tokens that follow those in the cache, the same number of each row.

    Returns:
        The logits after the last of them, [B, V] float32 on the host; None on stages before the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    start, vocab_size = cache.sequence_len_offset, get_model_config(chunk).vocab_size
    ids = torch.tensor(rows, device=current_device())
    number, length = ids.shape
    positions = torch.arange(start, start + length, device=current_device())[None].expand(number, -1)

    def forward(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output = model(ids, positions, None, inference_context=cache, runtime_gather_output=True)
        # Without padding: how much there is of it differs between layouts, and draws would differ with it.
        return output, lambda logits, non_loss_data: logits[:, -1, :vocab_size].float().cpu()

    collected = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=chunk,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=number,
        decoder_seq_length=length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    cache.sequence_len_offset += length
    cache.enable_decode_mode()
    return collected[0] if collected else None


def _from_last_stage(tokens: list[int]) -> list[int]:
    """The tokens that the last stage chose, on every stage; tensor-parallel ranks chose them from the same logits."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return tokens
    shared = torch.tensor(tokens, device=current_device())
    dist.broadcast(
        shared,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return shared.tolist()
