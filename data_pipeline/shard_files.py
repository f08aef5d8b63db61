"""One shard file: its schema, and writing it. The format is described in shards.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.files import atomic_file
from data_pipeline.manifest import ShardEntry, plain_name


def shard_schema(length: int, dtype: np.dtype, columns: Sequence[str]) -> pa.Schema:
    """Schema of the record batch. length: of the stored rows; dtype: of the ids; columns: the optional ones."""

    def field(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    bits = pa.list_(pa.field("item", pa.bool_(), nullable=False), length)
    kinds = {"word_start": bits, "sentence_start": bits, "segment_start": pa.uint16(), "pair_label": pa.bool_()}
    ids = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False), length)
    fields = [field("input_ids", ids), field("document_end", pa.bool_())]
    return pa.schema(fields + [field(name, kinds[name]) for name in columns])


def write_shard(
    folder: str | Path,
    file_name: str,
    input_ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
    columns: Mapping[str, NDArray[Any]] | None = None,
    binned: bool = False,
) -> ShardEntry:
    """Write one shard atomically, and return its manifest entry.

    input_ids: uint16 or uint32 [R, L], R > 0; document_end: bool [R]; columns: in the order of manifest.COLUMNS,
    word_start and sentence_start bool [R, L], segment_start uint16 [R], pair_label bool [R]. binned: L is specific to
    this shard, and recorded in its entry.
    Raises CorpusError if the disk is full.
    """
    rows, length = input_ids.shape
    columns = columns or {}
    assert input_ids.dtype in (np.uint16, np.uint32), input_ids.dtype
    assert document_end.dtype == np.bool_, document_end.dtype
    assert document_end.shape == (rows,), document_end.shape
    assert rows > 0
    schema = shard_schema(length, input_ids.dtype, tuple(columns))
    # From buffers, here and in the reader: Arrow's conversions from and to NumPy import pandas, which takes 0.25 s.
    arrays = [_array(input_ids, schema.field(0).type), _array(document_end, pa.bool_())]
    arrays += [_array(values, schema.field(name).type) for name, values in columns.items()]
    batch = pa.record_batch(arrays, schema=schema)
    path = Path(folder) / plain_name(file_name)
    with atomic_file(path, needed=batch.nbytes) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)
    entry = ShardEntry(file=file_name, rows=rows, bytes=file.bytes, sha256=file.sha256())
    return entry.model_copy(update={"length": length}) if binned else entry


def _array(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    item = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    if pa.types.is_boolean(item):
        # packbits clears the padding bits: equal corpora must have equal bytes.
        data = pa.py_buffer(np.packbits(values.reshape(-1), bitorder="little"))
    else:
        data = pa.py_buffer(np.ascontiguousarray(values))
    flat = pa.Array.from_buffers(item, values.size, [None, data], null_count=0)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if kind is not item else flat
