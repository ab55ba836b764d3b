"""Deal entries of the input out to the parts of the store, through files of bounded size.

Cells that are shuffled, genes that are matched, and input that is dense, CSC or untidy are converted so. A *span* is rows of input
that are read at once, or columns of CSC; a *part* is consecutive cells of the store. `spill_span` writes the entries of one span
sorted by part (the *spill*); `gather_part` reads what all spans hold for one part.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sedd.io.conversion.counts import (
    LargeSumError,
    append_rows,
    clean_rows,
    count_dtype,
    deal_columns,
    dense_rows,
    first_disorder,
    index_dtype,
)
from sedd.io.conversion.explain import sum_too_large
from sedd.io.conversion.inputs import Plan, check_indices, load_plan, open_source, read_rows, row_of, take_values
from sedd.io.files import new_file, save_arrays
from sedd.kernels.gather import take_rows

ALIGN = 8
"""Every array of a part begins at a multiple of this many bytes."""


def span_path(plan: Plan, number: int) -> str:
    """Stem of the files of span `number`: `.npz` (written last) and `.bin`."""
    return f"{plan.folder}/spill/{plan.id}-{number:06d}"


def spill_span(folder: str, number: int) -> None:
    """Deal the entries of one span of input out to the parts they belong to; a task."""
    plan = load_plan(folder)
    source, lo, hi = plan.spans[number]
    columns = open_source(plan, source).matrix.layout == "csc"
    rows, lengths, indices, values, row_cuts, entry_cuts, notes = (_spill_columns if columns else _spill_rows)(
        plan, source, lo, hi
    )
    if values.dtype.kind != "f":
        notes["largest"] = int(values.max()) if values.size else 0
        values = values.astype(count_dtype(notes["largest"]), copy=False)
    stem = span_path(plan, number)
    with new_file(f"{stem}.bin") as file:
        for part in range(plan.n_parts):
            r, e = slice(*row_cuts[part : part + 2]), slice(*entry_cuts[part : part + 2])
            for array in (rows[r], lengths[r], values[e], indices[e]):
                file.write(memoryview(array).cast("B") if array.size else b"")
                file.write(b"\0" * (-array.nbytes % ALIGN))
    save_arrays(f"{stem}.npz", row_cuts=row_cuts, entry_cuts=entry_cuts, dtype=values.dtype.str, by_row=lengths.size > 0, **notes)


def _spill_rows(plan: Plan, source: int, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """Rows of CSR or dense input: each goes whole to one part."""
    src = open_source(plan, source)
    if src.matrix.layout == "dense":
        indptr, raw_indices, raw_values = dense_rows(src.matrix.read_dense(lo, hi))
        indices = check_indices(src, raw_indices, lo, indptr)
        narrow = np.dtype(plan.narrow)
        counts = take_values(plan, src, raw_values, narrow, lambda k: (row_of(indptr, k) + lo, int(indices[k])))
        values, rounded, untidy = counts.values, counts.n_rounded, counts.n_zero > 0
        del raw_indices, raw_values
    else:
        indptr, indices, values, rounded, untidy = read_rows(plan, src, lo, hi)
    summed = 0
    if src.genes is not None or untidy:
        try:
            indptr, indices, values, summed = clean_rows(indptr, indices, values, plan.n_vars, src.genes)
        except LargeSumError as error:
            gene = error.gene if src.genes is None else int(np.argmax(src.genes == error.gene))
            raise sum_too_large(src.file, src.matrix, error.value, lo + error.row, gene) from error
    places = src.places[lo:hi] if src.places is not None else np.arange(lo, hi) + plan.offsets[source]
    order = np.argsort(places, kind="stable")
    bounds, indices, values = take_rows(indptr[order], indptr[order + 1], indices, values)
    row_cuts = np.searchsorted(places[order] // plan.step, np.arange(plan.n_parts + 1))
    entry_cuts = bounds[row_cuts]
    local = (places[order] % plan.step).astype(np.uint32)
    return local, np.diff(bounds).astype(np.uint32), indices, values, row_cuts, entry_cuts, {"rounded": rounded, "summed": summed}


def _spill_columns(plan: Plan, source: int, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """Columns of CSC input: each entry finds its part by itself."""
    src = open_source(plan, source)
    indptr, raw_rows, raw_values = src.matrix.read_major(lo, hi)
    rows = check_indices(src, raw_rows, lo, indptr)
    counts = take_values(plan, src, raw_values, np.dtype(plan.narrow), lambda k: (int(rows[k]), row_of(indptr, k) + lo))
    values, rounded = counts.values, counts.n_rounded
    del raw_rows, raw_values, counts
    summed = 0
    if first_disorder(indptr, rows) >= 0:
        try:
            indptr, rows, values, summed = clean_rows(indptr, rows, values, src.matrix.shape[0], None)
        except LargeSumError as error:  # its rows are genes here
            raise sum_too_large(src.file, src.matrix, error.value, error.gene, lo + error.row) from error
    genes = np.arange(lo, hi, dtype=np.int32) if src.genes is None else src.genes[lo:hi]
    cuts, local, indices, values = deal_columns(
        indptr, rows, values, genes, src.places, plan.offsets[source], plan.step, plan.n_parts, index_dtype(plan.n_vars)
    )
    return local, np.empty(0, np.uint32), indices, values, cuts, cuts, {"rounded": rounded, "summed": summed}


def index_spans(plan: Plan) -> dict[str, int]:
    """Collect the tables of all spans, once all are written, into files that tasks map.

    Returns
    -------
    notes : how many values were "rounded", and entries "summed"
    """
    cuts = np.zeros((len(plan.spans), plan.n_parts + 1, 2), np.int64)
    kinds = np.zeros(len(plan.spans), np.dtype([("dtype", "U4"), ("by_row", np.bool_), ("largest", np.int64)]))
    notes = {"rounded": 0, "summed": 0}
    for span in range(len(plan.spans)):
        with np.load(f"{span_path(plan, span)}.npz") as meta:
            cuts[span, :, 0], cuts[span, :, 1] = meta["row_cuts"], meta["entry_cuts"]
            kinds[span] = str(meta["dtype"]), bool(meta["by_row"]), int(meta["largest"]) if "largest" in meta else 0
            notes["rounded"] += int(meta["rounded"])
            notes["summed"] += int(meta["summed"])
    entries = np.diff(cuts[:, :, 1], axis=1).sum(axis=0)
    for name, table in (("cuts", cuts), ("kinds", kinds), ("first", np.concatenate([[0], np.cumsum(entries)]))):
        with new_file(_table_path(plan, name)) as file:
            np.save(file, table)
    return notes


@lru_cache(maxsize=2)
def _tables(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.load(_table_path(plan, "cuts"), mmap_mode="r"), np.load(_table_path(plan, "kinds")), np.load(_table_path(plan, "first"))


def _table_path(plan: Plan, name: str) -> str:
    return f"{plan.folder}/spill/{plan.id}-{name}.npy"


def first_entries(plan: Plan) -> np.ndarray:
    """(n_parts + 1,) int64, place in the store of each part's first entry."""
    return _tables(plan)[2]


