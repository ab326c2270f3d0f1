# ruff: noqa: ARG001 (signatures are the interpreter's)
"""Makes Triton's interpreter round where a GPU does.

By itself it multiplies the bits of bfloat16 numbers and cuts what it should round. Here operands are numbers,
casts round to nearest, and so do the float32 operands of a TF32 product.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype


def numbers(x: TensorHandle) -> torch.Tensor:
    data = np.ascontiguousarray(x.data)
    if x.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(data)


def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: int) -> TensorHandle:
    x, y = numbers(a), numbers(b)
    if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        x, y = (((t.view(torch.int32) + 4096) & -8192).view(torch.float32) for t in (x, y))
    return TensorHandle((x @ y).numpy() + d.data, d.dtype.scalar)


def cast(self: Any, source: TensorHandle, target: Any, *rounding: Any) -> TensorHandle:
    dtype = target.scalar
    if tl.bfloat16 not in (source.dtype.scalar, dtype):
        return TensorHandle(source.data.astype(_get_np_dtype(target)), dtype)
    x = numbers(source).float()
    if dtype == tl.bfloat16:
        return TensorHandle(x.bfloat16().view(torch.int16).numpy().view(np.uint16), dtype)
    return TensorHandle(x.numpy().astype(_get_np_dtype(target)), dtype)


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    with (
        mock.patch.object(InterpreterBuilder, "create_dot", dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast),
        mock.patch.object(InterpreterBuilder, "create_fp_to_fp", cast),
    ):
        yield
