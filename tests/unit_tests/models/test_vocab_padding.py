# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from megatron.bridge.models.vocab_padding import largest_divisor, mask_padding_logits, padded_vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "ranks", "padded"),
    [(49152, 128, 1, 49152), (49152, 128, 2, 49152), (101, 1, 2, 102), (101, 128, 4, 512), (128, 128, 1, 128)],
)
def test_padded_size(vocab_size, divisible_by, ranks, padded):
    assert padded_vocab_size(vocab_size, divisible_by, ranks) == padded


@pytest.mark.parametrize(("vocab_size", "divisor"), [(49152, 128), (101, 1), (32000, 128), (128256, 128), (50258, 2)])
def test_largest_divisor_pads_nothing_on_one_rank(vocab_size, divisor):
    assert largest_divisor(vocab_size) == divisor
    assert padded_vocab_size(vocab_size, divisor, 1) == vocab_size


class OutputLayer(torch.nn.Module):
    """As Core's: returns the logits of its rows, and a bias."""

    def __init__(self, rows: torch.Tensor, output_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rows.clone())
        self.output_size = output_size

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden @ self.weight.T, None


def test_loss_and_gradient_are_those_of_the_unpadded_vocabulary():
    torch.manual_seed(0)
    hidden, rows, labels = torch.randn(5, 2, 8), torch.randn(12, 8), torch.randint(0, 9, (10,))
    layer = OutputLayer(rows, output_size=12)
    mask_padding_logits(layer, vocab_size=9, tensor_parallel_rank=0, tensor_parallel_size=1)
    loss = torch.nn.functional.cross_entropy(layer(hidden)[0].flatten(0, 1), labels)
    loss.backward()

    real = rows[:9].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy((hidden @ real.T).flatten(0, 1), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)  # a sum over more columns, some of them zero, may round otherwise
    torch.testing.assert_close(layer.weight.grad[:9], real.grad)
    assert torch.count_nonzero(layer.weight.grad[9:]) == 0


@pytest.mark.parametrize(("rank", "num_real"), [(0, 4), (1, 4), (2, 1), (3, 0)])
def test_each_rank_masks_its_own_padding(rank, num_real):
    layer = OutputLayer(torch.ones(4, 8), output_size=16)
    mask_padding_logits(layer, vocab_size=9, tensor_parallel_rank=rank, tensor_parallel_size=4)
    logits, _ = layer(torch.ones(1, 1, 8))
    assert (logits[0, 0] == 8).tolist() == [index < num_real for index in range(4)]
