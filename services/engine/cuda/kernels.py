"""Triton kernels: norms, gates, products of few rows, new keys and values into pages, attention over pages, slices of pages.

A layer's pages are `[pages, 2, kv_heads, page_tokens, head_dim]`, strided by whole pages. Whatever changes from step to step is read from
device memory (positions, slots, lengths, page tables), so that a launch in a CUDA graph stays good. Sums are float32 whatever the type.
Positions beyond a sequence's end are never loaded: their memory may hold anything. Softmax is computed with powers of 2, `scale`
includes log2(e).

With OVERLAP a program begins while the launch before it ends (programmatic dependent launch, from Hopper on): every kernel of a decode
step waits for it before it reads or writes anything that the step computes, so that what came earlier still is complete.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE: tl.constexpr = tl.constexpr(128)
"""Bytes that one prefetch brings."""


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Wait for the launch before this one, and let the next one begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def norm(x, delta, weight, out, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    """One row of `WIDTH` a program: `x += ` the sum of the PARTS of `delta`, `[PARTS, rows, WIDTH]`, then `out = x / rms(x) * weight`."""
    follow(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    live = columns < WIDTH
    row = tl.load(x + at + columns, mask=live, other=0.0)
    if PARTS > 0:
        sum = row.to(tl.float32)
        for part in tl.static_range(PARTS):
            sum += tl.load(delta + part * tl.num_programs(0).to(tl.int64) * WIDTH + at + columns, mask=live, other=0.0).to(tl.float32)
        row = sum.to(row.dtype)
        tl.store(x + at + columns, row, mask=live)
    wide = row.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
    tl.store(out + at + columns, (wide * root * tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)).to(row.dtype), mask=live)


@triton.jit
def gate(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`out = silu(both[:, :WIDTH]) * both[:, WIDTH:]`, BLOCK columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    at = both + row * (2 * WIDTH) + columns
    left = tl.load(at, mask=live, other=0.0)
    wide = left.to(tl.float32)
    right = tl.load(at + WIDTH, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (wide / (1.0 + tl.exp(-wide)) * right).to(left.dtype), mask=live)


@triton.jit(do_not_specialize=["rows"])
def product(
    x,
    weight,
    out,
    rows,
    outputs,
    inputs,
    share,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`x @ weight.T` of few rows, for OUTPUTS columns of all of them and `share` of their inputs a program: bound by reading the weights.

    `x` is `[rows, inputs]`, `weight` `[outputs, inputs]`, `out` `[inputs / share, rows, outputs]`. GATED: `weight` has twice the rows,
    and `out = silu(left half) * right half`. `share` divides `inputs` and DEPTH `share`, OUTPUTS divides `outputs`. AHEAD lines of every
    row of weights are fetched before the launch ahead of this one is waited for."""
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * share
    depth = tl.arange(0, DEPTH)
    lies = weight + column[:, None].to(tl.int64) * inputs + (first + depth)[None, :]
    right = lies + outputs.to(tl.int64) * inputs
    if AHEAD > 0:
        lines = weight + column[:, None].to(tl.int64) * inputs + (first + tl.arange(0, AHEAD) * (LINE // 2))[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
    follow(OVERLAP)
    row = tl.arange(0, ROWS)
    live = (row < rows)[:, None]
    given = x + row[:, None] * inputs + (first + depth)[None, :]
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    gates = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for k in range(0, share, DEPTH):
        left = tl.load(given + k, mask=live, other=0.0)
        if GATED:
            gates = tl.dot(left, tl.trans(tl.load(lies + k)), gates)
            sums = tl.dot(left, tl.trans(tl.load(right + k)), sums)
        else:
            sums = tl.dot(left, tl.trans(tl.load(lies + k)), sums)
    if GATED:
        sums = gates / (1.0 + tl.exp(-gates)) * sums
    at = (tl.program_id(1) * rows + row[:, None]).to(tl.int64) * outputs + column[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=live)


@triton.jit
def put(
    qkv,
    queries,
    pages,
    cosines,
    sines,
    norms,
    positions,
    slots,
    page_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    NORMS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one token a program: its norm (NORMS), its rotation, then a query into `queries`, a key or a value into its slot.

    `qkv` is the sum of its PARTS, `[PARTS, tokens, (HEADS + 2 * KV_HEADS) * DIM]`. A slot is `page * PAGE + place`; below 0 the token is
    padding and is written nowhere."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, HALF)
    live = d < DIM // 2
    at = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM + d
    low = tl.load(at, mask=live, other=0.0).to(tl.float32)
    high = tl.load(at + DIM // 2, mask=live, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        more = at + part * tl.num_programs(0).to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM)
        low += tl.load(more, mask=live, other=0.0).to(tl.float32)
        high += tl.load(more + DIM // 2, mask=live, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMS:
            root = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DIM + epsilon)
            weight = norms + (head >= HEADS).to(tl.int32) * DIM + d
            low = low * root * tl.load(weight, mask=live, other=0.0).to(tl.float32)
            high = high * root * tl.load(weight + DIM // 2, mask=live, other=0.0).to(tl.float32)
        angle = tl.load(positions + row).to(tl.int64) * (DIM // 2) + d
        cosine = tl.load(cosines + angle, mask=live, other=0.0)
        sine = tl.load(sines + angle, mask=live, other=0.0)
        turned = low * cosine - high * sine
        high = high * cosine + low * sine
        low = turned
    kind = queries.dtype.element_ty
    if head < HEADS:
        to = queries + (row * HEADS + head) * DIM + d
        tl.store(to, low.to(kind), mask=live)
        tl.store(to + DIM // 2, high.to(kind), mask=live)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        there = live & (slot >= 0)
        to = pages + (slot // PAGE) * page_stride + ((head - HEADS) * PAGE + slot % PAGE) * DIM + d
        tl.store(to, low.to(kind), mask=there)
        tl.store(to + DIM // 2, high.to(kind), mask=there)


@triton.jit
def absorb(
    query,
    keys,
    tokens,
    known,
    seen,
    top,
    total,
    sums,
    scale,
    VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys and values into a running softmax (Milakov and Gimelshein): `top` the largest score so far, `total` the sum of
    weights, `sums` that of weighted values. Values lie VALUES elements behind their keys. Every row sees a key of its first block."""
    key = tl.load(keys + tokens, mask=known, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    value = tl.load(keys + VALUES + tokens, mask=known, other=0.0)
    sums = sums * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, 1), sums


@triton.jit
def decode(
    queries,
    pages,
    table,
    begins,
    lengths,
    out,
    parts,
    heights,
    page_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one sequence's keys, for the query heads of one KV head, a program (flash decoding). A length of 0 is padding.

    With one split the result goes to `out`; else it goes to `parts`, and to `heights` the logarithm of its sum of weights (-inf: empty)."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(length, first + share)
    heads = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mine = (heads < GROUP)[:, None] & (d < DIM)[None, :]
    at = row * (KV_HEADS * GROUP) + kv_head * GROUP + heads
    query = tl.load(queries + at[:, None] * DIM + d[None, :], mask=mine, other=0.0)
    places = table + tl.load(begins + row)
    keys = pages + kv_head * (PAGE * DIM)
    VALUES: tl.constexpr = KV_HEADS * PAGE * DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for n in range(first, last, BLOCK):
        position = n + tl.arange(0, BLOCK)
        there = position < last
        page = tl.load(places + position // PAGE, mask=there, other=0).to(tl.int64)
        tokens = page * page_stride + (position % PAGE) * DIM
        known = there[:, None] & (d < DIM)[None, :]
        at_key = tokens[:, None] + d[None, :]
        top, total, sums = absorb(query, keys, at_key, known, there[None, :], top, total, sums, scale, VALUES, True, PRECISION)
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + at[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=mine)
    else:
        part = at * SPLITS + split
        tl.store(parts + part[:, None] * DIM + d[None, :], result, mask=mine)
        height = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(heights + part, height, mask=heads < GROUP)


@triton.jit
def reduce(parts, heights, out, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr):
    """The splits of one query head of one sequence a program: their mean, weighted by their sums of weights."""
    follow(OVERLAP)
    at = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    height = tl.load(heights + at * SPLITS + splits)
    top = tl.max(height, 0)
    weights = tl.exp2(height - tl.where(top > float("-inf"), top, 0.0))
    part = tl.load(parts + (at * SPLITS + splits)[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(part * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + at * DIM + d, result.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def prefill(
    queries,
    pages,
    table,
    chunks,
    blocks,
    out,
    page_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS tokens of one chunk, for one query head, a program; keys and values, the chunk's own too, come from pages (FlashAttention-2).

    `blocks[b]`: chunk (below 0: padding) and the first of its rows; `chunks[c]`: first row, tokens, context, where its pages begin."""
    chunk = tl.load(blocks + 2 * tl.program_id(0))
    if chunk < 0:
        return
    head = tl.program_id(1)
    begin = tl.load(blocks + 2 * tl.program_id(0) + 1)
    first = tl.load(chunks + 4 * chunk)
    tokens = tl.load(chunks + 4 * chunk + 1)
    context = tl.load(chunks + 4 * chunk + 2)
    places = table + tl.load(chunks + 4 * chunk + 3)
    rows = begin + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mine = (rows < tokens)[:, None] & (d < DIM)[None, :]
    at = ((first + rows).to(tl.int64) * (KV_HEADS * GROUP) + head) * DIM
    query = tl.load(queries + at[:, None] + d[None, :], mask=mine, other=0.0)
    keys = pages + (head // GROUP) * (PAGE * DIM)
    VALUES: tl.constexpr = KV_HEADS * PAGE * DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    # Whole blocks that every row sees, without a mask; then those on the diagonal.
    seen = (context + begin + 1) // BLOCK * BLOCK
    for n in range(0, seen, BLOCK):
        position = n + tl.arange(0, BLOCK)
        page = tl.load(places + position // PAGE).to(tl.int64)
        token = page * page_stride + (position % PAGE) * DIM
        at_key = token[:, None] + d[None, :]
        known = (position >= 0)[:, None] & (d < DIM)[None, :]
        top, total, sums = absorb(query, keys, at_key, known, known, top, total, sums, scale, VALUES, False, PRECISION)
    end = context + tl.minimum(begin + ROWS, tokens)
    for n in range(seen, end, BLOCK):
        position = n + tl.arange(0, BLOCK)
        there = position < end
        page = tl.load(places + position // PAGE, mask=there, other=0).to(tl.int64)
        token = page * page_stride + (position % PAGE) * DIM
        known = there[:, None] & (d < DIM)[None, :]
        sees = position[None, :] <= context + rows[:, None]
        at_key = token[:, None] + d[None, :]
        top, total, sums = absorb(query, keys, at_key, known, sees, top, total, sums, scale, VALUES, True, PRECISION)
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mine)


@triton.jit
def move(pages, packed, ids, page_stride, layer_stride, half_stride, run, LAYERS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """BLOCK elements of the keys or values of one layer of one page a program: from the pages into `packed` (OUT), or back.

    `packed` is `[ids, LAYERS, 2, run]`; `pages` begins at the slice's first layer and head. A page id below 0 is padding."""
    page = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + page).to(tl.int64)
    live = (i < run) & (id >= 0)
    lies = pages + id * page_stride + (part // 2) * layer_stride + (part % 2) * half_stride + i
    flat = packed + (page * (2 * LAYERS) + part) * run + i
    if OUT:
        tl.store(flat, tl.load(lies, mask=live, other=0), mask=live)
    else:
        tl.store(lies, tl.load(flat, mask=live, other=0), mask=live)
