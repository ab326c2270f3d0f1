"""`scan_forward_kernel` for Hopper, in Gluon, where no state is kept for a backward pass.

The state stands transposed, [value channel, key channel], so that it and the error are first operands of
their products, which a warpgroup takes from registers: along the chain of chunks nothing passes through
shared memory and nothing waits but for the products themselves. Products that no later chunk needs run behind
those that one does. Keys are copied ahead, stage by stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_linear.ops.triton import scan
from kimi_linear.ops.triton.prepare_hopper import barrier
from kimi_linear.ops.triton.tiles import SIZES

SLICE = 64
STAGES = 3


def serves(key_dim: int, value_dim: int) -> bool:
    """Whether `scan_hopper_kernel` takes heads of these sizes."""
    return key_dim in (64, 128) and value_dim % SLICE == 0


place_sequence = gluon.jit(scan.place_sequence.fn)


@gluon.jit
def opaque(x):
    """x, a bfloat16 tensor, of which the compiler does not know that it was rounded.

    Of a rounding before a loop and another at the end of each turn LLVM makes one at the start of each turn,
    and carries the number in float32 until then: beside what else is made of a state, 64 registers instead of
    32. The scan spilled for it, and a chunk took 3.6 us instead of 1.4.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def copy_chunk(
    key_stage,
    query_stage,
    write_stage,
    attention_stage,
    value_stage,
    scale_stage,
    decay_stage,
    read_keys,
    queries,
    write_keys,
    attention,
    values,
    scales,
    decay,
    rows,
    ROW_STRIDE: gl.constexpr,
    K: gl.constexpr,
    OUTPUT: gl.constexpr,
):
    """Start the copies of a chunk; the last ones wait with `async_copy.wait_group`. `rows` of its tokens have
    values, and queries are copied only for an output.
    """
    C: gl.constexpr = 64
    KEYS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    SQUARE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, C, gl.SliceLayout(1, KEYS))[:, None] * K
    at += gl.arange(0, K, gl.SliceLayout(0, KEYS))[None, :]
    async_copy.async_copy_global_to_shared(key_stage, read_keys + at)
    if OUTPUT:
        async_copy.async_copy_global_to_shared(query_stage, queries + at)
    async_copy.async_copy_global_to_shared(write_stage, write_keys + at)
    row = gl.arange(0, C, gl.SliceLayout(1, SQUARE))[:, None]
    column = gl.arange(0, C, gl.SliceLayout(0, SQUARE))[None, :]
    if OUTPUT:
        async_copy.async_copy_global_to_shared(attention_stage, attention + row * C + column)
    inside = (row < rows) & (column < C)
    async_copy.async_copy_global_to_shared(value_stage, values + row * ROW_STRIDE + column, mask=inside)
    line = gl.arange(0, 256, LINE)
    async_copy.async_copy_global_to_shared(scale_stage, scales + line, mask=line < 3 * C)
    async_copy.async_copy_global_to_shared(decay_stage, decay + gl.arange(0, K, LINE))


