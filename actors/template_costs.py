"""What operations of a chat template may cost at most, told before they are done. Pure.

A unit is a character, or a byte of what is no text. Estimates are never too low; for what templates really do, cutting
and joining the texts of messages, they are about what is made. Whoever charges them is the template's environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.utils import Namespace

__all__ = ["FILTERS", "PASSIVE", "cost_of", "of_binary", "of_format", "of_method", "text_size"]

MAX_BITS = 1 << 16
"""Of a whole number that is multiplied, or the power of one."""

_ITEM = 8  # a reference
_PIECE = 64  # a small string, or the like, and the reference to it
_ESCAPED = 12  # what one character may become in a repr or in JSON
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_PERCENT = re.compile(r"(?:(\d+)|\*)?(?:\.(?:(\d+)|\*))?[hlL]?[diouxXeEfFgGcrsa]")
_PERCENT_STAR = re.compile(r"%[^a-zA-Z%]*\*")
_BRACES = re.compile(r"\{[^{}]*:([^{}]*)\}")
_BRACES_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")


def text_size(value: Any) -> int:
    """The most characters that ``str(value)``, its repr or its JSON may have."""
    return len(value) if isinstance(value, str | bytes) else _shown(value, {})


def _shown(value: Any, known: dict[int, int]) -> int:
    """Each container is looked at once, however often it is in others."""
    if isinstance(value, str | bytes):
        return _ESCAPED * len(value) + 8
    if isinstance(value, int):
        return value.bit_length() // 3 + 8
    if value is None or isinstance(value, float):
        return 32
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if not isinstance(value, list | tuple | set | frozenset | Mapping | KeysView | ValuesView | ItemsView):
        return 256
    size = known.get(id(value))
    if size is None:
        known[id(value)] = 256  # one that is inside itself is shown as dots
        items = value.items() if isinstance(value, Mapping) else value
        size = known[id(value)] = 256 + sum(_shown(item, known) for item in items)
    return size


def _lines_of_json(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many lines indented JSON of a value has at most, and how deep it is."""
    if not isinstance(value, list | tuple | Mapping):
        return 1, 1
    found = known.get(id(value))
    if found is None:
        known[id(value)] = (0, 0)
        inner = [_lines_of_json(item, known) for item in (value.values() if isinstance(value, Mapping) else value)]
        found = known[id(value)] = (
            2 + sum(lines for lines, _ in inner), 1 + max((depth for _, depth in inner), default=0),
        )  # fmt: skip
    return found


def cost_of(value: Any) -> int:
    """What was made, if it is a text or a container of its own."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return _ITEM * len(value)
    return _PIECE * len(value) if isinstance(value, dict) else 0


def of_binary(operator: str, left: Any, right: Any) -> int:
    """Of ``left operator right``. Raises ``TemplateRuntimeError`` for a whole number that is far too large."""
    if operator == "%" and isinstance(left, str | bytes):
        values = [*right.values()] if isinstance(right, Mapping) else right
        return of_percent(left, values if isinstance(values, list | tuple) else [values])
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and numbers and right > 0:
        _check_bits(left.bit_length() * right)
    if operator == "*" and numbers:
        _check_bits(left.bit_length() + right.bit_length())
    if operator == "*" and not numbers:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                return cost_of(sequence) * max(0, times)
    if operator == "+" and isinstance(left, str | bytes | list | tuple):
        return _marked(left, right) * (cost_of(left) + cost_of(right))
    return 0


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateRuntimeError(f"it computed a number of more than {MAX_BITS} bits")


def _marked(*values: Any) -> int:
    """A text that is marked as HTML escapes whatever it takes in."""
    return 6 if any(hasattr(value, "__html__") for value in values) else 1


def _largest(values: Sequence[Any]) -> int:
    known: dict[int, int] = {}
    return max((_shown(value, known) for value in values), default=0)


def of_percent(form: str | bytes, values: Sequence[Any]) -> int:
    """Of ``form % values``. Raises ``TemplateRuntimeError`` if a width is an argument."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    if _PERCENT_STAR.search(text):
        raise TemplateRuntimeError("it formats with a width that is an argument")
    widths = sum(int(digits) for found in _PERCENT.findall(text) for digits in found if digits)
    largest = _largest(values)
    return _marked(form) * (len(text) + widths + text.count("%") * largest)


def of_format(form: str, arguments: Sequence[Any]) -> int:
    """Of ``form.format(…)``. Raises ``TemplateRuntimeError`` if a width is an argument."""
    if _BRACES_NESTED.search(form):
        raise TemplateRuntimeError("it formats with a width that is an argument")
    widths = sum(int(digits) for spec in _BRACES.findall(form) for digits in re.findall(r"\d+", spec))
    largest = _largest(arguments)
    return _marked(form) * (len(form) + widths + form.count("{") * largest)


# Methods of texts.


def of_method(owner: Any, name: str, *args: Any, **kwargs: Any) -> int:
    """Of a method of a text, of bytes or of a number, called with these arguments."""
    if isinstance(owner, int):
        return _padded(owner, *args, **kwargs) if name == "to_bytes" else 0
    if not isinstance(owner, str | bytes):
        return 0
    estimate = _METHODS.get(name)
    return 3 * len(owner) + _marked(owner) * (0 if estimate is None else estimate(owner, *args, **kwargs))


def _padded(owner: Any, length: Any = 0, *_: Any, **__: Any) -> int:
    return max(0, length) if isinstance(length, int) else 0


def _joined(owner: Any, values: Any) -> int:
    return sum(map(cost_of, values)) + len(owner) * len(values)


