"""The two scans over chunks that carry the state, forwards and (for gradients) backwards.

Both take what `prepare_kernel` wrote. A program owns a slice of BV value channels of one head of
one sequence, so nothing is exchanged between programs and every sum has one order.
"""

import triton
import triton.language as tl

from kimi_linear.ops.triton.prepare import load_row_scales
from kimi_linear.ops.triton.tiles import SIZES


@triton.jit
def place_sequence(sequence, chunk_starts, cu_seqlens, T, VARLEN: tl.constexpr, C: tl.constexpr):
    """First token, length and first chunk of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start).to(tl.int32)
        first_chunk = tl.load(chunk_starts + sequence).to(tl.int64)
    else:
        start = sequence.to(tl.int64) * T
        length = T
        first_chunk = sequence.to(tl.int64) * tl.cdiv(T, C)
    return start, length, first_chunk


@triton.jit(do_not_specialize=SIZES)
def scan_forward_kernel(
    read_keys,
    queries,
    write_keys,
    decay,
    scales,
    inverse,
    inverse_rest,
    attention,
    v,
    o,
    initial_state,
    final_state,
    states,
    deltas,
    delta_rest,
    chunk_starts,
    cu_seqlens,
    T,
    scale,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per chunk, with S the state at its start:

    e = beta (v - rk read_keys S);  o = scale (rq queries S + attention e);  S <- decay S + write_keys^T e.

    With `states` [chunks, HV, KP, VP] and `deltas` [chunks, HV, 64, VP] given, writes S and
    delta = inverse e for the backward pass; without `o` computes no output. What delta loses when it is
    rounded goes to `delta_rest`.
    """
    C: tl.constexpr = 64
    v_start = tl.program_id(0) * BV
    sequence = tl.program_id(1) // HV
    hv = tl.program_id(1) % HV
    start, length, first_chunk = place_sequence(sequence, chunk_starts, cu_seqlens, T, VARLEN, C)

    n = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = v_start + tl.arange(0, BV)
    v_mask = vv < V
    state_offsets = (tl.program_id(1).to(tl.int64) * K + kk[:, None]) * V + vv[None, :]
    state_mask = (kk < K)[:, None] & v_mask[None, :]
    if initial_state is not None:
        state = tl.load(initial_state + state_offsets, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([KP, BV], dtype=tl.float32)

    v_base = (start * HV + hv) * V
    block = first_chunk * HV + hv
    key_offsets = n[:, None] * KP + kk[None, :]
    square_offsets = n[:, None] * C + n[None, :]
    for chunk in tl.range(0, tl.cdiv(length, C)):
        keys = tl.load(read_keys + block * (C * KP) + key_offsets)
        writes = tl.load(write_keys + block * (C * KP) + key_offsets)
        q_norm, k_norm, gain = load_row_scales(scales, block, n, C)
        forget = tl.load(decay + block * KP + kk)
        v_offsets = v_base + n[:, None] * (HV * V) + vv[None, :]
        mask = (n < length - chunk * C)[:, None] & v_mask[None, :]
        values = tl.load(v + v_offsets, mask=mask, other=0.0).to(tl.float32)

        state_operand = state.to(OPERAND)
        if states is not None:
            tl.store(states + block * (KP * VP) + kk[:, None] * VP + vv[None, :], state_operand)
        recalled = tl.dot(keys, state_operand, input_precision=PRECISION)
        exact = values * gain[:, None] - recalled * (gain * k_norm)[:, None]
        error = exact.to(OPERAND)
        if deltas is not None:
            solve = tl.load(inverse + block * (C * C) + square_offsets)
            delta_offsets = block * (C * VP) + n[:, None] * VP + vv[None, :]
            delta = tl.dot(solve, error, input_precision=PRECISION)
            if delta_rest is not None:
                # Errors of nearly equal keys are alike, and delta holds their differences, of which beta's
                # gradient is a sum of both signs: both operands are taken as two numbers each.
                rest = (exact - error.to(tl.float32)).to(OPERAND)
                delta = tl.dot(solve, rest, acc=delta, input_precision=PRECISION)
                solve = tl.load(inverse_rest + block * (C * C) + square_offsets)
                delta = tl.dot(solve, error, acc=delta, input_precision=PRECISION)
                rest = (delta - delta.to(OPERAND).to(tl.float32)).to(OPERAND)
                tl.store(delta_rest + delta_offsets, rest)
            tl.store(deltas + delta_offsets, delta.to(OPERAND))
        if o is not None:
            query = tl.load(queries + block * (C * KP) + key_offsets)
            scores = tl.load(attention + block * (C * C) + square_offsets)
            output = tl.dot(query, state_operand, input_precision=PRECISION) * q_norm[:, None]
            output = tl.dot(scores, error, acc=output, input_precision=PRECISION) * scale
            tl.store(o + v_offsets, output.to(o.dtype.element_ty), mask=mask)
        state = tl.dot(tl.trans(writes), error, acc=state * forget[:, None], input_precision=PRECISION)
        block += HV
        v_base += C * HV * V

    if final_state is not None:
        tl.store(final_state + state_offsets, state, mask=state_mask)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    read_keys,
    queries,
    write_keys,
    write_rest,
    decay,
    scales,
    attention,
    deltas,
    delta_rest,
    do,
    final_state_grad,
    initial_state_grad,
    state_grads,
    error_grads,
    beta_parts,
    chunk_starts,
    cu_seqlens,
    T,
    scale,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`scan_forward_kernel` transposed. Per chunk, last first, with dS the gradient of the state at its end:

    derror = scale attention^T do + write_keys dS;
    dS <- decay dS + queries^T (scale rq do) - read_keys^T (beta rk derror).

    Writes dS to `state_grads` [chunks, HV, KP, VP], derror to `error_grads` [chunks, HV, 64, VP] and
    derror . delta, before either is rounded, to `beta_parts` [chunks, HV, slices, 64]; without `state_grads`
    none of these.
    """
    C: tl.constexpr = 64
    v_start = tl.program_id(0) * BV
    sequence = tl.program_id(1) // HV
    hv = tl.program_id(1) % HV
    start, length, first_chunk = place_sequence(sequence, chunk_starts, cu_seqlens, T, VARLEN, C)

    n = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = v_start + tl.arange(0, BV)
    v_mask = vv < V
    state_offsets = (tl.program_id(1).to(tl.int64) * K + kk[:, None]) * V + vv[None, :]
    state_mask = (kk < K)[:, None] & v_mask[None, :]
    if final_state_grad is not None:
        grad = tl.load(final_state_grad + state_offsets, mask=state_mask, other=0.0)
    else:
        grad = tl.zeros([KP, BV], dtype=tl.float32)

    chunks = tl.cdiv(length, C)
    block = (first_chunk + chunks - 1) * HV + hv
    v_base = ((start + (chunks - 1) * C) * HV + hv) * V
    key_offsets = n[:, None] * KP + kk[None, :]
    square_offsets = n[:, None] * C + n[None, :]
    for step in tl.range(0, chunks):
        keys = tl.load(read_keys + block * (C * KP) + key_offsets)
        query = tl.load(queries + block * (C * KP) + key_offsets)
        writes = tl.load(write_keys + block * (C * KP) + key_offsets)
        scores = tl.load(attention + block * (C * C) + square_offsets)
        forget = tl.load(decay + block * KP + kk)
        v_offsets = v_base + n[:, None] * (HV * V) + vv[None, :]
        mask = (n < length - (chunks - 1 - step) * C)[:, None] & v_mask[None, :]
        q_norm, k_norm, gain = load_row_scales(scales, block, n, C)
        if state_grads is not None:
            delta_offsets = block * (C * VP) + n[:, None] * VP + vv[None, :]
            delta = tl.load(deltas + delta_offsets).to(tl.float32)
            if delta_rest is not None:
                delta += tl.load(delta_rest + delta_offsets).to(tl.float32)
        output_grad = tl.load(do + v_offsets, mask=mask, other=0.0)

        grad_operand = grad.to(OPERAND)
        if state_grads is not None:
            tl.store(state_grads + block * (KP * VP) + kk[:, None] * VP + vv[None, :], grad_operand)
        error_grad = tl.dot(tl.trans(scores), output_grad.to(OPERAND), input_precision=PRECISION) * scale
        error_grad = tl.dot(writes, grad_operand, acc=error_grad, input_precision=PRECISION)
        if tl.float32 != OPERAND:
            # write_keys are differences of keys. Where keys are nearly equal, their products with dS are far
            # smaller than what rounding either would add to them.
            rest = (grad - grad_operand.to(tl.float32)).to(OPERAND)
            error_grad = tl.dot(writes, rest, acc=error_grad, input_precision=PRECISION)
            writes = tl.load(write_rest + block * (C * KP) + key_offsets)
            error_grad = tl.dot(writes, grad_operand, acc=error_grad, input_precision=PRECISION)
        if state_grads is not None:
            tl.store(error_grads + delta_offsets, error_grad.to(OPERAND))
            part = (block * tl.num_programs(0) + tl.program_id(0)) * C
            tl.store(beta_parts + part + n, tl.sum(error_grad * delta, axis=1))
        output_grad = (output_grad.to(tl.float32) * (q_norm * scale)[:, None]).to(OPERAND)
        grad = tl.dot(tl.trans(query), output_grad, acc=grad * forget[:, None], input_precision=PRECISION)
        recall_grad = error_grad * (-gain * k_norm)[:, None]
        recall_operand = recall_grad.to(OPERAND)
        grad = tl.dot(tl.trans(keys), recall_operand, acc=grad, input_precision=PRECISION)
        if tl.float32 != OPERAND:
            # What a nearly equal key takes back of dS is all but a small rest of it.
            rest = (recall_grad - recall_operand.to(tl.float32)).to(OPERAND)
            grad = tl.dot(tl.trans(keys), rest, acc=grad, input_precision=PRECISION)
        block -= HV
        v_base -= C * HV * V

    if initial_state_grad is not None:
        tl.store(initial_state_grad + state_offsets, grad, mask=state_mask)
