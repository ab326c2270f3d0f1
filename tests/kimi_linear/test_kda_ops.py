"""Kimi Delta Attention: every form against a float64 recurrence, on fresh and on adversarial inputs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.ops import chunk_kda, fused_recurrent_kda, kda_gate, l2_normalize, recurrent_step
from kimi_linear.ops.reference import beta_gradient_terms, recurrent_kda

Inputs = dict[str, torch.Tensor]


def draw(
    tokens: int,
    heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 8,
    groups: int = 1,
    batch: int = 1,
    gate: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Normalised q and k, values of both signs, decays up to exp(-gate), beta in (0, 1)."""
    value_heads = heads * groups
    return {
        "q": l2_normalize(torch.randn(batch, tokens, heads, key_dim, dtype=dtype)),
        "k": l2_normalize(torch.randn(batch, tokens, heads, key_dim, dtype=dtype)),
        "v": torch.randn(batch, tokens, value_heads, value_dim, dtype=dtype),
        "g": -gate * torch.rand(batch, tokens, value_heads, key_dim, dtype=dtype),
        "beta": torch.rand(batch, tokens, value_heads, dtype=dtype),
    }


def draw_state(sequences: int, inputs: Inputs) -> torch.Tensor:
    v, k = inputs["v"], inputs["k"]
    return torch.randn(sequences, v.shape[2], k.shape[3], v.shape[3], dtype=v.dtype)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def oracle(
    inputs: Inputs, cu_seqlens: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each packed sequence on its own, token by token, in float64."""
    groups = inputs["v"].shape[2] // inputs["q"].shape[2]
    exact = {name: x.double() for name, x in inputs.items()}
    exact["q"], exact["k"] = (exact[name].repeat_interleave(groups, 2) for name in ("q", "k"))
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        parts = {name: x[:, start:end] for name, x in exact.items()}
        scale = exact["q"].shape[-1] ** -0.5
        o, s = recurrent_kda(**parts, scale=scale, state=state[n : n + 1].double())
        outputs.append(o)
        states.append(s)
    return torch.cat(outputs, 1), torch.cat(states)


def error(actual: torch.Tensor, expected: torch.Tensor, typical: float = 0.0) -> float:
    """Root mean square error, relative to that of `expected`, or to `typical` where that is larger: of few
    numbers, sums of both signs, all may happen to be small.
    """
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    least = max(typical * expected.numel() ** 0.5, 1e-30)
    return float(difference / expected.double().norm().clamp_min(least))


def test_the_recurrence_is_the_papers_equation() -> None:
    inputs = draw(5, heads=1, key_dim=4, value_dim=3, dtype=torch.float64)
    state = torch.randn(4, 3, dtype=torch.float64)
    o, final = recurrent_kda(**inputs, scale=0.7, state=state[None, None])
    for t in range(5):
        q, k, v, g = (inputs[name][0, t, 0] for name in ("q", "k", "v", "g"))
        beta = inputs["beta"][0, t, 0]
        state = (torch.eye(4) - beta * torch.outer(k, k)) @ torch.diag(g.exp()) @ state
        state = state + beta * torch.outer(k, v)
        torch.testing.assert_close(o[0, t, 0], 0.7 * state.t() @ q)
    torch.testing.assert_close(final[0, 0], state)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    heads=st.integers(1, 2),
    groups=st.integers(1, 2),
    key_dim=st.integers(1, 24),
    value_dim=st.integers(1, 24),
    gate=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_both_forms_equal_the_float64_recurrence_on_any_packing(
    lengths: list[int], heads: int, groups: int, key_dim: int, value_dim: int, gate: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = draw(sum(lengths), heads, key_dim, value_dim, groups, gate=gate)
    cu_seqlens = boundaries(lengths)
    state = draw_state(len(lengths), inputs)
    expected_o, expected_state = oracle(inputs, cu_seqlens, state)
    # Unit keys and queries, values and states of size 1: so large are a key's channels and what is read.
    typical = key_dim**-0.5
    for form in (chunk_kda, fused_recurrent_kda):
        o, final = form(**inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        assert error(o, expected_o, typical) < 1e-5
        assert error(final, expected_state, typical) < 1e-5


def collinear_keys(inputs: Inputs) -> None:
    inputs["k"][:] = l2_normalize(inputs["k"][:, :1] + 1e-3 * torch.randn_like(inputs["k"]))
    inputs["beta"][:] = 0.999
    inputs["g"].mul_(1e-4)


def saturated_beta(inputs: Inputs) -> None:
    inputs["beta"][:] = 1 - 1e-6


def constant_gate(value: float) -> object:
    def apply(inputs: Inputs) -> None:
        inputs["g"][:] = value

    apply.__name__ = f"gate_{value:g}"
    return apply


def gates_of_every_size(inputs: Inputs) -> None:
    choices = torch.tensor([0.0, -1e-3, -1.0, -20.0, -1000.0])
    inputs["g"][:] = choices[torch.randint(0, 5, inputs["g"].shape)]


def rare_reset(inputs: Inputs) -> None:
    """A small gate after a huge one is lost where prefixes are subtracted."""
    inputs["g"].mul_(0.01)
    inputs["g"][:, 5:6] = -1000.0


def zero_keys(inputs: Inputs) -> None:
    inputs["k"][torch.rand(inputs["k"].shape[:3]) < 0.5] = 0.0


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 130])
@pytest.mark.parametrize(
    "make_hard",
    [
        collinear_keys,
        saturated_beta,
        constant_gate(0.0),
        constant_gate(-20.0),
        constant_gate(-1000.0),
        gates_of_every_size,
        rare_reset,
        zero_keys,
    ],
    ids=lambda function: function.__name__,
)
def test_chunks_equal_the_recurrence_where_others_broke(make_hard: object, tokens: int) -> None:
    inputs = draw(tokens, heads=2, key_dim=20, value_dim=12)
    make_hard(inputs)  # type: ignore[operator]
    cu_seqlens, state = boundaries([tokens]), draw_state(1, inputs)
    expected_o, expected_state = oracle(inputs, cu_seqlens, state)
    o, final = chunk_kda(**inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    assert error(o, expected_o) < 1e-5
    assert error(final, expected_state) < 1e-5


@pytest.mark.parametrize("make_hard", [None, gates_of_every_size, collinear_keys])
def test_gradients_equal_those_of_the_float64_recurrence(make_hard: object) -> None:
    lengths = [3, 70, 0, 129, 1]
    inputs = draw(sum(lengths), heads=2, key_dim=12, value_dim=10, groups=2, gate=0.5)
    if make_hard is not None:
        make_hard(inputs)  # type: ignore[operator]
    state, cu_seqlens = draw_state(len(lengths), inputs), boundaries(lengths)
    gradients = []
    weights: list[torch.Tensor] = []
    for exact in (False, True):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        initial = state.clone().requires_grad_()
        if exact:
            o, final = oracle(leaves, cu_seqlens, initial)
        else:
            o, final = chunk_kda(
                **leaves, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens
            )
            weights = [torch.randn_like(o), torch.randn_like(final)]
        torch.autograd.backward((o, final), [w.to(o.dtype) for w in weights])
        gradients.append({**{name: x.grad for name, x in leaves.items()}, "state": initial.grad})
    for name, gradient in gradients[0].items():
        assert error(gradient, gradients[1][name]) < 5e-5, name


def test_the_terms_of_betas_gradient_add_up_to_it() -> None:
    inputs = draw(9, batch=2, key_dim=5, value_dim=7, dtype=torch.float64)
    state = draw_state(2, inputs)
    inputs["beta"].requires_grad_()
    results = recurrent_kda(**inputs, scale=0.5, state=state)
    grads = [torch.randn_like(x) for x in results]
    (gradient,) = torch.autograd.grad(results, inputs["beta"], grads)
    terms = beta_gradient_terms(**inputs, scale=0.5, state=state, o_grad=grads[0], state_grad=grads[1])
    assert terms.shape == inputs["v"].shape
    assert error(terms.sum(-1), gradient) < 1e-12
    assert terms.norm() > 0.1 * gradient.norm()


def test_gradcheck_passes_through_every_activation() -> None:
    lengths, heads, key_dim, value_dim = [5, 0, 19], 1, 3, 2
    tokens = sum(lengths)
    shapes = [
        *[(1, tokens, heads, key_dim)] * 2,
        (1, tokens, heads, value_dim),
        (1, tokens, heads, key_dim),
        (1, tokens, heads),
        (heads,),
        (heads * key_dim,),
        (len(lengths), heads, key_dim, value_dim),
    ]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, g, beta, A_log, dt_bias, state = tensors
        return chunk_kda(  # type: ignore[return-value]
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            A_log=A_log,
            dt_bias=dt_bias,
            cu_seqlens=boundaries(lengths),
        )

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("form", [chunk_kda, fused_recurrent_kda])
def test_changing_the_future_leaves_the_past_bit_for_bit(form: object) -> None:
    inputs = draw(150, heads=2, key_dim=16, value_dim=16)
    before = form(**inputs)[0]  # type: ignore[operator]
    for cut in (1, 17, 63, 64, 100, 149):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name, x in draw(150 - cut, heads=2, key_dim=16, value_dim=16, gate=50.0).items():
            changed[name][:, cut:] = x
        after = form(**changed)[0]  # type: ignore[operator]
        assert torch.equal(before[:, :cut], after[:, :cut]), cut


def test_changing_one_packed_sequence_leaves_the_others_bit_for_bit() -> None:
    lengths = [30, 64, 1, 90]
    inputs = draw(sum(lengths))
    cu_seqlens, state = boundaries(lengths), draw_state(4, inputs)
    before = chunk_kda(**inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    for n in range(4):
        changed = {name: x.clone() for name, x in inputs.items()}
        changed["v"][:, cu_seqlens[n] : cu_seqlens[n + 1]] *= -1e20
        after = chunk_kda(**changed, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[cu_seqlens[n] : cu_seqlens[n + 1]] = False
        assert torch.equal(before[0][:, others], after[0][:, others])
        assert not torch.equal(before[0], after[0])
        assert torch.equal(
            before[1].index_select(0, (torch.arange(4) != n).nonzero().squeeze(1)),
            after[1].index_select(0, (torch.arange(4) != n).nonzero().squeeze(1)),
        )


def test_a_batch_equals_its_rows_packed() -> None:
    inputs = draw(70, batch=3)
    state = draw_state(3, inputs)
    o, final = chunk_kda(**inputs, initial_state=state, output_final_state=True)
    flat = {name: x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
    packed_o, packed_final = chunk_kda(
        **flat, initial_state=state, output_final_state=True, cu_seqlens=boundaries([70] * 3)
    )
    assert torch.equal(o.flatten(0, 1), packed_o[0])
    assert torch.equal(final, packed_final)


def test_a_thousand_tiny_sequences_equal_the_recurrence() -> None:
    lengths = torch.randint(0, 4, (1000,)).tolist()
    inputs = draw(sum(lengths), heads=1)
    cu_seqlens, state = boundaries(lengths), draw_state(1000, inputs)
    o, final = chunk_kda(**inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    expected_o, expected_state = oracle(inputs, cu_seqlens, state)
    assert error(o, expected_o) < 1e-5
    assert error(final, expected_state) < 1e-5


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(2, 150), data=st.data())
def test_stopping_anywhere_and_going_on_from_the_state_changes_nothing(
    tokens: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, tokens - 1))
    inputs = draw(tokens)
    whole_o, whole_state = chunk_kda(**inputs, output_final_state=True)
    first_o, state = chunk_kda(**{n: x[:, :cut] for n, x in inputs.items()}, output_final_state=True)
    rest = {name: x[:, cut:] for name, x in inputs.items()}
    rest_o, final = fused_recurrent_kda(**rest, initial_state=state, output_final_state=True)
    assert error(torch.cat((first_o, rest_o), 1), whole_o) < 1e-5
    assert error(final, whole_state) < 1e-5


def test_a_decode_step_advances_every_sequence_by_one_token() -> None:
    inputs = draw(1, batch=7, key_dim=5, value_dim=9)
    state = draw_state(7, inputs)
    untouched = state.clone()
    q, k, v, g, beta = (inputs[name][:, 0] for name in ("q", "k", "v", "g", "beta"))
    o, after = recurrent_step(q, k, v, g, beta, state, scale=5**-0.5)
    expected_o, expected_state = chunk_kda(**inputs, initial_state=state, output_final_state=True)
    assert error(o, expected_o[:, 0]) < 1e-6
    assert error(after, expected_state) < 1e-6
    assert torch.equal(state, untouched)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_activations_inside_the_call_equal_those_before_it(lower_bound: float | None) -> None:
    q, k, v, f = (torch.randn(1, 40, 2, 6) for _ in range(4))
    b, A_log, dt_bias = torch.randn(1, 40, 2), torch.randn(2), torch.randn(12)
    inside, _ = chunk_kda(
        q,
        k,
        v,
        f,
        b,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
    )
    shifted = f + dt_bias.view(2, 6)
    rate = A_log.exp().view(2, 1)
    if lower_bound is None:
        g = -rate * torch.log1p(shifted.exp())
    else:
        g = lower_bound / (1 + torch.exp(-rate * shifted))
    unit = [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    outside, _ = chunk_kda(*unit, v, g, 1 / (1 + torch.exp(-b)))
    assert error(inside, outside) < 1e-5


def test_the_bounded_gate_is_another_function_and_not_a_clamp() -> None:
    f, A_log = torch.linspace(-3, 3, 13).view(13, 1, 1), torch.zeros(1)
    bounded, unbounded = kda_gate(f, A_log, lower_bound=-5.0), kda_gate(f, A_log)
    assert bounded.min() > -5
    assert (bounded < 0).all()
    assert not torch.allclose(bounded, unbounded.clamp(min=-5))
    assert torch.equal(kda_gate(f, None, lower_bound=-5.0), bounded)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = {name: x.bfloat16() for name, x in draw(100).items()}
    o, final = chunk_kda(**inputs, output_final_state=True)
    exact, exact_state = chunk_kda(**{name: x.float() for name, x in inputs.items()}, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, exact.bfloat16())
    assert final.dtype == torch.float32
    assert torch.equal(final, exact_state)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_pairwise_decays_are_never_held_for_a_whole_sequence() -> None:
    tokens, key_dim = 512, 64
    inputs = {name: x.requires_grad_() for name, x in draw(tokens, 1, key_dim, key_dim).items()}
    with LargestTensor() as largest:
        chunk_kda(**inputs)[0].sum().backward()
    assert largest.elements <= 4 * tokens * key_dim


def test_an_empty_batch_gives_back_its_states() -> None:
    inputs = draw(0)
    state = draw_state(2, inputs)
    for form in (chunk_kda, fused_recurrent_kda):
        o, final = form(
            **inputs, initial_state=state, output_final_state=True, cu_seqlens=torch.tensor([0, 0, 0])
        )
        assert o.shape == (1, 0, 2, 8)
        assert torch.equal(final, state)
