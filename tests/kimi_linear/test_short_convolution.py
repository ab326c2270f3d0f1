"""The short convolution over packed sequences, its state and its single step."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.config import preset
from kimi_linear.layers import KimiDeltaAttention, PackedSequences
from kimi_linear.ops import convolution_state, convolution_step, convolve_cached, short_convolution


def expected_outputs(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own convolution of each sequence with its history before it."""
    width = weight.shape[1]
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows = torch.cat((state[n], x[start:end]))
        filtered = F.conv1d(rows.t()[None], weight[:, None], groups=len(weight)) if end > start else None
        outputs.append(x[:0] if filtered is None else F.silu(filtered[0].t()))
        states.append(rows[len(rows) - (width - 1) :])
    return torch.cat(outputs), torch.stack(states)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    width=st.integers(2, 5),
    with_state=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packed_convolution_equals_each_sequence_alone(
    lengths: list[int], width: int, with_state: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    x, weight = torch.randn(sum(lengths), 3), torch.randn(3, width)
    state = torch.randn(len(lengths), width - 1, 3) if with_state else torch.zeros(len(lengths), width - 1, 3)
    expected, expected_state = expected_outputs(x, weight, cu_seqlens, state)
    given_state = state if with_state else None
    torch.testing.assert_close(short_convolution(x, weight, cu_seqlens, given_state), expected)
    torch.testing.assert_close(convolution_state(x, width, cu_seqlens, given_state), expected_state)


def test_a_cache_keeps_what_sequences_go_on_from() -> None:
    lengths, cut = [7, 1, 5], torch.tensor([3, 0, 5])
    x, weight = torch.randn(sum(lengths), 6), torch.randn(6, 4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    whole = short_convolution(x, weight, cu_seqlens)
    states, slots = torch.zeros(9, 3, 6), torch.tensor([4, 8, 1], dtype=torch.int32)
    places = torch.arange(len(x))
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    early = places - cu_seqlens[:-1][sequence] < cut[sequence]
    for chosen, counts in ((early, cut), (~early, torch.tensor(lengths) - cut)):
        bounds = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
        y = convolve_cached(x[chosen], weight, bounds, states, slots, parts=2)
        assert y.shape == (2, int(chosen.sum()), 3)
        assert y.is_contiguous()
        torch.testing.assert_close(torch.cat(y.unbind(), -1), whole[chosen])
    assert torch.equal(states[slots.long()], convolution_state(x, 4, cu_seqlens))
    assert not states[[0, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": 4}, "parts=4 does not divide x's 6 channels"),
        ({"states": torch.zeros(9, 2, 6)}, r"states must be \[slots, W - 1, C\] with \[3, 6\] contiguous"),
        ({"states": torch.zeros(9, 6, 3).transpose(1, 2)}, "contiguous"),
        ({"slots": torch.tensor([1])}, "cu_seqlens has 2 sequences and slots 1"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(9, 6),
        "weight": torch.randn(6, 4),
        "cu_seqlens": torch.tensor([0, 4, 9]),
        "states": torch.zeros(9, 3, 6),
        "slots": torch.tensor([1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        convolve_cached(**{**arguments, **changes})  # type: ignore[arg-type]


def test_steps_equal_the_convolution_of_the_whole() -> None:
    x, weight = torch.randn(4, 10, 6), torch.randn(6, 4)
    whole = short_convolution(x.flatten(0, 1), weight, torch.arange(5) * 10).view(4, 10, 6)
    state = torch.zeros(4, 3, 6)
    for t in range(10):
        y, state = convolution_step(x[:, t], weight, state)
        torch.testing.assert_close(y, whole[:, t])
    assert torch.equal(state, x[:, -3:])


def test_gradcheck_passes_for_inputs_weights_and_state() -> None:
    cu_seqlens = torch.tensor([0, 1, 1, 8, 10])
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: short_convolution(t[0], t[1], cu_seqlens, t[2]), (x, weight, state)
    )
    assert torch.autograd.gradcheck(lambda *t: short_convolution(t[0], t[1], cu_seqlens), (x, weight))


def test_result_has_the_inputs_dtype_whatever_the_filters() -> None:
    x, weight = torch.randn(9, 2).bfloat16(), torch.randn(2, 4)
    y = short_convolution(x, weight, torch.tensor([0, 5, 9]))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, short_convolution(x, weight.bfloat16(), torch.tensor([0, 5, 9])))


def test_no_gradient_crosses_a_boundary() -> None:
    x = torch.randn(9, 2, requires_grad=True)
    short_convolution(x, torch.randn(2, 4), torch.tensor([0, 5, 9]))[5:].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:5], torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(9, 3)}, "x must be"),
        ({"weight": torch.randn(2, 1)}, "W at least 2"),
        ({"initial_state": torch.zeros(1, 3, 2)}, r"\[2, 3, 2\], got \[1, 3, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "from 0 to T = 9"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.randn(9, 2), "weight": torch.randn(2, 4), "cu_seqlens": torch.tensor([0, 5, 9])}
    with pytest.raises(ValueError, match=message):
        short_convolution(**{**arguments, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, state = (torch.randn(shape).to(dtype) for shape in ((40, 24), (24, 4), (2, 3, 24)))
    boundaries = torch.tensor([0, 17, 40])
    exact = short_convolution(x.double(), weight.double(), boundaries, state.double())
    assert (short_convolution(x, weight, boundaries, state) == exact.to(dtype)).float().mean() > 0.99
    exact_step, _ = convolution_step(x[:2].double(), weight.double(), state.double())
    y, _ = convolution_step(x[:2], weight, state)
    assert (y == exact_step.to(dtype)).float().mean() > 0.95


@torch.no_grad()
def test_a_kda_layer_rounds_alike_in_chunks_and_token_by_token() -> None:
    config = preset("tiny")
    layer = KimiDeltaAttention(config)
    for parameter in layer.parameters():
        parameter.uniform_(-0.3, 0.3)
    layer.bfloat16()
    x = torch.randn(40, config.hidden_size).bfloat16()
    whole = layer(x, PackedSequences.checked(torch.tensor([0, 40]), 40))
    _, cache = layer.prefill(x[:9], PackedSequences.checked(torch.tensor([0, 9]), 9))
    tokens = torch.cat([layer.decode(x[t : t + 1], cache) for t in range(9, 40)])
    # A rounding more on one side alone would show as several thousandths.
    assert ((tokens - whole[9:]).float().norm() / whole[9:].float().norm()) < 1.5e-3
