"""The Triton kernels of convolution, norm and decode step against float64 under the interpreter.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kimi_linear.ops import (
    convolve_cached,
    gated_rms_norm,
    kda_decode_step,
    rms_norm,
    short_convolution,
    swiglu,
)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_layer_kernels_agree_with_pytorch_under_the_interpreter() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from rounding_interpreter import rounding

    from kimi_linear.ops.triton import conv, decode, norm
    from kimi_linear.ops.triton import swiglu as gate

    def relative_error(x: torch.Tensor, expected: torch.Tensor, typical: float = 0.0) -> float:
        """Relative to `expected`, or to numbers of size `typical` where these are larger: sums of both signs
        may cancel, and of few numbers all of them.
        """
        least = max(typical * expected.numel() ** 0.5, 1e-12)
        return float((x.double() - expected).norm() / expected.norm().clamp(min=least))

    def check(  # type: ignore[no-untyped-def]
        kernel, exact, tensors: list[torch.Tensor], tolerance: float = 1e-6, typical: Sequence[float] = ()
    ) -> None:
        """The kernel's result and every gradient against the same function in float64.

        Args:
            typical: sizes of the result's and the gradients' terms, for few numbers.
        """
        typical = typical or (0.0,) * (1 + len(tensors))
        doubles = [x.double().requires_grad_() for x in tensors]
        for x in tensors:
            x.requires_grad_()
        y, expected = kernel(*tensors), exact(*doubles)
        assert y.dtype == tensors[0].dtype
        assert y.is_contiguous()
        assert relative_error(y.detach(), expected.detach(), typical[0]) < tolerance
        grad = torch.randn_like(y)
        grads = torch.autograd.grad(y, tensors, grad)
        expected_grads = torch.autograd.grad(expected, doubles, grad.double())
        for x, want, size in zip(grads, expected_grads, typical[1:], strict=True):
            assert relative_error(x, want, size) < tolerance

    def check_convolution(
        lengths: list[int], channels: int, with_state: bool, tolerance: float = 1e-6, **kind: torch.dtype
    ) -> None:
        tokens, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
        x, weight = torch.randn(tokens, channels + 3, **kind)[:, 3:], torch.randn(channels, 4, **kind)
        tensors = [x, weight]
        if with_state:
            tensors.append(torch.randn(len(lengths), 3, channels, **kind))

        def kernel(*t: torch.Tensor) -> torch.Tensor:
            return conv.short_convolution(t[0], t[1], cu_seqlens, *t[2:])

        def exact(*t: torch.Tensor) -> torch.Tensor:
            return short_convolution(t[0], t[1], cu_seqlens, *t[2:])

        check(kernel, exact, tensors, tolerance, typical=(0.3,) * (1 + len(tensors)))

    def check_norm(tensors: list[torch.Tensor], tolerance: float = 1e-6) -> None:
        check(
            lambda *t: norm.gated_rms_norm(*t, eps=1e-5),
            lambda *t: gated_rms_norm(*t, eps=1e-5),
            tensors,
            tolerance,
        )

    @pytest.fixture
    def _short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FORWARD_OPTIONS", "BACKWARD_OPTIONS"):
            small = {"BT": 8, "GROUP": 4, "BC": 16, "num_warps": 1}
            monkeypatch.setattr(conv, name, small)

    @pytest.mark.usefixtures("_short_strips")
    @pytest.mark.parametrize("with_state", [False, True])
    def test_convolution_of_many_strips_has_pytorchs_results_and_gradients(with_state: bool) -> None:
        check_convolution([1, 0, 2, 9, 3], 19, with_state)

    @pytest.mark.usefixtures("_short_strips")
    @pytest.mark.parametrize(("parts", "size"), [(1, 19), (3, 16), (2, 21)])
    def test_convolution_from_a_cache_leaves_it_as_pytorch_does(parts: int, size: int) -> None:
        lengths, channels = [1, 2, 21, 3, 14], parts * size
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        x, weight = torch.randn(sum(lengths), channels + 3)[:, 3:], torch.randn(channels, 4)
        pages = torch.randn(11, 5 * channels)  # of which a state has a part
        slots = torch.randperm(11)[: len(lengths)].int()
        expected_pages = pages.clone()
        states, expected_states = (
            p[:, channels : 4 * channels].unflatten(1, (3, channels)) for p in (pages, expected_pages)
        )
        expected = convolve_cached(x, weight, cu_seqlens, expected_states, slots, parts)
        y = conv.convolve_cached(x, weight, cu_seqlens, states, slots, parts)
        torch.testing.assert_close(y, expected)
        assert torch.equal(pages, expected_pages)

    def test_convolution_takes_its_own_strip_sizes() -> None:
        check_convolution([62], 5, False)

    @settings(max_examples=4, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
        channels=st.integers(1, 16),
        with_state=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_convolution_of_any_packing_has_pytorchs_results_and_gradients(
        lengths: list[int], channels: int, with_state: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("FORWARD_OPTIONS", "BACKWARD_OPTIONS"):
                patch.setattr(conv, name, {"BT": 8, "GROUP": 4, "BC": 16, "num_warps": 1})
            check_convolution(lengths, channels, with_state)

    @pytest.mark.usefixtures("_short_strips")
    def test_half_precision_convolution_rounds_its_result_once() -> None:
        check_convolution([7, 5], 16, True, tolerance=0.005, dtype=torch.bfloat16)

    @pytest.mark.usefixtures("_short_strips")
    def test_a_sequence_of_nan_leaves_its_neighbours_alone() -> None:
        x, weight = torch.randn(11, 4), torch.randn(4, 4)
        x[5:8] = float("nan")
        x.requires_grad_()
        y = conv.short_convolution(x, weight, torch.tensor([0, 5, 8, 11]))
        assert torch.equal(y.isnan().any(1), torch.arange(11).clamp(5, 7) == torch.arange(11))
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert grad[:5].isfinite().all()
        assert grad[8:].isfinite().all()

    @settings(max_examples=6, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40)),
        size=st.sampled_from([0.01, 1.0, 1000.0]),
        seed=st.integers(0, 2**31),
    )
    @example(shape=(4, 3, 1), size=1000.0, seed=0)  # one channel: the gradient of x is a difference
    def test_gated_norm_of_any_shape_has_pytorchs_results_and_gradients(
        shape: tuple[int, int, int], size: float, seed: int
    ) -> None:
        torch.manual_seed(seed)
        tensors = [size * torch.randn(shape), 3 * torch.randn(shape), torch.randn(shape[-1])]
        check(
            lambda *t: norm.gated_rms_norm(*t, eps=1e-5),
            lambda *t: gated_rms_norm(*t, eps=1e-5),
            tensors,
            1e-5,
            typical=(0.3, 0.3 / size, 0.1, 0.3),
        )

    def test_gated_norm_of_more_blocks_than_programs_adds_up_the_whole_weight_gradient(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(norm, "BLOCK", 64)
        monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 3)
        tensors = [torch.randn(29, 16), torch.randn(29, 16), torch.randn(16)]
        check_norm(tensors)

    @pytest.mark.parametrize("size", [24, 72, 130])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["float32", "bfloat16"]
    )
    def test_plain_norm_has_pytorchs_results_and_gradients(
        size: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Rows wider than a block, of which one is a program's; programs that take several blocks.
        monkeypatch.setattr(norm, "BLOCK", 64)
        monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 3)
        torch.manual_seed(0)
        tensors = [3 * torch.randn(7, size, dtype=dtype), torch.randn(size, dtype=dtype)]
        with rounding():
            check(partial(norm.rms_norm, eps=1e-5), partial(rms_norm, eps=1e-5), tensors, tolerance)

    def test_plain_norm_rounds_in_the_forward_pass_as_pytorch_does() -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*s, generator=generator).bfloat16() for s in ((20, 50), (50,)))
        with rounding():
            y = norm.rms_norm(x, weight, 1e-5)
        # Where a number lies between two of bfloat16, the root's last bit decides.
        assert (y == rms_norm(x, weight, 1e-5)).float().mean() > 0.99

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["float32", "bfloat16"]
    )
    def test_swiglu_has_pytorchs_results_and_gradients(
        dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gate, "BLOCK", 64)  # the last block is not full
        torch.manual_seed(0)
        with rounding():
            check(gate.swiglu, swiglu, [3 * torch.randn(7, 39, dtype=dtype) for _ in range(2)], tolerance)

    def test_swiglu_rounds_in_the_forward_pass_as_pytorch_does() -> None:
        z, u = (3 * torch.randn(500, generator=torch.manual_seed(0)).bfloat16() for _ in range(2))
        with rounding():
            y = gate.swiglu(z, u)
        # Where a number lies between two of bfloat16, its exponential's last bit decides.
        assert (y == swiglu(z, u)).float().mean() > 0.99

    @pytest.mark.parametrize("z", [-1e30, -200.0, 0.0, 200.0, 1e30])
    def test_swiglu_is_finite_for_gates_of_any_size(z: float) -> None:
        tensors = [torch.full((2,), z, requires_grad=True), torch.ones(2, requires_grad=True)]
        y = gate.swiglu(*tensors)
        grads = torch.autograd.grad(y.sum(), tensors)
        assert torch.stack((y, *grads)).isfinite().all()

    def test_gated_norm_of_zeros_is_zero_with_finite_gradients() -> None:
        x = torch.zeros(3, 16, requires_grad=True)
        y = norm.gated_rms_norm(x, torch.randn(3, 16), torch.randn(16), 1e-5)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, torch.zeros_like(y))
        assert grad.isfinite().all()

    @settings(max_examples=4, deadline=None)
    @given(
        sequences=st.integers(1, 2),
        heads=st.integers(1, 2),
        key_dim=st.integers(16, 40),
        value_dim=st.integers(16, 40),
        width=st.integers(2, 5),
        state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 2**31),
    )
    def test_decode_step_of_any_size_is_the_float64_step(
        sequences: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        width: int,
        state_dtype: torch.dtype,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        channels, slots = heads * (2 * key_dim + value_dim), torch.randperm(4)[:sequences]
        tensors = {
            "qkv": torch.randn(sequences, channels),
            "conv_weight": torch.randn(channels, width),
            "conv_state": torch.randn(4, width - 1, channels),
            "g": torch.randn(sequences, heads, key_dim),
            "beta": torch.randn(sequences, heads),
            "A_log": torch.randn(heads),
            "dt_bias": torch.randn(heads * key_dim),
            "state": torch.randn(4, heads, key_dim, value_dim).to(state_dtype),
            "output_gate": torch.randn(sequences, heads, value_dim),
            "norm_weight": torch.randn(value_dim),
        }
        exact = {name: x.double() for name, x in tensors.items()}
        o = decode.kda_decode_step(**tensors, slots=slots)
        expected = kda_decode_step(**exact, slots=slots)
        assert relative_error(o, expected) < 1e-5
        assert torch.equal(tensors["conv_state"].double(), exact["conv_state"])
        tolerance = 1e-6 if state_dtype == torch.float32 else 0.003
        assert relative_error(tensors["state"], exact["state"]) < tolerance
