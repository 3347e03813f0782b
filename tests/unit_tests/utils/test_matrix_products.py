# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Products of 16-bit matrices where the CPU has none of its own: in FP32, rounded once, in every form."""

import logging

import pytest
import torch

from megatron.bridge.utils import matrix_products
from megatron.bridge.utils.matrix_products import SIXTEEN_BIT

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in SIXTEEN_BIT]


@pytest.fixture(autouse=True)
def in_fp32():
    matrix_products.override(SIXTEEN_BIT)
    yield
    matrix_products.restore()


def _made(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _matrices(dtype):
    """[M, K], [K, N], [M, N], with a K that rounds otherwise if a sum is kept in 16 bits."""
    return _made(24, 300, dtype=dtype), _made(300, 40, dtype=dtype), _made(24, 40, dtype=dtype)


def _batches(dtype):
    """[B, M, K], [B, K, N], [B, M, N]"""
    return _made(3, 24, 300, dtype=dtype), _made(3, 300, 40, dtype=dtype), _made(3, 24, 40, dtype=dtype)


FORMS = {
    "matmul": (_matrices, lambda a, b, c: a @ b),
    "matmul of a matrix and a batch": (_batches, lambda a, b, c: a @ b[0]),
    "mm": (_matrices, lambda a, b, c: torch.mm(a, b)),
    "mm, transposed": (_matrices, lambda a, b, c: torch.mm(b.t(), a.t())),
    "mm, into": (_matrices, lambda a, b, c: torch.mm(a, b, out=torch.empty_like(c))),
    "mm, into an empty one": (_matrices, lambda a, b, c: torch.mm(a, b, out=c.new_empty(0))),
    "addmm": (_matrices, lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2.0)),
    "addmm, into": (_matrices, lambda a, b, c: torch.addmm(c, a, b, out=torch.empty_like(c))),
    "addmm, in place": (_matrices, lambda a, b, c: c.clone().addmm_(a, b, alpha=2.0)),
    "linear": (_matrices, lambda a, b, c: torch.nn.functional.linear(a, b.t(), c[0])),
    "einsum": (_batches, lambda a, b, c: torch.einsum("bmk,bkn->nbm", a, b)),
    "bmm": (_batches, lambda a, b, c: torch.bmm(a, b)),
    "bmm, expanded": (_batches, lambda a, b, c: torch.bmm(a, b[:1].expand(3, -1, -1))),
    "bmm, into": (_batches, lambda a, b, c: torch.bmm(a, b, out=torch.empty_like(c))),
    "baddbmm": (_batches, lambda a, b, c: torch.baddbmm(c, a, b, beta=2.0, alpha=0.5)),
    "baddbmm, in place": (_batches, lambda a, b, c: c.clone().baddbmm_(a, b, alpha=0.5)),
    "baddbmm, over what is no number": (
        _batches,
        lambda a, b, c: torch.baddbmm(torch.full_like(c, float("nan")), a, b, beta=0.0, alpha=0.5),
    ),
}


FUNCTIONAL = [name for name in FORMS if "into" not in name and "in place" not in name]


@pytest.mark.parametrize("form", FORMS if matrix_products._hands_kernels_out() else FUNCTIONAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_fp32s_rounded_once(dtype, form):
    made, product = FORMS[form]
    factors = made(dtype)
    found = product(*factors)
    assert found.dtype == dtype
    assert torch.equal(found, product(*(factor.float() for factor in factors)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_autograd_engine_runs_through_them(dtype):
    x, weight, bias = (_made(*shape, dtype=dtype).requires_grad_() for shape in ((2, 24, 300), (40, 300), (40,)))
    output = torch.nn.functional.linear(x, weight, bias)
    gradient = _made(2, 24, 40, dtype=dtype)
    output.backward(gradient)
    flat = gradient.float().view(-1, 40)
    assert torch.equal(x.grad, (flat @ weight.detach().float()).to(dtype).view_as(x))
    assert torch.equal(weight.grad, (flat.t() @ x.detach().float().view(-1, 300)).to(dtype))


@pytest.mark.parametrize("form", FUNCTIONAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_before_2_9_multiplies_so_too_and_says_what_it_leaves_out(monkeypatch, caplog, dtype, form):
    monkeypatch.delattr(torch.library, "get_kernel", raising=False)
    matrix_products.restore()
    with caplog.at_level(logging.INFO):
        matrix_products.install(lambda dtype: 16.0)
    assert f"with torch {torch.__version__} (2.9 or newer is needed) not the forms out= and in place" in caplog.text
    test_a_product_is_fp32s_rounded_once(dtype, form)
    test_what_torch_refuses_stays_refused(dtype)


def test_other_types_are_torchs_own():
    for dtype in (torch.float32, torch.float64, torch.int64):
        a, b, _ = (_made(24, 300, dtype=torch.float32).mul(8).to(dtype) for _ in range(3))
        inside = a @ b.t(), torch.addmm(a[:, :24], a, b.t())
        matrix_products.restore()
        outside = a @ b.t(), torch.addmm(a[:, :24], a, b.t())
        matrix_products.override(SIXTEEN_BIT)
        assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_refuses_stays_refused(dtype):
    a, b, c = _matrices(dtype)
    for wrong in (
        lambda: a @ b.float(),
        lambda: torch.mm(a, b, out=c.float()),
        lambda: torch.addmm(c.float(), a, b),
        lambda: a @ a,
        lambda: c.clone().addmm_(a, b[:, :7]),
    ):
        with pytest.raises(RuntimeError):
            wrong()


@pytest.mark.parametrize(
    ("slowdowns", "converted"),
    [((0.5, 20.0), {torch.float16}), ((16.0, 18.0), set(SIXTEEN_BIT)), ((0.5, 1.5), set())],
    ids=["bf16 of its own", "neither", "both of its own"],
)
def test_only_what_is_slow_on_this_cpu_is_converted(caplog, slowdowns, converted):
    matrix_products.restore()
    with caplog.at_level(logging.INFO):
        chosen = matrix_products.install(dict(zip(SIXTEEN_BIT, slowdowns, strict=True)).__getitem__)
    assert set(chosen) == converted
    assert len(caplog.messages) == bool(converted)
    assert all((str(dtype).removeprefix("torch.") in caplog.text) == (dtype in converted) for dtype in SIXTEEN_BIT)
