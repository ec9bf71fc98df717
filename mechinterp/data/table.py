"""CSV files that people wrote: read as text, checked row by row, with line numbers for the error."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from mechinterp.errors import DataError

__all__ = ["Table", "read_table"]

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Table:
    """Columns of text cells, stripped of outer blanks, with the line each row started on."""

    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)


def read_table(path: Path, required: tuple[str, ...]) -> Table:
    """Read a comma-separated UTF-8 file with a header line.

    Raises DataError with file and line for: a missing file, other encodings, NUL bytes, a missing or repeated column,
    rows of another length than the header, an unterminated quote, no rows.
    """
    rows, lines = _rows(path)
    if not rows:
        raise DataError("is empty", where=path.name, hint=f"the first line names the columns: {', '.join(required)}")
    header = [name.strip() for name in rows[0]]
    missing = [name for name in required if name not in header]
    if missing:
        found = ", ".join(header)[:200]
        raise DataError(f"has no column {missing[0]!r}; found: {found}", where=path.name, hint="separate by commas")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"has two columns called {twice[:80]!r}", where=path.name)
    body = [(line, row) for line, row in zip(lines[1:], rows[1:], strict=True) if row]
    for line, row in body:
        if len(row) != len(header):
            raise DataError(
                f"has {len(row)} cells where the header has {len(header)}",
                where=f"{path.name} line {line}",
                hint='quote a cell that holds a comma: "a, b"',
            )
    if not body:
        raise DataError("has no rows", where=path.name)
    columns = {name: [row[i].strip() for _, row in body] for i, name in enumerate(header)}
    return Table(columns, [line for line, _ in body])


def _rows(path: Path) -> tuple[list[list[str]], list[int]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES} bytes", where=path.name)
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), hint="a data folder holds metadata.csv") from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text at byte {error.start}", where=path.name, hint="save as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if "\0" in text:
        raise DataError("holds a NUL byte, so it is no text", where=path.name, hint="save as UTF-8 text")
    rows, lines, line = [], [], 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            rows.append(row)
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"is not a table: {error}", where=f"{path.name} line {line}") from error
    return rows, lines
