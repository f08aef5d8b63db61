"""Readers of tables: Parquet, Arrow, and builders of `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from data_pipeline.files import CorpusError
from data_pipeline.sources.inputs import BUILDER, Source
from data_pipeline.sources.reading import Reading


@contextmanager
def open_arrow(source: Source) -> Iterator[Any]:
    """The record batches of a memory-mapped Arrow stream file, as saved by `datasets`.

    Raises CorpusError if the file is corrupt, also while it is being read.
    """
    try:
        with pa.memory_map(source.path) as file, pa.ipc.open_stream(file) as reader:
            yield reader
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: corrupt Arrow file ({error}). Save the dataset again") from error


@contextmanager
def open_builder(source: Source, text_field: str, reading: Reading) -> Iterator[Iterator[str]]:
    """Stream the texts of one local file through a builder of `datasets`.

    Cells of CSV are text as written, whatever they look like ("NA", "17"); only an empty cell is no text.
    Raises CorpusError if the library is missing, the builder fails, or a record has no such text.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"{source.path}: format {source.format} requires the package datasets. Install it") from None
    name = source.format.removeprefix(BUILDER)
    place = f"{source.path} (builder {name})"

    def texts() -> Iterator[str]:
        files = [glob.escape(source.path)]
        # pandas would turn cells to numbers, and "NA", "null" and others to missing values. The mark prevents it.
        mark = "text:" if name == "csv" else ""
        options: dict[str, Any] = {"converters": {text_field: _marked}} if mark else {}
        data = datasets.load_dataset(name, data_files=files, split="train", streaming=True, **options)
        for row, record in enumerate(data):
            text = record.get(text_field)
            if isinstance(text, str):
                text = text.removeprefix(mark)
                reading.check_length(text, f"{place}: record {row:,}")
                yield text
                continue
            found = f"only {', '.join(map(str, record))}" if text_field not in record else type(text).__name__
            fault = f"{place}: record {row:,} has no text in {text_field!r}, {found}. Set text_field"
            if text is None:
                reading.no_text_at(fault)
            else:
                reading.bad_record_at(fault)

    try:
        yield texts()
    except CorpusError:
        raise
    except Exception as error:  # the parser of a builder may raise anything
        raise CorpusError(f"{place}: cannot be read ({type(error).__name__}: {error}). Correct the file") from error


def _marked(cell: str) -> str | None:
    return f"text:{cell}" if cell else None


@contextmanager
def open_parquet(source: Source) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises CorpusError if the file is corrupt, also while it is being read."""
    import pyarrow.parquet as pq

    try:
        # Buffered, so that only some pages of a column chunk are in memory, whatever its size.
        with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: corrupt Parquet file ({error}). Copy or create it again") from error
