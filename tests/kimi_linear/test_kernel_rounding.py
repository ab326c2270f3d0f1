"""The chunk kernels in bfloat16 against the float64 recurrence, rounding where a GPU does, on the CPU.

Both interpreters are chosen when kernels are imported, so these tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from kimi_linear.ops.arguments import activate
from kimi_linear.ops.reference import beta_gradient_terms, recurrent_kda

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_bfloat16_kernels_stay_within_their_tolerances_under_the_interpreters() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from gluon_interpreter import load_hopper_kernels
    from rounding_interpreter import rounding

    from kimi_linear.ops.triton import chunk

    hopper = load_hopper_kernels()

    @pytest.fixture(params=["portable", "hopper"])
    def kernels(request, monkeypatch):  # type: ignore[no-untyped-def]
        """Operands in bfloat16, and the kernels of one architecture."""
        monkeypatch.setattr(chunk.Problem, "operand", torch.bfloat16)
        monkeypatch.setattr(chunk.Problem, "on_hopper", lambda *_: request.param == "hopper")
        for name, kernel in vars(hopper).items():
            monkeypatch.setattr(chunk, f"{name}_kernel", kernel)
        with rounding():
            yield

    def new_inputs(tokens: int, heads: int, size: int) -> dict[str, torch.Tensor]:
        shape = (1, tokens, heads, size)
        inputs = {name: torch.randn(shape).bfloat16() for name in "qkvg"}
        inputs["beta"] = torch.randn(shape[:3]).bfloat16()
        inputs["initial_state"] = torch.randn(1, heads, size, size)
        return inputs

    def near_collinear(tokens: int, heads: int, size: int) -> dict[str, torch.Tensor]:
        """Keys 2% from one another, a lasting memory, and beta near 1 for all tokens alike."""
        inputs = new_inputs(tokens, heads, size)
        inputs["k"] = (torch.randn(1, 1, heads, size) + 0.02 * inputs["k"].float()).bfloat16()
        inputs["g"] = (-0.003 * torch.nn.functional.softplus(inputs["g"].float())).bfloat16()
        inputs["beta"] = 0.5 * inputs["beta"] + 6
        return inputs

    def errors(inputs: dict[str, torch.Tensor], use_gate: bool) -> dict[str, float]:
        """Relative RMS errors of the output, the final state and every gradient."""
        leaves = [x.requires_grad_() for x in inputs.values()]
        o, state = chunk.chunk_kda(
            **inputs,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=use_gate,
            use_beta_sigmoid_in_kernel=True,
        )
        x = {name: tensor.double() for name, tensor in inputs.items()}
        names = ("q", "k", "v", "g", "beta")
        gates = (x.get("A_log"), x.get("dt_bias"), None)
        activated = activate(*(x[name] for name in names), True, use_gate, True, *gates)
        scale = inputs["q"].shape[-1] ** -0.5
        expected = recurrent_kda(*activated, scale, x["initial_state"])
        output_grads = torch.randn_like(o), torch.randn_like(state)
        grads = torch.autograd.grad((o, state), leaves, output_grads)
        exact_grads = [grad.double() for grad in output_grads]
        wanted = torch.autograd.grad(expected, leaves, exact_grads, retain_graph=True)
        found = dict(zip(("o", "state", *inputs), (o, state, *grads), strict=True))
        right = dict(zip(found, (*expected, *wanted), strict=True))
        sizes = {name: float(tensor.detach().norm()) for name, tensor in right.items()}
        # Gradients that are sums of both signs, and few of them decide the norm: they may come near zero.
        # A_log's is one sum a head, here of one head. Beta's are sums over value channels, and those of the
        # last tokens, at which the final state's gradient arrives, are most of the norm.
        if use_gate:
            decay = activated[3]
            terms = torch.autograd.grad(expected, decay, exact_grads)[0] * decay.detach()
            sizes["A_log"] = max(sizes["A_log"], float(terms.norm()))
        terms = beta_gradient_terms(*activated, scale, x["initial_state"], *exact_grads)
        terms *= (activated[4] * (1 - activated[4])).detach().unsqueeze(-1)
        sizes["beta"] = max(sizes["beta"], float(terms.norm()))
        found = {n: float((y.double() - right[n]).detach().norm()) / sizes[n] for n, y in found.items()}
        print(found)
        return found

    def check(found: dict[str, float]) -> None:
        """Few channels leave gradients some scatter: `benchmarks.kda_check` holds whole layers to 0.006."""
        for name, error in found.items():
            assert error < (0.004 if name in ("o", "state") else 0.008), name

    @pytest.mark.usefixtures("kernels")
    def test_the_released_models_gate_stays_within_tolerance() -> None:
        inputs = new_inputs(70, 1, 32)
        inputs["A_log"] = torch.empty(1).uniform_(1, 16).log()
        inputs["dt_bias"] = torch.randn(32) - 3
        found = errors(inputs, use_gate=True)
        # Sums of both signs over 70 tokens: A_log's is one number here, and was 0.016 in one draw of 26.
        assert found.pop("A_log") < 0.03
        assert found.pop("dt_bias") < 0.012
        check(found)

    @pytest.mark.usefixtures("kernels")
    def test_near_collinear_keys_with_full_beta_stay_within_tolerance() -> None:
        found = errors(near_collinear(64, 6, 32), use_gate=False)
        # In 800 draws of a simulation of these roundings, 0.0047 at most; 0.0128 of its norm alone.
        assert found.pop("beta") < 0.006
        check(found)
