"""Texts as files, prompts and other libraries may hold them, and the check of what is printed or logged."""

from __future__ import annotations

import re

LONGEST = 500
HOSTILE = {
    "color": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;own title\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1 sequence": "\x9b31m",
    "line feed": "one\nerror: two",
    "carriage return": "good\rbad",
    "Unicode line": "one\u2028two\x85three",
    "backspace": "abc\b\b\bxyz",
    "null": "a\0b",
    "bidi": "gnp.\u202ereversed",
    "not UTF-8": "caf\udce9",
    "long": "x" * 1_000_000,
    "long and hostile": "\x1b[31m" * 20_000,
    "long line of lines": "\n" * 100_000,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def is_clean(text: str) -> bool:
    """Whether each line may be printed; a line feed ends one."""
    return not CONTROL.search(text) and all(len(line) <= LONGEST for line in text.split("\n"))
