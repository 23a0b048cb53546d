"""What is between a layer's matrix products, each in one pass over the rows, as Triton kernels.

Only ``fused_layers`` imports this module, and only if Triton is installed.

A launch depends on the tensors' shapes only, so a CUDA graph may record it. Sums are float32; results are rounded to
the rows' dtype where the models round them. All tensors are contiguous unless stated otherwise.
"""

# ruff: noqa: N803 - constants are in capitals, as everywhere in Triton
# No postponed annotations: Triton recognises constant arguments by the annotation objects.

import triton.language as tl

from server.engine.cuda.triton_kernels import compiled


@compiled()
def _rounded(x, places):  # type: ignore[no-untyped-def]
    """Float32 numbers rounded to the dtype of the elements at some places."""
    return x.to(places.dtype.element_ty).to(tl.float32)


@compiled()
def _normed(x, inverse, factors, places, ROUNDS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows times the inverse root of their mean square, times the factors: see ``NormForm``."""
    x = x * inverse
    if ROUNDS_FIRST:
        x = _rounded(x, places)
    return _rounded(x * factors, places)


@compiled(do_not_specialize=["eps"])
def rms_norm(  # type: ignore[no-untyped-def]
    rows,
    factors,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """RMS norm of one row; program (row).

    Args:
        rows: [rows, WIDTH].
        factors: [WIDTH] float32.
        out: [rows, WIDTH], written.
        eps: Added to the mean square.
        WIDTH: Width of a row.
        BLOCK: ``WIDTH`` rounded up to a power of two.
        ROUNDS_FIRST: Whether the norm rounds before it multiplies by the factors.
    """
    at = tl.arange(0, BLOCK)
    exists = at < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + at
    x = tl.load(rows + place, mask=exists, other=0.0).to(tl.float32)
    factor = tl.load(factors + at, mask=exists, other=0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    normed = _normed(x, inverse, factor, out, ROUNDS_FIRST)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=exists)


@compiled(do_not_specialize=["eps"])
def add_and_norm(  # type: ignore[no-untyped-def]
    rows,
    total,
    factors,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """Add one row to ``total``, and write the RMS norm of the sum; program (row).

    Arguments that are not listed are those of ``rms_norm``.

    Args:
        total: [rows, WIDTH]; becomes the sum.
    """
    at = tl.arange(0, BLOCK)
    exists = at < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + at
    x = tl.load(rows + place, mask=exists, other=0.0).to(tl.float32)
    x = _rounded(x + tl.load(total + place, mask=exists, other=0.0).to(tl.float32), total)
    tl.store(total + place, x.to(total.dtype.element_ty), mask=exists)
    factor = tl.load(factors + at, mask=exists, other=0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    normed = _normed(x, inverse, factor, out, ROUNDS_FIRST)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=exists)


@compiled()
def gate(  # type: ignore[no-untyped-def]
    gates_and_ups,
    out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    """``activation(gate) * up`` for one part of one row; program (row, part).

    Args:
        gates_and_ups: [rows, 2 * WIDTH]: a row's gates, then its ups.
        out: [rows, WIDTH], written.
        WIDTH: Number of gates.
        BLOCK: Elements of a part, a power of two.
        IS_SILU: Whether the activation is SiLU; else it is GELU, approximated by tanh.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < WIDTH
    place = row * 2 * WIDTH + at
    x = tl.load(gates_and_ups + place, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gates_and_ups + place + WIDTH, mask=exists, other=0.0).to(tl.float32)
    # GELU: (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)).
    exponent = x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    activated = _rounded(x / (1.0 + tl.exp(-exponent)), out)
    tl.store(out + row * WIDTH + at, (activated * up).to(out.dtype.element_ty), mask=exists)


@compiled(do_not_specialize=["eps"], do_not_specialize_on_alignment=["slots"])
def rotate_and_store(  # type: ignore[no-untyped-def]
    projected,
    cos,
    sin,
    query_factors,
    key_factors,
    slots,
    keys,
    values,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """Apply head norms, if any, and rotary positions to some heads of one row; store keys and values.

    Element i of a head is paired with element ``i + HEAD_DIM / 2``, as in Llama. Program (row, part of the heads).

    Args:
        projected: [rows, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM]: a row's queries, keys, values. Queries are changed
            in place; the rest stays.
        cos: [rows, HEAD_DIM].
        sin: [rows, HEAD_DIM].
        query_factors: [HEAD_DIM] float32, of the norm of each query head; read only if HAS_NORMS.
        key_factors: [HEAD_DIM] float32, of the norm of each key head; read only if HAS_NORMS.
        slots: [rows] int64.
        keys: [slots, NUM_KV_HEADS, HEAD_DIM].
        values: [slots, NUM_KV_HEADS, HEAD_DIM].
        eps: Added to the mean square of a head.
        NUM_HEADS: Query heads.
        NUM_KV_HEADS: Key/value heads.
        HEAD_DIM: Width of a head; even.
        HEADS: Heads of a part, a power of two.
        HALF: ``HEAD_DIM / 2`` rounded up to a power of two.
        HAS_NORMS: Whether there are head norms.
        ROUNDS_FIRST: See ``rms_norm``.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    in_half = at < HEAD_DIM // 2
    exists = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & in_half
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS

    place = projected + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM + at
    low = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    high = tl.load(place + HEAD_DIM // 2, mask=exists, other=0.0).to(tl.float32)
    x, y = low, high
    if HAS_NORMS:
        inverse = tl.rsqrt(tl.sum(x * x + y * y, axis=1) / HEAD_DIM + eps)[:, None]
        low_factor = tl.where(
            is_query,
            tl.load(query_factors + at, mask=in_half, other=0.0),
            tl.load(key_factors + at, mask=in_half, other=0.0),
        )
        high_factor = tl.where(
            is_query,
            tl.load(query_factors + HEAD_DIM // 2 + at, mask=in_half, other=0.0),
            tl.load(key_factors + HEAD_DIM // 2 + at, mask=in_half, other=0.0),
        )
        x = _normed(x, inverse, low_factor, projected, ROUNDS_FIRST)
        y = _normed(y, inverse, high_factor, projected, ROUNDS_FIRST)
    angle = row * HEAD_DIM + at
    low_cos = tl.load(cos + angle, mask=in_half, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + angle, mask=in_half, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + angle + HEAD_DIM // 2, mask=in_half, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + angle + HEAD_DIM // 2, mask=in_half, other=0.0).to(tl.float32)
    low = tl.where(is_value, low, x * low_cos - y * low_sin).to(projected.dtype.element_ty)
    high = tl.where(is_value, high, y * high_cos + x * high_sin).to(projected.dtype.element_ty)

    tl.store(place, low, mask=exists & is_query)
    tl.store(place + HEAD_DIM // 2, high, mask=exists & is_query)
    slot = tl.load(slots + row) * NUM_KV_HEADS * HEAD_DIM
    key_place = keys + slot + (head - NUM_HEADS) * HEAD_DIM + at
    is_key = exists & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    tl.store(key_place, low, mask=is_key)
    tl.store(key_place + HEAD_DIM // 2, high, mask=is_key)
    value_place = values + slot + (head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM + at
    tl.store(value_place, low, mask=exists & is_value)
    tl.store(value_place + HEAD_DIM // 2, high, mask=exists & is_value)
