"""The Triton kernels against the float64 recurrence, on the CPU under Triton's interpreter.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from gradient_terms import rate_gradient_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.ops.arguments import activate, kda_gate, l2_normalize
from kimi_linear.ops.conv import convolution_step
from kimi_linear.ops.reference import beta_gradient_terms, recurrent_kda, recurrent_step

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernels_agree_with_the_recurrence_under_the_interpreter() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from kimi_linear.ops.triton import chunk as chunk_module
    from kimi_linear.ops.triton import chunk_kda, fused_recurrent_kda, kda_decode_step

    NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

    def relative_error(x: torch.Tensor, expected: torch.Tensor, least: float = 1e-12) -> float:
        return float((x.double() - expected).norm() / expected.norm().clamp(min=least))

    def new_inputs(
        batch: int, tokens: int, heads: int, value_heads: int, key_dim: int, value_dim: int, sequences: int
    ) -> dict[str, torch.Tensor]:
        return {
            "q": torch.randn(batch, tokens, heads, key_dim),
            "k": torch.randn(batch, tokens, heads, key_dim),
            "v": torch.randn(batch, tokens, value_heads, value_dim),
            "g": torch.randn(batch, tokens, value_heads, key_dim),
            "beta": torch.randn(batch, tokens, value_heads),
            "A_log": torch.empty(value_heads).uniform_(1, 16).log(),
            "dt_bias": torch.randn(value_heads * key_dim) - 2,
            "initial_state": torch.randn(sequences, value_heads, key_dim, value_dim),
        }

    def call(kernel, inputs, activated=False, lower_bound=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
        tensors = {n: x for n, x in inputs.items() if not (activated and n in ("A_log", "dt_bias"))}
        return kernel(
            **tensors,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=not activated,
            use_beta_sigmoid_in_kernel=not activated,
            lower_bound=lower_bound,
            cu_seqlens=cu_seqlens,
        )

    def sequences_of(inputs, activated=False, lower_bound=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
        """What `recurrent_kda` takes, in float64, sequence by sequence, and the tokens of each."""
        x = {name: tensor.double() for name, tensor in inputs.items()}
        gates = (None, None) if activated else (x["A_log"], x["dt_bias"])
        tensors = activate(
            *(x[n] for n in NAMES[:5]), True, not activated, not activated, *gates, lower_bound
        )
        scale = x["q"].shape[-1] ** -0.5
        if cu_seqlens is None:
            return [(*tensors, scale, x["initial_state"])], [slice(None)]
        tokens = [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]
        states = x["initial_state"].split(1)
        parts = [
            (*(t[:, at] for t in tensors), scale, state) for at, state in zip(tokens, states, strict=True)
        ]
        return parts, tokens

    def reference(inputs, **options):  # type: ignore[no-untyped-def]
        parts, _ = sequences_of(inputs, **options)
        outputs, states = zip(*(recurrent_kda(*part) for part in parts), strict=True)
        return torch.cat(outputs, 1), torch.cat(states)

    def norms_of_terms(inputs, o_grad, state_grad, g_grad, lower_bound=None, **options):  # type: ignore[no-untyped-def]
        """Of the gradients that are one number a token or a head: the norms of what they add up."""
        parts, tokens = sequences_of(inputs, lower_bound=lower_bound, **options)
        state_grads = state_grad.split(len(state_grad) // len(parts))
        terms = [
            beta_gradient_terms(*part, o_grad[:, at], grad)
            for part, at, grad in zip(parts, tokens, state_grads, strict=True)
            if part[0].shape[1]
        ]
        terms = torch.cat(terms, 1)
        if options.get("activated"):
            return {"beta": float(terms.norm())}
        beta = inputs["beta"].detach().double().sigmoid().unsqueeze(-1)
        gate = (inputs[name] for name in ("g", "A_log", "dt_bias"))
        rate_terms = rate_gradient_terms(*gate, lower_bound, g_grad)
        return {"beta": float((terms * beta * (1 - beta)).norm()), "A_log": float(rate_terms.norm())}

    def check(inputs, tolerance=1e-5, **options):  # type: ignore[no-untyped-def]
        """Outputs, states and every gradient against float64."""
        unused = ("A_log", "dt_bias") if options.get("activated") else ()
        used = {name: x.requires_grad_() for name, x in inputs.items() if name not in unused}
        o, state = call(chunk_kda, inputs, **options)
        expected_o, expected_state = reference(inputs, **options)
        assert relative_error(o.detach(), expected_o.detach()) < tolerance
        assert relative_error(state.detach(), expected_state.detach()) < tolerance
        o_grad, state_grad = torch.randn_like(o), torch.randn_like(state)
        leaves = list(used.values())
        grads = torch.autograd.grad((o, state), leaves, (o_grad, state_grad))
        exact = (o_grad.double(), state_grad.double())
        expected = torch.autograd.grad((expected_o, expected_state), leaves, exact)
        wanted = {name: grad.double() for name, grad in zip(used, expected, strict=True)}
        terms = norms_of_terms(inputs, *exact, wanted["g"], **options)
        for (name, want), grad in zip(wanted.items(), grads, strict=True):
            assert relative_error(grad, want, terms.get(name, 1e-12)) < tolerance, name

    @pytest.mark.parametrize(
        ("tokens", "heads", "value_heads", "key_dim", "value_dim", "lower_bound"),
        [
            (65, 1, 1, 16, 16, None),
            (130, 1, 2, 24, 40, -5.0),
            (1, 2, 2, 16, 32, None),
            (15, 1, 1, 80, 16, None),
        ],
    )
    def test_chunks_give_the_recurrences_results_and_gradients(
        tokens: int, heads: int, value_heads: int, key_dim: int, value_dim: int, lower_bound: float | None
    ) -> None:
        check(new_inputs(1, tokens, heads, value_heads, key_dim, value_dim, 1), lower_bound=lower_bound)

    def test_a_batch_of_rows_gives_the_recurrences_results_and_gradients() -> None:
        check(new_inputs(2, 63, 1, 1, 16, 16, 2))

    def test_packed_sequences_of_any_length_do_not_see_each_other() -> None:
        bounds = torch.tensor([0, 1, 1, 65, 100])
        check(new_inputs(1, 100, 1, 1, 16, 16, 4), cu_seqlens=bounds)

    def extreme_gates(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shape = inputs["g"].shape
        choice = torch.tensor([0.0, -20.0, -1000.0, -0.1])[torch.randint(0, 4, shape)]
        inputs["g"] = torch.where(torch.rand(shape) < 0.3, choice, -torch.rand(shape))
        inputs["beta"] = torch.rand(inputs["beta"].shape)
        return inputs

    def test_gates_of_zero_and_minus_a_thousand_stay_exact() -> None:
        check(extreme_gates(new_inputs(1, 80, 1, 1, 16, 16, 1)), activated=True)

    def test_near_collinear_keys_with_full_beta_do_not_blow_up() -> None:
        inputs = extreme_gates(new_inputs(1, 64, 1, 1, 32, 16, 1))
        inputs["k"] = torch.randn(1, 1, 1, 32) + 0.02 * inputs["k"]
        inputs["g"] = -0.01 * torch.rand(inputs["g"].shape)
        inputs["beta"] = torch.full(inputs["beta"].shape, 0.999)
        o, state = call(chunk_kda, inputs, activated=True)
        expected_o, expected_state = reference(inputs, activated=True)
        assert relative_error(o, expected_o) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    def test_beta_of_zero_has_its_gradient() -> None:
        inputs = extreme_gates(new_inputs(1, 20, 1, 1, 16, 16, 1))
        inputs["beta"][:, ::3] = 0.0
        check(inputs, activated=True)

    def test_keys_of_zero_leave_only_the_initial_state() -> None:
        inputs = new_inputs(1, 66, 1, 1, 16, 16, 1)
        inputs["k"].zero_()
        o, state = call(chunk_kda, inputs)
        expected_o, expected_state = reference(inputs)
        assert relative_error(o, expected_o) < 1e-5
        assert relative_error(state, expected_state) < 1e-5

    def test_changing_the_future_changes_no_bit_before_it() -> None:
        inputs = new_inputs(1, 70, 1, 1, 16, 16, 1)
        before, _ = call(chunk_kda, inputs)
        for cut in (21, 66):
            changed = {name: x.clone() for name, x in inputs.items()}
            for name in NAMES[:5]:
                changed[name][:, cut:] = 30 * torch.randn_like(changed[name][:, cut:])
            after, _ = call(chunk_kda, changed)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])

    @settings(max_examples=5, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(lambda n: 0 < sum(n) < 150),
        groups=st.integers(1, 3),
        key_dim=st.integers(16, 40),
        value_dim=st.integers(16, 40),
        seed=st.integers(0, 2**16),
    )
    def test_chunks_equal_the_token_by_token_kernel(
        lengths: list[int], groups: int, key_dim: int, value_dim: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        inputs = new_inputs(1, sum(lengths), 1, groups, key_dim, value_dim, len(lengths))
        with torch.no_grad():
            chunk = call(chunk_kda, inputs, cu_seqlens=bounds)
            token = call(fused_recurrent_kda, inputs, cu_seqlens=bounds)
        for x, expected in zip(chunk, token, strict=True):
            assert relative_error(x, expected.double()) < 1e-5

    def test_a_training_step_prepares_once_and_what_needs_no_gradient_keeps_nothing_for_one(
        monkeypatch,
    ) -> None:  # type: ignore[no-untyped-def]
        prepared, original = [], chunk_module.prepare

        def prepare(*arguments, **options):  # type: ignore[no-untyped-def]
            prepared.append(original(*arguments, **options))
            return prepared[-1]

        monkeypatch.setattr(chunk_module, "prepare", prepare)
        inputs = new_inputs(1, 20, 1, 1, 16, 16, 1)
        with torch.no_grad():
            call(chunk_kda, inputs)
        call(chunk_kda, inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]
        o, state = call(chunk_kda, inputs)
        for _ in range(2):
            torch.autograd.grad(o.sum() + state.sum(), leaves, retain_graph=True)
        assert [x.inverse is not None for x in prepared] == [False, False, True]

    @settings(max_examples=3, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
        groups=st.integers(1, 2),
        key_dim=st.integers(16, 32),
        value_dim=st.integers(16, 32),
        seed=st.integers(0, 2**16),
    )
    def test_gradients_of_any_packing_and_head_sizes_are_the_recurrences(
        lengths: list[int], groups: int, key_dim: int, value_dim: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        inputs = new_inputs(1, sum(lengths), 1, groups, key_dim, value_dim, len(lengths))
        check(inputs, cu_seqlens=bounds)

    def test_half_precision_inputs_are_read_and_written_in_their_dtype() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            inputs = new_inputs(1, 20, 1, 1, 16, 16, 1)
            for name in NAMES[:5]:
                inputs[name] = inputs[name].to(dtype)
            o, state = call(chunk_kda, inputs)
            assert o.dtype == dtype
            assert state.dtype == torch.float32
            assert relative_error(o, reference(inputs)[0]) < 0.004

    def pages(slots: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """Random caches whose slots lie side by side in pages, with something else behind them."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        parts = torch.randn(slots, sum(sizes) + 5).split([*sizes, 5], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=False)]

    @pytest.mark.parametrize("padding", [-1, 0])
    def test_decode_step_is_the_layer_and_touches_no_other_slot(padding: int) -> None:
        sequences, heads, key_dim, value_dim, width, slots = 3, 2, 16, 24, 4, 6
        channels = heads * (2 * key_dim + value_dim)
        weight, g = torch.randn(channels, width), torch.randn(sequences, heads, key_dim)
        qkv, _, beta = torch.randn(sequences, channels + 3 + heads).split([channels, 3, heads], dim=1)
        a_log, dt_bias = torch.randn(heads), torch.randn(heads * key_dim)
        gate, norm = torch.randn(sequences, heads, value_dim), torch.randn(value_dim)
        shapes = (width - 1, channels), (heads, key_dim, value_dim)
        window, state = pages(slots, *shapes)
        rows = torch.tensor([[4, 2], [padding, 2], [1, 2]])[:, 0]
        unused = [0, 2, 3, 5]
        window[unused], state[unused] = float("nan"), float("nan")
        new_window, new_state = (
            x.copy_(y) for x, y in zip(pages(slots, *shapes), (window, state), strict=True)
        )
        o = kda_decode_step(
            qkv,
            weight,
            new_window,
            g,
            beta,
            a_log,
            dt_bias,
            new_state,
            rows,
            gate,
            norm,
            padding_slot=padding,
        )

        used = [0, 2]
        y, expected_window = convolution_step(qkv[used], weight, window[rows[used]])
        q, k, v = (
            x.view(2, heads, -1) for x in y.split([heads * key_dim, heads * key_dim, heads * value_dim], 1)
        )
        decay = kda_gate(g[used], a_log, dt_bias)
        expected, expected_state = recurrent_step(
            l2_normalize(q), l2_normalize(k), v, decay, beta[used].sigmoid(), state[rows[used]], key_dim**-0.5
        )
        expected = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-5)
        torch.testing.assert_close(o[used], expected * norm * gate[used].sigmoid(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new_state[rows[used]], expected_state, rtol=1e-4, atol=1e-5)
        assert torch.equal(new_window[rows[used]], expected_window)
        assert not o[1].any()
        assert new_state[unused].isnan().all()
        assert new_window[unused].isnan().all()

    def test_impossible_calls_are_refused_in_one_line() -> None:
        inputs = new_inputs(1, 2, 1, 1, 16, 16, 1)
        with pytest.raises(ValueError, match="float32, got"):
            call(chunk_kda, {**inputs, "q": inputs["q"].double()})
        with pytest.raises(ValueError, match="K = 272 is too large"):
            call(chunk_kda, new_inputs(1, 2, 1, 1, 272, 16, 1))
        with pytest.raises(ValueError, match="has no gradient"):
            call(fused_recurrent_kda, {**inputs, "v": inputs["v"].requires_grad_()})
