"""Label maps: which class number a folder, or a single file, stands for.

The files of the field are read as they are: `{"cat": 3}`, `{"3": "cat"}`, `{"3": ["n02123045", "tabby"]}` (each of the
names stands for the number), `["dog", "cat"]`, and as text a name and a number per line, in either order, or one name
per line, which is then the class of its line, counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxsnp.errors import DataError

_MOST_BYTES = 64 << 20
_HINT = 'write JSON {"name": number}, or a name and a number per line'


def read_label_map(path: str | Path) -> dict[str, int]:
    """Class numbers by name.

    Raises:
        DataError: the file is missing, is no map, or gives one name two numbers.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise DataError(f"label map {file} is larger than {_MOST_BYTES >> 20} MB", hint=_HINT)
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"cannot read the label map {file}: {said}", hint=_HINT) from error
    pairs = _from_json(text, file) if text.lstrip()[:1] in ("{", "[") else _from_lines(text)
    found: dict[str, int] = {}
    for name, number in pairs:
        if found.setdefault(name, number) != number:
            raise DataError(f"label map {file} gives '{name}' the classes {found[name]} and {number}")
        if number < 0:
            raise DataError(f"label map {file} gives '{name}' the class {number}", hint="classes count from 0")
    if not found:
        raise DataError(f"label map {file} is empty", hint=_HINT)
    return found


def _from_json(text: str, file: Path) -> Iterator[tuple[str, int]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"label map {file} is no JSON: {error}", hint=_HINT) from error
    entries = content.items() if isinstance(content, dict) else ((str(place), one) for place, one in enumerate(content))
    for key, value in entries:
        if isinstance(content, dict) and isinstance(value, int) and not isinstance(value, bool):
            yield key, value
        elif isinstance(content, dict) and not _is_number(key) and _is_number(value):
            yield key, int(value)
        else:
            names = value if isinstance(value, list) else [value]
            if not _is_number(key) or not all(isinstance(name, str) for name in names):
                raise DataError(f"label map {file} cannot be read at {json.dumps({key: value})[:80]}", hint=_HINT)
            yield from ((name, int(key)) for name in names)


def _from_lines(text: str) -> Iterator[tuple[str, int]]:
    lines = [line.replace(",", " ").replace("\t", " ").strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    parts = [line.rsplit(" ", 1) for line in lines]
    if lines and all(len(part) == 2 and _is_number(part[1]) for part in parts):
        yield from ((name.strip(), int(number)) for name, number in parts)
        return
    fronts = [line.split(" ", 1) for line in lines]
    if lines and all(len(part) == 2 and _is_number(part[0]) for part in fronts):
        yield from ((name.strip(), int(number)) for number, name in fronts)
        return
    yield from ((line.strip(), number) for number, line in enumerate(text.splitlines()) if line.strip())


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdigit()
