"""`gradient_kernel` for Hopper, in Gluon: the same results, with every layout chosen by hand.

A warp owns a sub-chunk. Here sums run over tokens, so tiles stand as [sub-chunk, channel, token]: decayed
keys are the first operand of a product, a block of the attention's gradient is the second, and what comes
back lies as the keys did. So the levels of the tree inside a sub-chunk move no data between lanes. A lane's
channels are neighbours in memory; which channel is which row of a tile does not matter to the products.

Nothing is loaded right before its use: q and k are copied whole into the shared memory that their gradients
take later, g comes a tile ahead, and so do the rows of the states, which lie where the squares were.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
)

from kimi_linear.ops.triton.prepare_hopper import (
    BLOCK_LAYOUT,
    COLUMNS_LAYOUT,
    FLAT_TILE_LAYOUT,
    ROWS_LAYOUT,
    SECOND_LAYOUT,
    TILE_LAYOUT,
    barrier,
    exchange,
    keep,
    leading,
    log2_decay,
    place_chunk,
)
from kimi_linear.ops.triton.tiles import BOUNDED_GATE, NO_GATE, SIZES

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

# [token, channel], two channels a lane: with channels before tokens, the layout of a product's result.
PAIR_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [8, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 2], [0, 4], [0, 8]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)


# Rows of a square [64, 64] to warps, each of its blocks as a second operand of bfloat16.
SQUARE_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [8, 0], [0, 16], [0, 32]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
FIRST = gl.constexpr(gl.DotOperandLayout(0, BLOCK_LAYOUT.value, 2))
SECOND = gl.constexpr(gl.DotOperandLayout(1, BLOCK_LAYOUT.value, 2))


@gluon.jit
def channels_first(x):
    """x [64, 16] in PAIR_LAYOUT as a tile [4, 16, 16]: channel c is its row 8 (c % 2) + c / 2."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 8, 2]), (0, 3, 2, 1)), [4, 16, 16])
    return gl.convert_layout(x, BLOCK_LAYOUT, assert_trivial=True)


@gluon.jit
def tokens_first(x):
    """The inverse of `channels_first`."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 2, 8, 16]), (0, 3, 2, 1)), [64, 16])
    return gl.convert_layout(x, PAIR_LAYOUT, assert_trivial=True)


@gluon.jit
def load_state(slots, index: gl.constexpr, like):
    """32 value channels of a tile's rows of a state, for all sub-chunks, as the first operand."""
    x = slots.slice(32 * index, 32, dim=1).load(gl.SliceLayout(0, TILE_LAYOUT))
    x, like = gl.broadcast(gl.expand_dims(x, 0), like)
    return gl.convert_layout(fold(x), FIRST, assert_trivial=True)


@gluon.jit
def swap_token_halves(x, h: gl.constexpr):
    """The value of the token h further or back, whichever is in the same segment of 2h tokens."""
    if h == 1:
        x, y = gl.split(gl.reshape(x, [4, 16, 8, 2]))
        x = gl.convert_layout(gl.reshape(gl.join(y, x), [4, 16, 16]), BLOCK_LAYOUT, assert_trivial=True)
    elif h == 2:
        x = exchange(x, "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")
    elif h == 4:
        x = exchange(x, "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;")
    else:
        x, y = gl.split(gl.permute(gl.reshape(x, [4, 16, 2, 8]), (0, 1, 3, 2)))
        x = gl.reshape(gl.permute(gl.join(y, x), (0, 1, 3, 2)), [4, 16, 16])
        x = gl.convert_layout(x, BLOCK_LAYOUT, assert_trivial=True)
    return x


@gluon.jit
def first(x):
    """A tile as the first operand; no data moves."""
    return gl.convert_layout(x.to(gl.bfloat16), FIRST, assert_trivial=True)


@gluon.jit
def second(x):
    """x^T as the second operand, x [4, 16, 16] in BLOCK_LAYOUT; no data moves."""
    return gl.convert_layout(gl.permute(x.to(gl.bfloat16), (0, 2, 1)), SECOND, assert_trivial=True)


