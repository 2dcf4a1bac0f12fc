"""Random damage to the bytes and texts of files. The same `chance` gives the same damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# How many changes an input gets.
NUM_CHANGES = (1, 1, 1, 1, 2, 2, 3, 6)
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
TEXT = re.compile(rb'"[^"\n]*"')
# Beginning and end of a file, where the indices of most formats lie.
EDGE_BYTES = 400
EXTREME_NUMBERS = (
    *(
        b"0",
        b"-1",
        b"1",
        b"2147483648",
        b"4294967295",
        b"9223372036854775808",
        b"18446744073709551615",
    ),
    *(
        b"1e999",
        b"-1e999",
        b"1e-999",
        b"0.1",
        b"NaN",
        b"Infinity",
        b"true",
        b"null",
        b'"1"',
        b"[1]",
    ),
    *(b"9" * 400, b"9" * 5000, b"00", b"-0", b"0x10", b"1_0", "\u0663".encode()),
)
EXTREME_TEXTS = (
    *(b'""', b'"\\ud800"', b'"\\udfff x"', b'"\\u0000"', b'"\\u202e"', b'"\\n"', b'"a\\u2028b"'),
    *(b'"../../etc/passwd"', b'"/etc/passwd"', b'"file:///etc/passwd"', b'"memory://x::y"'),
    *(b'"' + b"x" * 70_000 + b'"', b'"' + "\u732b".encode() * 90 + b'"', b'"e\\u0301"'),
    *(b"[" * 100_000, b'{"a":' * 100_000),
    *(b"null", b"7", b"[]", b"{}", b'[["x"]]', b'"\xff\xfe"', b'"\\x"', b'"', b"'x'"),
)
EXTREME_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e300),
    *(float("inf"), float("nan"), "", "x", "\ud800", "\0", "a\nb", "../x", "x" * 9000, "0" * 64),
    *([], {}, [[]], [None], {"": ""}, [1, 2, 3], ["x"], "2026-01-01", "1", "-1", "1e5"),
)
PIECES = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\n\n\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
    ),
    *(b",", b";", b"\t", b":", b" ", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xc0\xaf", b"#", b"//"),
    *(b"[" * 3000, b'{"a":' * 3000, b"[" * 200_000, b'"' * 3, b"," * 50, b"\0" * 512),
)

Change = Callable[[bytes, Random, Sequence[bytes]], bytes]


def mutate_bytes(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Damages binary content in a few places.

    Args:
        content: The file.
        chance: Source of all choices.
        donors: Files from which pieces are taken.
    """
    for _ in range(chance.choice(NUM_CHANGES)):
        content = chance.choice(BYTE_CHANGES)(content, chance, donors)
    return content


