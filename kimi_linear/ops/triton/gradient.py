"""Gradients of a chunk's inputs, once both scans have left the states and their gradients at its two ends."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.prepare import (
    halves,
    inside_tile,
    load_raw_gate,
    load_row_scales,
    product,
    stack_rows,
)
from kimi_linear.ops.triton.tiles import (
    BOUNDED_GATE,
    LN2,
    LOG2E,
    NO_GATE,
    SIZES,
    double_segments,
    double_sub_chunks,
    level_decay,
    level_mask,
    load_tile,
    log2_decay,
    multiply,
    outer_decay,
    place_chunk,
    store_tile,
    sub_chunk_totals,
)


@triton.jit
def sub_chunk_sums(x, h: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Sums [1, S, D] over whole sub-chunks at the level that pairs halves of h of them: those behind each one
    where it is a row, those before where it is a column.
    """
    y = tl.reshape(x, [S // (2 * h), 2, h, D])
    second = tl.arange(0, 2)[None, :, None, None] == 1
    y = tl.where(second, tl.cumsum(y, axis=2, reverse=True) - y, tl.cumsum(y, axis=2) - y)
    return tl.reshape(y, [1, S, D])


@triton.jit
def value_products(
    do,
    deltas,
    error_grads,
    scales,
    v_base,
    packed,
    block,
    row,
    column,
    rows,
    scale,
    HV: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products over the value channels between tokens `row` [G, N] and tokens `column` [G, N], all [G, N, N].

    do' delta^T and -beta rk derror delta^T, each followed by its transpose.
    """
    G: tl.constexpr = row.shape[0]
    N: tl.constexpr = row.shape[1]
    pair = tl.zeros([G, N, N], dtype=tl.float32)
    pair_t = tl.zeros([G, N, N], dtype=tl.float32)
    gram = tl.zeros([G, N, N], dtype=tl.float32)
    gram_t = tl.zeros([G, N, N], dtype=tl.float32)
    q_norm, k_norm, b = load_row_scales(scales, block, row, C)
    for v_start in tl.range(0, VP, BV):
        vv = v_start + tl.arange(0, BV)
        mask = (row < rows)[:, :, None] & (vv < V)[None, None, :]
        offsets = v_base + row[:, :, None] * (HV * V) + vv[None, None, :]
        output_grad = tl.load(do + offsets, mask=mask, other=0.0).to(tl.float32)
        output_grad = (output_grad * (q_norm * scale)[:, :, None]).to(OPERAND)
        error_grad = tl.load(error_grads + packed + row[:, :, None] * VP + vv[None, None, :])
        delta = tl.load(deltas + packed + column[:, :, None] * VP + vv[None, None, :])
        output_grad_t = tl.permute(output_grad, (0, 2, 1))
        error_grad_t = tl.permute(error_grad, (0, 2, 1))
        delta_t = tl.permute(delta, (0, 2, 1))
        pair += product(output_grad, delta_t, PRECISION)
        pair_t += product(delta, output_grad_t, PRECISION)
        gram += product(error_grad, delta_t, PRECISION)
        gram_t += product(delta, error_grad_t, PRECISION)
    row_scale = -b * k_norm
    return pair, pair_t, gram * row_scale[:, :, None], gram_t * row_scale[:, None, :]


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q,
    k,
    g,
    a_log,
    dt_bias,
    do,
    states,
    deltas,
    delta_rest,
    state_grads,
    error_grads,
    beta_parts,
    scales,
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
    slices,
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
    """One program a chunk and value head. q and k are taken as they came, as `prepare_kernel` takes them.

    With P the attention and L the strictly lower triangle of `prepare_kernel`, delta and derror of the scans
    and do' = scale rq do: dP = do' delta^T; dL = -derror delta^T up to the factor beta rk of its rows, since
    derror already holds the inverse; d(queries) = do' S^T, d(read_keys) = -beta rk derror S^T, d(write_keys)
    = delta dS^T, dv = beta derror. The rest is local to the chunk.
    """
    A: tl.constexpr = 16
    S: tl.constexpr = 4
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
    packed = block * (C * VP)

    # The gradients of P and L, in the pieces of `prepare_kernel`, and of their transposes, which columns
    # need.
    a = tl.arange(0, A)
    near = tl.arange(0, S)[:, None] * A + a[None, :]
    mid = tl.arange(0, 2)[:, None] * (2 * A) + a[None, :]
    far = tl.arange(0, 2 * A)[None, :]
    near_pair, near_pair_t, near_gram, near_gram_t = value_products(
        do,
        deltas,
        error_grads,
        scales,
        v_base,
        packed,
        block,
        near,
        near,
        rows,
        scale,
        HV,
        V,
        VP,
        BV,
        C,
        OPERAND,
        PRECISION,
    )
    mid_pair, mid_pair_t, mid_gram, mid_gram_t = value_products(
        do,
        deltas,
        error_grads,
        scales,
        v_base,
        packed,
        block,
        mid + A,
        mid,
        rows,
        scale,
        HV,
        V,
        VP,
        BV,
        C,
        OPERAND,
        PRECISION,
    )
    far_pair, far_pair_t, far_gram, far_gram_t = value_products(
        do,
        deltas,
        error_grads,
        scales,
        v_base,
        packed,
        block,
        far + 2 * A,
        far,
        rows,
        scale,
        HV,
        V,
        VP,
        BV,
        C,
        OPERAND,
        PRECISION,
    )
    same = a[None, :, None] == a[None, None, :]
    lower = a[None, :, None] > a[None, None, :]
    near_pair = near_pair.to(OPERAND)
    near_pair_t = near_pair_t.to(OPERAND)
    near_gram = tl.where(lower, near_gram, near_gram_t).to(OPERAND)
    mid_pair = mid_pair.to(OPERAND)
    mid_pair_t = mid_pair_t.to(OPERAND)
    mid_gram = mid_gram.to(OPERAND)
    mid_gram_t = mid_gram_t.to(OPERAND)
    far_pair = far_pair.to(OPERAND)
    far_pair_t = far_pair_t.to(OPERAND)
    far_gram = far_gram.to(OPERAND)
    far_gram_t = far_gram_t.to(OPERAND)
    nothing = tl.zeros([S, A, A], dtype=OPERAND)

    s = tl.arange(0, S)
    tokens = s[None, :] * A + a[:, None]
    rate = 1.0
    if a_log is not None:
        rate = tl.exp2(tl.load(a_log + hv).to(tl.float32) * LOG2E)
        rate_grad = tl.zeros([S, BK], dtype=tl.float32)

    for k_start in tl.range(0, KP, BK):
        channels = k_start + tl.arange(0, BK)
        q_tile = load_tile(q + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
        k_tile = load_tile(k + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
        inside = inside_tile(rows, k_start, K, S, A, BK)
        f = load_raw_gate(g + g_base, rows, k_start, hv, dt_bias, HV * K, K, S, A, BK)
        before = tl.where(inside, tl.exp2(log2_decay(f, 0.0, rate, lower_bound, GATE)), 1.0)
        after = tl.full([A, S, BK], 1.0, dtype=tl.float32)

        # The diagonal of P, which no decay touches.
        own = tl.where(same, near_pair, nothing)
        q_grad = tl.dot(own, tl.permute(k_tile.to(OPERAND), (1, 0, 2)), input_precision=PRECISION)
        k_grad = tl.dot(own, tl.permute(q_tile.to(OPERAND), (1, 0, 2)), input_precision=PRECISION)
        q_grad = tl.permute(q_grad, (1, 0, 2))
        k_grad = tl.permute(k_grad, (1, 0, 2))
        # What a token's decays contribute as a row and as a column.
        g_rows = tl.zeros([A, S, BK], dtype=tl.float32)
        g_columns = tl.zeros([A, S, BK], dtype=tl.float32)
        for level in tl.static_range(4):
            d = level_decay(before, after, 1 << level, A, S, BK)
            k_decayed = tl.permute((k_tile * d).to(OPERAND), (1, 0, 2))
            q_decayed = tl.permute((q_tile * d).to(OPERAND), (1, 0, 2))
            down = level_mask(a[:, None], a[None, :], 1 << level)[None, :, :]
            up = level_mask(a[None, :], a[:, None], 1 << level)[None, :, :]
            to_q = tl.dot(tl.where(down, near_pair, nothing), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(tl.where(down | up, near_gram, nothing), k_decayed, input_precision=PRECISION)
            to_k = tl.dot(tl.where(up, near_pair_t, nothing), q_decayed, acc=to_k, input_precision=PRECISION)
            to_q = tl.permute(to_q, (1, 0, 2)) * d
            to_k = tl.permute(to_k, (1, 0, 2)) * d
            q_grad += to_q
            k_grad += to_k
            # A column takes back what its rows, all behind it in the sub-chunk, add to the tokens before it.
            is_row = ((a >> level) % 2 == 1)[:, None, None]
            g_rows += q_tile * to_q + tl.where(is_row, k_tile, -k_tile) * to_k
            before, after = double_segments(before, after, 1 << level, A, S, BK)

        totals = sub_chunk_totals(before, A)
        offset_before = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        offset_after = tl.full([1, S, BK], 1.0, dtype=tl.float32)
        g_offsets = tl.zeros_like(totals)
        for level in tl.static_range(2):
            d = outer_decay(before, after, offset_before, offset_after, 1 << level, S)
            k_decayed = tl.permute((k_tile * d).to(OPERAND), (1, 0, 2))
            q_decayed = tl.permute((q_tile * d).to(OPERAND), (1, 0, 2))
            if level == 0:
                k_columns, k_rows = halves(k_decayed, 2, A)
                _q_columns, q_rows = halves(q_decayed, 2, A)
                to_q = tl.dot(mid_pair, k_columns, input_precision=PRECISION)
                to_rows = tl.dot(mid_gram, k_columns, input_precision=PRECISION)
                to_columns = tl.dot(mid_pair_t, q_rows, input_precision=PRECISION)
                to_columns = tl.dot(mid_gram_t, k_rows, acc=to_columns, input_precision=PRECISION)
            else:
                k_columns, k_rows = halves(k_decayed, 1, 2 * A)
                _q_columns, q_rows = halves(q_decayed, 1, 2 * A)
                to_q = product(far_pair, k_columns, PRECISION)
                to_rows = product(far_gram, k_columns, PRECISION)
                to_columns = product(far_pair_t, q_rows, PRECISION) + product(far_gram_t, k_rows, PRECISION)
            to_q = tl.reshape(stack_rows(tl.zeros_like(to_q), to_q), [S, A, BK])
            to_k = tl.reshape(stack_rows(to_columns, to_rows), [S, A, BK])
            to_q = tl.permute(to_q, (1, 0, 2)) * d
            to_k = tl.permute(to_k, (1, 0, 2)) * d
            is_row = ((s >> level) % 2 == 1)[None, :, None]
            q_grad += to_q
            k_grad += to_k
            # to_q is zero in columns.
            to_g = q_tile * to_q + k_tile * to_k
            g_rows += tl.where(is_row, to_g, 0.0)
            g_columns += tl.where(is_row, 0.0, to_g)
            to_g = tl.sum(to_g, axis=0, keep_dims=True)
            g_offsets += sub_chunk_sums(to_g, 1 << level, S, BK)
            offset_before, offset_after = double_sub_chunks(
                offset_before, offset_after, totals, 1 << level, S, BK
            )

        # What passes through the states at the chunk's two ends.
        to_q2 = tl.zeros([C, BK], dtype=tl.float32)
        to_row2 = tl.zeros([C, BK], dtype=tl.float32)
        to_column2 = tl.zeros([C, BK], dtype=tl.float32)
        through = tl.zeros([BK], dtype=tl.float32)
        n = tl.arange(0, C)
        n_q_norm, n_k_norm, n_b = load_row_scales(scales, block, n, C)
        for v_start in tl.range(0, VP, BV):
            vv = v_start + tl.arange(0, BV)
            state_offsets = block * (KP * VP) + channels[:, None] * VP + vv[None, :]
            state = tl.load(states + state_offsets)
            state_grad = tl.load(state_grads + state_offsets)
            v_mask = (n < rows)[:, None] & (vv < V)[None, :]
            output_grad = tl.load(do + v_base + n[:, None] * (HV * V) + vv[None, :], mask=v_mask, other=0.0)
            output_grad = (output_grad.to(tl.float32) * (n_q_norm * scale)[:, None]).to(OPERAND)
            delta = tl.load(deltas + packed + n[:, None] * VP + vv[None, :])
            error_grad = tl.load(error_grads + packed + n[:, None] * VP + vv[None, :])
            recall_grad = (error_grad.to(tl.float32) * (-n_b * n_k_norm)[:, None]).to(OPERAND)
            to_q2 = tl.dot(output_grad, tl.trans(state), acc=to_q2, input_precision=PRECISION)
            to_row2 = tl.dot(recall_grad, tl.trans(state), acc=to_row2, input_precision=PRECISION)
            to_column2 = tl.dot(delta, tl.trans(state_grad), acc=to_column2, input_precision=PRECISION)
            if delta_rest is not None:
                # Nearly equal keys write differences, a small rest of which a lasting memory keeps: rounded,
                # delta would leave most of the error of g's gradient, which adds them up.
                rest = tl.load(delta_rest + packed + n[:, None] * VP + vv[None, :])
                to_column2 = tl.dot(rest, tl.trans(state_grad), acc=to_column2, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * state_grad.to(tl.float32), axis=1)
        d = before * offset_before
        to_q = tl.permute(tl.reshape(to_q2, [S, A, BK]), (1, 0, 2)) * d
        to_k = tl.permute(tl.reshape(to_row2, [S, A, BK]), (1, 0, 2)) * d
        q_grad += to_q
        k_grad += to_k
        to_g = q_tile * to_q + k_tile * to_k
        g_rows += to_g
        to_g = tl.sum(to_g, axis=0, keep_dims=True)
        g_offsets += tl.cumsum(to_g, axis=1, reverse=True) - to_g
        to_k = tl.permute(tl.reshape(to_column2, [S, A, BK]), (1, 0, 2)) * (after * offset_after)
        k_grad += to_k
        to_g = k_tile * to_k
        g_columns += to_g
        to_g = tl.sum(to_g, axis=0, keep_dims=True)
        g_offsets += tl.cumsum(to_g, axis=1) - to_g
        g_offsets += (through * tl.reshape(tl.reduce(totals, 1, multiply), [BK]))[None, None, :]
        # A row decays over the tokens up to it, a column over those behind it.
        g_grad = (
            tl.cumsum(g_rows, axis=0, reverse=True) + tl.cumsum(g_columns, axis=0) - g_columns + g_offsets
        )

        # Read again: kept since the loop's start, it would cost a register a token.
        f = load_raw_gate(g + g_base, rows, k_start, hv, dt_bias, HV * K, K, S, A, BK)
        if GATE == NO_GATE:
            f_grad = g_grad
        elif GATE == BOUNDED_GATE:
            e = 1.0 / (1.0 + tl.exp2(-rate * f * LOG2E))
            f_grad = g_grad * (lower_bound * rate) * e * (1.0 - e)
        else:
            f_grad = g_grad * -rate / (1.0 + tl.exp2(-f * LOG2E))
        f_grad = tl.where(inside, f_grad, 0.0)
        store_tile(dg + g_base, f_grad, HV * K, rows, k_start, K, S, A, BK)
        if bias_parts is not None:
            at = bias_parts + (block * S + s[:, None]) * K + channels[None, :]
            tl.store(at, tl.sum(f_grad, axis=0), mask=(channels < K)[None, :])
        if a_log is not None:
            if GATE == BOUNDED_GATE:
                to_rate = f_grad * f
            else:
                to_rate = tl.where(inside, g_grad * log2_decay(f, 0.0, rate, lower_bound, GATE) * LN2, 0.0)
            rate_grad += tl.sum(to_rate, axis=0)

        store_tile(dq + g_base, q_grad, HV * K, rows, k_start, K, S, A, BK)
        store_tile(dk + g_base, k_grad, HV * K, rows, k_start, K, S, A, BK)

    if NORMALIZE:
        # Normalisation takes the part along q and k away, known only now that all channels are there.
        q_along = tl.zeros([A, S, BK], dtype=tl.float32)
        k_along = tl.zeros([A, S, BK], dtype=tl.float32)
        for k_start in tl.range(0, KP, BK):
            q_tile = load_tile(q + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
            k_tile = load_tile(k + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
            q_grad = load_tile(dq + g_base, HV * K, rows, k_start, K, S, A, BK)
            k_grad = load_tile(dk + g_base, HV * K, rows, k_start, K, S, A, BK)
            q_along += q_tile * q_grad.to(tl.float32)
            k_along += k_tile * k_grad.to(tl.float32)
        q_norm, k_norm, _ = load_row_scales(scales, block, tokens, C)
        q_part = (tl.sum(q_along, axis=2) * q_norm * q_norm)[:, :, None]
        k_part = (tl.sum(k_along, axis=2) * k_norm * k_norm)[:, :, None]
        for k_start in tl.range(0, KP, BK):
            q_tile = load_tile(q + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
            k_tile = load_tile(k + qk_base, H * K, rows, k_start, K, S, A, BK).to(tl.float32)
            q_grad = (
                load_tile(dq + g_base, HV * K, rows, k_start, K, S, A, BK).to(tl.float32) - q_tile * q_part
            )
            k_grad = (
                load_tile(dk + g_base, HV * K, rows, k_start, K, S, A, BK).to(tl.float32) - k_tile * k_part
            )
            store_tile(dq + g_base, q_grad, HV * K, rows, k_start, K, S, A, BK)
            store_tile(dk + g_base, k_grad, HV * K, rows, k_start, K, S, A, BK)
    if a_log is not None:
        tl.store(rate_parts + block, tl.sum(tl.sum(rate_grad, axis=1), axis=0))

    # beta scales what a token's error adds, so its gradient is derror . delta / beta, which the sigmoid's own
    # derivative turns into a product.
    n = tl.arange(0, C)
    _, n_k_norm, n_b = load_row_scales(scales, block, n, C)
    b_grad = tl.zeros([C], dtype=tl.float32)
    for part in tl.range(0, slices):
        b_grad += tl.load(beta_parts + (block * slices + part) * C + n)
    for v_start in tl.range(0, VP, BV):
        vv = v_start + tl.arange(0, BV)
        error_grad = tl.load(error_grads + packed + n[:, None] * VP + vv[None, :]).to(tl.float32)
        v_mask = (n < rows)[:, None] & (vv < V)[None, :]
        at = dv + v_base + n[:, None] * (HV * V) + vv[None, :]
        tl.store(at, (error_grad * n_b[:, None]).to(dv.dtype.element_ty), mask=v_mask)
    b_grad /= n_k_norm
    if BETA_SIGMOID:
        b_grad *= 1.0 - n_b
    else:
        b_grad /= tl.where(n < rows, n_b, 1.0)
    tl.store(dbeta + (start + n) * HV + hv, b_grad.to(dbeta.dtype.element_ty), mask=n < rows)
