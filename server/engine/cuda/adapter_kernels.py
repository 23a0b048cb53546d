"""The products of adapters, for all adapters of a pass at once, as Triton kernels.

Only ``adapter_backend`` imports this module, and only if Triton is installed.

Rows are divided into tiles, each of rows of one adapter, as in Punica (Chen et al., 2023, arXiv:2310.18547) and
S-LoRA (Sheng et al., 2023, arXiv:2311.03285). ``shrink`` multiplies a tile by A. ``expand`` multiplies the result by
B, and adds it to the product's output. Which adapter a tile has, where its matrices are and how large they are is
read from device memory. So a launch depends on the number of rows only, a CUDA graph may record it, and every adapter
has its own ranks. Sums are float32.

An adapter's table is [parts, ``NUM_FIELDS``] int64, with a line for each part of each product of the model. The
fields of a line are:

- ``A``: address of [rank, width] in the rows' dtype, or, for embeddings, of [vocabulary, rank]; 0 for none.
- ``B``: address of [rank, size] in the rows' dtype.
- ``RANK``: rows of A and B; 0 for none.
- ``SCALE``: the factor of the product with A, the bits of a float32.
- ``GAIN``: address of [size] float32, by which the output is multiplied first; 0 for none.
- ``BIAS``: address of [size] float32, which is added last; 0 for none.
- ``START``, ``SIZE``: the part's first column in the product's output, and its number of columns.
"""

# ruff: noqa: N803 - constants are in capitals, as everywhere in Triton
# No postponed annotations: Triton recognises constant arguments by the annotation objects.

import triton.language as tl

from server.engine.cuda.triton_kernels import compiled

A, B, RANK, SCALE, GAIN, BIAS, START, SIZE = range(8)
NUM_FIELDS = 8

ADDRESSES = (A, B, GAIN, BIAS)
"""Fields that are addresses."""

TILE_FIELDS = 3
"""Of a tile: the address of its adapter's table, its first place in the order of rows, and its number of rows."""

# The functions below cannot read the module's variables, because Triton takes constants only of this kind.
_A, _B, _RANK, _SCALE = tl.constexpr(A), tl.constexpr(B), tl.constexpr(RANK), tl.constexpr(SCALE)
_GAIN, _BIAS, _START, _SIZE = tl.constexpr(GAIN), tl.constexpr(BIAS), tl.constexpr(START), tl.constexpr(SIZE)
_NUM_FIELDS, _TILE_FIELDS = tl.constexpr(NUM_FIELDS), tl.constexpr(TILE_FIELDS)