def mutate_text(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Damages text: mostly its numbers, strings and lines, sometimes its bytes."""
    for _ in range(chance.choice(NUM_CHANGES)):
        changes = TEXT_CHANGES if chance.random() < 0.75 else BYTE_CHANGES
        content = chance.choice(changes)(content, chance, donors)
    return content


def mutate_json(value: Any, chance: Random) -> Any:
    """Returns a JSON value with one part replaced, removed, repeated or renamed."""
    places = list(_places(value))
    if not places:
        return chance.choice(EXTREME_VALUES)
    holder, name = chance.choice(places)
    act = chance.randrange(5)
    if act == 0:
        del holder[name]
    elif act == 1 and isinstance(holder, dict):
        holder[chance.choice(("", "x", f"{name} ", "\ud800"))] = holder.pop(name)
    elif act == 2 and isinstance(holder, list):
        holder.insert(name, holder[name])
    elif act == 3:
        other, other_name = chance.choice(places)
        holder[name] = json.loads(json.dumps(other[other_name]))
    else:
        holder[name] = chance.choice(EXTREME_VALUES)
    return value


def mutate_json_file(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Damages the values of a JSON file or its text."""
    if chance.random() < 0.5:
        return mutate_text(content, chance, donors)
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        value = mutate_json(value, chance)
    return json.dumps(value, indent=1).encode()


def _places(value: Any) -> Any:
    """Yields every (container, key) below a value."""
    if isinstance(value, dict | list):
        names = list(value) if isinstance(value, dict) else range(len(value))
        for name in names:
            yield value, name
            yield from _places(value[name])


# ------------------------------------------------------------------ bytes


def _at(content: bytes, chance: Random) -> int:
    """A position, half of the time near an end."""
    if not content:
        return 0
    if chance.random() < 0.5:
        return chance.randrange(len(content))
    at = chance.randrange(min(EDGE_BYTES, len(content)))
    return at if chance.random() < 0.6 else len(content) - 1 - at


def _range(content: bytes, chance: Random) -> tuple[int, int]:
    """A range of bytes, mostly short."""
    start = _at(content, chance)
    longest = chance.choice((4, 16, 64, 512, len(content)))
    return start, min(len(content), start + 1 + chance.randrange(max(1, longest)))


def _put(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at] + piece + content[at + len(piece) :]


def _flip_bits(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8)) if content else 0):
        changed[_at(content, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _set_byte(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    value = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return _put(content, _at(content, chance), bytes([value]))


def _set_number(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Writes an extreme number as a field of 2, 4 or 8 bytes."""
    width = chance.choice((2, 4, 4, 8))
    top = 1 << (8 * width)
    near = chance.choice((0, 1, 7, 255, len(content), len(content) + 1, top // 2, top // 2 - 1))
    number = chance.choice((near, top - 1, top - 2, top - near)) % top
    order = chance.choice(("big", "little"))
    at = _at(content, chance)
    at -= at % chance.choice((1, 4))
    return _put(content, at, number.to_bytes(width, order))


def _zero_range(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    start, end = _range(content, chance)
    return content[:start] + bytes(end - start) + content[end:]


def _cut_end(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    return content[: _at(content, chance)]


def _cut_out(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    start, end = _range(content, chance)
    return content[:start] + content[end:]


def _repeat_range(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    start, end = _range(content, chance)
    return content[:end] + content[start:end] * chance.choice((1, 1, 3)) + content[end:]


def _swap_ranges(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    (a, b), (c, d) = sorted((_range(content, chance), _range(content, chance)))
    if b > c:
        return content
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _splice(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Replaces a range by one of another file."""
    donor = chance.choice(donors)
    start, end = _range(content, chance)
    first, last = _range(donor, chance)
    return content[:start] + donor[first:last] + content[end:]


def _append(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    if chance.random() < 0.5:
        return content + chance.choice(donors)
    return content + chance.randbytes(chance.choice((1, 16, 700)))


def _insert_noise(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    at = _at(content, chance)
    return content[:at] + chance.randbytes(chance.choice((1, 2, 8, 188))) + content[at:]


# ------------------------------------------------------------------- text


def _replace_token(
    pattern: re.Pattern[bytes], values: Sequence[bytes]
) -> Callable[[bytes, Random, Sequence[bytes]], bytes]:
    def change(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
        tokens = [match.span() for match in pattern.finditer(content)]
        if not tokens:
            return content
        start, end = chance.choice(tokens)
        other = chance.choice(tokens)
        value = content[slice(*other)] if chance.random() < 0.3 else chance.choice(values)
        return content[:start] + value + content[end:]

    return change


def _change_lines(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Removes, repeats, moves or joins lines."""
    lines = content.splitlines(keepends=True) or [b""]
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    act = chance.randrange(4)
    if act == 0:
        del lines[at]
    elif act == 1:
        lines.insert(other, lines[at])
    elif act == 2:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = lines[at].rstrip(b"\r\n")
    return b"".join(lines)


def _insert_piece(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    at = _at(content, chance)
    return content[:at] + chance.choice(PIECES) + content[at:]


def _remove_mark(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Removes a bracket, a quote or a separator."""
    marks = [at for at, byte in enumerate(content[:20_000]) if byte in b'{}[]",:;\n\t']
    if not marks:
        return content
    at = chance.choice(marks)
    return content[:at] + content[at + 1 :]


def _encode(content: bytes, chance: Random, donors: Sequence[bytes]) -> bytes:
    """Stores the text in another encoding, or with other ends of lines."""
    text = content.decode("utf-8", "replace")
    act = chance.randrange(5)
    if act == 0:
        return text.encode("utf-16")
    if act == 1:
        return text.encode("latin-1", "replace")
    if act == 2:
        return text.encode("utf-8-sig")
    return content.replace(b"\n", (b"\r\n", b"\r")[act - 3])


BYTE_CHANGES: tuple[Change, ...] = (
    *(_flip_bits, _flip_bits, _set_byte, _set_byte, _set_number, _set_number, _set_number),
    *(_zero_range, _cut_end, _cut_out, _repeat_range, _swap_ranges, _splice, _append),
    _insert_noise,
)
TEXT_CHANGES: tuple[Change, ...] = (
    *(_replace_token(NUMBER, EXTREME_NUMBERS),) * 2,
    *(_replace_token(TEXT, EXTREME_TEXTS),) * 2,
    *(_change_lines, _insert_piece, _insert_piece, _remove_mark, _encode),
)