def value_dtype(plan: Plan) -> np.dtype:
    """Return the narrowest type that holds all values of the spill."""
    if plan.settings["values"] == "real":
        return np.dtype(np.float32)
    return count_dtype(int(_tables(plan)[1]["largest"].max()))


def close_spill() -> None:
    """Let go of the tables of the spill."""
    _tables.cache_clear()


def _read(plan: Plan, span: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what `span` holds for `part`: local rows, entries of each (empty: one each), indices, values."""
    cuts, kinds, _ = _tables(plan)
    table = np.asarray(cuts[span, : part + 2])
    n_rows, n_entries = np.diff(table, axis=0).T
    index = index_dtype(plan.n_vars)
    value = np.dtype(str(kinds[span]["dtype"]))
    by_row = bool(kinds[span]["by_row"])
    widths = (4 * n_rows, 4 * n_rows * by_row, value.itemsize * n_entries, index.itemsize * n_entries)
    sizes = np.stack([-(-width // ALIGN) * ALIGN for width in widths])
    raw = np.fromfile(f"{span_path(plan, span)}.bin", np.uint8, int(sizes[:, part].sum()), offset=int(sizes[:, :part].sum()))
    starts = np.cumsum(sizes[:, part]) - sizes[:, part]
    counts = (n_rows[part], n_rows[part] * by_row, n_entries[part], n_entries[part])
    dtypes = (np.dtype(np.uint32), np.dtype(np.uint32), value, index)
    rows, lengths, values, indices = (
        raw[start : start + count * dtype.itemsize].view(dtype)
        for start, count, dtype in zip(starts, counts, dtypes, strict=True)
    )
    return rows, lengths, indices, values


def gather_part(plan: Plan, number: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put part `number` together from what the spans hold for it: tidy CSR, `indptr` from 0, values as `dtype`."""
    n_rows = min(plan.step, plan.n_obs - number * plan.step)
    spilled = [_read(plan, span, number) for span in range(len(plan.spans))]
    counts = np.zeros(n_rows, np.int64)
    for rows, lengths, _, _ in spilled:
        counts += np.bincount(rows, lengths if lengths.size else None, n_rows).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    indices, values = np.empty(indptr[-1], index_dtype(plan.n_vars)), np.empty(indptr[-1], dtype)
    cursor = indptr[:-1].copy()
    for rows, lengths, own_indices, own_values in spilled:
        append_rows(cursor, rows, lengths, (own_indices, own_values), (indices, values))
    del spilled
    if first_disorder(indptr, indices) >= 0:  # columns whose genes changed order
        indptr, indices, wide, _ = clean_rows(indptr, indices, values, plan.n_vars, None)
        values = wide.astype(dtype)
    return indptr, indices, values
