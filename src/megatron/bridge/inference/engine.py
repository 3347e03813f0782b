# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""An engine that continues prompts in batches, on any device and layout, with Core's requests and sampling parameters.

It has the arguments of Core's `MegatronLLM`, whose dynamic engine needs a GPU and flash attention.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.inference.prompts import check_lengths, with_bos
from megatron.bridge.inference.settings import NO_END, InferenceLimits
from megatron.bridge.models.generation import Sampling, generate_together
from megatron.bridge.models.layer_kinds import kinds_of_layers

if TYPE_CHECKING:
    from megatron.core.inference.inference_request import InferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.transformer.module import MegatronModule

NOT_BUILT: dict[str, Any] = {
    "return_log_probs": False,
    "top_n_logprobs": 0,
    "return_segments": False,
    "num_cuda_graphs": None,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "num_speculative_tokens": 0,
}
"""Fields of Core's sampling parameters and settings that aren't built, with the value that asks for nothing."""


class TextGenerationEngine:
    """Continues prompts.

    Args:
        model: This rank's part of the model, in evaluation mode.
        tokenizer: With `tokenize`, `detokenize`, `bos` and `eod`, as `HFTokenizerAdapter` has them.
        inference_config: From `build_inference_config`; None: its defaults.

    Raises:
        ValueError: The settings ask for what isn't built.
    """

    def __init__(self, *, model: "MegatronModule", tokenizer: Any, inference_config: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = InferenceLimits() if inference_config is None else inference_config
        _refuse_unbuilt(self.config, "inference_config")

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: "SamplingParams | None" = None,
    ) -> "list[InferenceRequest]":
        """Continue one prompt, or several. Collective: every rank gets the same results.

        Args:
            prompts: Texts or token ids; one alone counts as a list of one.
            sampling_params: How tokens are chosen, and how many; None: Core's defaults, which draw.

        Returns:
            A request for each prompt, in their order: `prompt_tokens`, `generated_tokens` [S] int64 in host memory,
            with the token that ended them, and `generated_text`, without it and without the stop word.

        Raises:
            ValueError: A parameter that isn't built, or a prompt that leaves no room for new tokens.
        """
        from megatron.core.inference.sampling_params import SamplingParams
        from megatron.core.utils import get_model_config

        params = sampling_params or SamplingParams(num_tokens_to_generate=30)
        _refuse_unbuilt(params, "sampling_params")
        texts = _as_list(prompts)
        rows = [self._encode(prompt, params) for prompt in texts]
        numbers = [_number_of_new_tokens(params, len(row), self.config.max_sequence_length) for row in rows]
        check_lengths(list(map(len, rows)), numbers, self.config.max_sequence_length)
        sampling = sampling_of(params, seed=get_model_config(self.model).inference_sampling_seed)
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        size = self.config.max_requests or max(len(rows), 1)
        batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
        for batch in batches:
            self._check_memory([len(rows[index]) + numbers[index] for index in batch])
        made: list[list[int]] = [[] for _ in rows]
        for batch in batches:
            passes = generate_together(
                [self.model],
                [rows[index] for index in batch],
                max_new_tokens=[numbers[index] for index in batch],
                sampling=sampling,
                end_ids=self._end_ids(params),
                is_end=(lambda tokens: self._has_stop_word(tokens, params)) if params.stop_words else None,
            )
            for tokens in passes:
                for index, token in zip(batch, tokens, strict=True):
                    made[index] += [] if token is None else [token]
        return [self._request(index, prompt, rows[index], made[index], params) for index, prompt in enumerate(texts)]

    def _encode(self, prompt: str | Sequence[int], params: "SamplingParams") -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids = list(self.tokenizer.tokenize(prompt))
        return with_bos(ids, self.tokenizer) if params.add_BOS else ids

    def _end_ids(self, params: "SamplingParams") -> tuple[int, ...]:
        if params.termination_id == NO_END:
            return ()
        if params.termination_id is not None:
            return (params.termination_id,)
        return getattr(self.tokenizer, "end_ids", None) or (self.tokenizer.eod,)

    def _has_stop_word(self, made: list[int], params: "SamplingParams") -> bool:
        text = self.tokenizer.detokenize(made)
        return any(word in text for word in params.stop_words or ())

    def _request(
        self, index: int, prompt: str | Sequence[int], row: list[int], made: list[int], params: "SamplingParams"
    ) -> "InferenceRequest":
        import torch
        from megatron.core.inference.inference_request import InferenceRequest, Status

        return InferenceRequest(
            request_id=index,
            prompt=prompt if isinstance(prompt, str) else self.tokenizer.detokenize(row),
            sampling_params=params,
            prompt_tokens=row,
            status=Status.COMPLETED,
            generated_text=self._text_of(row, made, params),
            generated_tokens=torch.tensor(made, dtype=torch.int64, device="cpu"),
            generated_length=len(made),
        )

    def _text_of(self, row: list[int], made: list[int], params: "SamplingParams") -> str:
        """The new text; the stop word that ended it is left out, unless it is asked for."""
        # With the prompt before it: some tokenizers join the first word of a text to nothing.
        before, whole = (self.tokenizer.detokenize(ids, skip_special_tokens=True) for ids in (row, row + made))
        text = whole[len(before) :]
        if not params.stop_words or getattr(params, "detokenize_stop_sequence", False):
            return text
        places = [text.find(word) for word in params.stop_words]
        return text[: min((place for place in places if place >= 0), default=len(text))]

    def _check_memory(self, lengths: Sequence[int]) -> None:
        """Refuse a batch whose cache of keys and values is larger than the settings allow."""
        from megatron.core.utils import get_model_config

        config = get_model_config(self.model)
        sizes = [config.sizes_of(kind) for kind in kinds_of_layers(config)]
        rows = sum(max(one.num_query_groups // config.tensor_model_parallel_size, 1) * one.kv_channels for one in sizes)
        token_bytes = 2 * rows // config.pipeline_model_parallel_size * config.params_dtype.itemsize
        needed = len(lengths) * max(lengths) * token_bytes / 2**30
        if needed > self.config.buffer_size_gb:
            raise ValueError(
                f"the cache of {len(lengths)} prompts of up to {max(lengths)} tokens takes {needed:.3g} GiB of a rank, "
                f"more than buffer_size_gb={self.config.buffer_size_gb}: raise it, or lower max_requests"
            )


def sampling_of(params: "SamplingParams", *, seed: int) -> Sampling:
    """Core's sampling parameters in this package's words: there `top_k=1` takes the likeliest token.

    Args:
        params: Core's.
        seed: Of the draws.
    """
    if params.top_k == 1 or params.temperature == 0:
        return Sampling(seed=seed)
    return Sampling(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p or 1.0, seed=seed)


def _number_of_new_tokens(params: "SamplingParams", length: int, most: int) -> int:
    if params.num_tokens_total is not None:
        return params.num_tokens_total - length
    return most - length if params.num_tokens_to_generate is None else params.num_tokens_to_generate


def _as_list(prompts: Any) -> list:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _refuse_unbuilt(section: Any, where: str) -> None:
    for name, neutral in NOT_BUILT.items():
        value = getattr(section, name, neutral)
        if value != neutral:
            raise ValueError(f"{where}.{name}={value!r} is not built into this engine: leave it at {neutral!r}")
