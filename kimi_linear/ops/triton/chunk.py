"""`chunk_kda` on a GPU: the launches of the chunk kernels and their place in autograd."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kimi_linear.ops.triton.gradient import gradient_kernel
from kimi_linear.ops.triton.gradient_hopper import gradient_hopper_kernel
from kimi_linear.ops.triton.packing import CHUNK, chunk_table
from kimi_linear.ops.triton.prepare import prepare_kernel
from kimi_linear.ops.triton.prepare_hopper import TILE, WARPS, prepare_hopper_kernel
from kimi_linear.ops.triton.scan import scan_backward_kernel, scan_forward_kernel
from kimi_linear.ops.triton.scan_hopper import SLICE, STAGES, scan_hopper_kernel, serves
from kimi_linear.ops.triton.tiles import BOUNDED_GATE, NO_GATE, SOFTPLUS_GATE

MAX_HEAD_SIZE = 256

# Fixed by measurement (benchmarks/NOTES.md): channels of a tile and warps. Loops are not pipelined through
# shared memory: their tiles live in registers.
PREPARE_OPTIONS = {"BK": 64, "num_warps": 4, "num_stages": 1}
HOPPER_OPTIONS = {"num_warps": WARPS}
GRADIENT_OPTIONS = {"BK": 16, "num_warps": 4, "num_stages": 1}
WIDE_GRADIENT_OPTIONS = {"BK": 32, "num_warps": 2, "num_stages": 1}
SCAN_STAGES = 3


def fit(options: dict[str, int], padded_key_dim: int) -> dict[str, int]:
    """Options of a kernel, with tiles no wider than the keys."""
    return {**options, "BK": min(options["BK"], padded_key_dim)}


@dataclass(frozen=True)
class Problem:
    """One call: sizes, activations and packing, without its differentiable tensors."""

    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    sequences: int
    scale: float
    gate: int
    lower_bound: float
    sigmoid_beta: bool
    normalize: bool
    dtype: torch.dtype
    cu_seqlens: torch.Tensor | None
    table: torch.Tensor | None
    starts: torch.Tensor | None

    @property
    def chunks(self) -> int:
        """Chunks of all sequences; for packed ones an upper bound that needs no look at their lengths."""
        if self.table is not None:
            return self.table.shape[0]
        return self.batch * triton.cdiv(self.tokens, CHUNK)

    @property
    def padded_key_dim(self) -> int:
        return max(16, triton.next_power_of_2(self.key_dim))

    @property
    def padded_value_dim(self) -> int:
        return max(16, triton.next_power_of_2(self.value_dim))

    @property
    def operand(self) -> torch.dtype:
        """dtype of what the matrix units multiply: bfloat16, whose range no decay leaves, or float32."""
        # Triton's interpreter multiplies the bits of bfloat16 numbers, so there everything is float32.
        exact = self.dtype == torch.float32 or isinstance(prepare_kernel, InterpretedFunction)
        return torch.float32 if exact else torch.bfloat16

    @property
    def sizes(self) -> dict[str, object]:
        """Constants that all chunk kernels share."""
        exact = self.operand == torch.float32
        return {
            "HV": self.value_heads,
            "K": self.key_dim,
            "KP": self.padded_key_dim,
            "VARLEN": self.cu_seqlens is not None,
            "OPERAND": tl.float32 if exact else tl.bfloat16,
            "PRECISION": "tf32x3" if exact else "tf32",
        }

    @property
    def activations(self) -> dict[str, object]:
        return {"GATE": self.gate, "BETA_SIGMOID": self.sigmoid_beta, "NORMALIZE": self.normalize}

    @property
    def wide(self) -> bool:
        """Whether a chunk's keys are too large to be prefetched.

        Such scans do without warp-group products (two
        warps are too few for them): unpipelined ones read past their operands in Triton 3.6."""
        return self.padded_key_dim * self.operand.itemsize > 256

    def on_hopper(self, device: torch.device) -> bool:
        """Whether `prepare_hopper_kernel` serves this problem."""
        fits = self.operand == torch.bfloat16 and self.key_dim % TILE == 0 and self.key_dim <= 128
        return fits and torch.cuda.get_device_capability(device)[0] == 9

    def scan_options(self, backward: bool = False) -> tuple[dict[str, int], int]:
        """Value channels a program, pipeline depth, and the number of slices they make."""
        # The scan is a chain of dependent steps: fewer channels a program shorten a step and fill more
        # multiprocessors, but each slice reads all keys again. So: the widest slice that still fills them.
        block = min(64, self.padded_value_dim)
        while block > 16 and self.sequences * self.value_heads * triton.cdiv(self.value_dim, block) < 120:
            block //= 2
        if self.wide:
            block, stages, warps = 16, 1, 2
        else:
            stages = 2 if backward else SCAN_STAGES
            warps = 8 if backward and block == 64 else 4
        options = {"BV": block, "num_warps": warps, "num_stages": stages}
        return options, triton.cdiv(self.value_dim, block)


@dataclass(frozen=True)
class Prepared:
    """What `prepare_kernel` writes."""

    read_keys: torch.Tensor
    queries: torch.Tensor
    write_keys: torch.Tensor
    decay: torch.Tensor
    scales: torch.Tensor
    attention: torch.Tensor
    # For gradients alone; the rests only where operands are bfloat16.
    inverse: torch.Tensor | None
    inverse_rest: torch.Tensor | None
    write_rest: torch.Tensor | None


def prepare(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    a_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    backward: bool = False,
) -> Prepared:
    blocks = (p.chunks, p.value_heads)
    split = backward and p.operand != torch.float32
    keys = torch.empty(4 if split else 3, *blocks, CHUNK, p.padded_key_dim, dtype=p.operand, device=q.device)
    squares = torch.empty(1 + backward + split, *blocks, CHUNK, CHUNK, dtype=p.operand, device=q.device)
    decay = torch.empty(*blocks, p.padded_key_dim, dtype=torch.float32, device=q.device)
    scales = torch.empty(*blocks, 3, CHUNK, dtype=torch.float32, device=q.device)
    prepared = Prepared(
        read_keys=keys[0],
        queries=keys[1],
        write_keys=keys[2],
        decay=decay,
        scales=scales,
        attention=squares[0],
        inverse=squares[1] if backward else None,
        inverse_rest=squares[2] if split else None,
        write_rest=keys[3] if split else None,
    )
    arguments = (
        q, k, g, beta, a_log, dt_bias, prepared.read_keys, prepared.queries, prepared.write_keys,
        prepared.decay, prepared.scales, prepared.inverse, prepared.inverse_rest, prepared.write_rest,
        prepared.attention, p.table, p.cu_seqlens, p.tokens, p.sequences, p.lower_bound,
    )  # fmt: skip
    grid = (p.chunks * p.value_heads,)
    if p.on_hopper(q.device):
        prepare_hopper_kernel[grid](
            *arguments,
            H=p.heads,
            HV=p.value_heads,
            K=p.key_dim,
            VARLEN=p.cu_seqlens is not None,
            **p.activations,
            **HOPPER_OPTIONS,
        )
    else:
        prepare_kernel[grid](
            *arguments,
            H=p.heads,
            EXACT="tf32x3",
            **fit(PREPARE_OPTIONS, p.padded_key_dim),
            **p.sizes,
            **p.activations,
        )
    return prepared


def scan_forward(
    p: Problem,
    prepared: Prepared,
    v: torch.Tensor,
    o: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    states: torch.Tensor | None,
    deltas: torch.Tensor | None,
    delta_rest: torch.Tensor | None,
) -> None:
    if states is None and p.on_hopper(v.device) and serves(p.key_dim, p.value_dim):
        scan_hopper_kernel[(p.value_dim // SLICE, p.sequences * p.value_heads)](
            prepared.read_keys, prepared.queries, prepared.write_keys, prepared.decay, prepared.scales,
            prepared.attention, v, o, initial_state, final_state, p.starts, p.cu_seqlens, p.tokens, p.scale,
            HV=p.value_heads, K=p.key_dim, V=p.value_dim, VARLEN=p.cu_seqlens is not None, DEPTH=STAGES,
            **HOPPER_OPTIONS,
        )  # fmt: skip
        return
    options, slices = p.scan_options()
    scan_forward_kernel[(slices, p.sequences * p.value_heads)](
        prepared.read_keys, prepared.queries, prepared.write_keys, prepared.decay, prepared.scales,
        prepared.inverse, prepared.inverse_rest, prepared.attention, v, o, initial_state,
        final_state, states, deltas, delta_rest, p.starts, p.cu_seqlens, p.tokens, p.scale,
        V=p.value_dim,
        VP=p.padded_value_dim,
        **p.sizes,
        **options,
    )  # fmt: skip


def new_final_state(p: Problem, like: torch.Tensor) -> torch.Tensor:
    shape = (p.sequences, p.value_heads, p.key_dim, p.value_dim)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class ChunkKDA(torch.autograd.Function):
    """Keeps its inputs and what `prepare` made of them; the backward pass computes the rest again. To hold
    less between the two, checkpoint the layer.
    """

    @staticmethod
    def forward(ctx, p, q, k, v, g, beta, a_log, dt_bias, initial_state, output_final_state):
        prepared = prepare(p, q, k, g, beta, a_log, dt_bias, backward=any(ctx.needs_input_grad))
        o = torch.empty_like(v)
        final_state = new_final_state(p, v) if output_final_state else None
        scan_forward(p, prepared, v, o, initial_state, final_state, None, None, None)
        ctx.problem = p
        ctx.save_for_backward(q, k, v, g, beta, a_log, dt_bias, initial_state, *vars(prepared).values())
        return o, final_state

    @staticmethod
    def backward(ctx, do, final_state_grad):
        p: Problem = ctx.problem
        q, k, v, g, beta, a_log, dt_bias, initial_state, *prepared = ctx.saved_tensors
        do = do.contiguous()
        if final_state_grad is not None:
            final_state_grad = final_state_grad.contiguous()
        prepared = Prepared(*prepared)
        scanned = scan_again(p, prepared, v, initial_state)
        initial_state_grad = torch.empty_like(initial_state) if ctx.needs_input_grad[8] else None
        back = scan_backward(p, prepared, do, final_state_grad, initial_state_grad, scanned)
        assert back is not None
        grads = gradients(p, q, k, v, g, beta, a_log, dt_bias, prepared, do, scanned, back)
        return None, *grads, initial_state_grad, None


@dataclass(frozen=True)
class Scanned:
    """What the backward pass wants of the forward scan: states where chunks start, and delta."""

    states: torch.Tensor
    deltas: torch.Tensor
    delta_rest: torch.Tensor | None


@dataclass(frozen=True)
class ScannedBack:
    """What `scan_backward_kernel` writes."""

    state_grads: torch.Tensor
    error_grads: torch.Tensor
    beta_parts: torch.Tensor


def new_chunks(p: Problem, rows: int, device: torch.device) -> torch.Tensor:
    """[chunks, HV, rows, VP] of operands."""
    # Value channels that a slice pads are never written, and the gradient reads them: zeros.
    new = torch.empty if p.value_dim == p.padded_value_dim else torch.zeros
    return new(p.chunks, p.value_heads, rows, p.padded_value_dim, dtype=p.operand, device=device)


def scan_again(
    p: Problem, prepared: Prepared, v: torch.Tensor, initial_state: torch.Tensor | None
) -> Scanned:
    scanned = Scanned(
        states=new_chunks(p, p.padded_key_dim, v.device),
        deltas=new_chunks(p, CHUNK, v.device),
        delta_rest=None if prepared.inverse_rest is None else new_chunks(p, CHUNK, v.device),
    )
    scan_forward(p, prepared, v, None, initial_state, None, *vars(scanned).values())
    return scanned


def scan_backward(
    p: Problem,
    prepared: Prepared,
    do: torch.Tensor,
    final_state_grad: torch.Tensor | None,
    initial_state_grad: torch.Tensor | None,
    scanned: Scanned | None,
) -> ScannedBack | None:
    """Fill `initial_state_grad`; nothing else without `scanned`."""
    options, slices = p.scan_options(backward=True)
    back, deltas, delta_rest = None, None, None
    if scanned is not None:
        deltas, delta_rest = scanned.deltas, scanned.delta_rest
        back = ScannedBack(
            state_grads=new_chunks(p, p.padded_key_dim, do.device),
            error_grads=new_chunks(p, CHUNK, do.device),
            beta_parts=torch.empty(p.chunks, p.value_heads, slices, CHUNK, device=do.device),
        )
    written = (None, None, None) if back is None else vars(back).values()
    scan_backward_kernel[(slices, p.sequences * p.value_heads)](
        prepared.read_keys, prepared.queries, prepared.write_keys, prepared.write_rest, prepared.decay,
        prepared.scales, prepared.attention, deltas, delta_rest, do, final_state_grad, initial_state_grad,
        *written, p.starts, p.cu_seqlens, p.tokens, p.scale,
        V=p.value_dim,
        VP=p.padded_value_dim,
        **p.sizes,
        **options,
    )  # fmt: skip
    return back


def gradients(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    a_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    prepared: Prepared,
    do: torch.Tensor,
    scanned: Scanned,
    back: ScannedBack,
) -> tuple[torch.Tensor | None, ...]:
    """Those of q, k, v, g, beta, A_log and dt_bias."""
    blocks = (p.chunks, p.value_heads)
    groups = p.value_heads // p.heads
    per_head = (*q.shape[:2], p.value_heads, p.key_dim)
    qk_dtype = q.dtype if groups == 1 else torch.float32
    dq = torch.empty(per_head, dtype=qk_dtype, device=q.device)
    dk = torch.empty(per_head, dtype=qk_dtype, device=q.device)
    dv, dg, dbeta = torch.empty_like(v), torch.empty_like(g), torch.empty_like(beta)
    bias_parts = torch.zeros(*blocks, 4, p.key_dim, device=q.device) if dt_bias is not None else None
    rate_parts = torch.zeros(blocks, device=q.device) if a_log is not None else None
    arguments = (
        q, k, g, a_log, dt_bias, do, *vars(scanned).values(), *vars(back).values(), prepared.scales,
        dq, dk, dv, dg, dbeta, bias_parts, rate_parts, p.table, p.cu_seqlens, p.tokens,
        p.sequences, back.beta_parts.shape[2], p.scale, p.lower_bound,
    )  # fmt: skip
    grid = (p.chunks * p.value_heads,)
    if p.on_hopper(q.device) and groups == 1 and p.value_dim == p.padded_value_dim >= TILE:
        gradient_hopper_kernel[grid](
            *arguments,
            HV=p.heads,
            K=p.key_dim,
            V=p.value_dim,
            VARLEN=p.cu_seqlens is not None,
            **p.activations,
            **HOPPER_OPTIONS,
        )
    else:
        gradient_kernel[grid](
            *arguments,
            H=p.heads,
            V=p.value_dim,
            VP=p.padded_value_dim,
            BV=min(64, p.padded_value_dim),
            **fit(WIDE_GRADIENT_OPTIONS if p.wide else GRADIENT_OPTIONS, p.padded_key_dim),
            **p.sizes,
            **p.activations,
        )
    if groups > 1:
        dq = dq.unflatten(2, (p.heads, groups)).sum(3).to(q.dtype)
        dk = dk.unflatten(2, (p.heads, groups)).sum(3).to(k.dtype)
    da_log, ddt_bias = None, None
    if a_log is not None and rate_parts is not None:
        da_log = rate_parts.sum(0).view_as(a_log).to(a_log.dtype)
    if dt_bias is not None and bias_parts is not None:
        ddt_bias = bias_parts.sum((0, 2)).view_as(dt_bias).to(dt_bias.dtype)
    return dq, dk, dv, dg, dbeta, da_log, ddt_bias


def check_head_sizes(q: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError for dtypes and head sizes that the kernels do not take."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the GPU kernels take bfloat16, float16 and float32, got {q.dtype}")
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size > MAX_HEAD_SIZE:
            raise ValueError(
                f"head size {name} = {size} is too large for the GPU kernels: use {MAX_HEAD_SIZE} or less"
            )


def new_problem(
    q: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    lower_bound: float | None,
) -> Problem:
    check_head_sizes(q, v)
    if cu_seqlens is None:
        table, starts, sequences = None, None, q.shape[0]
    else:
        cu_seqlens = cu_seqlens.contiguous()
        table, starts = chunk_table(cu_seqlens, q.shape[1])
        sequences = cu_seqlens.numel() - 1
    return Problem(
        batch=q.shape[0],
        tokens=q.shape[1],
        heads=q.shape[2],
        value_heads=v.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        sequences=sequences,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        gate=gate_kind(use_gate_in_kernel, lower_bound),
        lower_bound=0.0 if lower_bound is None else lower_bound,
        sigmoid_beta=use_beta_sigmoid_in_kernel,
        normalize=use_qk_l2norm_in_kernel,
        dtype=q.dtype,
        cu_seqlens=cu_seqlens,
        table=table,
        starts=starts,
    )


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`kimi_linear.ops.chunk_kda` (arXiv:2510.26692, appendix C) in two launches, and gradients in three.

    Arguments and results are the dispatcher's, which checks their shapes. Sums have a fixed order, so equal
    inputs give equal bits, gradients included. Nothing waits for the device.
    """
    p = new_problem(
        q, v, cu_seqlens, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
        lower_bound,
    )  # fmt: skip
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if torch.is_grad_enabled():
        return ChunkKDA.apply(p, q, k, v, g, beta, A_log, dt_bias, initial_state, output_final_state)
    prepared = prepare(p, q, k, g, beta, A_log, dt_bias)
    o = torch.empty_like(v)
    final_state = new_final_state(p, v) if output_final_state else None
    scan_forward(p, prepared, v, o, initial_state, final_state, None, None, None)
    return o, final_state


def gate_kind(use_gate: bool, lower_bound: float | None) -> int:
    if not use_gate:
        return NO_GATE.value
    return SOFTPLUS_GATE.value if lower_bound is None else BOUNDED_GATE.value
