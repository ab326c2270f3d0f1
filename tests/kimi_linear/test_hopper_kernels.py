"""The Gluon kernels against the Triton kernels that they stand in for, on the CPU, both interpreted.

Both interpreters are chosen when kernels are imported, so these tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_hopper_kernels_agree_with_the_portable_ones_under_the_interpreters() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from gluon_interpreter import load_hopper_kernels
    from gradient_terms import rate_gradient_terms

    from kimi_linear.ops.triton import chunk
    from kimi_linear.ops.triton.gradient import gradient_kernel
    from kimi_linear.ops.triton.prepare import prepare_kernel
    from kimi_linear.ops.triton.scan import scan_forward_kernel
    from kimi_linear.ops.triton.scan_hopper import SLICE, STAGES

    hopper = load_hopper_kernels()

    # What the Hopper kernels take of the portable ones' constants.
    SHARED = ("HV", "K", "VARLEN", "GATE", "BETA_SIGMOID", "NORMALIZE")

    class BothKernels:
        """Launches the portable kernel, then the Hopper kernel on the same inputs, rounded to bfloat16, and
        compares what they wrote.
        """

        def __init__(self, portable, hopper, written, rounded, names, rests=()) -> None:  # type: ignore[no-untyped-def]
            self.portable, self.hopper = portable, hopper
            self.written, self.rounded, self.names, self.rests = written, rounded, names, rests
            self.errors: dict[str, float] = {}
            self.norms: dict[str, float] = {}

        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            def launch(*arguments, **constants):  # type: ignore[no-untyped-def]
                self.portable[grid](*arguments, **constants)
                own = list(arguments)
                for i in self.rests:
                    # What the number before it loses when it is rounded; portable float32 kernels have none.
                    own[i] = (own[i - 1] - own[i - 1].bfloat16().float()).bfloat16()
                for i, x in enumerate(own):
                    if isinstance(x, torch.Tensor) and i in self.rounded:
                        own[i] = x.bfloat16()
                    if isinstance(x, torch.Tensor) and i in self.written:
                        own[i] = torch.full_like(own[i], float("nan"))
                self.hopper[grid](*own, **{name: constants[name] for name in (*SHARED, *self.names)})
                for i, name in self.written.items():
                    expected = arguments[i]
                    if expected is not None:
                        # Chunks that a packed batch does not use are written by neither kernel.
                        used = ~own[i].isnan()
                        error = (own[i].float() - expected)[used].norm()
                        self.norms[name] = float(expected[used].norm().clamp(min=1e-12))
                        error /= self.norms[name]
                        self.errors[name] = max(float(error), self.errors.get(name, 0.0))
                        assert used.float().mean() > 0.5

            return launch

    def run_both(monkeypatch, inputs, **options):  # type: ignore[no-untyped-def]
        """Forward and backward with the portable kernels; errors of both Hopper kernels on the way."""
        prepare = BothKernels(
            prepare_kernel,
            hopper.prepare_hopper,
            {6: "read_keys", 7: "queries", 8: "write_keys", 9: "decay", 11: "inverse", 14: "attention"},
            {0, 1, 2, 3, 6, 7, 8, 11, 14},
            ("H",),
        )
        gradient = BothKernels(
            gradient_kernel,
            hopper.gradient_hopper,
            {13: "dq", 14: "dk", 15: "dv", 16: "dg", 17: "dbeta", 18: "bias", 19: "rate"},
            {0, 1, 2, 5, 6, 7, 9, 10, 13, 14, 15, 16, 17},
            ("V",),
            (8,),
        )
        monkeypatch.setattr(chunk, "prepare_kernel", prepare)
        monkeypatch.setattr(chunk, "gradient_kernel", gradient)
        leaves = [x.requires_grad_() for x in inputs.values()]
        o, state = chunk.chunk_kda(**inputs, output_final_state=True, **options)
        o_grad, state_grad = torch.randn_like(o).bfloat16().float(), torch.randn_like(state)
        grads = dict(zip(inputs, torch.autograd.grad((o, state), leaves, (o_grad, state_grad)), strict=True))
        if "A_log" in inputs:
            # One number a chunk and head.
            gate = (inputs[name] for name in ("g", "A_log", "dt_bias"))
            terms = rate_gradient_terms(*gate, options["lower_bound"], grads["g"])
            gradient.errors["rate"] *= min(1.0, gradient.norms["rate"] / float(terms.norm()))
        return prepare.errors, gradient.errors

    def new_inputs(tokens: int, heads: int, size: int, activated: bool) -> dict[str, torch.Tensor]:
        shape = (1, tokens, heads, size)
        inputs = {name: torch.randn(shape).bfloat16().float() for name in "qkvg"}
        inputs["beta"] = torch.randn(shape[:3]).bfloat16().float()
        if activated:
            choice = torch.tensor([0.0, -20.0, -1000.0, -0.125])[torch.randint(0, 4, shape)]
            inputs["g"] = torch.where(torch.rand(shape) < 0.3, choice, -torch.rand(shape).bfloat16().float())
            inputs["beta"] = torch.rand(shape[:3]).bfloat16().float()
        else:
            inputs["A_log"] = torch.empty(heads).uniform_(1, 16).log()
            inputs["dt_bias"] = torch.randn(heads * size) - 3
        return inputs

    @pytest.mark.parametrize(
        ("bounds", "heads", "size", "activated", "lower_bound"),
        [([0, 70], 1, 64, False, None), ([0, 1, 1, 40], 2, 32, False, -5.0), ([0, 64], 1, 32, True, None)],
    )
    def test_both_kernels_write_what_the_portable_ones_write(  # type: ignore[no-untyped-def]
        monkeypatch, bounds, heads, size, activated, lower_bound
    ) -> None:
        options = {
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": not activated,
            "use_beta_sigmoid_in_kernel": not activated,
            "lower_bound": lower_bound,
            "cu_seqlens": torch.tensor(bounds) if len(bounds) > 2 else None,
        }
        prepared, gradients = run_both(monkeypatch, new_inputs(bounds[-1], heads, size, activated), **options)
        assert set(prepared) == {"read_keys", "queries", "write_keys", "decay", "inverse", "attention"}
        assert {"dq", "dk", "dv", "dg", "dbeta"} <= set(gradients)
        print(prepared, gradients)
        assert max(prepared.values()) < 0.003
        for name, error in gradients.items():
            # Errors of few numbers scatter more.
            assert error < (0.02 if name == "rate" else 0.01), name

    class BothScans:
        """Launches the portable scan, then the Hopper scan on the same inputs, rounded to bfloat16."""

        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            def launch(*arguments, **constants):  # type: ignore[no-untyped-def]
                scan_forward_kernel[grid](*arguments, **constants)
                keys, queries, writes, decay, scales, _, _, scores, v, o, initial, final, *_ = arguments
                starts, bounds, tokens, scale = arguments[-4:]
                rounded = (x.bfloat16() for x in (keys, queries, writes))
                own_o, own_final = (
                    torch.full_like(o, float("nan")).bfloat16(),
                    torch.full_like(final, float("nan")),
                )
                hopper.scan_hopper[(constants["V"] // SLICE, grid[1])](
                    *rounded, decay, scales, scores.bfloat16(), v.bfloat16(), own_o, initial, own_final,
                    starts, bounds, tokens, scale, HV=constants["HV"], K=constants["K"], V=constants["V"],
                    VARLEN=constants["VARLEN"], DEPTH=STAGES,
                )  # fmt: skip
                self.errors = [float((x - y).norm() / y.norm()) for x, y in ((own_o, o), (own_final, final))]

            return launch

    @pytest.mark.parametrize("given", [False, True])
    @pytest.mark.parametrize(("bounds", "value_dim"), [([0, 200], 128), ([0, 1, 1, 70], 64)])
    def test_both_scans_give_the_same_outputs_and_states(monkeypatch, bounds, value_dim, given) -> None:  # type: ignore[no-untyped-def]
        scans = BothScans()
        monkeypatch.setattr(chunk, "scan_forward_kernel", scans)
        inputs = new_inputs(bounds[-1], 1, 64, activated=False)
        inputs["v"] = torch.randn(1, bounds[-1], 1, value_dim).bfloat16().float()
        with torch.no_grad():
            chunk.chunk_kda(
                **inputs,
                initial_state=torch.randn(len(bounds) - 1, 1, 64, value_dim) if given else None,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                cu_seqlens=torch.tensor(bounds) if len(bounds) > 2 else None,
            )
        assert max(scans.errors) < 0.004

    def test_a_scan_without_output_gives_what_a_sequence_makes_of_any_state() -> None:
        shape = (1, 150, 1, 64)
        x = {name: torch.randn(shape).bfloat16().float() for name in "qkvg"}
        beta, a_log, dt_bias = torch.randn(shape[:3]), torch.rand(1), torch.randn(64) - 5  # a slow gate
        bounds = torch.tensor([0, 20, 150])
        p = chunk.new_problem(x["q"], x["v"], bounds, None, True, True, True, None)
        prepared = chunk.prepare(p, x["q"], x["k"], x["g"], beta, a_log, dt_bias)
        first, last = torch.randn(2, 1, 64, 64)
        final = chunk.new_final_state(p, x["v"])
        chunk.scan_forward(p, prepared, x["v"], None, torch.stack((first, last)), final, None, None, None)
        found = torch.full((1, 1, 64, 128), float("nan"))
        hopper.scan_hopper[(2, 1)](
            *(y.bfloat16() for y in (prepared.read_keys, prepared.queries, prepared.write_keys)),
            prepared.decay, prepared.scales, prepared.attention.bfloat16(), x["v"].bfloat16(), None, None,
            found, p.starts[1:], bounds[1:], p.tokens, p.scale, HV=1, K=64, V=64, VARLEN=True, DEPTH=STAGES,
            THROUGH=True,
        )  # fmt: skip
        free, through = found[0].split(64, dim=-1)
        left = free + through @ last
        assert (left - final[1]).norm() < 0.005 * final[1].norm()
        assert through.norm() > 0.1
