"""Large JSON bodies, read in a thread that lets others have their turn.

A parser runs to its end with the interpreter to itself, for half a second with the largest batches,
and so does the collector of what is not needed any more. Nothing else of the process is done then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from holdfast.protocol.bodies import read_json
from holdfast.protocol.errors import InvalidMessageError

PIECE = 64 << 10
"""Bytes that are parsed at a time, some milliseconds' work; more where one element has more."""

_BRACKET_OR_STRING = re.compile(rb'["\[\]{}]')
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_QUOTE = ord('"')


def read_json_in_pieces(data: bytes, element: Callable[[Any], Any]) -> Any:
    """As `read_json`, but for the lists of the objects of an object, such as a batch's data.

    Those are parsed a few elements at a time, which become what `element` makes of them.
    """
    try:
        shell, lists = _take_out_lists(data, element)
        whole = read_json(shell)
    except InvalidMessageError:
        return read_json(data)  # to say where in the whole it is wrong
    for holder in whole.values() if lists else ():
        for name, value in holder.items() if isinstance(holder, dict) else ():
            if isinstance(value, list):
                holder[name] = lists[value[0]]
    return whole


def _take_out_lists(data: bytes, element: Callable[[Any], Any]) -> tuple[bytes, list[list[Any]]]:
    """The text without these lists, each of which has its number there instead, and the lists."""
    shell: list[bytes] = []
    lists: list[list[Any]] = []
    open_ = bytearray()
    elements: list[Any] | None = None
    begin = 0
    for at, bracket in _brackets(data):
        if bracket in b"[{":
            open_.append(bracket)
            if open_ == b"{{[":
                shell += data[begin : at + 1], b"%d" % len(lists)
                lists.append(elements := [])
                begin = at + 1
            continue
        del open_[-1:]
        if elements is None:
            continue
        if len(open_) == 2:
            elements += map(element, _elements(data[begin:at], not elements))
            elements, begin = None, at
        elif len(open_) == 3 and at - begin > PIECE:
            elements += map(element, _elements(data[begin : at + 1], not elements))
            begin = at + 1
    shell.append(data[begin:])
    return b"".join(shell), lists


def _brackets(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the brackets are that are not in a string."""
    at = 0
    while found := _BRACKET_OR_STRING.search(data, at):
        at = found.start()
        if data[at] == _QUOTE:
            string = _STRING.match(data, at)
            if string is None:
                raise InvalidMessageError("a string does not end")
            at = string.end()
        else:
            yield at, data[at]
            at += 1


def _elements(text: bytes, are_first: bool) -> list[Any]:
    """A part of a list's text. One that is not the first begins with its comma."""
    found: list[Any] = read_json(b"[%b]" % text if are_first else b"[0%b]" % text)
    return found if are_first else found[1:]
