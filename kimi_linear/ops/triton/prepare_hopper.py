"""`prepare_kernel` for Hopper, in Gluon: the same results, with every layout chosen by hand.

Triton's own layouts send each level of the tree through shared memory, three conversions and their barriers
a level. Here a warp owns a sub-chunk, and a lane holds tokens lane / 4 and lane / 4 + 8 and eight
neighbouring channels of a tile: 16 bytes of memory, and, channels of a sum being free to be renumbered,
exactly what the lane must hand to the matrix unit, for rows and for columns alike. So the levels inside a
sub-chunk touch no shared memory and know no barrier. Blocks below the diagonal take their columns from
shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mma_v2, warpgroup_mma

from kimi_linear.ops.triton import prepare, tiles
from kimi_linear.ops.triton.tiles import SIZES

WARPS = 4
TILE = 32

# Named so since Triton 3.7.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
place_chunk = gluon.jit(tiles.place_chunk.fn)
log2_decay = gluon.jit(tiles.log2_decay.fn)
load_beta = gluon.jit(prepare.load_beta.fn)

# [sub-chunk, token, channel], as memory and the matrix unit share it.
TILE_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0]],
        lane_bases=[[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[],
        shape=[4, 16, 32],
    )
)
FLAT_TILE_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
# [sub-chunk, row, column]: results of products, one sub-chunk a warp, and their operands.
BLOCK_LAYOUT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])
)
ROWS_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, BLOCK_LAYOUT.value, 1))
COLUMNS_LAYOUT = gl.constexpr(gl.DotOperandLayout(1, BLOCK_LAYOUT.value, 1))
# A block as the second operand, its rows in the order in which `block_rows` leaves the first one's columns.
SECOND_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0], [0, 8, 0], [0, 0, 8]],
        lane_bases=[[0, 2, 0], [0, 4, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[],
        shape=[4, 16, 16],
    )
)


@gluon.jit
def multiply(x, y):
    return x * y


@gluon.jit
def keep(x, y):  # noqa: ARG001 (a reduction's combination has two arguments)
    return x


@gluon.jit
def exchange(x, shuffle: gl.constexpr):
    return gl.inline_asm_elementwise(shuffle, "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def swap_halves(x, h: gl.constexpr):
    """The value of the token h further or back, whichever is in the same segment of 2h tokens."""
    if h == 8:
        y = gl.permute(gl.reshape(x, [4, 2, 8, 32]), (0, 2, 3, 1))
        low, high = gl.split(y)
        y = gl.permute(gl.join(high, low), (0, 3, 1, 2))
        y = gl.convert_layout(gl.reshape(y, [4, 16, 32]), TILE_LAYOUT, assert_trivial=True)
    elif h == 4:
        y = exchange(x, "shfl.sync.bfly.b32 $0, $1, 16, 0x1f, 0xffffffff;")
    elif h == 2:
        y = exchange(x, "shfl.sync.bfly.b32 $0, $1, 8, 0x1f, 0xffffffff;")
    else:
        y = exchange(x, "shfl.sync.bfly.b32 $0, $1, 4, 0x1f, 0xffffffff;")
    return y


@gluon.jit
def rows(x):
    """A tile [4, 16, 32] as rows of a product over channels; no data moves."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 4, 8]), (0, 1, 3, 2)), [4, 16, 32])
    return gl.convert_layout(x, ROWS_LAYOUT, assert_trivial=True)


@gluon.jit
def columns(x):
    """A tile [4, 16, 32] as columns of a product over channels; no data moves."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 4, 8]), (0, 1, 3, 2)), [4, 16, 32])
    return gl.convert_layout(gl.permute(x, (0, 2, 1)), COLUMNS_LAYOUT, assert_trivial=True)


@gluon.jit
def leading(x):
    """What a TF32 product sees of x: its 11 leading bits."""
    return (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)


@gluon.jit
def nearest(x):
    """x, moved so that a TF32 product, which cuts it to its leading bits, takes it rounded to nearest.

    Cut, all products of keys come out too small, by so much as the leading bits' half: enough to change what
    nearly equal keys leave of each other.
    """
    return (x.to(gl.int32, bitcast=True) + 4096).to(gl.float32, bitcast=True)


@gluon.jit
def multiply_blocks(x, y, acc):
    """acc + x y for blocks [4, 16, 16], x a result, y in SECOND_LAYOUT, to float32's precision."""
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 16, 2, 4, 2]), (0, 1, 2, 4, 3)), [4, 16, 16])
    x = gl.convert_layout(x, ROWS_LAYOUT, assert_trivial=True)
    y = gl.reshape(gl.permute(gl.reshape(y, [4, 2, 4, 2, 16]), (0, 1, 3, 2, 4)), [4, 16, 16])
    y = gl.convert_layout(y, COLUMNS_LAYOUT, assert_trivial=True)
    x_leading = leading(x)
    y_leading = leading(y)
    acc = mma_v2(x - x_leading, y_leading, acc, input_precision="tf32")
    acc = mma_v2(x_leading, y - y_leading, acc, input_precision="tf32")
    return mma_v2(x_leading, y_leading, acc, input_precision="tf32")


