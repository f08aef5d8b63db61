"""Recognition of files that are not text by their first bytes.

Without it, compressed files, images or UTF-16 could become rows: as replaced bytes, or because UTF-16 text of Latin
letters happens to be valid UTF-8.
"""

from __future__ import annotations

import codecs

HEAD = 1 << 16

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive or Office document",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "LZ4-compressed",
    b"\x1f\x9d": "compressed by compress",
    b"\xff\x06\x00\x00sNaPpY": "Snappy-compressed",
    b"%PDF-1": "a PDF document",
    b"%PDF-2": "a PDF document",
    b"ARROW1\x00\x00": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Office document",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
}
# These may also start a text: control characters must follow.
_LIKE_TEXT = {b"PAR1": "a Parquet file", b"GIF87a": "a GIF image", b"GIF89a": "a GIF image"}
# UTF-32 first: its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# The third byte of "BZh" is text; after the block size follow the digits of pi or of its square root.
_BZIP2 = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
_CONTROLS = bytes(i for i in range(32) if i not in b"\t\n\v\f\r\x1b")


def compression_of(head: bytes) -> str | None:
    """The compression of data that start with `head`: "gzip", "zstd", "xz", "bzip2", or None."""
    for magic, name in COMPRESSIONS.items():
        if head.startswith(magic) and (name != "bzip2" or head[4:10] in _BZIP2):
            return name
    return None


def why_not_text(head: bytes) -> str | None:
    """What a file is that starts with `head`, and the remedy; None if it may be UTF-8 text.

    head: the first HEAD bytes of the file, or all of it.
    """
    if name := compression_of(head):
        suffix = {"gzip": ".gz", "zstd": ".zst", "xz": ".xz", "bzip2": ".bz2"}[name]
        return f"is {name}-compressed, not text. Give it the suffix {suffix}, or decompress it"
    controls = len(head) - len(head.translate(None, _CONTROLS))
    for magic, name in (_OTHERS | (_LIKE_TEXT if controls else {})).items():
        if head.startswith(magic):
            return f"is {name}, not text. Extract the text, or remove the file"
    if encoding := _wide_encoding(head):
        form = encoding.split()[0]
        return f"not UTF-8 at byte 0: it is {encoding}. Convert the file, for example with iconv -f {form} -t UTF-8"
    zeros = head.count(0)
    if zeros > 0.1 * len(head) or (controls > 0.02 * len(head) and not _is_utf8(head)):
        return f"is binary data, not text ({controls:,} of the first {len(head):,} bytes are control characters)"
    return None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 with its byte order, or None. Without a mark, the zero bytes of ASCII characters tell: all of
    them are at even or all at odd places, and any text has line ends or spaces."""
    for mark, name in _MARKS:
        # The mark of UTF-16 is followed by a character, that of UTF-32 by at least one zero byte.
        if head.startswith(mark) and _decodes(head, name):
            return name
    zeros = head.count(0)
    if zeros == 0:
        return None
    for order, name in ((0, "BE"), (1, "LE")):
        # UTF-32: only one or two of four bytes are not zero.
        if zeros >= 0.5 * len(head) and len(head) >= 8 and _decodes(head, f"UTF-32-{name}"):
            return f"UTF-32{name} without a byte order mark"
        here, pairs = head[order::2].count(0), len(head) // 2
        likely = here >= 0.2 * pairs or (here >= 0.001 * pairs and not _is_utf8(head))
        if here >= 0.95 * zeros and likely and _decodes(head, f"UTF-16-{name}"):
            return f"UTF-16{name} without a byte order mark"
    return None


def _decodes(head: bytes, encoding: str) -> bool:
    try:
        # The last character may be incomplete.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return "\x00" not in text


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.utf_8_decode(head, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