@gluon.jit
def block_columns(x):
    """The four block columns of x [64, 64] in SQUARE_LAYOUT, transposed, as second operands."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 4, 16]), (0, 3, 1, 2)), [4, 16, 16, 2, 2])
    x, y = gl.split(x)
    x0, x2 = gl.split(x)
    x1, x3 = gl.split(y)
    return (
        gl.convert_layout(x0, SECOND, assert_trivial=True),
        gl.convert_layout(x1, SECOND, assert_trivial=True),
        gl.convert_layout(x2, SECOND, assert_trivial=True),
        gl.convert_layout(x3, SECOND, assert_trivial=True),
    )


@gluon.jit
def fold(x):
    """Channels of values [4, 16, 32] in the order in which both operands take them."""
    x = gl.permute(gl.reshape(x, [4, 16, 4, 2, 2, 2]), (0, 1, 3, 4, 2, 5))
    return gl.reshape(x, [4, 16, 32])


@gluon.jit
def load_values(values, index: gl.constexpr):
    """32 channels of the tokens' values as the second operand."""
    x = fold(gl.reshape(values.index(index).load(FLAT_TILE_LAYOUT), [4, 16, 32]))
    return gl.convert_layout(gl.permute(x, (0, 2, 1)), SECOND, assert_trivial=True)


@gluon.jit
def load_tile_of(slots, sub_chunk: gl.constexpr, like):
    """The tile of one sub-chunk, for all of them, as the first operand."""
    x = slots.slice(16 * sub_chunk, 16).load(gl.SliceLayout(0, BLOCK_LAYOUT))
    x, like = gl.broadcast(gl.expand_dims(x, 0), like)
    return gl.convert_layout(x, FIRST, assert_trivial=True)


@gluon.jit
def load_channels_of(slots, sub_chunk: gl.constexpr):
    """[1, 16, 1]: one number a channel of one sub-chunk."""
    x = slots.slice(16 * sub_chunk, 16).load(gl.SliceLayout(0, gl.SliceLayout(2, BLOCK_LAYOUT)))
    return x[None, :, None]


@gluon.jit
def ones_where(chosen):
    """A matrix of zeros and ones as the second operand of `sum_tokens`, `chosen` in SECOND_LAYOUT."""
    x = gl.where(chosen, 1.0, gl.zeros([4, 16, 16], gl.float32, SECOND_LAYOUT))
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 2, 4, 2, 16]), (0, 1, 3, 2, 4)), [4, 16, 16])
    return gl.convert_layout(x, COLUMNS_LAYOUT, assert_trivial=True)


