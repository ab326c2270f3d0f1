"""Gradients of a chunk's inputs, once both scans have left the states and their gradients at its two ends."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.prepare import inverse_norm, load_beta
from kimi_linear.ops.triton.tiles import (
    BOUNDED_GATE,
    LN2,
    LOG2E,
    NO_GATE,
    double_segments,
    double_sub_chunks,
    level_exponent,
    level_mask,
    log2_decay,
    outer_exponent,
    place_chunk,
    sub_chunk_totals,
)


@triton.jit
def segment_sums(x, h: tl.constexpr, A: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Share of the log decays in level h < A, from x [A, S, D], what each token's decay contributes.

    A row of the second half decays over the tokens from the segment's middle to itself, so a token there gets the
    sum over the rows at and behind it; a token of the first half gets the columns before it. Nothing cancels.
    """
    y = tl.reshape(x, [A // (2 * h), 2, h, S, D])
    second = tl.arange(0, 2)[None, :, None, None, None] == 1
    y = tl.where(second, tl.cumsum(y, axis=2, reverse=True), tl.cumsum(y, axis=2) - y)
    return tl.reshape(y, [A, S, D])


@triton.jit
def sub_chunk_sums(x, h: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """As `segment_sums` for whole sub-chunks: from sums x [1, S, D], those behind (rows) or before (columns)."""
    y = tl.reshape(x, [S // (2 * h), 2, h, D])
    second = tl.arange(0, 2)[None, :, None, None] == 1
    y = tl.where(second, tl.cumsum(y, axis=2, reverse=True) - y, tl.cumsum(y, axis=2) - y)
    return tl.reshape(y, [1, S, D])


@triton.jit
def gradient_kernel(
    q,
    k,
    v,
    g,
    beta,
    a_log,
    dt_bias,
    do,
    states,
    deltas,
    state_grads,
    error_grads,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    bias_parts,
    rate_parts,
    chunk_table,
    cu_seqlens,
    T,
    sequences,
    scale,
    lower_bound,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    GATE: tl.constexpr,
    BETA_SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and value head.

    With P the attention and L the strictly lower triangle of `prepare_kernel`, delta and derror of the scans:
    dP = do delta^T; dL = -derror delta^T, since derror already holds the inverse; d(beta v) = derror;
    d(queries) = do S^T, d(read_keys) = -derror S^T, d(write_keys) = delta dS^T. The rest is local to the chunk.
    """
    A: tl.constexpr = 8
    S: tl.constexpr = 8
    C: tl.constexpr = A * S
    program = tl.program_id(0)
    chunk = program // HV
    hv = program % HV
    start, rows = place_chunk(chunk, chunk_table, cu_seqlens, T, sequences, VARLEN, C)
    if rows <= 0:
        return
    qk_base = (start * H + hv // (HV // H)) * K
    g_base = (start * HV + hv) * K
    v_base = (start * HV + hv) * V
    block = program.to(tl.int64)

    n = tl.arange(0, C)
    token = (n % S) * A + n // S
    stored = (token % 16) * 4 + token // 16
    b_rows = load_beta(beta, start * HV + hv, token * HV, token < rows, BETA_SIGMOID)

    # Values: the gradients of both triangles, and of their transposes, which the columns need.
    attention_grad = tl.zeros([C, C], dtype=tl.float32)
    attention_grad_t = tl.zeros([C, C], dtype=tl.float32)
    gram_grad = tl.zeros([C, C], dtype=tl.float32)
    gram_grad_t = tl.zeros([C, C], dtype=tl.float32)
    b_grad = tl.zeros([C], dtype=tl.float32)
    for v_start in tl.range(0, VP, BV):
        vv = v_start + tl.arange(0, BV)
        mask = (token < rows)[:, None] & (vv < V)[None, :]
        offsets = v_base + token[:, None] * (HV * V) + vv[None, :]
        packed = block * (C * VP) + stored[:, None] * VP + vv[None, :]
        output_grad = tl.load(do + offsets, mask=mask, other=0.0).to(OPERAND)
        values = tl.load(v + offsets, mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(deltas + packed)
        error_grad = tl.load(error_grads + packed)
        attention_grad = tl.dot(output_grad, tl.trans(delta), acc=attention_grad, input_precision=PRECISION)
        attention_grad_t = tl.dot(
            delta, tl.trans(output_grad), acc=attention_grad_t, input_precision=PRECISION
        )
        gram_grad = tl.dot(error_grad, tl.trans(delta), acc=gram_grad, input_precision=PRECISION)
        gram_grad_t = tl.dot(delta, tl.trans(error_grad), acc=gram_grad_t, input_precision=PRECISION)
        error_grad = error_grad.to(tl.float32)
        b_grad += tl.sum(error_grad * values, axis=1)
        tl.store(dv + offsets, (error_grad * b_rows[:, None]).to(dv.dtype.element_ty), mask=mask)
    row = token[:, None]
    column = token[None, :]
    diagonal = tl.sum(tl.where(row == column, attention_grad, 0.0), axis=1) * scale
    attention_lower = tl.where(row > column, attention_grad * scale, 0.0).to(OPERAND)
    attention_upper = tl.where(row < column, attention_grad_t * scale, 0.0).to(OPERAND)
    # Rows of L get beta last, because its own gradient needs them without; columns get it here.
    gram_both = tl.where(row > column, -gram_grad, 0.0)
    gram_both = tl.where(row < column, -gram_grad_t * b_rows[None, :], gram_both).to(OPERAND)
    zero = tl.zeros([C, C], dtype=OPERAND)

    a = tl.arange(0, A)
    s = tl.arange(0, S)
    tokens = s[None, :] * A + a[:, None]
    row_mask = tokens < rows
    b = load_beta(beta, start * HV + hv, tokens * HV, row_mask, BETA_SIGMOID)[:, :, None]
    diagonal = tl.reshape(diagonal, [A, S, 1])
    if NORMALIZE:
        q_norm = inverse_norm(q, qk_base, H * K, tokens, row_mask, K, BK)[:, :, None]
        k_norm = inverse_norm(k, qk_base, H * K, tokens, row_mask, K, BK)[:, :, None]
        q_along = tl.zeros([A, S], dtype=tl.float32)
        k_along = tl.zeros([A, S], dtype=tl.float32)
    rate = 1.0
    if a_log is not None:
        rate = tl.exp2(tl.load(a_log + hv).to(tl.float32) * LOG2E)
        rate_grad = 0.0
    b_grad = tl.reshape(b_grad, [A, S])

    for k_start in tl.range(0, KP, BK):
        channels = k_start + tl.arange(0, BK)
        channel_mask = channels < K
        mask = row_mask[:, :, None] & channel_mask[None, None, :]
        offsets = tokens[:, :, None] * (H * K) + channels[None, None, :]
        q_tile = tl.load(
            tl.max_contiguous(q + qk_base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
        ).to(tl.float32)
        k_tile = tl.load(
            tl.max_contiguous(k + qk_base + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
        ).to(tl.float32)
        if NORMALIZE:
            q_tile *= q_norm
            k_tile *= k_norm
        g_offsets = g_base + tokens[:, :, None] * (HV * K) + channels[None, None, :]
        f = tl.load(tl.max_contiguous(g + g_offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0).to(
            tl.float32
        )
        if dt_bias is not None:
            f += tl.load(dt_bias + hv * K + channels, mask=channel_mask, other=0.0).to(tl.float32)[
                None, None, :
            ]
        before = tl.where(mask, log2_decay(f, 0.0, rate, lower_bound, GATE), 0.0)
        after = tl.zeros_like(before)

        q_grad = tl.zeros([A, S, BK], dtype=tl.float32)
        row_grad = tl.zeros([A, S, BK], dtype=tl.float32)
        column_grad = tl.zeros([A, S, BK], dtype=tl.float32)
        g_grad = tl.zeros([A, S, BK], dtype=tl.float32)
        for level in tl.static_range(3):
            d = tl.exp2(level_exponent(before, after, 1 << level, A, S, BK))
            k_decayed = tl.reshape((k_tile * d).to(OPERAND), [C, BK])
            q_decayed = tl.reshape((q_tile * d).to(OPERAND), [C, BK])
            lower = level_mask(row, column, 1 << level)
            upper = level_mask(column, row, 1 << level)
            to_q = tl.dot(tl.where(lower, attention_lower, zero), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(tl.where(lower | upper, gram_both, zero), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(
                tl.where(upper, attention_upper, zero), q_decayed, acc=to_k, input_precision=PRECISION
            )
            to_q = tl.reshape(to_q, [A, S, BK]) * d
            to_k = tl.reshape(to_k, [A, S, BK]) * d
            is_row = ((a >> level) % 2 == 1)[:, None, None]
            q_grad += to_q
            row_grad += tl.where(is_row, to_k, 0.0)
            column_grad += tl.where(is_row, 0.0, to_k)
            to_g = k_tile * to_k
            to_g = tl.where(is_row, q_tile * to_q + b * to_g, to_g)
            g_grad += segment_sums(to_g, 1 << level, A, S, BK)
            before, after = double_segments(before, after, 1 << level, A, S, BK)

        totals = sub_chunk_totals(before, A)
        offset_before = tl.zeros_like(totals)
        offset_after = tl.zeros_like(totals)
        far_rows = tl.zeros([A, S, BK], dtype=tl.float32)
        far_columns = tl.zeros([A, S, BK], dtype=tl.float32)
        far_offsets = tl.zeros_like(totals)
        for level in tl.static_range(3):
            d = tl.exp2(outer_exponent(before, after, offset_before, offset_after, 1 << level, S))
            k_decayed = tl.reshape((k_tile * d).to(OPERAND), [C, BK])
            q_decayed = tl.reshape((q_tile * d).to(OPERAND), [C, BK])
            lower = level_mask(row, column, A << level)
            upper = level_mask(column, row, A << level)
            to_q = tl.dot(tl.where(lower, attention_lower, zero), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(tl.where(lower | upper, gram_both, zero), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(
                tl.where(upper, attention_upper, zero), q_decayed, acc=to_k, input_precision=PRECISION
            )
            to_q = tl.reshape(to_q, [A, S, BK]) * d
            to_k = tl.reshape(to_k, [A, S, BK]) * d
            is_row = ((s >> level) % 2 == 1)[None, :, None]
            q_grad += to_q
            row_grad += tl.where(is_row, to_k, 0.0)
            column_grad += tl.where(is_row, 0.0, to_k)
            to_g = k_tile * to_k
            to_g = tl.where(is_row, q_tile * to_q + b * to_g, to_g)
            far_rows += tl.where(is_row, to_g, 0.0)
            far_columns += tl.where(is_row, 0.0, to_g)
            far_offsets += sub_chunk_sums(tl.sum(to_g, axis=0, keep_dims=True), 1 << level, S, BK)
            offset_before, offset_after = double_sub_chunks(
                offset_before, offset_after, totals, 1 << level, S, BK
            )

        # What passes through the states at the chunk's two ends.
        to_q2 = tl.zeros([C, BK], dtype=tl.float32)
        to_row2 = tl.zeros([C, BK], dtype=tl.float32)
        to_column2 = tl.zeros([C, BK], dtype=tl.float32)
        through = tl.zeros([BK], dtype=tl.float32)
        for v_start in tl.range(0, VP, BV):
            vv = v_start + tl.arange(0, BV)
            state_offsets = block * (KP * VP) + channels[:, None] * VP + vv[None, :]
            state = tl.load(states + state_offsets)
            state_grad = tl.load(state_grads + state_offsets)
            v_mask = (token < rows)[:, None] & (vv < V)[None, :]
            offsets2 = v_base + token[:, None] * (HV * V) + vv[None, :]
            packed = block * (C * VP) + stored[:, None] * VP + vv[None, :]
            output_grad = tl.load(do + offsets2, mask=v_mask, other=0.0).to(OPERAND)
            delta = tl.load(deltas + packed)
            error_grad = tl.load(error_grads + packed)
            to_q2 = tl.dot(output_grad, tl.trans(state), acc=to_q2, input_precision=PRECISION)
            to_row2 = tl.dot(error_grad, tl.trans(state), acc=to_row2, input_precision=PRECISION)
            to_column2 = tl.dot(delta, tl.trans(state_grad), acc=to_column2, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * state_grad.to(tl.float32), axis=1)
        d = tl.exp2(before + offset_before)
        to_q = tl.reshape(to_q2, [A, S, BK]) * d * scale
        to_row = tl.reshape(to_row2, [A, S, BK]) * -d
        to_column = tl.reshape(to_column2, [A, S, BK]) * tl.exp2(after + offset_after)
        q_grad += to_q
        row_grad += to_row
        column_grad += to_column
        rows_here = q_tile * to_q + b * k_tile * to_row
        columns_here = k_tile * to_column
        row_totals = tl.sum(rows_here, axis=0, keep_dims=True)
        column_totals = tl.sum(columns_here, axis=0, keep_dims=True)
        far_offsets += tl.cumsum(row_totals, axis=1, reverse=True) - row_totals
        far_offsets += tl.cumsum(column_totals, axis=1) - column_totals
        far_rows += rows_here
        far_columns += columns_here
        g_grad += tl.cumsum(far_rows, axis=0, reverse=True) + tl.cumsum(far_columns, axis=0) - far_columns
        through *= tl.exp2(tl.reshape(tl.sum(totals, axis=1), [BK]))
        g_grad += far_offsets + through[None, None, :]

        if GATE == NO_GATE:
            f_grad = g_grad
        elif GATE == BOUNDED_GATE:
            e = 1.0 / (1.0 + tl.exp2(-rate * f * LOG2E))
            f_grad = g_grad * (lower_bound * rate) * e * (1.0 - e)
        else:
            f_grad = g_grad * -rate / (1.0 + tl.exp2(-f * LOG2E))
        f_grad = tl.where(mask, f_grad, 0.0)
        tl.store(
            tl.max_contiguous(dg + g_offsets, (1, 1, max(1, BK // 32))),
            f_grad.to(dg.dtype.element_ty),
            mask=mask,
        )
        if bias_parts is not None:
            parts = tl.sum(tl.sum(f_grad, axis=0), axis=0)
            tl.store(bias_parts + block * K + channels, parts, mask=channel_mask)
        if a_log is not None:
            if GATE == BOUNDED_GATE:
                to_rate = f_grad * f
            else:
                to_rate = tl.where(mask, g_grad * log2_decay(f, 0.0, rate, lower_bound, GATE) * LN2, 0.0)
            rate_grad += tl.sum(tl.sum(tl.sum(to_rate, axis=2), axis=1), axis=0)

        b_grad += tl.sum(k_tile * row_grad, axis=2)
        q_grad += diagonal * k_tile
        k_grad = b * row_grad + column_grad + diagonal * q_tile
        if NORMALIZE:
            q_along += tl.sum(q_tile * q_grad, axis=2)
            k_along += tl.sum(k_tile * k_grad, axis=2)
            q_grad *= q_norm
            k_grad *= k_norm
            if KP == BK:
                q_grad -= q_tile * (q_norm * q_along[:, :, None])
                k_grad -= k_tile * (k_norm * k_along[:, :, None])
        tl.store(
            tl.max_contiguous(dq + g_offsets, (1, 1, max(1, BK // 32))),
            q_grad.to(dq.dtype.element_ty),
            mask=mask,
        )
        tl.store(
            tl.max_contiguous(dk + g_offsets, (1, 1, max(1, BK // 32))),
            k_grad.to(dk.dtype.element_ty),
            mask=mask,
        )

    if NORMALIZE and KP > BK:
        # The part along q, lost in normalisation, is known only now that all channels are summed.
        q_along = q_along[:, :, None] * q_norm * q_norm
        k_along = k_along[:, :, None] * k_norm * k_norm
        for k_start in tl.range(0, KP, BK):
            channels = k_start + tl.arange(0, BK)
            mask = row_mask[:, :, None] & (channels < K)[None, None, :]
            offsets = qk_base + tokens[:, :, None] * (H * K) + channels[None, None, :]
            g_offsets = g_base + tokens[:, :, None] * (HV * K) + channels[None, None, :]
            q_tile = tl.load(
                tl.max_contiguous(q + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
            ).to(tl.float32)
            k_tile = tl.load(
                tl.max_contiguous(k + offsets, (1, 1, max(1, BK // 32))), mask=mask, other=0.0
            ).to(tl.float32)
            q_at = tl.max_contiguous(dq + g_offsets, (1, 1, max(1, BK // 32)))
            k_at = tl.max_contiguous(dk + g_offsets, (1, 1, max(1, BK // 32)))
            q_grad = tl.load(q_at, mask=mask, other=0.0).to(tl.float32) - q_tile * q_along
            k_grad = tl.load(k_at, mask=mask, other=0.0).to(tl.float32) - k_tile * k_along
            tl.store(q_at, q_grad.to(dq.dtype.element_ty), mask=mask)
            tl.store(k_at, k_grad.to(dk.dtype.element_ty), mask=mask)

    if BETA_SIGMOID:
        x = tl.reshape(b, [A, S])
        b_grad *= x * (1.0 - x)
    tl.store(dbeta + start * HV + hv + tokens * HV, b_grad.to(dbeta.dtype.element_ty), mask=row_mask)
    if a_log is not None:
        tl.store(rate_parts + block, rate_grad)
