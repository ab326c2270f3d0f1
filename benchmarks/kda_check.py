"""Checks the chunk kernels on a GPU against the float64 recurrence; launches every kernel for a sanitizer.

    python -m benchmarks.kda_check [--limit SECONDS] [--output benchmarks/results/kda_errors_h100.json]
    compute-sanitizer --tool memcheck python -m benchmarks.kda_check --launch-only

Fresh random inputs, seeds in the results. Relative RMS errors of the output, the final state and every
gradient; the exit status is 1 if one is above its tolerance or has not run.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from copy import copy
from functools import partial
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import timing
from kimi_linear.ops import chunk_kda, gated_rms_norm, kda_decode_step, short_convolution
from kimi_linear.ops.arguments import activate
from kimi_linear.ops.reference import beta_gradient_terms, recurrent_kda

# Of results and of gradients.
TOLERANCES = {torch.bfloat16: (0.004, 0.006), torch.float16: (0.004, 0.006), torch.float32: (1e-5, 1e-5)}
# Of beta's gradient against its terms: 0.0041 at most in 512 draws of a simulation (NOTES.md).
TERMS_TOLERANCE = 0.005
NAMES = ("q", "k", "v", "g", "beta")
MEMORY_TRIES, MEMORY_WAIT_S = 12, 5.0
PROCESSES = 8
HEAD_DIM = 128
# Of one sequence, and how often another repeats it: more than 2^31 numbers in q, and in the states that the
# backward pass keeps.
FAR_TOKENS, FAR_HEADS = 200, 64
FAR_REPEATS = {"forward": 1350, "backward": 675}
DECODE_SIZES = ((128, torch.float32), (128, torch.bfloat16), (80, torch.float32))


class Case:
    """Inputs of one call, drawn anew."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        gate: str = "unbounded",
        bounds: list[int] | torch.Tensor | None = None,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        by_terms: bool = False,
    ) -> None:
        """Args:
        shape: B, T, H, HV, K, V.
        gate: "unbounded", "bounded", or "none" for a decay that is given.
        bounds: of packed sequences.
        change: makes the inputs special, in place, before they are rounded to `dtype`.
        by_terms: whether the error of beta's gradient is taken relative to the norm of the terms that its
            sums over value channels have, where these cancel. For few heads, not packed.
        """
        self.dtype, self.gate, self.bounds, self.by_terms = dtype, gate, bounds, by_terms
        batch, tokens, heads, value_heads, key_dim, value_dim = shape
        x = {name: normal(batch, tokens, heads, key_dim) for name in "qk"}
        x["v"] = normal(batch, tokens, value_heads, value_dim)
        x["g"] = normal(batch, tokens, value_heads, key_dim)
        x["beta"] = normal(batch, tokens, value_heads)
        if gate == "none":
            x["g"] = -0.3 * F.softplus(x["g"])
        if change is not None:
            change(x)
        self.inputs = {name: tensor.to(dtype) for name, tensor in x.items()}
        if gate != "none":
            self.inputs["A_log"] = normal(value_heads).uniform_(1, 16).log()
            self.inputs["dt_bias"] = normal(value_heads * key_dim) - 3
        sequences = batch if bounds is None else len(bounds) - 1
        self.inputs["initial_state"] = normal(sequences, value_heads, key_dim, value_dim)
        self.lower_bound = -5.0 if gate == "bounded" else None

    def ours(self) -> tuple[torch.Tensor, torch.Tensor]:
        bounds = None if self.bounds is None else torch.as_tensor(self.bounds, device=timing.DEVICE)
        return chunk_kda(
            **self.inputs,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=self.gate != "none",
            use_beta_sigmoid_in_kernel=True,
            lower_bound=self.lower_bound,
            cu_seqlens=bounds,
        )

    def activated(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, g and beta in float64 as the recurrence takes them."""
        x = {name: tensor.double() for name, tensor in self.inputs.items()}
        gates = (x.get("A_log"), x.get("dt_bias"), self.lower_bound)
        return activate(*(x[name] for name in NAMES), True, self.gate != "none", True, *gates)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float64 recurrence on the same rounded inputs."""
        activated, state = self.activated(), self.inputs["initial_state"].double()
        scale = activated[0].shape[-1] ** -0.5
        if self.bounds is None:
            return recurrent_kda(*activated, scale, state)
        # Autograd keeps a few states a token: those of one sequence at a time.
        parts = [
            checkpoint(
                recurrent_kda,
                *(t[:, a:b] for t in activated),
                scale,
                state[n : n + 1],
                use_reentrant=False,
            )
            for n, (a, b) in enumerate(pairwise(self.bounds))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])

    def errors(self) -> dict[str, float]:
        leaves = [x.requires_grad_() for x in self.inputs.values()]
        o, state = self.ours()
        expected = self.exact()
        output_grads = torch.randn_like(o), torch.randn_like(state)
        grads = torch.autograd.grad((o, state), leaves, output_grads)
        wanted = torch.autograd.grad(expected, leaves, [grad.double() for grad in output_grads])
        found = zip(("o", "state", *self.inputs), (o, state, *grads), (*expected, *wanted), strict=True)
        least = {"beta": self.beta_terms(*output_grads)} if self.by_terms else {}
        return {
            name: float(
                (x.detach().double() - y.detach()).norm() / y.norm().clamp(min=least.get(name, 1e-12))
            )
            for name, x, y in found
            if y.any()
        }

    def beta_terms(self, o_grad: torch.Tensor, state_grad: torch.Tensor) -> float:
        """Norm of the terms of beta's gradient."""
        activated, state = self.activated(), self.inputs["initial_state"].double()
        scale, beta = activated[0].shape[-1] ** -0.5, activated[4].detach()
        terms = beta_gradient_terms(*activated, scale, state, o_grad.double(), state_grad.double())
        return float((terms * (beta * (1 - beta)).unsqueeze(-1)).norm())

    def results(self, o_grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output, the final state, and every gradient of the product with `o_grad`."""
        leaves = [x.requires_grad_() for x in self.inputs.values()]
        o, state = self.ours()
        return (o.detach(), state.detach(), *torch.autograd.grad(o, leaves, o_grad))

    def too_large(self, errors: dict[str, float]) -> list[str]:
        """Names of what is out of tolerance; NaN is."""
        result, gradient = TOLERANCES[self.dtype]
        limits = {name: result if name in ("o", "state") else gradient for name in errors}
        if self.by_terms:
            limits["beta"] = min(gradient, TERMS_TOLERANCE)
        return [name for name, error in errors.items() if not error <= limits[name]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=timing.DEVICE)


def near_collinear(x: dict[str, torch.Tensor]) -> None:
    """Keys 2% from one another, a memory that hardly fades, beta near 1."""
    x["k"] = x["k"][:1, :1] + 0.02 * x["k"]
    x["g"] *= 0.01
    x["beta"] += 6


def extreme_gates(x: dict[str, torch.Tensor]) -> None:
    """Gates of 0, -20 and -1000 among others."""
    choice = x["g"].new_tensor([0.0, -20.0, -1000.0])[torch.randint(0, 3, x["g"].shape, device=x["g"].device)]
    x["g"] = torch.where(torch.rand_like(x["g"]) < 0.25, choice, x["g"])


def zero_keys(x: dict[str, torch.Tensor]) -> None:
    x["k"].zero_()


def tiny_bounds(sequences: int, tokens: int) -> list[int]:
    """Boundaries of random sequences, empty ones among them."""
    inner = torch.randint(0, tokens + 1, (sequences - 1,)).sort().values.tolist()
    return [0, *inner, tokens]


COLLINEAR = {"gate": "none", "change": near_collinear}
# Name, then what `Case` takes; what changed last, or has been cut off before, first. The gradient of A_log is
# one sum of both signs a head, some of them near zero. Over all heads its error is 0.0025 to 0.0041 of its
# norm; of 2 heads a draw in four passes 0.006, of 16 one in twenty or fewer, of 32 one in a hundred or fewer.
# So it is with beta's of near-collinear keys, whose norm is half that of each head's last token: of 2 heads a
# draw in a hundred passes 0.006 without a fault, of 32 none in 20,000. Few heads are judged by its terms.
CASES: tuple[tuple[str, tuple[int, ...], dict[str, object]], ...] = (
    ("near-collinear keys, beta near 1", (1, 192, 32, 32, 128, 128), COLLINEAR),
    *(
        ("near-collinear keys, two heads", (1, 192, 2, 2, 128, 128), {**COLLINEAR, "by_terms": True})
        for _ in range(3)
    ),
    ("K = 80, V = 48", (1, 130, 16, 16, 80, 48), {"dtype": torch.float32}),
    ("K = V = 128", (1, 130, 16, 16, 128, 128), {"dtype": torch.float32}),
    ("K = 33, V = 255", (1, 130, 16, 32, 33, 255), {}),
    ("K = 64, V = 100", (1, 130, 32, 32, 64, 100), {"dtype": torch.float16}),
    ("released gate", (1, 1000, 32, 32, 128, 128), {}),
    ("near-collinear keys, many tokens", (1, 1024, 16, 16, 128, 128), COLLINEAR),
    ("extreme gates", (1, 192, 2, 2, 128, 128), {"gate": "none", "change": extreme_gates}),
    ("keys of zero", (1, 192, 2, 2, 128, 128), {"gate": "none", "change": zero_keys}),
    *((f"T = {tokens}", (1, tokens, 32, 32, 128, 128), {}) for tokens in (1, 15, 63, 64, 65)),
    ("bounded gate", (1, 300, 32, 32, 128, 128), {"gate": "bounded"}),
    ("packed, grouped values", (1, 300, 16, 32, 128, 128), {"bounds": [0, 1, 1, 64, 129, 300]}),
    ("1000 tiny sequences", (1, 2500, 32, 32, 128, 128), {"bounds": tiny_bounds(1000, 2500)}),
    ("K = V = 64", (1, 200, 32, 32, 64, 64), {}),
    ("K = V = 256", (1, 200, 16, 16, 256, 256), {}),
)


def run_case(index: int) -> dict[str, object]:
    """Errors of one of CASES, and which of them are out of tolerance."""
    seed = torch.seed()
    name, shape, options = CASES[index]
    case = Case(shape, **options)
    errors = case.errors()
    return {
        "case": name, "shape": shape, "dtype": str(case.dtype).removeprefix("torch."),
        "seed": seed, "errors": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "out_of_tolerance": case.too_large(errors),
    }  # fmt: skip


def causal_and_deterministic() -> dict[str, object]:
    """Whether changing the future changes no bit before it, whether two calls give equal bits, gradients
    included, and whether calls never wait for the device.
    """
    case = Case((1, 200, 2, 2, 128, 128), bounds=[0, 1, 130, 200])
    case.bounds = torch.tensor(case.bounds, device=timing.DEVICE)
    o_grad = torch.randn_like(case.inputs["v"])
    once = case.results(o_grad)
    timing.forbid_waiting(True)
    try:
        again = case.results(o_grad)
    finally:
        timing.forbid_waiting(False)
    deterministic = all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    case = Case((1, 200, 2, 2, 128, 128))
    with torch.no_grad():
        before = case.ours()[0]
        for name in NAMES:
            case.inputs[name][:, 101:] = 30 * torch.randn_like(case.inputs[name][:, 101:])
        after = case.ours()[0]
    causal = torch.equal(before[:, :101], after[:, :101]) and not torch.equal(before, after)
    return verdict("bits", causal=causal, deterministic=deterministic)


def far_addresses() -> dict[str, object]:
    """Whether the last sequence of a batch whose tensors take more than 2^31 numbers gives the same bits as
    alone: inputs and outputs forwards, states backwards.
    """
    facts = {name: same_at_the_end(repeats, name == "backward") for name, repeats in FAR_REPEATS.items()}
    return verdict("far addresses", **facts)


def same_at_the_end(repeats: int, backward: bool) -> bool:
    shape = (1, FAR_TOKENS, FAR_HEADS, FAR_HEADS, HEAD_DIM, HEAD_DIM)
    last = Case(shape, bounds=[0, FAR_TOKENS])
    whole = copy(last)
    whole.bounds = [0, repeats * FAR_TOKENS, (repeats + 1) * FAR_TOKENS]
    whole.inputs = {
        name: x.repeat(1, repeats + 1, *[1] * (x.dim() - 2)) if name in NAMES else x
        for name, x in last.inputs.items()
    }
    whole.inputs["initial_state"] = last.inputs["initial_state"].repeat(2, 1, 1, 1)
    if not backward:
        with torch.no_grad():
            return alike(whole.ours()[0][:, -FAR_TOKENS:], last.ours()[0])
    o_grad = torch.randn_like(last.inputs["v"])
    whole_grad = torch.zeros_like(whole.inputs["v"])
    whole_grad[:, -FAR_TOKENS:] = o_grad
    gradients = slice(2, 2 + len(NAMES))
    pairs = zip(whole.results(whole_grad)[gradients], last.results(o_grad)[gradients], strict=True)
    return all(alike(x[:, -FAR_TOKENS:], y) for x, y in pairs)


def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether bits are equal; on a CPU, whose products may round differently in batches of other sizes,
    whether all but a few roundings are.
    """
    if x.is_cuda:
        return torch.equal(x, y)
    return bool((x.float() - y.float()).norm() <= 1e-3 * y.float().norm())


def verdict(case: str, **facts: bool) -> dict[str, object]:
    wrong = [name for name, holds in facts.items() if not holds]
    return {"case": case, **facts, "out_of_tolerance": wrong}


def decode_step(dim: int, state_dtype: torch.dtype) -> dict[str, object]:
    """The decode step's errors against the same step in float64; whether slots that no sequence names keep
    their NaN.
    """
    heads, width, slots = 4, 4, torch.tensor([3, -1, 0, 5], device=timing.DEVICE)
    channels = 3 * heads * dim
    x = {
        "qkv": normal(4, channels), "conv_weight": normal(channels, width) / 2,
        "conv_state": normal(8, width - 1, channels), "g": normal(4, heads, dim), "beta": normal(4, heads),
        "A_log": normal(heads).uniform_(1, 16).log(), "dt_bias": normal(heads * dim) - 3,
        "state": normal(8, heads, dim, dim), "output_gate": normal(4, heads, dim), "norm_weight": normal(dim),
    }  # fmt: skip
    unnamed = [1, 2, 4, 6, 7]
    for name in ("conv_state", "state"):
        x[name][unnamed] = float("nan")
    rounded = ("qkv", "conv_weight", "conv_state", "g", "beta", "output_gate", "norm_weight")
    x = {name: tensor.bfloat16() if name in rounded else tensor for name, tensor in x.items()}
    x["state"] = x["state"].to(state_dtype)
    exact = {name: tensor.cpu().double() for name, tensor in x.items()}
    o = kda_decode_step(**x, slots=slots)
    wanted = kda_decode_step(**exact, slots=slots.cpu())
    used = slots[slots >= 0]
    found = {"o": (o, wanted), "state": (x["state"][used], exact["state"][used.cpu()])}
    errors = {name: float((y.cpu().double() - z).norm() / z.norm()) for name, (y, z) in found.items()}
    facts = {
        "o": errors["o"] <= 0.004, "state": errors["state"] <= 0.004,
        "poison": bool(x["state"][unnamed].isnan().all() and x["conv_state"][unnamed].isnan().all()),
        "padding": not o[1].any(),
    }  # fmt: skip
    case = f"decode step, K = V = {dim}, state {str(state_dtype).removeprefix('torch.')}"
    return {**verdict(case, **facts), "errors": errors}


def launch_everything() -> None:
    """Every kernel of a layer once, forwards and backwards, on small inputs."""
    for tokens, bounds in ((130, None), (1, None), (130, [0, 1, 1, 64, 130])):
        case = Case((1, tokens, 2, 2, 128, 128), bounds=bounds)
        leaves = [x.requires_grad_() for x in case.inputs.values()]
        o, state = case.ours()
        torch.autograd.grad((o, state), leaves, (torch.randn_like(o), torch.randn_like(state)))
        with torch.no_grad():
            case.ours()
    heads, dim, width, slots = 2, 128, 4, 8
    channels = 3 * heads * dim
    bf16 = {"device": timing.DEVICE, "dtype": torch.bfloat16}
    kda_decode_step(
        torch.randn(4, channels, **bf16), torch.randn(channels, width, **bf16),
        torch.randn(slots, width - 1, channels, **bf16), torch.randn(4, heads, dim, **bf16),
        torch.randn(4, heads, **bf16), normal(heads), normal(heads * dim), normal(slots, heads, dim, dim),
        torch.tensor([3, -1, 0, 5], device=timing.DEVICE), torch.randn(4, heads, dim, **bf16),
        torch.randn(dim, **bf16),
    )  # fmt: skip
    x, weight = torch.randn(130, heads * dim, **bf16), torch.randn(heads * dim, width, **bf16)
    gate, norm = torch.randn(130, heads, dim, **bf16), torch.randn(dim, **bf16)
    leaves = [t.requires_grad_() for t in (x, weight, gate, norm)]
    y = short_convolution(x, weight, torch.tensor([0, 1, 70, 130], device=timing.DEVICE))
    y = gated_rms_norm(y.view(130, heads, dim), gate, norm, 1e-5)
    torch.autograd.grad(y, leaves, torch.randn_like(y))
    timing.synchronize()


def with_memory(case: Callable[..., dict[str, object]], *arguments: object) -> dict[str, object]:
    """What a case finds; without memory on a device that others use too, it waits for theirs."""
    for _ in range(MEMORY_TRIES - 1):
        try:
            return case(*arguments)
        except RuntimeError as error:  # PyTorch's or Triton's
            if "out of memory" not in str(error):
                raise
        finally:
            torch.cuda.empty_cache()
        time.sleep(MEMORY_WAIT_S)
    return case(*arguments)


def check(results: timing.Results, executor: Executor, limit_s: float | None = None) -> bool:
    """Whether everything is within tolerance; what has no result after `limit_s` seconds is named, and wrong.

    Results are added as they come.
    """
    begin = partial(executor.submit, with_memory)
    jobs = {begin(run_case, index): case[0] for index, case in enumerate(CASES)}
    jobs[begin(causal_and_deterministic)] = "bits"
    jobs |= {begin(decode_step, *sizes): f"decode step {sizes}" for sizes in DECODE_SIZES}
    jobs[begin(far_addresses)] = "far addresses"
    right = True
    missing = dict(jobs)
    try:
        for job in as_completed(jobs, timeout=limit_s):
            name = missing.pop(job)
            try:
                facts = job.result()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                facts = {"case": name, "error": reason, "out_of_tolerance": ["all"]}
            results.add(**facts)
            right &= not facts["out_of_tolerance"]
    except TimeoutError:
        results.add(case=f"not run within {limit_s:g} s", cases=list(missing.values()))
        right = False
        for job in missing:
            job.cancel()
        # A case under way would be waited for.
        for process in active_children():
            process.kill()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kda_errors_h100.json"))
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop then, and say what has not run")
    parser.add_argument("--launch-only", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.kda_check needs a CUDA device, found none\n")
    if arguments.launch_only:
        launch_everything()
        return
    # Side by side, because most of the time goes to compilation.
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as executor:
        right = check(timing.Results(arguments.output), executor, arguments.limit)
    parser.exit(0 if right else 1)


if __name__ == "__main__":
    main()
