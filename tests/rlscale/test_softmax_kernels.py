"""The learner's softmax kernels against float64 under Triton's interpreter.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from rlscale.learner import logprobs

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_softmax_kernels_agree_with_pytorch_under_the_interpreter() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from kimi_linear.ops.triton import softmax

    @pytest.mark.parametrize("vocabulary", [1, 50, softmax.BLOCK, 2 * softmax.BLOCK + 77])
    @pytest.mark.parametrize("spread", [0.01, 3.0, 1000.0])
    def test_statistics_and_gradient(vocabulary: int, spread: float) -> None:
        logits = spread * torch.randn(5, vocabulary) + 10 * torch.randn(5, 1)
        targets, scales = torch.randint(vocabulary, (5,)), torch.randn(5)
        exact = logits.double()
        expected = logprobs.softmax_statistics(exact.clone(), targets, 0.7)
        found = softmax.softmax_statistics(logits, targets, 0.7)
        # A log-probability is a difference of logits in float32, so it is as exact as they are.
        for x, want in zip(found, expected, strict=True):
            torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=2e-6 * max(1.0, spread))
        arguments = targets, expected[2], scales.double(), 0.7
        gradient = logprobs.softmax_gradient(exact.clone(), *arguments, torch.float64)
        exactness = 1e-3 if spread == 1000.0 else 1e-5
        # The interpreter cuts where a GPU rounds to nearest.
        for dtype, tolerance in ((torch.float32, exactness), (torch.bfloat16, 2**-7)):
            rounded = softmax.softmax_gradient(logits, targets, found[2], scales, 0.7, dtype)
            assert rounded.dtype == dtype
            torch.testing.assert_close(rounded.double(), gradient, rtol=tolerance, atol=1e-3 * tolerance)

    def test_what_is_not_finite_shows() -> None:
        logits = torch.zeros(2, 50)
        logits[1, 7] = float("nan")
        found = softmax.softmax_statistics(logits, torch.tensor([3, 3]), 1.0)
        assert [bool(x[0].isfinite()) for x in found] == [True] * 3
        assert [bool(x[1].isfinite()) for x in found] == [False] * 3