@gluon.jit(do_not_specialize=SIZES)
def scan_hopper_kernel(
    read_keys,
    queries,
    write_keys,
    decay,
    scales,
    attention,
    v,
    o,
    initial_state,
    final_state,
    chunk_starts,
    cu_seqlens,
    T,
    scale,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    VARLEN: gl.constexpr,
    DEPTH: gl.constexpr,
    THROUGH: gl.constexpr = False,
):
    """Arguments and results are `scan_forward_kernel`'s; V a multiple of 64, K 64 or 128.

    Where THROUGH, K further columns of the state start as the identity and see values of zero: what the
    sequence makes of any state. `final_state` [sequences, HV, K, V + K] has them behind the others.
    """
    C: gl.constexpr = 64
    v_start = gl.program_id(0) * 64
    sequence = gl.program_id(1) // HV
    hv = gl.program_id(1) % HV
    start, length, first_chunk = place_sequence(sequence, chunk_starts, cu_seqlens, T, VARLEN, C)
    v += (start * HV + hv) * V + v_start
    OUTPUT: gl.constexpr = o is not None
    if OUTPUT:
        o += (start * HV + hv) * V + v_start
    COLUMNS: gl.constexpr = V + K if THROUGH else V
    # Of these no token is inside, where there are no values.
    valued = length
    if THROUGH:
        valued = gl.where(v_start < V, length, 0)
    block = first_chunk * HV + hv
    read_keys += block * (C * K)
    queries += block * (C * K)
    write_keys += block * (C * K)
    attention += block * (C * C)
    scales += block * (3 * C)
    decay += block * K

    KEYS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    key_stages = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, C, K], KEYS)
    query_stages = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, C, K], KEYS)
    write_stages = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, C, K], KEYS)
    attention_stages = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, C, C], KEYS)
    value_stages = gl.allocate_shared_memory(v.dtype.element_ty, [DEPTH, C, 64], KEYS)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    scale_stages = gl.allocate_shared_memory(gl.float32, [DEPTH, 256], LINE)
    STATE: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16]
    )
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    # Behind the last chunk the state is kept as it is: a stage of ones.
    decay_stages = gl.allocate_shared_memory(gl.float32, [DEPTH + 1, K], LINE)
    decay_stages.index(DEPTH).store(gl.full([K], 1.0, gl.float32, gl.SliceLayout(0, STATE)))
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    STATE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    BY_TOKEN: gl.constexpr = gl.SliceLayout(0, RESULT)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    stored_row = gl.arange(0, C, gl.SliceLayout(1, STORED))[:, None]
    stored_offsets = stored_row * (HV * V) + gl.arange(0, 64, gl.SliceLayout(0, STORED))[None, :]

    state_offsets = (gl.program_id(1).to(gl.int64) * K) * COLUMNS + v_start
    STATE_STORED: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    state_offsets += gl.arange(0, K, gl.SliceLayout(1, STATE_STORED))[:, None] * COLUMNS
    state_offsets += gl.arange(0, 64, gl.SliceLayout(0, STATE_STORED))[None, :]
    if initial_state is not None:
        given = gl.load(initial_state + state_offsets)
        state = gl.convert_layout(gl.permute(given, (1, 0)), STATE)
    else:
        state = gl.zeros([64, K], gl.float32, STATE)
    if THROUGH:
        own = v_start - V + gl.arange(0, 64, gl.SliceLayout(1, STATE))[:, None]
        state = gl.where(own == gl.arange(0, K, gl.SliceLayout(0, STATE))[None, :], 1.0, state)

    if OUTPUT:
        SLOTS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        output_slots = gl.allocate_shared_memory(o.dtype.element_ty, [C, 64], SLOTS)

    chunks = gl.cdiv(length, C)
    for ahead in gl.static_range(DEPTH - 1):
        if ahead < chunks:
            copy_chunk(
                key_stages.index(ahead),
                query_stages.index(ahead),
                write_stages.index(ahead),
                attention_stages.index(ahead),
                value_stages.index(ahead),
                scale_stages.index(ahead),
                decay_stages.index(ahead),
                read_keys + ahead * (HV * C * K),
                queries + ahead * (HV * C * K),
                write_keys + ahead * (HV * C * K),
                attention + ahead * (HV * C * C),
                v + ahead * (C * HV * V),
                scales + ahead * (HV * 3 * C),
                decay + ahead * (HV * K),
                valued - ahead * C,
                HV * V,
                K,
                OUTPUT,
            )
        async_copy.commit_group()
    async_copy.wait_group(DEPTH - 2)
    fence_async_shared()
    barrier()
    state_operand = gl.convert_layout(opaque(state.to(gl.bfloat16)), OPERAND, assert_trivial=True)
    forget = decay_stages.index(gl.where(chunks > 0, 0, DEPTH)).load(gl.SliceLayout(0, STATE))
    state *= forget[None, :]
    for chunk in range(chunks):
        stage = chunk % DEPTH
        recalled = gl.zeros([64, C], gl.float32, RESULT)
        recalled = warpgroup_mma(
            state_operand, key_stages.index(stage).permute((1, 0)), recalled, use_acc=False, is_async=True
        )
        if OUTPUT:
            output = gl.zeros([64, C], gl.float32, RESULT)
            output = warpgroup_mma(
                state_operand, query_stages.index(stage).permute((1, 0)), output, use_acc=False, is_async=True
            )
        # Behind these products: the last chunk's output goes out, and its stage is free for copies.
        barrier()
        if OUTPUT:  # noqa: SIM102 (decided when compiled, and `chunk` is not)
            if chunk > 0:
                at = o + gl.cast(chunk - 1, gl.int64) * (C * HV * V) + stored_offsets
                gl.store(at, output_slots.load(STORED))
        coming = chunk + (DEPTH - 1)
        if coming < chunks:
            far = gl.cast(coming, gl.int64) * HV
            into = coming % DEPTH
            copy_chunk(
                key_stages.index(into),
                query_stages.index(into),
                write_stages.index(into),
                attention_stages.index(into),
                value_stages.index(into),
                scale_stages.index(into),
                decay_stages.index(into),
                read_keys + far * (C * K),
                queries + far * (C * K),
                write_keys + far * (C * K),
                attention + far * (C * C),
                v + far * (C * V),
                scales + far * (3 * C),
                decay + far * K,
                valued - coming * C,
                HV * V,
                K,
                OUTPUT,
            )
        async_copy.commit_group()
        recalled, state_operand = warpgroup_mma_wait(1 if OUTPUT else 0, deps=(recalled, state_operand))
        # There is time for what follows until the products with the queries end.
        row_scales = scale_stages.index(stage)
        k_norm = row_scales.slice(C, C).load(BY_TOKEN)
        gain = row_scales.slice(2 * C, C).load(BY_TOKEN)
        values = value_stages.index(stage).permute((1, 0)).load(RESULT).to(gl.float32)
        values *= gain[None, :]
        error = (values - recalled * (gain * k_norm)[None, :]).to(gl.bfloat16)
        error_operand = gl.convert_layout(error, STATE_OPERAND, assert_trivial=True)
        state = warpgroup_mma(error_operand, write_stages.index(stage), state, is_async=True)
        if OUTPUT:
            output, state_operand = warpgroup_mma_wait(1, deps=(output, state_operand))
            output *= row_scales.slice(0, C).load(BY_TOKEN)[None, :]
            output_operand = gl.convert_layout(error, OPERAND, assert_trivial=True)
            output = warpgroup_mma(
                output_operand, attention_stages.index(stage).permute((1, 0)), output, is_async=True
            )
        # Behind these: the next chunk's copies arrive.
        async_copy.wait_group(DEPTH - 2)
        fence_async_shared()
        barrier()
        next_stage = gl.where(chunk + 1 < chunks, (chunk + 1) % DEPTH, DEPTH)
        forget = decay_stages.index(next_stage).load(gl.SliceLayout(0, STATE))
        state, error_operand = warpgroup_mma_wait(1 if OUTPUT else 0, deps=(state, error_operand))
        state_operand = gl.convert_layout(state.to(gl.bfloat16), OPERAND, assert_trivial=True)
        state *= forget[None, :]
        if OUTPUT:
            output, output_operand = warpgroup_mma_wait(0, deps=(output, output_operand))
            output_slots.permute((1, 0)).store((output * scale).to(o.dtype.element_ty))
    async_copy.wait_group(0)
    if OUTPUT:  # noqa: SIM102
        if chunks > 0:
            at = o + gl.cast(chunks - 1, gl.int64) * (C * HV * V) + stored_offsets
            inside = (stored_row < length - (chunks - 1) * C) & (stored_offsets >= 0)
            gl.store(at, output_slots.load(STORED), mask=inside)

    if final_state is not None:
        gl.store(final_state + state_offsets, gl.convert_layout(gl.permute(state, (1, 0)), STATE_STORED))