@gluon.jit
def sum_tokens(x, chosen, acc):
    """acc + x [4, 16, 16] summed over the tokens that a column of `chosen` holds ones for, in float32."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 2, 4, 2]), (0, 1, 2, 4, 3)), [4, 16, 16])
    x = gl.convert_layout(x, ROWS_LAYOUT, assert_trivial=True)
    y = leading(x)
    acc = mma_v2(x - y, chosen, acc, input_precision="tf32")
    return mma_v2(y, chosen, acc, input_precision="tf32")


@gluon.jit(do_not_specialize=SIZES)
def gradient_hopper_kernel(
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
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    VARLEN: gl.constexpr,
    GATE: gl.constexpr,
    BETA_SIGMOID: gl.constexpr,
    NORMALIZE: gl.constexpr,
):
    """One program a chunk and head; arguments and results are `gradient_kernel`'s, with as many heads of keys
    as of values, and K and V multiples of 32.
    """
    C: gl.constexpr = 64
    BY_VALUE_ROW: gl.constexpr = gl.SliceLayout(1, FLAT_TILE_LAYOUT)
    CHANNELS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, BLOCK_LAYOUT))
    BY_CHANNEL: gl.constexpr = gl.SliceLayout(2, BLOCK_LAYOUT)
    BY_TOKEN: gl.constexpr = gl.SliceLayout(1, BLOCK_LAYOUT)
    program = gl.program_id(0)
    chunk = program // HV
    hv = program % HV
    start, length = place_chunk(chunk, chunk_table, cu_seqlens, T, sequences, VARLEN, C)
    if length <= 0:
        return
    block = program.to(gl.int64)
    key_base = (start * HV + hv) * K
    value_base = (start * HV + hv) * V
    states += block * (K * V)
    state_grads += block * (K * V)
    deltas += block * (C * V)
    delta_rest += block * (C * V)
    error_grads += block * (C * V)
    scales += block * (3 * C)

    # What the loop over channels reads; [token, channel] by tiles, and a state's rows by 32 value channels.
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    q_slots = gl.allocate_shared_memory(q.dtype.element_ty, [K // 16, C, 16], ROWS)
    k_slots = gl.allocate_shared_memory(k.dtype.element_ty, [K // 16, C, 16], ROWS)
    g_slots = gl.allocate_shared_memory(g.dtype.element_ty, [2, C, 16], ROWS)
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    copied_token = gl.arange(0, C, gl.SliceLayout(1, COPIED))[:, None]
    copied_channel = gl.arange(0, 16, gl.SliceLayout(0, COPIED))[None, :]
    copied_mask = (copied_token < length) & (copied_channel < 16)
    copied_at = key_base + copied_token * (HV * K) + copied_channel
    for tile in gl.static_range(K // 16):
        async_copy.async_copy_global_to_shared(
            q_slots.index(tile), q + copied_at + 16 * tile, mask=copied_mask
        )
        async_copy.async_copy_global_to_shared(
            k_slots.index(tile), k + copied_at + 16 * tile, mask=copied_mask
        )
    async_copy.async_copy_global_to_shared(g_slots.index(0), g + copied_at, mask=copied_mask)
    async_copy.commit_group()

    # Values to shared memory; sums over them that need no product.
    VALUES: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    output_grad = gl.allocate_shared_memory(gl.bfloat16, [V // 32, C, 32], VALUES)
    error_grad = gl.allocate_shared_memory(gl.bfloat16, [V // 32, C, 32], VALUES)
    delta = gl.allocate_shared_memory(gl.bfloat16, [V // 32, C, 32], VALUES)
    n = gl.arange(0, C, BY_VALUE_ROW)
    n_channel = gl.arange(0, 32, gl.SliceLayout(0, FLAT_TILE_LAYOUT))[None, :]
    n_mask = (n < length)[:, None] & (n_channel < 32)
    n_b = gl.load(scales + 2 * C + n)
    own = gl.zeros([C], gl.float32, BY_VALUE_ROW)
    b_grad = gl.zeros([C], gl.float32, BY_VALUE_ROW)
    for index in gl.static_range(V // 32):
        at = value_base + n[:, None] * (HV * V) + n_channel + 32 * index
        packed = n[:, None] * V + n_channel + 32 * index
        x = gl.load(do + at, mask=n_mask, other=0.0)
        y = gl.load(error_grads + packed)
        z = gl.load(deltas + packed)
        output_grad.index(index).store(x.to(gl.bfloat16))
        error_grad.index(index).store(y)
        delta.index(index).store(z)
        y = y.to(gl.float32)
        own += gl.sum(x.to(gl.float32) * z.to(gl.float32), axis=1)
        gl.store(dv + at, (y * n_b[:, None]).to(dv.dtype.element_ty), mask=n_mask)
    for part in range(slices):
        b_grad += gl.load(beta_parts + (block * slices + part) * C + n)
    # beta scales what a token's error adds, so its gradient is derror . delta / beta, which the sigmoid's own
    # derivative turns into a product.
    b_grad /= gl.load(scales + C + n)
    if BETA_SIGMOID:
        b_grad *= 1.0 - n_b
    else:
        b_grad /= gl.where(n < length, n_b, 1.0)
    gl.store(dbeta + (start + n) * HV + hv, b_grad.to(dbeta.dtype.element_ty), mask=n < length)

    # The gradients of P and L: blocks on the diagonal stay in registers, those below pass shared memory.
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    fence_async_shared()
    pair = gl.zeros([C, C], gl.float32, RESULT)
    gram = gl.zeros([C, C], gl.float32, RESULT)
    for index in gl.static_range(V // 32):
        pair = warpgroup_mma(output_grad.index(index), delta.index(index).permute((1, 0)), pair)
        gram = warpgroup_mma(error_grad.index(index), delta.index(index).permute((1, 0)), gram)
    row = gl.arange(0, C, gl.SliceLayout(1, RESULT))
    column = gl.arange(0, C, gl.SliceLayout(0, RESULT))[None, :]
    pair *= (gl.load(scales + row) * scale)[:, None]
    gram *= -(gl.load(scales + C + row) * gl.load(scales + 2 * C + row))[:, None]
    row = row[:, None]
    inside = (row // 16 == column // 16) & (row > column)
    below = row // 16 > column // 16
    own_pair = gl.sum(gl.reshape(gl.where(inside, pair, 0.0), [4, 16, 4, 16]), axis=2)
    own_gram = gl.sum(gl.reshape(gl.where(inside, gram, 0.0), [4, 16, 4, 16]), axis=2)
    own_pair_t = gl.convert_layout(gl.permute(own_pair, (0, 2, 1)), BLOCK_LAYOUT)
    own_gram_t = gl.convert_layout(gl.permute(own_gram, (0, 2, 1)), BLOCK_LAYOUT)
    own_pair = gl.convert_layout(own_pair, BLOCK_LAYOUT)
    own_gram = gl.convert_layout(own_gram, BLOCK_LAYOUT) + own_gram_t
    SQUARE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    pair = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE, gl.where(below, pair, 0.0).to(gl.bfloat16))
    gram = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE, gl.where(below, gram, 0.0).to(gl.bfloat16))
    pair_row0, pair_row1, pair_row2, _ = block_columns(pair.load(SQUARE_LAYOUT))
    gram_row0, gram_row1, gram_row2, _ = block_columns(gram.load(SQUARE_LAYOUT))
    _, pair_column1, pair_column2, pair_column3 = block_columns(pair.permute((1, 0)).load(SQUARE_LAYOUT))
    _, gram_column1, gram_column2, gram_column3 = block_columns(gram.permute((1, 0)).load(SQUARE_LAYOUT))

    sub_chunk = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, BLOCK_LAYOUT)))[:, None, None]
    at_row = gl.arange(0, 16, CHANNELS)
    at_token = gl.arange(0, 16, gl.SliceLayout(0, BY_TOKEN))[None, None, :]
    at_block_row = at_row[None, :, None]
    token = gl.arange(0, 4, gl.SliceLayout(1, BY_TOKEN))[:, None] * 16
    token += gl.arange(0, 16, gl.SliceLayout(0, BY_TOKEN))[None, :]
    q_norm = gl.load(scales + token)
    k_norm = gl.load(scales + C + token)
    q_gain = gl.expand_dims(q_norm * scale, 1)
    k_gain = gl.expand_dims(-k_norm * gl.load(scales + 2 * C + token), 1)
    own = gl.convert_layout(gl.reshape(own, [4, 16]), BY_TOKEN)
    own = gl.expand_dims(own, 1) * q_gain
    summed = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, SECOND_LAYOUT)))[None, :, None]
    by = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, SECOND_LAYOUT)))[None, None, :]
    later = ones_where(summed >= by)
    earlier = ones_where(summed < by)

    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    column_slots = gl.allocate_shared_memory(gl.bfloat16, [C, 16], PLAIN)
    total_slots = gl.allocate_shared_memory(gl.float32, [C], LINE)
    row_slots_sum = gl.allocate_shared_memory(gl.float32, [C], LINE)
    column_slots_sum = gl.allocate_shared_memory(gl.float32, [C], LINE)
    start_slots = gl.allocate_shared_memory(gl.float32, [C], LINE)
    end_slots = gl.allocate_shared_memory(gl.float32, [C], LINE)
    rate = 1.0
    if a_log is not None:
        rate = gl.exp2(gl.load(a_log + hv).to(gl.float32) * LOG2E)
    rate_grad = gl.zeros([4, 16], gl.float32, BY_CHANNEL)
    q_along = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    k_along = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    inside = (token < length)[:, None, :] & (at_row < 16)[None, :, None]
    stored_token = gl.arange(0, C, gl.SliceLayout(1, PAIR_LAYOUT))[:, None]
    stored_channel = gl.arange(0, 16, gl.SliceLayout(0, PAIR_LAYOUT))[None, :]
    stored_mask = (stored_token < length) & (stored_channel < 16)
    stored_at = key_base + stored_token * (HV * K) + stored_channel
    # A tile's row is the channel 2 (row % 8) + row / 8 of its 16.
    channel_of_row = 2 * (at_row % 8) + at_row // 8
    bias_slots = gl.allocate_shared_memory(gl.float32, [K // 16, 16], LINE)
    if dt_bias is not None:
        for tile in gl.static_range(K // 16):
            bias_slots.index(tile).store(
                gl.load(dt_bias + hv * K + 16 * tile + channel_of_row).to(gl.float32)
            )
    STATE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    state_row = gl.arange(0, 16, gl.SliceLayout(1, STATE))[:, None]
    state_at = (2 * (state_row % 8) + state_row // 8) * V + gl.arange(0, V, gl.SliceLayout(0, STATE))[None, :]
    state_slots = gl.allocate_shared_memory(gl.bfloat16, [16, V], ROWS)
    state_grad_slots = gl.allocate_shared_memory(gl.bfloat16, [16, V], ROWS)
    # Where the squares were; with it two programs still share a multiprocessor.
    rest = gl.allocate_shared_memory(gl.bfloat16, [V // 32, C, 32], VALUES)
    REST: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rest_at = gl.arange(0, C, gl.SliceLayout(1, REST))[:, None] * V
    rest_at += gl.arange(0, 32, gl.SliceLayout(0, REST))[None, :]
    barrier()
    for index in gl.static_range(V // 32):
        async_copy.async_copy_global_to_shared(rest.index(index), delta_rest + rest_at + 32 * index)
    async_copy.async_copy_global_to_shared(state_slots, states + state_at)
    async_copy.async_copy_global_to_shared(state_grad_slots, state_grads + state_at)
    async_copy.commit_group()
    neighbours = ((at_block_row ^ at_token) // 2) == 0
    neighbour_pair = gl.expand_dims(gl.sum(gl.where(neighbours, own_pair + own_pair_t, 0.0), axis=1), 1)
    neighbour_gram = gl.expand_dims(gl.sum(gl.where(neighbours, own_gram, 0.0), axis=1), 1)
    zero = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    one = gl.full([4, 16, 16], 1.0, gl.float32, BLOCK_LAYOUT)
    state_like = gl.zeros([4, 16, 32], gl.bfloat16, TILE_LAYOUT)
    for tile in range(K // 16):
        # Copies end in the order in which they began: this tile's g, then its states.
        async_copy.wait_group(1)
        barrier()
        if tile + 1 < K // 16:
            async_copy.async_copy_global_to_shared(
                g_slots.index((tile + 1) % 2), g + copied_at + 16 * (tile + 1), mask=copied_mask
            )
        async_copy.commit_group()
        q_tile = channels_first(q_slots.index(tile).load(PAIR_LAYOUT)).to(gl.float32)
        k_tile = channels_first(k_slots.index(tile).load(PAIR_LAYOUT)).to(gl.float32)
        f = channels_first(g_slots.index(tile % 2).load(PAIR_LAYOUT)).to(gl.float32)
        if dt_bias is not None:
            f += bias_slots.index(tile).load(CHANNELS)[None, :, None]
        log_decay = log2_decay(f, 0.0, rate, lower_bound, GATE)
        total = gl.where(inside, gl.exp2(log_decay), 1.0)
        # Neighbouring tokens, without a product.
        odd = at_token % 2 == 1
        k_neighbour = swap_token_halves(gl.where(odd, k_tile * total, k_tile), 1)
        q_neighbour = swap_token_halves(q_tile * total, 1)
        to_q = gl.where(odd, neighbour_pair * k_neighbour * total, 0.0)
        to_row = gl.where(odd, neighbour_gram * k_neighbour * total, 0.0)
        to_column = neighbour_gram * k_neighbour + neighbour_pair * q_neighbour
        to_column = gl.where(odd, 0.0, to_column)
        other = swap_token_halves(total, 1)
        before = gl.where(odd, total * other, total)
        after = gl.where(odd, one, other)
        total *= other
        for level in gl.static_range(1, 4):
            h = 1 << level
            is_row = (at_token // h) % 2 == 1
            pairs = ((at_block_row ^ at_token) // h) == 1
            d = gl.where(is_row, before, after)
            k_decayed = first(k_tile * d)
            q_decayed = first(q_tile * d)
            to_q += mma_v2(k_decayed, second(gl.where(pairs, own_pair, 0.0)), zero) * d
            both = mma_v2(k_decayed, second(gl.where(pairs, own_gram, 0.0)), zero)
            both = mma_v2(q_decayed, second(gl.where(pairs, own_pair_t, 0.0)), both) * d
            to_row += gl.where(is_row, both, 0.0)
            to_column += gl.where(is_row, 0.0, both)
            other = swap_token_halves(total, h)
            before = gl.where(is_row, before * other, before)
            after = gl.where(is_row, after, after * other)
            total = total * other

        whole = gl.reduce(total, 2, keep)
        # A tile's own place is free between its inputs and its gradients.
        query_slots = q_slots.index(tile)._reinterpret(gl.bfloat16, [C, 16], ROWS)
        row_slots = k_slots.index(tile)._reinterpret(gl.bfloat16, [C, 16], ROWS)
        column_slots.store(gl.reshape((k_tile * after).to(gl.bfloat16), [C, 16]))
        query_slots.store(gl.reshape((q_tile * before).to(gl.bfloat16), [C, 16]))
        row_slots.store(gl.reshape((k_tile * before).to(gl.bfloat16), [C, 16]))
        total_slots.store(gl.reshape(whole, [C]))
        like = zero.to(gl.bfloat16)
        total0 = load_channels_of(total_slots, 0)
        total1 = load_channels_of(total_slots, 1)
        total2 = load_channels_of(total_slots, 2)
        total3 = load_channels_of(total_slots, 3)
        far = load_tile_of(column_slots, 0, like)
        far_q = mma_v2(far, pair_row0, zero)
        far_row = mma_v2(far, gram_row0, zero)
        far = load_tile_of(column_slots, 1, like)
        far_q = mma_v2(far, pair_row1, gl.where(sub_chunk > 1, far_q * total1, far_q))
        far_row = mma_v2(far, gram_row1, gl.where(sub_chunk > 1, far_row * total1, far_row))
        far = load_tile_of(column_slots, 2, like)
        far_q = mma_v2(far, pair_row2, gl.where(sub_chunk > 2, far_q * total2, far_q))
        far_row = mma_v2(far, gram_row2, gl.where(sub_chunk > 2, far_row * total2, far_row))
        far_column = mma_v2(load_tile_of(query_slots, 3, like), pair_column3, zero)
        far_column = mma_v2(load_tile_of(row_slots, 3, like), gram_column3, far_column)
        far_column = gl.where(sub_chunk < 2, far_column * total2, far_column)
        far_column = mma_v2(load_tile_of(query_slots, 2, like), pair_column2, far_column)
        far_column = mma_v2(load_tile_of(row_slots, 2, like), gram_column2, far_column)
        far_column = gl.where(sub_chunk < 1, far_column * total1, far_column)
        far_column = mma_v2(load_tile_of(query_slots, 1, like), pair_column1, far_column)
        far_column = mma_v2(load_tile_of(row_slots, 1, like), gram_column1, far_column)
        far_q *= before
        far_row *= before
        far_column *= after
        # What a token's decay gathers: from pairs inside its sub-chunk and from rows, everything behind
        # it; from columns with rows in later sub-chunks or the state, everything before it.
        behind = -k_tile * to_column
        ahead = k_tile * far_column
        row_slots_sum.store(gl.reshape(gl.sum(q_tile * far_q + k_tile * far_row, axis=2), [C]))
        column_slots_sum.store(gl.reshape(gl.sum(ahead, axis=2), [C]))
        to_q += far_q
        to_row += far_row
        to_column += far_column

        # What passes through the states at the chunk's two ends.
        through_q = zero
        through_row = zero
        through_column = zero
        async_copy.wait_group(1)
        barrier()
        for index in gl.static_range(V // 32):
            state = load_state(state_slots, index, state_like)
            through_q = mma_v2(state, load_values(output_grad, index), through_q)
            through_row = mma_v2(state, load_values(error_grad, index), through_row)
            state = load_state(state_grad_slots, index, state_like)
            through_column = mma_v2(state, load_values(rest, index), through_column)
            through_column = mma_v2(state, load_values(delta, index), through_column)
        product = state_slots.load(STATE).to(gl.float32) * state_grad_slots.load(STATE).to(gl.float32)
        passed = gl.convert_layout(gl.sum(product, axis=1), CHANNELS)[None, :, None]
        barrier()
        if tile + 1 < K // 16:
            next_at = state_at + 16 * (tile + 1) * V
            async_copy.async_copy_global_to_shared(state_slots, states + next_at)
            async_copy.async_copy_global_to_shared(state_grad_slots, state_grads + next_at)
        async_copy.commit_group()
        before *= gl.where(sub_chunk > 0, total0, 1.0)
        before *= gl.where(sub_chunk > 1, total1, 1.0)
        before *= gl.where(sub_chunk > 2, total2, 1.0)
        after *= gl.where(sub_chunk < 3, total3, 1.0)
        after *= gl.where(sub_chunk < 2, total2, 1.0)
        after *= gl.where(sub_chunk < 1, total1, 1.0)
        through_q *= before * q_gain
        through_row *= before * k_gain
        through_column *= after
        to_q += through_q
        to_row += through_row
        to_column += through_column
        start_slots.store(gl.reshape(gl.sum(q_tile * through_q + k_tile * through_row, axis=2), [C]))
        end_slots.store(gl.reshape(gl.sum(k_tile * through_column, axis=2), [C]))
        behind += q_tile * to_q + k_tile * to_row
        ahead += k_tile * through_column

        passed *= total0 * total1 * total2 * total3
        g_grad = sum_tokens(ahead, earlier, sum_tokens(behind, later, zero)) + passed
        g_grad += gl.where(sub_chunk < 3, load_channels_of(start_slots, 3), 0.0)
        g_grad += gl.where(sub_chunk < 2, load_channels_of(start_slots, 2), 0.0)
        g_grad += gl.where(sub_chunk < 1, load_channels_of(start_slots, 1), 0.0)
        g_grad += gl.where(sub_chunk > 0, load_channels_of(end_slots, 0), 0.0)
        g_grad += gl.where(sub_chunk > 1, load_channels_of(end_slots, 1), 0.0)
        g_grad += gl.where(sub_chunk > 2, load_channels_of(end_slots, 2), 0.0)
        # Pairs with the row in a later sub-chunk and the column in an earlier one.
        around = load_channels_of(column_slots_sum, 0) - load_channels_of(row_slots_sum, 1)
        g_grad += gl.where(sub_chunk == 1, around, 0.0)
        around = load_channels_of(row_slots_sum, 3) - load_channels_of(column_slots_sum, 2)
        g_grad += gl.where(sub_chunk == 2, around, 0.0)

        q_grad = to_q + own * k_tile
        k_grad = to_row + to_column + own * q_tile
        if NORMALIZE:
            q_along += q_tile * q_grad
            k_along += k_tile * k_grad
        if GATE == NO_GATE:
            f_grad = g_grad
        elif GATE == BOUNDED_GATE:
            e = 1.0 / (1.0 + gl.exp2(-rate * f * LOG2E))
            f_grad = g_grad * (lower_bound * rate) * e * (1.0 - e)
        else:
            f_grad = g_grad * -rate / (1.0 + gl.exp2(-f * LOG2E))
        f_grad = gl.where(inside, f_grad, 0.0)
        if bias_parts is not None:
            parts_at = (block * 4 + gl.arange(0, 4, gl.SliceLayout(1, BY_CHANNEL))[:, None]) * K
            gl.store(bias_parts + parts_at + 16 * tile + channel_of_row[None, :], gl.sum(f_grad, axis=2))
        if a_log is not None:
            if GATE == BOUNDED_GATE:
                rate_grad += gl.sum(f_grad * f, axis=2)
            else:
                rate_grad += gl.sum(gl.where(inside, g_grad * log_decay * LN2, 0.0), axis=2)
        gl.store(dg + stored_at + 16 * tile, tokens_first(f_grad).to(dg.dtype.element_ty), mask=stored_mask)
        q_slots.index(tile).store(tokens_first(q_grad).to(q.dtype.element_ty))
        k_slots.index(tile).store(tokens_first(k_grad).to(k.dtype.element_ty))
    async_copy.wait_group(0)

    if a_log is not None:
        gl.store(rate_parts + block, gl.sum(gl.sum(rate_grad, axis=1), axis=0))
    # Normalisation takes the part along q and k away, known only now that all channels are there.
    BY_COPIED_ROW: gl.constexpr = gl.SliceLayout(1, COPIED)
    q_part = gl.reshape(gl.sum(q_along, axis=1) * q_norm * q_norm, [C])
    q_part = gl.convert_layout(q_part, BY_COPIED_ROW)[:, None]
    k_part = gl.reshape(gl.sum(k_along, axis=1) * k_norm * k_norm, [C])
    k_part = gl.convert_layout(k_part, BY_COPIED_ROW)[:, None]
    for tile in gl.static_range(K // 16):
        at = copied_at + 16 * tile
        q_out = q_slots.index(tile).load(COPIED).to(gl.float32)
        k_out = k_slots.index(tile).load(COPIED).to(gl.float32)
        if NORMALIZE:
            q_out -= gl.load(q + at, mask=copied_mask, other=0.0).to(gl.float32) * q_part
            k_out -= gl.load(k + at, mask=copied_mask, other=0.0).to(gl.float32) * k_part
        gl.store(dq + at, q_out.to(dq.dtype.element_ty), mask=copied_mask)
        gl.store(dk + at, k_out.to(dk.dtype.element_ty), mask=copied_mask)
