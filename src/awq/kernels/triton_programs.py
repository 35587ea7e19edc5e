"""Triton programs on 4-bit weights. Importing this needs Triton; `triton_int4` decides what is launched.

A row's codes lie in int16 words of four nibbles. A chunk is 4 * PLANE channels: its word j holds, nibble by
nibble, the codes of its channels j, j + PLANE, j + 2 PLANE and j + 3 PLANE. Shifting and masking a tile of
words therefore gives four tiles of codes, each an operand of a matrix product as it stands: neither reshaped
nor sent through shared memory again. A plane never crosses a group, for PLANE divides the group size.

`pairs` `[groups, out_features]` holds a scale and a zero point in one int32: the bits of a float32, of which
the lowest four are the zero point. Code - zero is exact in the activations' type; products are added up in
float32 group by group, and the scale is applied to the sum, so no weight is ever rounded. For few rows the
codes are multiplied without their zero points, which are taken off the sums.

Sums that several programs share are written down and added in a fixed order by the last one to arrive: the
same inputs give the same bits, whatever the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _centred(words, zeros, NIBBLE: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """(code - zero) of one nibble of `words`; `zeros` int16, broadcastable.

    0x6400 and 0x4300 are 1024 in float16 and 128 in bfloat16: a nibble in the lowest bits adds its own value.
    PTX unpacks two words at a time, which the compiler does not find by itself.
    """
    if BF16:
        SHIFT: tl.constexpr = 4 * NIBBLE
        if PTX:
            raised = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA; }}",
                "=r,r",
                [words],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            raised = (((words >> SHIFT) & 15) | 0x4300).to(tl.bfloat16, bitcast=True)
        centred = raised - (zeros | 0x4300).to(tl.bfloat16, bitcast=True)
    elif PTX:
        # Nibbles 1 and 3 are left where they are, sixteen times too large: one shift serves two nibbles.
        BYTE: tl.constexpr = 8 * (NIBBLE // 2)
        MASK: tl.constexpr = "0x000F000F" if NIBBLE % 2 == 0 else "0x00F000F0"
        raised = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {BYTE}; lop3.b32 $0, t, {MASK}, 0x64006400, 0xEA; }}",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        offset = (zeros | 0x6400).to(tl.float16, bitcast=True)
        if NIBBLE % 2 == 0:
            centred = raised - offset
        else:
            sixteenth = tl.full(raised.shape, 0.0625, tl.float16)
            centred = tl.fma(raised, sixteenth, tl.broadcast_to(960 - offset, raised.shape))
    else:
        raised = (((words >> (4 * NIBBLE)) & 15) | 0x6400).to(tl.float16, bitcast=True)
        centred = raised - (zeros | 0x6400).to(tl.float16, bitcast=True)
    return centred


@triton.jit
def _zeros_of(pairs):
    return (pairs & 15).to(tl.int16)


@triton.jit
def _scales_of(pairs):
    return (pairs & -16).to(tl.float32, bitcast=True)


@triton.jit
def _subnormal(words, NIBBLE: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """The codes of one nibble of `words` as the lowest bits of floats: as many times 2 ** -133 in bfloat16,
    2 ** -24 in float16.

    In bfloat16 nibbles 1 and 3 are left where they are, sixteen times as large: one shift serves two nibbles.
    """
    SHIFT: tl.constexpr = 8 * (NIBBLE // 2) if BF16 else 4 * NIBBLE
    MASK: tl.constexpr = 0x00F000F0 if BF16 and NIBBLE % 2 == 1 else 0x000F000F
    if PTX:
        codes = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}",
            "=r,r",
            [words],
            dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        codes = ((words >> SHIFT) & (MASK & 0xFF)).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)
    return codes


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x_ptr,
    words_ptr,
    pairs_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    row_words,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,
    STAGES: tl.constexpr,
    ONE: tl.constexpr,
    EARLY: tl.constexpr,
    BF16: tl.constexpr,
    PTX: tl.constexpr,
):
    """out `[rows, out_features]` = x `[rows, in_features]` times the weight, for rows up to BLOCK_M.

    A program computes BLOCK_N output channels. SIDE chunks side by side are a batch of products, one for each
    warp, added up at the end: few output channels are enough to keep a whole processor reading.

    Unpacking would take longer than all the rest. So codes are multiplied as they lie there, as subnormal
    numbers, which NVIDIA's matrix units take (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021),
    and zero points are taken off the sums: zero * (sum of the group's activations), a product with ones.
    bfloat16 activations are first multiplied by powers of two, exactly below 2 ** 63, so that products stay
    clear of the smallest float32.

    PER_GROUP: planes of a chunk that share a group; WHOLE: all SIDE chunks of each step lie within the input
    channels. ONE: there is one row, read once and multiplied as if it were many, which leaves more memory for
    what is read ahead, which is STAGES steps. EARLY: programs are launched before the launch ahead has ended,
    and wait for that; the next launch may begin only then, so whoever waits for the launch just ahead of it
    has waited for all.
    """
    CHUNK: tl.constexpr = 4 * PLANE
    first_n = tl.program_id(0) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, PLANE)
    side = tl.arange(0, SIDE)
    n_inside = (n < out_features)[None, :]
    m_inside = (m < rows)[None, None, :]
    # Offsets within a tile need 32 bits only: half the instructions that addresses of 64 take.
    words_ptr += first_n.to(tl.int64) * row_words
    words_at = tl.arange(0, BLOCK_N)[None, :, None] * row_words + side[:, None, None] * PLANE + column
    x_at = m[None, None, :] * in_features + side[:, None, None] * CHUNK + column[None, :, None]
    total = tl.zeros((SIDE, BLOCK_N, BLOCK_M), tl.float32)
    chunks = tl.cdiv(in_features, CHUNK)
    for first in tl.range(0, chunks, SIDE, num_stages=STAGES):
        inside = (first + side < chunks)[:, None]
        in_words = n_inside if WHOLE else inside & n_inside
        words = tl.load(words_ptr + first * PLANE + words_at, mask=in_words[:, :, None], other=0)
        for part in tl.static_range(4 // PER_GROUP):
            channel = (first + side) * CHUNK + part * PER_GROUP * PLANE
            in_part = n_inside if WHOLE else n_inside & (channel < in_features)[:, None]
            pairs = tl.load(
                pairs_ptr + (channel // GROUP)[:, None] * out_features + n[None, :],
                mask=in_part,
                other=0,
            )
            sums = tl.zeros((SIDE, BLOCK_N, BLOCK_M), tl.float32)
            x_sums = tl.zeros((SIDE, BLOCK_N, BLOCK_M), tl.float32)
            for plane in tl.static_range(part * PER_GROUP, (part + 1) * PER_GROUP):
                start = (first + side) * CHUNK + plane * PLANE
                in_plane = inside & (start < in_features)[:, None]
                if ONE:
                    if WHOLE:
                        one = tl.load(x_ptr + start[:, None] + column[None, :])
                    else:
                        one = tl.load(x_ptr + start[:, None] + column[None, :], mask=in_plane, other=0)
                    x = tl.broadcast_to(one[:, :, None], (SIDE, PLANE, BLOCK_M))
                else:
                    in_x = m_inside if WHOLE else in_plane[:, :, None] & m_inside
                    x = tl.load(x_ptr + (first * CHUNK + plane * PLANE) + x_at, mask=in_x, other=0)
                if BF16:
                    x = x * tl.full(x.shape, 2.0**64 if plane % 2 == 0 else 2.0**60, tl.bfloat16)
                ones = tl.full((SIDE, BLOCK_N, PLANE), 16 if BF16 and plane % 2 == 1 else 1, tl.int16)
                sums = tl.dot(_subnormal(words, plane, BF16, PTX), x, sums)
                x_sums = tl.dot(ones.to(x.dtype, bitcast=True), x, x_sums)
            # A whole number below 2 ** 23 in the lowest bits of that float adds its own value.
            zeros = ((pairs & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            total += (sums - zeros[:, :, None] * x_sums) * _scales_of(pairs)[:, :, None]
    total = tl.sum(total, 0) * (2.0**69 if BF16 else 2.0**24)
    inside_out = (n < out_features)[:, None] & (m < rows)[None, :]
    tl.store(
        out_ptr + m[None, :] * out_features + n[:, None], total.to(out_ptr.dtype.element_ty), mask=inside_out
    )


@triton.jit(do_not_specialize=["rows", "share_chunks"])
def many_rows(
    x_ptr,
    words_ptr,
    pairs_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    rows,
    out_features,
    in_features,
    row_words,
    share_chunks,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    BF16: tl.constexpr,
    PTX: tl.constexpr,
):
    """out `[rows, out_features]` = x `[rows, in_features]` times the weight.

    A program computes BLOCK_N output channels of BLOCK_M rows over `share_chunks` chunks. SPLIT programs
    share the input channels: their sums go to `partial`, and `counters`, zero before and after, tell who is
    last.
    """
    CHUNK: tl.constexpr = 4 * PLANE
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    share = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, PLANE)
    m_inside = (m < rows)[None, :]
    n_inside = n < out_features
    words_at = words_ptr + n.to(tl.int64)[:, None] * row_words + column[None, :]
    x_at = x_ptr + m[None, :] * in_features + column[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = tl.minimum((share + 1) * share_chunks, tl.cdiv(in_features, CHUNK))
    for chunk in range(share * share_chunks, end):
        words = tl.load(words_at + chunk * PLANE, mask=n_inside[:, None], other=0)
        for part in tl.static_range(4 // PER_GROUP):
            channel = chunk * CHUNK + part * PER_GROUP * PLANE
            in_part = n_inside if WHOLE else n_inside & (tl.full((BLOCK_N,), channel, tl.int32) < in_features)
            pairs = tl.load(pairs_ptr + (channel // GROUP) * out_features + n, mask=in_part, other=0)
            zeros = _zeros_of(pairs)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for plane in tl.static_range(part * PER_GROUP, (part + 1) * PER_GROUP):
                codes = _centred(words, zeros[:, None], plane, BF16, PTX)
                offset = chunk * CHUNK + plane * PLANE
                in_plane = m_inside if WHOLE else m_inside & (offset + column < in_features)[:, None]
                x = tl.load(x_at + offset, mask=in_plane, other=0)
                sums = tl.dot(codes, x, sums)
            total += sums * _scales_of(pairs)[:, None]
    inside_out = n_inside[:, None] & m_inside
    out_at = out_ptr + m[None, :] * out_features + n[:, None]
    if SPLIT == 1:
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside_out)
    else:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partial_at = partial_ptr + tile * (BLOCK_N * BLOCK_M) + within
        tl.store(partial_at + share * tiles * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # every thread's sums are written before this program is counted
        before = tl.atomic_add(counters_ptr + tile, 1)
        if before == SPLIT - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLIT):
                # Read from the shared cache: this processor's own may hold older values.
                total += tl.load(partial_at + other * tiles * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside_out)
            tl.store(counters_ptr + tile, 0)


@triton.jit
def dequantize(
    words_ptr,
    pairs_ptr,
    out_ptr,
    out_features,
    in_features,
    row_words,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    """The weight as floats `[out_features, in_features]`: (code - zero) * scale in float32, then rounded."""
    CHUNK: tl.constexpr = 4 * PLANE
    chunk = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]
    column = tl.arange(0, PLANE)[None, :]
    n_inside = n < out_features
    words = tl.load(words_ptr + row * row_words + chunk * PLANE + column, mask=n_inside[:, None], other=0)
    for plane in tl.static_range(4):
        channel = chunk * CHUNK + plane * PLANE
        inside = n_inside if WHOLE else n_inside & (tl.full((BLOCK_N,), channel, tl.int32) < in_features)
        pairs = tl.load(pairs_ptr + (channel // GROUP) * out_features + n, mask=inside, other=0)
        codes = _centred(words, _zeros_of(pairs)[:, None], plane, False, PTX)
        values = codes.to(tl.float32) * _scales_of(pairs)[:, None]
        out_at = out_ptr + row * in_features + channel + column
        tl.store(out_at, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["channels", "levels"])
def round_panel(
    rest_ptr,
    upper_ptr,
    scales_ptr,
    zeros_ptr,
    codes_ptr,
    channels,
    out_features,
    levels,
    WIDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round channel after channel, moving each one's error to those behind it; `rest` becomes the errors."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDEST)
    inside = n < out_features
    cells = channel.to(tl.int64)[:, None] * out_features + n[None, :]
    rest = tl.load(rest_ptr + cells, mask=(channel < channels)[:, None] & inside[None, :], other=0.0)
    for i in range(channels):
        here = i * out_features + n
        value = tl.sum(tl.where((channel == i)[:, None], rest, 0.0), 0)
        scales = tl.load(scales_ptr + here, mask=inside, other=1.0)
        zeros = tl.load(zeros_ptr + here, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(zeros + tl.div_rn(value, scales), 0.0), levels)
        # To the nearest whole number, halves to the even one: what is added leaves no bits for fractions.
        code = (code + 12582912.0) - 12582912.0
        row = tl.load(upper_ptr + i * channels + channel, mask=channel < channels, other=0.0)
        pivot = tl.load(upper_ptr + i * channels + i)
        error = tl.div_rn(value - (code - zeros) * scales, tl.zeros_like(value) + pivot)
        rest -= tl.where(channel > i, row, 0.0)[:, None] * error[None, :]
        tl.store(codes_ptr + here, code.to(tl.uint8), mask=inside)
        tl.store(rest_ptr + here, error, mask=inside)


@triton.jit(do_not_specialize=["channels", "levels"])
def move_panel(
    numbers_ptr,
    slope_ptr,
    gram_ptr,
    scales_ptr,
    moves_ptr,
    channels,
    out_features,
    levels,
    TINY: tl.constexpr,
    WIDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move code after code to where it does best, and the slopes of those behind it along; in place."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDEST)
    inside = n < out_features
    cells = channel.to(tl.int64)[:, None] * out_features + n[None, :]
    slope = tl.load(slope_ptr + cells, mask=(channel < channels)[:, None] & inside[None, :], other=0.0)
    for i in range(channels):
        here = i * out_features + n
        value = tl.sum(tl.where((channel == i)[:, None], slope, 0.0), 0)
        scales = tl.load(scales_ptr + here, mask=inside, other=1.0)
        code = tl.load(numbers_ptr + here, mask=inside, other=0.0)
        row = tl.load(gram_ptr + i * channels + channel, mask=channel < channels, other=0.0)
        pivot = tl.maximum(tl.load(gram_ptr + i * channels + i), TINY)
        best = tl.minimum(tl.maximum(code - tl.div_rn(value, scales * pivot), 0.0), levels)
        # To the nearest whole number, as above.
        best = (best + 12582912.0) - 12582912.0
        move = (best - code) * scales
        slope += row[:, None] * move[None, :]
        tl.store(numbers_ptr + here, best, mask=inside)
        tl.store(moves_ptr + here, move, mask=inside)