def _replaced(owner: Any, old: Any, new: Any, count: Any = -1) -> int:
    times = owner.count(old) if old else len(owner) + 1
    return text_size(new) * (min(times, count) if isinstance(count, int) and count >= 0 else times)


def _split(owner: Any, sep: Any = None, maxsplit: Any = -1) -> int:
    pieces = owner.count(sep) if sep else len(owner) // 2
    return _PIECE * ((min(pieces, maxsplit) if isinstance(maxsplit, int) and maxsplit >= 0 else pieces) + 1)


def _line_ends(owner: Any) -> int:
    ends = _LINE_ENDS if isinstance(owner, str) else (b"\n", b"\r")
    return sum(map(owner.count, ends))


def _expanded(owner: Any, tabsize: Any = 8) -> int:
    tabs = owner.count("\t" if isinstance(owner, str) else b"\t")
    return tabs * max(0, tabsize) if isinstance(tabsize, int) else 0


def _translated(owner: Any, table: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else table if isinstance(table, list | tuple) else ()
    return len(owner) * max((len(value) for value in values if isinstance(value, str)), default=1)


_METHODS: Mapping[str, Callable[..., int]] = {
    "center": _padded, "ljust": _padded, "rjust": _padded, "zfill": _padded, "expandtabs": _expanded,
    "join": _joined, "replace": _replaced, "split": _split, "rsplit": _split,
    "splitlines": lambda owner, *_, **__: _PIECE * (_line_ends(owner) + 1), "translate": _translated,
    "encode": lambda owner, *_, **__: len(owner),
}  # fmt: skip


# Filters, with the names that jinja2 gives their arguments.


def _text(value: Any = "", *_: Any, **__: Any) -> int:
    return 3 * text_size(value)


def _escaped(value: Any = "", *_: Any, **__: Any) -> int:
    return _ESCAPED * text_size(value)


def _slow(value: Any = "", *_: Any, **__: Any) -> int:
    """In pieces, and by so little a piece that this bounds the time, too."""
    return _PIECE * text_size(value)


def _slower(value: Any = "", *_: Any, **__: Any) -> int:
    """All of it may be copied for each piece."""
    size = text_size(value)
    return _PIECE * size + size * size // _PIECE


def _list(value: Any = (), *_: Any, **__: Any) -> int:
    return _PIECE * len(value) if isinstance(value, str | bytes) else 0


def _reverse(value: Any = (), *_: Any, **__: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _batch(value: Any, linecount: Any = 0, fill_with: Any = None) -> int:
    return _list(value) + (_PIECE * max(0, linecount) if isinstance(linecount, int) else 0)


def _center(value: Any, width: Any = 80) -> int:
    return _text(value) + _padded(value, width)


def _indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    by = width if isinstance(width, int) else text_size(width)
    return _text(s) + (_line_ends(s) + 1 if isinstance(s, str) else text_size(s)) * max(0, by)


def _format(value: Any, *args: Any, **kwargs: Any) -> int:
    return of_percent(value if isinstance(value, str) else "", [*args, *kwargs.values()]) + _text(value)


def _join(value: Any, d: Any = "", attribute: Any = None) -> int:
    return _marked(d) * (text_size(value) + text_size(d) * len(value))


def _replace(s: Any, old: Any = "", new: Any = "", count: Any = None) -> int:
    if isinstance(s, str) and isinstance(old, str):
        return _marked(s, old, new) * (_text(s) + _replaced(s, old, new, -1 if count is None else count))
    return _text(s) + text_size(s) * text_size(new)


def _round(value: Any, precision: Any = 0, method: Any = "common") -> int:
    if isinstance(precision, int):
        _check_bits(4 * abs(precision))
    return 0


def _sum(iterable: Any, attribute: Any = None, start: Any = 0) -> int:
    """Of lists: what has been added up is copied for each."""
    if isinstance(start, int | float):
        return 0
    return len(iterable) * (cost_of(start) + text_size(iterable))


def _to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> int:
    by = 0 if indent is None else indent if isinstance(indent, int) else text_size(indent)
    between = sum(map(text_size, separators)) if isinstance(separators, list | tuple) else 4
    lines, depth = _lines_of_json(value, {})
    return _ESCAPED * text_size(value) + lines * (depth * max(0, by) + between)


def _word_wrap(s: Any, *args: Any, wrapstring: Any = None, **_: Any) -> int:
    by = args[2] if len(args) > 2 else wrapstring
    return _slow(s) + (text_size(s) + 1) * text_size(by or "")


FILTERS: Mapping[str, Callable[..., int]] = {
    "batch": _batch, "capitalize": _text, "center": _center, "e": _escaped, "escape": _escaped,
    "forceescape": _escaped, "format": _format, "indent": _indent, "join": _join, "list": _list, "lower": _text,
    "pprint": _slow, "replace": _replace, "reverse": _reverse, "round": _round, "safe": _text, "slice": _batch,
    "sort": _list, "string": _text, "striptags": _slower, "sum": _sum, "title": _slow, "tojson": _to_json,
    "trim": _text, "truncate": _text, "unique": _list, "upper": _text, "urlencode": _escaped, "urlize": _slower,
    "wordcount": _slow, "wordwrap": _word_wrap, "xmlattr": _escaped,
}  # fmt: skip
"""Estimates for those that make something, called with the filter's own arguments."""

PASSIVE = frozenset({
    "abs", "attr", "count", "d", "default", "dictsort", "filesizeformat", "first", "float", "groupby", "int", "items",
    "last", "length", "map", "max", "min", "random", "reject", "rejectattr", "select", "selectattr",
})  # fmt: skip
"""Those that pass on, choose among, or put in order what is there, or make a number."""