@compiled(
    do_not_specialize=["first_part", "num_rows", "max_rank"],
    do_not_specialize_on_alignment=["tiles", "order", "low"],
)
def shrink(  # type: ignore[no-untyped-def]
    rows,
    tiles,
    order,
    low,
    first_part,
    width,
    num_rows,
    max_rank,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """One share of a tile's product with A, for one part of the product; program (tile, share, part).

    The shares divide the columns of the input; ``expand`` adds them.

    Args:
        rows: The product's input [rows, width].
        tiles: [tiles, TILE_FIELDS] int64; address 0 for a tile without rows.
        order: [rows] int64: the numbers of the rows, those of a tile side by side.
        low: [shares, parts, num_rows, max_rank] float32, by place in the order; written where the adapter has ranks.
        first_part: Line of the product's first part in the adapters' tables.
        width: Columns of the input.
        num_rows: Places in ``low``.
        max_rank: Columns of ``low``.
        TILE: Rows of a tile, a power of two of at least 16.
        BLOCK_K: Columns per iteration.
        BLOCK_RANK: Ranks that are computed at once, a power of two of at least 16.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_FIELDS
    share, part = tl.program_id(1), tl.program_id(2)
    table = tl.load(tile)
    if table == 0:
        return
    line = table.to(tl.pointer_type(tl.int64)) + (first_part + part) * _NUM_FIELDS
    rank = tl.load(line + _RANK).to(tl.int32)
    if rank == 0:
        return
    a = tl.multiple_of(tl.load(line + _A).to(tl.pointer_type(rows.dtype.element_ty)), 16)
    lanes = tl.arange(0, TILE)
    first = tl.load(tile + 1)
    is_row = lanes < tl.load(tile + 2)
    row = tl.load(order + first + lanes, mask=is_row, other=0)
    num_steps = tl.cdiv(tl.cdiv(width, BLOCK_K), tl.num_programs(1))
    start = share * num_steps * BLOCK_K
    stop = tl.minimum(start + num_steps * BLOCK_K, width)
    place = low + ((share * tl.num_programs(2) + part).to(tl.int64) * num_rows + first + lanes) * max_rank
    for first_rank in range(0, rank, BLOCK_RANK):
        ranks = first_rank + tl.arange(0, BLOCK_RANK)
        acc = tl.zeros([TILE, BLOCK_RANK], tl.float32)
        for column in range(start, stop, BLOCK_K):
            columns = column + tl.arange(0, BLOCK_K)
            x = tl.load(
                rows + row[:, None] * width + columns[None, :],
                mask=is_row[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            factors = tl.load(
                a + ranks.to(tl.int64)[:, None] * width + columns[None, :],
                mask=(ranks < rank)[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            acc += tl.dot(x, tl.trans(factors), input_precision="ieee")
        tl.store(place[:, None] + ranks[None, :], acc, mask=is_row[:, None] & (ranks < rank)[None, :])


@compiled(
    do_not_specialize=["first_part", "num_rows", "max_rank", "num_shares"],
    do_not_specialize_on_alignment=["ids", "tiles", "order", "low"],
)
def expand(  # type: ignore[no-untyped-def]
    ids,
    tiles,
    order,
    low,
    out,
    first_part,
    out_width,
    num_rows,
    max_rank,
    num_shares,
    TILE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    IS_EMBEDDING: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Change some blocks of columns of a tile's rows; program (tile, first block, part).

    A program computes every n-th block, n being the number of programs in the second dimension. Arguments that are
    not listed are those of ``shrink``.

    Args:
        ids: The embeddings' input [rows] int64; read only if IS_EMBEDDING.
        low: As written by ``shrink``; read unless IS_EMBEDDING.
        out: The product's output [rows, out_width], changed in place.
        out_width: Columns of the output.
        num_shares: Shares in ``low``.
        BLOCK_COLUMNS: Columns per iteration.
        IS_EMBEDDING: Whether the rows of A are looked up by the ids.
        IS_ALIGNED: Whether every part's start and size are divisible by 16.
        PRECISION: Of the product with B: "ieee", or "tf32" for rows in half precision.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_FIELDS
    part = tl.program_id(2)
    table = tl.load(tile)
    if table == 0:
        return
    line = table.to(tl.pointer_type(tl.int64)) + (first_part + part) * _NUM_FIELDS
    rank = tl.load(line + _RANK).to(tl.int32)
    gain_at = tl.load(line + _GAIN)
    bias_at = tl.load(line + _BIAS)
    if (rank == 0) & (gain_at == 0) & (bias_at == 0):
        return
    a = tl.load(line + _A).to(tl.pointer_type(out.dtype.element_ty))
    b = tl.multiple_of(tl.load(line + _B).to(tl.pointer_type(out.dtype.element_ty)), 16)
    gains = tl.multiple_of(gain_at.to(tl.pointer_type(tl.float32)), 16)
    biases = tl.multiple_of(bias_at.to(tl.pointer_type(tl.float32)), 16)
    scale = tl.load(line + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    start = tl.load(line + _START)
    size = tl.load(line + _SIZE)
    if IS_ALIGNED:
        start = tl.multiple_of(start, 16)
        size = tl.multiple_of(size, 16)
    lanes = tl.arange(0, TILE)
    first = tl.load(tile + 1)
    is_row = lanes < tl.load(tile + 2)
    row = tl.load(order + first + lanes, mask=is_row, other=0)
    if IS_EMBEDDING:
        factors_of_row = a + tl.load(ids + row, mask=is_row, other=0) * rank
    else:
        factors_of_row = low + (part.to(tl.int64) * num_rows + first + lanes) * max_rank
    share_stride = tl.num_programs(2).to(tl.int64) * num_rows * max_rank
    num_blocks = tl.cdiv(size, BLOCK_COLUMNS).to(tl.int32)
    for block in range(tl.program_id(1), num_blocks, tl.num_programs(1)):
        columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = columns < size
        acc = tl.zeros([TILE, BLOCK_COLUMNS], tl.float32)
        for first_rank in range(0, rank, BLOCK_RANK):
            ranks = first_rank + tl.arange(0, BLOCK_RANK)
            is_factor = is_row[:, None] & (ranks < rank)[None, :]
            places = factors_of_row[:, None] + ranks[None, :]
            factors = tl.load(places, mask=is_factor, other=0.0).to(tl.float32)
            if not IS_EMBEDDING:
                for share in range(1, num_shares):
                    factors += tl.load(places + share * share_stride, mask=is_factor, other=0.0)
            of_columns = tl.load(
                b + ranks.to(tl.int64)[:, None] * size + columns[None, :],
                mask=(ranks < rank)[:, None] & is_column[None, :],
                other=0.0,
            )
            acc += tl.dot(factors * scale, of_columns.to(tl.float32), input_precision=PRECISION)
        places = out + row[:, None] * out_width + start + columns[None, :]
        exists = is_row[:, None] & is_column[None, :]
        total = tl.load(places, mask=exists, other=0.0).to(tl.float32)
        gain = tl.load(gains + columns, mask=is_column & (gain_at != 0), other=1.0)
        bias = tl.load(biases + columns, mask=is_column & (bias_at != 0), other=0.0)
        total = total * gain[None, :] + acc + bias[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=exists)
