"""Calls of the KDA operators that have no meaning are refused in one line that names the argument."""

import inspect

import pytest
import torch

from kimi_linear.ops import chunk_kda, fused_recurrent_kda
from kimi_linear.ops.arguments import check_cu_seqlens


def call(form: object, **changes: object) -> None:
    arguments: dict[str, object] = {
        "q": torch.randn(1, 6, 2, 4),
        "k": torch.randn(1, 6, 2, 4),
        "v": torch.randn(1, 6, 4, 3),
        "g": -torch.rand(1, 6, 4, 4),
        "beta": torch.rand(1, 6, 4),
    }
    form(**{**arguments, **changes})  # type: ignore[operator]


@pytest.mark.parametrize("form", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(6, 2, 4)}, "q must be"),
        ({"k": torch.randn(1, 6, 2, 5)}, "k must have q's shape"),
        ({"v": torch.randn(1, 5, 4, 3)}, "v must be"),
        ({"v": torch.randn(1, 6, 3, 3)}, "multiple of the 2 heads"),
        ({"v": torch.randn(1, 6, 4, 0)}, "must be positive"),
        ({"g": torch.randn(1, 6, 2, 4)}, r"g must be \[B, T, HV, K\] = \[1, 6, 4, 4\]"),
        ({"beta": torch.rand(1, 6, 2)}, "beta must be"),
        ({"beta": torch.ones(1, 6, 4, dtype=torch.int64)}, "beta must be a floating point"),
        ({"v": torch.randn(1, 6, 4, 3).bfloat16()}, "share one dtype"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, r"initial_state must be \[N, HV, K, V\]"),
        (
            {"initial_state": torch.zeros(1, 4, 4, 3, dtype=torch.float16)},
            "initial_state must be torch.float32",
        ),
        ({"initial_state": torch.zeros(2, 4, 4, 3), "cu_seqlens": torch.tensor([0, 6])}, r"= \[1, 4, 4, 3\]"),
        ({"use_gate_in_kernel": True}, "needs A_log"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(2)}, "A_log must hold HV = 4"),
        (
            {"use_gate_in_kernel": True, "A_log": torch.zeros(4), "dt_bias": torch.zeros(4)},
            "dt_bias must hold",
        ),
        ({"use_gate_in_kernel": True, "lower_bound": 5.0}, "lower_bound must be negative"),
        ({"A_log": torch.zeros(4)}, "A_log given but use_gate_in_kernel is False"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "from 0 to T = 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "must not decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0])}, r"\[N \+ 1\]"),
        (
            {
                "q": torch.randn(2, 6, 2, 4),
                "k": torch.randn(2, 6, 2, 4),
                "v": torch.randn(2, 6, 2, 4),
                "g": torch.randn(2, 6, 2, 4),
                "beta": torch.rand(2, 6, 2),
                "cu_seqlens": torch.tensor([0, 6]),
            },
            "B must be 1, got 2",
        ),
    ],
)
def test_a_meaningless_call_is_refused_in_one_line(
    form: object, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(form, **changes)
    assert "\n" not in str(caught.value)


def test_boundaries_on_another_device_are_refused_and_values_on_a_gpu_are_not_waited_for() -> None:
    elsewhere = torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="cu_seqlens is on meta but the tokens are on cpu"):
        call(chunk_kda, cu_seqlens=elsewhere)
    assert check_cu_seqlens(elsewhere, 1, 6, elsewhere.device) == 2


def test_both_operators_take_the_same_named_arguments_and_no_others() -> None:
    parameters = inspect.signature(chunk_kda).parameters
    assert parameters == inspect.signature(fused_recurrent_kda).parameters
    assert list(parameters) == [
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "output_final_state",
        "use_qk_l2norm_in_kernel",
        "use_gate_in_kernel",
        "use_beta_sigmoid_in_kernel",
        "A_log",
        "dt_bias",
        "lower_bound",
        "cu_seqlens",
    ]
    with pytest.raises(TypeError, match="output_finale_state"):
        call(chunk_kda, output_finale_state=True)