@gluon.jit
def second(x):
    return gl.convert_layout(x, SECOND_LAYOUT)


@gluon.jit
def load_block(slots, row: gl.constexpr):
    """Block `row` of a block column [64, 16], for all sub-chunks, in SECOND_LAYOUT."""
    x = slots.slice(16 * row, 16).load(gl.SliceLayout(0, SECOND_LAYOUT))
    return gl.expand_dims(x, 0) + gl.zeros([4, 16, 16], gl.float32, SECOND_LAYOUT)


@gluon.jit
def place_blocks(c0, c1, c2, c3):
    """The matrix [64, 64] of its block columns [4, 16, 16]."""
    x = gl.join(gl.join(c0, c2), gl.join(c1, c3))
    return gl.reshape(gl.permute(x, (0, 1, 3, 4, 2)), [64, 64])


@gluon.jit(do_not_specialize=SIZES)
def prepare_hopper_kernel(
    q,
    k,
    g,
    beta,
    a_log,
    dt_bias,
    read_keys,
    queries,
    write_keys,
    decay,
    scales,
    inverse,
    inverse_rest,
    write_rest,
    attention,
    chunk_table,
    cu_seqlens,
    T,
    sequences,
    lower_bound,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    VARLEN: gl.constexpr,
    GATE: gl.constexpr,
    BETA_SIGMOID: gl.constexpr,
    NORMALIZE: gl.constexpr,
):
    """One program a chunk and value head. Arguments and results are `prepare_kernel`'s; K is a multiple of
    32.
    """
    C: gl.constexpr = 64
    TILES: gl.constexpr = K // 32
    BY_CHANNEL: gl.constexpr = gl.SliceLayout(1, TILE_LAYOUT)
    BY_TOKEN: gl.constexpr = gl.SliceLayout(2, TILE_LAYOUT)
    ONE_CHANNEL: gl.constexpr = gl.SliceLayout(0, BY_CHANNEL)
    BY_ROW: gl.constexpr = gl.SliceLayout(2, BLOCK_LAYOUT)
    program = gl.program_id(0)
    chunk = program // HV
    hv = program % HV
    start, length = place_chunk(chunk, chunk_table, cu_seqlens, T, sequences, VARLEN, C)
    if length <= 0:
        return
    q += (start * H + hv // (HV // H)) * K
    k += (start * H + hv // (HV // H)) * K
    g += (start * HV + hv) * K
    block = program.to(gl.int64)
    queries += block * (C * K)
    read_keys += block * (C * K)
    write_keys += block * (C * K)
    decay += block * K
    scales += block * (3 * C)
    attention += block * (C * C)

    sub_chunk = gl.arange(0, 4, gl.SliceLayout(1, BY_TOKEN))[:, None]
    token = sub_chunk * 16 + gl.arange(0, 16, gl.SliceLayout(0, BY_TOKEN))[None, :]
    at_token = gl.arange(0, 16, gl.SliceLayout(0, BY_TOKEN))[None, :, None]
    channel = gl.arange(0, 32, gl.SliceLayout(0, BY_CHANNEL))[None, :]
    tile_sub_chunk = sub_chunk[:, :, None]
    qk_offsets = token[:, :, None] * (H * K) + channel[:, None, :]
    g_offsets = token[:, :, None] * (HV * K) + channel[:, None, :]
    out_offsets = token[:, :, None] * K + channel[:, None, :]
    mask = (token < length)[:, :, None] & (channel < 32)[:, None, :]
    rate = 1.0
    if a_log is not None:
        rate = gl.exp2(gl.load(a_log + hv).to(gl.float32) * 1.4426950408889634)
    at_sub_chunk = gl.arange(0, 4, gl.SliceLayout(1, BY_ROW))[:, None, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, BY_ROW))[None, :, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, BLOCK_LAYOUT)))[None, None, :]

    key_slots = gl.allocate_shared_memory(gl.float32, [C, 32], gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]))
    total_slots = gl.allocate_shared_memory(gl.float32, [4 * 32], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    WRITES: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    writes = gl.allocate_shared_memory(gl.bfloat16, [TILES, C, 32], WRITES)
    writes_rest = gl.allocate_shared_memory(gl.bfloat16, [TILES, C, 32], WRITES)
    attention0 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    attention1 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    attention2 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    own_attention = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    own_gram = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    gram0 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    gram1 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    gram2 = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    q_square = gl.zeros([4, 16], gl.float32, BY_TOKEN)
    k_square = gl.zeros([4, 16], gl.float32, BY_TOKEN)
    own = gl.zeros([4, 16], gl.float32, BY_TOKEN)
    for tile in range(TILES):
        k_start = tile * 32
        q_tile = gl.load(q + qk_offsets + k_start, mask=mask, other=0.0).to(gl.float32)
        k_tile = gl.load(k + qk_offsets + k_start, mask=mask, other=0.0).to(gl.float32)
        f = gl.load(g + g_offsets + k_start, mask=mask, other=0.0).to(gl.float32)
        if dt_bias is not None:
            bias = gl.load(dt_bias + hv * K + k_start + channel)
            f += gl.expand_dims(bias.to(gl.float32), 1)
        total = gl.where(mask, gl.exp2(log2_decay(f, 0.0, rate, lower_bound, GATE)), 1.0)
        own += gl.sum(q_tile * k_tile, axis=2)
        if NORMALIZE:
            q_square += gl.sum(q_tile * q_tile, axis=2)
            k_square += gl.sum(k_tile * k_tile, axis=2)

        before = total
        after = gl.full([4, 16, 32], 1.0, gl.float32, TILE_LAYOUT)
        for level in gl.static_range(4):
            h = 1 << level
            is_row = (at_token // h) % 2 == 1
            d = gl.where(is_row, before, after)
            k_decayed = nearest(k_tile * d)
            k_columns = columns(k_decayed)
            pairs = (
                ((row // (2 * h)) == (column // (2 * h))) & ((row // h) % 2 == 1) & ((column // h) % 2 == 0)
            )
            x = mma_v2(rows(q_tile * d), k_columns, own_attention, input_precision="tf32")
            own_attention = gl.where(pairs, x, own_attention)
            x = mma_v2(rows(k_decayed), k_columns, own_gram, input_precision="tf32")
            own_gram = gl.where(pairs, x, own_gram)
            other = swap_halves(total, h)
            before = gl.where(is_row, before * other, before)
            after = gl.where(is_row, after, after * other)
            total = total * other

        k_columns = k_tile * after
        k_rows = k_tile * before
        q_rows = q_tile * before
        whole = gl.reduce(total, 1, keep)
        key_slots.store(gl.reshape(nearest(k_columns), [C, 32]))
        total_slots.store(gl.reshape(whole, [4 * 32]))
        passed = gl.full([32], 1.0, gl.float32, ONE_CHANNEL)
        for j in gl.static_range(3, -1, -1):
            skipped = total_slots.slice(32 * j, 32).load(ONE_CHANNEL)
            passed *= skipped
            skipped = skipped[None, None, :]
            if j < 3:
                x = key_slots.slice(16 * j, 16).load(gl.SliceLayout(0, TILE_LAYOUT))
                x = columns(gl.expand_dims(x, 0) + gl.zeros([4, 16, 32], gl.float32, TILE_LAYOUT))
                if j == 2:
                    attention2 = mma_v2(rows(q_rows), x, attention2, input_precision="tf32")
                    gram2 = mma_v2(rows(nearest(k_rows)), x, gram2, input_precision="tf32")
                elif j == 1:
                    attention1 = mma_v2(rows(q_rows), x, attention1, input_precision="tf32")
                    gram1 = mma_v2(rows(nearest(k_rows)), x, gram1, input_precision="tf32")
                else:
                    attention0 = mma_v2(rows(q_rows), x, attention0, input_precision="tf32")
                    gram0 = mma_v2(rows(nearest(k_rows)), x, gram0, input_precision="tf32")
                behind = tile_sub_chunk > j
                q_rows = gl.where(behind, q_rows * skipped, q_rows)
                k_rows = gl.where(behind, k_rows * skipped, k_rows)
            if j > 0:
                k_columns = gl.where(tile_sub_chunk < j, k_columns * skipped, k_columns)
        gl.store(queries + out_offsets + k_start, q_rows.to(queries.dtype.element_ty))
        gl.store(read_keys + out_offsets + k_start, k_rows.to(read_keys.dtype.element_ty))
        gl.store(decay + k_start + gl.arange(0, 32, ONE_CHANNEL), passed)
        x = k_columns.to(gl.bfloat16)
        writes.index(tile).store(gl.reshape(x, [C, 32]))
        writes_rest.index(tile).store(gl.reshape((k_columns - x.to(gl.float32)).to(gl.bfloat16), [C, 32]))

    b = load_beta(beta, start * HV + hv, token * HV, token < length, BETA_SIGMOID)
    if NORMALIZE:
        q_norm = gl.rsqrt(q_square + 1e-6)
        k_norm = gl.rsqrt(k_square + 1e-6)
    else:
        q_norm = gl.full([4, 16], 1.0, gl.float32, BY_TOKEN)
        k_norm = gl.full([4, 16], 1.0, gl.float32, BY_TOKEN)
    gl.store(scales + token, q_norm)
    gl.store(scales + C + token, k_norm)
    gl.store(scales + 2 * C + token, b)
    norms = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    norms.store(gl.reshape(k_norm, [C]))
    q_norms = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_norms.store(gl.reshape(q_norm, [C]))

    # diag(rk) (I + X diag(rk))^-1 = (I + diag(rk) X)^-1 diag(rk): the factor rk is left to the results.
    gain = gl.expand_dims(gl.convert_layout(b * k_norm * k_norm, BY_ROW, assert_trivial=True), 2)
    own = gl.expand_dims(gl.convert_layout(own, BY_ROW, assert_trivial=True), 2)
    own_attention = gl.where(row == column, own, own_attention)
    own_gram *= gain
    gram0 *= gain
    gram1 *= gain
    gram2 *= gain
    zero = gl.zeros([4, 16, 16], gl.float32, BLOCK_LAYOUT)
    solve = gl.where((row // 2 == column // 2) & (row > column), -own_gram, zero)
    solve = gl.where(row == column, 1.0, solve)
    for level in gl.static_range(1, 4):
        h = 1 << level
        pairs = ((row // (2 * h)) == (column // (2 * h))) & ((row // h) % 2 == 1) & ((column // h) % 2 == 0)
        x = multiply_blocks(gl.where(pairs, own_gram, zero), second(solve), zero)
        solve -= multiply_blocks(solve, second(x), zero)

    # Forwards through the block rows: row m, once known, goes to those behind it.
    SLOTS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    slots0 = gl.allocate_shared_memory(gl.float32, [C, 16], SLOTS, gl.reshape(solve, [C, 16]))
    slots1 = gl.allocate_shared_memory(gl.float32, [C, 16], SLOTS)
    slots2 = gl.allocate_shared_memory(gl.float32, [C, 16], SLOTS)
    sum0 = multiply_blocks(gram0, load_block(slots0, 0), zero)
    solve0 = -multiply_blocks(solve, second(sum0), zero)
    slots1.store(gl.reshape(solve0, [C, 16]))
    sum0 = multiply_blocks(gram1, load_block(slots1, 1), sum0)
    sum1 = multiply_blocks(gram1, load_block(slots0, 1), zero)
    x = -multiply_blocks(solve, second(sum0), zero)
    solve1 = -multiply_blocks(solve, second(sum1), zero)
    slots1.store(gl.reshape(x, [C, 16]))
    slots2.store(gl.reshape(solve1, [C, 16]))
    solve0 = gl.where(at_sub_chunk > 1, x, solve0)
    sum0 = multiply_blocks(gram2, load_block(slots1, 2), sum0)
    sum1 = multiply_blocks(gram2, load_block(slots2, 2), sum1)
    sum2 = multiply_blocks(gram2, load_block(slots0, 2), zero)
    solve0 = gl.where(at_sub_chunk > 2, -multiply_blocks(solve, second(sum0), zero), solve0)
    solve1 = gl.where(at_sub_chunk > 2, -multiply_blocks(solve, second(sum1), zero), solve1)
    solve2 = -multiply_blocks(solve, second(sum2), zero)

    x = place_blocks(
        gl.where(at_sub_chunk == 0, solve, solve0),
        gl.where(at_sub_chunk == 1, solve, gl.where(at_sub_chunk > 1, solve1, zero)),
        gl.where(at_sub_chunk == 2, solve, gl.where(at_sub_chunk > 2, solve2, zero)),
        gl.where(at_sub_chunk == 3, solve, zero),
    )
    y = place_blocks(
        gl.where(at_sub_chunk == 0, own_attention, attention0),
        gl.where(at_sub_chunk == 1, own_attention, gl.where(at_sub_chunk > 1, attention1, zero)),
        gl.where(at_sub_chunk == 2, own_attention, gl.where(at_sub_chunk > 2, attention2, zero)),
        gl.where(at_sub_chunk == 3, own_attention, zero),
    )
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    leading_bits = x.to(gl.bfloat16)
    solve = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE, leading_bits)
    solve_rest = gl.allocate_shared_memory(
        gl.bfloat16, [C, C], SQUARE, (x - leading_bits.to(gl.float32)).to(gl.bfloat16)
    )
    leading_bits = y.to(gl.bfloat16)
    scores = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE, leading_bits)
    scores_rest = gl.allocate_shared_memory(
        gl.bfloat16, [C, C], SQUARE, (y - leading_bits.to(gl.float32)).to(gl.bfloat16)
    )
    fence_async_shared()
    SQUARE_RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    result = gl.zeros([C, C], gl.float32, SQUARE_RESULT)
    result = warpgroup_mma(scores, solve_rest, result)
    result = warpgroup_mma(scores_rest, solve, result)
    result = warpgroup_mma(scores, solve, result)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    result *= norms.load(gl.SliceLayout(0, SQUARE_RESULT))[None, :]
    result *= q_norms.load(gl.SliceLayout(1, SQUARE_RESULT))[:, None]
    at = gl.arange(0, C, gl.SliceLayout(1, STORED))[:, None] * C
    at += gl.arange(0, C, gl.SliceLayout(0, STORED))[None, :]
    gl.store(attention + at, gl.convert_layout(result.to(attention.dtype.element_ty), STORED))
    if inverse is not None:
        x = solve.load(STORED).to(gl.float32) + solve_rest.load(STORED).to(gl.float32)
        x *= norms.load(gl.SliceLayout(0, STORED))[None, :]
        rounded = x.to(inverse.dtype.element_ty)
        gl.store(inverse + block * (C * C) + at, rounded)
        if inverse_rest is not None:
            rest = (x - rounded.to(gl.float32)).to(inverse_rest.dtype.element_ty)
            gl.store(inverse_rest + block * (C * C) + at, rest)
    TILE_RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]
    )
    TILE_STORED: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    at = gl.arange(0, C, gl.SliceLayout(1, TILE_STORED))[:, None] * K
    at += gl.arange(0, 32, gl.SliceLayout(0, TILE_STORED))[None, :]
    norm = norms.load(gl.SliceLayout(1, TILE_RESULT))[:, None]
    for tile in range(TILES):
        written = gl.zeros([C, 32], gl.float32, TILE_RESULT)
        written = warpgroup_mma(solve.permute((1, 0)), writes_rest.index(tile), written)
        written = warpgroup_mma(solve_rest.permute((1, 0)), writes.index(tile), written)
        written = warpgroup_mma(solve.permute((1, 0)), writes.index(tile), written)
        written *= norm
        # Names of their own: to Triton 3.6, a loop that gives a name another layout carries it around.
        rounded_keys = written.to(write_keys.dtype.element_ty)
        gl.store(write_keys + at + tile * 32, gl.convert_layout(rounded_keys, TILE_STORED))
        if write_rest is not None:
            keys_rest = (written - rounded_keys.to(gl.float32)).to(write_keys.dtype.element_ty)
            at_rest = write_rest + block * (C * K) + at + tile * 32
            gl.store(at_rest, gl.convert_layout(keys_rest, TILE_STORED))
