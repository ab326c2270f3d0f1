"""The gated norm of the KDA layer on the CPU."""

import pytest
import torch

from kimi_linear.ops import gated_rms_norm


def test_gated_norm_is_its_formula_in_float32_whatever_the_inputs() -> None:
    x, gate, weight = (torch.randn(shape).bfloat16() for shape in ((5, 3, 8), (5, 3, 8), (8,)))
    y = gated_rms_norm(x, gate, weight, 1e-5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = exact * weight.double() / (1 + (-gate.double()).exp())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.004, atol=1e-6)


def test_gradcheck_passes_for_inputs_gate_and_weight() -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (4, 6), (6,))]
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, eps=1e-5), leaves)


@pytest.mark.parametrize(
    ("gate", "weight", "message"),
    [((4, 5), (6,), "gate must have x's shape"), ((4, 6), (5,), r"weight must be \[d\] = \[6\]")],
)
def test_a_shape_that_does_not_fit_is_refused(
    gate: tuple[int, ...], weight: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(torch.randn(4, 6), torch.randn(gate), torch.randn(weight), 1e-5)
