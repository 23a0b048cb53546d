"""What stands between a layer's matrix products, row by row and in one pass each, compiled by Numba.

torch does each of these as five to ten operations, each of which reads and writes all rows in memory. Sums are taken
in float32; results are rounded to the rows' dtype where the models round them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import prange

from server.engine.compiled import Elements, compiled, element_of, exp, float32_of
from server.engine.vector_code import LANES, rotate_halves

SILU, GELU_TANH = 0, 1

SERIAL_ELEMENTS = 1 << 17
"""Up to so many elements one thread is quicker: waking another one takes some 50 us."""

_ONE = np.float32(1.0)
_GELU_CUBE, _GELU_SCALE = np.float32(0.044715), np.float32(0.7978845608)
_LARGEST = {"uint16": np.float32(3.3895314e38), "float32": np.finfo(np.float32).max}
NO_WEIGHT = np.empty(0, np.float32)

Weights = npt.NDArray[np.float32]


def rms_norm(rows: Elements, weight: Weights, eps: float, rounds_first: bool, out: Elements) -> None:
    """Rows over the root of their mean square, times a weight.

    Args:
        rows: [rows, width], float32 or bfloat16 seen as uint16.
        weight: [width]; Gemma's models add 1 to theirs, which the caller has to do.
        eps: Added to the mean square.
        rounds_first: Whether rows are rounded before they are multiplied by the weight, as Llama does.
        out: [rows, width], overwritten.
    """
    kernel = _norm_serially if rows.size <= SERIAL_ELEMENTS else _norm_in_parallel
    kernel(rows, weight, np.float32(eps), rounds_first, out)


def add(rows: Elements, out: Elements) -> None:
    """Add rows to ``out``; both are [rows, width]."""
    kernel = _add_serially if rows.size <= SERIAL_ELEMENTS else _add_in_parallel
    kernel(rows, out)


def add_and_norm(
    rows: Elements, total: Elements, weight: Weights, eps: float, rounds_first: bool, out: Elements
) -> None:
    """Add rows to ``total``, and write the norm of that to ``out``.

    Args:
        rows: [rows, width].
        total: [rows, width], what the rows are added to.
        weight: As in ``rms_norm``; so are the rest.
        eps: Likewise.
        rounds_first: Likewise.
        out: Likewise.
    """
    kernel = _add_and_norm_serially if rows.size <= SERIAL_ELEMENTS else _add_and_norm_in_parallel
    kernel(rows, total, weight, np.float32(eps), rounds_first, out)


def gate(gates_and_ups: Elements, activation: int, out: Elements) -> None:
    """Activated gates times the ups beside them.

    Args:
        gates_and_ups: [rows, 2 * width]: a row's gates, then its ups.
        activation: ``SILU`` or ``GELU_TANH``.
        out: [rows, width], overwritten.
    """
    kernel = _gate_serially if out.size <= SERIAL_ELEMENTS else _gate_in_parallel
    kernel(gates_and_ups, activation, out)


def rotate_and_store(
    projected: Elements,
    cos: Elements,
    sin: Elements,
    slots: npt.NDArray[np.int64],
    query_weight: Weights,
    key_weight: Weights,
    eps: float,
    rounds_first: bool,
    query: Elements,
    keys: Elements,
    values: Elements,
) -> None:
    """Rotary positions for queries and keys; keys and values go to their slots, finite.

    Args:
        projected: [rows, (heads + 2 * kv_heads) * head_dim]: a row's queries, keys, values.
        cos: [rows, head_dim].
        sin: Likewise.
        slots: [rows], where each row's key and value are written.
        query_weight: [head_dim], by which each head is normalised first, as in ``rms_norm``; [0] for none.
        key_weight: Likewise.
        eps: As in ``rms_norm``.
        rounds_first: As in ``rms_norm``.
        query: [rows, heads, head_dim], overwritten.
        keys: [slots, kv_heads, head_dim].
        values: Likewise.
    """
    kernel = _rotate_serially if projected.size <= SERIAL_ELEMENTS else _rotate_in_parallel
    largest = _LARGEST[projected.dtype.name]
    kernel(
        projected, cos, sin, slots, query_weight, key_weight, np.float32(eps), rounds_first, largest,
        query.reshape(len(query), -1), keys.reshape(len(keys), -1), values.reshape(len(values), -1),
    )  # fmt: skip


def compile_for(dtype: npt.DTypeLike) -> None:
    """Compile everything for one dtype, or read it from the disk.

    Raises:
        Exception: Whatever Numba and LLVM raise where they cannot.
    """
    for num_rows in (1, SERIAL_ELEMENTS + 1):
        rows, weight = np.zeros((num_rows, 2), dtype), np.ones(2, np.float32)
        rms_norm(rows, weight, 1e-6, True, np.empty_like(rows))
        add_and_norm(rows, rows.copy(), weight, 1e-6, True, np.empty_like(rows))
        add(rows, rows.copy())
        gate(rows, SILU, np.empty((num_rows, 1), dtype))
        projected, slots = np.zeros((num_rows, 6), dtype), np.zeros(num_rows, np.int64)
        cache = np.zeros((1, 1, 2), dtype)
        query = np.empty((num_rows, 1, 2), dtype)
        rotate_and_store(
            projected, rows, rows, slots, NO_WEIGHT, NO_WEIGHT, 1e-6, True, query, cache, np.zeros_like(cache)
        )


@compiled()
def _norm_row(row, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for index in range(row.shape[0]):
        total += float32_of(row[index]) * float32_of(row[index])
    factor = _ONE / np.sqrt(total / np.float32(row.shape[0]) + eps)
    if rounds_first:
        for index in range(row.shape[0]):
            rounded = element_of(float32_of(row[index]) * factor, out)
            out[index] = element_of(float32_of(rounded) * weight[index], out)
    else:
        for index in range(row.shape[0]):
            out[index] = element_of(float32_of(row[index]) * factor * weight[index], out)


@compiled()
def _norm_serially(rows, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    for row in range(rows.shape[0]):
        _norm_row(rows[row], weight, eps, rounds_first, out[row])


@compiled(parallel=True)
def _norm_in_parallel(rows, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    for row in prange(rows.shape[0]):
        _norm_row(rows[row], weight, eps, rounds_first, out[row])


@compiled()
def _add_row(row, out):  # type: ignore[no-untyped-def]
    for index in range(row.shape[0]):
        out[index] = element_of(float32_of(row[index]) + float32_of(out[index]), out)


@compiled()
def _add_serially(rows, out):  # type: ignore[no-untyped-def]
    for row in range(rows.shape[0]):
        _add_row(rows[row], out[row])


@compiled(parallel=True)
def _add_in_parallel(rows, out):  # type: ignore[no-untyped-def]
    for row in prange(rows.shape[0]):
        _add_row(rows[row], out[row])


@compiled()
def _add_and_norm_serially(rows, total, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    for row in range(rows.shape[0]):
        _add_row(rows[row], total[row])
        _norm_row(total[row], weight, eps, rounds_first, out[row])


@compiled(parallel=True)
def _add_and_norm_in_parallel(rows, total, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    for row in prange(rows.shape[0]):
        _add_row(rows[row], total[row])
        _norm_row(total[row], weight, eps, rounds_first, out[row])


@compiled()
def _gate_row(row, activation, out):  # type: ignore[no-untyped-def]
    width = out.shape[0]
    gates, ups = row[:width], row[width:]
    if activation == SILU:
        for index in range(width):
            x = float32_of(gates[index])
            activated = element_of(x / (_ONE + exp(-x)), out)
            out[index] = element_of(float32_of(activated) * float32_of(ups[index]), out)
    else:
        for index in range(width):
            x = float32_of(gates[index])
            y = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
            # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)).
            activated = element_of(x / (_ONE + exp(-y - y)), out)
            out[index] = element_of(float32_of(activated) * float32_of(ups[index]), out)


@compiled()
def _gate_serially(gates_and_ups, activation, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        _gate_row(gates_and_ups[row], activation, out[row])


@compiled(parallel=True)
def _gate_in_parallel(gates_and_ups, activation, out):  # type: ignore[no-untyped-def]
    for row in prange(out.shape[0]):
        _gate_row(gates_and_ups[row], activation, out[row])


@compiled()
def _rotate_row(  # type: ignore[no-untyped-def]
    projected, cos, sin, query_weight, key_weight, eps, rounds_first, largest, own, query, key, value
):
    """One row; ``own`` is room for its queries and keys, then its cosines, then its sines, in float32."""
    width, num_queries = cos.shape[0], query.shape[0]
    num_turned = num_queries + key.shape[0]
    half, whole = width // 2, width // 2 // LANES * LANES
    own_cos, own_sin = own[num_turned : num_turned + width], own[num_turned + width :]
    for index in range(num_turned):
        own[index] = float32_of(projected[index])
    for index in range(width):
        own_cos[index], own_sin[index] = float32_of(cos[index]), float32_of(sin[index])
    for at in range(0, num_turned, width):
        weight = query_weight if at < num_queries else key_weight
        if weight.shape[0]:
            # The result is rounded, and so it can wait in the array that it ends up in.
            normed = query[at : at + width] if at < num_queries else key[at - num_queries : at - num_queries + width]
            _norm_row(projected[at : at + width], weight, eps, rounds_first, normed)
            for index in range(width):
                own[at + index] = float32_of(normed[index])
        rotate_halves(own, at, half, whole, own_cos, own_sin)
        for low in range(whole, half):
            x, y = own[at + low], own[at + half + low]
            own[at + low] = x * own_cos[low] - y * own_sin[low]
            own[at + half + low] = y * own_cos[half + low] + x * own_sin[half + low]
    for index in range(num_queries):
        query[index] = element_of(own[index], query)
    for index in range(key.shape[0]):
        key[index] = element_of(_finite(own[num_queries + index], largest), key)
        value[index] = element_of(_finite(float32_of(projected[num_turned + index]), largest), value)


@compiled()
def _finite(x, largest):  # type: ignore[no-untyped-def]
    """NaN becomes 0 and an infinity the largest number, as in torch.nan_to_num."""
    x = x if x == x else np.float32(0.0)
    return min(max(x, -largest), largest)


@compiled()
def _rotate_serially(  # type: ignore[no-untyped-def]
    projected, cos, sin, slots, query_weight, key_weight, eps, rounds_first, largest, query, keys, values
):
    own = np.empty(query.shape[1] + keys.shape[1] + 2 * cos.shape[1], np.float32)
    for row in range(projected.shape[0]):
        slot = slots[row]
        _rotate_row(
            projected[row], cos[row], sin[row], query_weight, key_weight, eps, rounds_first, largest, own,
            query[row], keys[slot], values[slot],
        )  # fmt: skip


@compiled(parallel=True)
def _rotate_in_parallel(  # type: ignore[no-untyped-def]
    projected, cos, sin, slots, query_weight, key_weight, eps, rounds_first, largest, query, keys, values
):
    for row in prange(projected.shape[0]):
        slot = slots[row]
        own = np.empty(query.shape[1] + keys.shape[1] + 2 * cos.shape[1], np.float32)
        _rotate_row(
            projected[row], cos[row], sin[row], query_weight, key_weight, eps, rounds_first, largest, own,
            query[row], keys[slot], values[slot],
        )  # fmt: skip
