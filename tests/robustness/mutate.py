"""Damage to bytes, the same for the same random generator: what readers of foreign files are tried with."""

import random
import re
from collections.abc import Callable

# What a number in a text becomes, and a length or offset in binary.
WORDS = (b"-1", b"0", b"1e999", b"NaN", b"-0.0", b"18446744073709551616", b"9" * 400, b"null", b"true", b"[]", b"{}",
         b'""', b'"\\ud800"', b"[[[]]]", b"1.5", b"- 1", b"'", b"\xff\xfe")
LENGTHS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TOKENS = re.compile(rb'"[^"]{0,40}"|-?\d+(?:\.\d+)?|true|false|null')


def mutated(content: bytes, chosen: random.Random) -> bytes:
    """The content with one to four kinds of damage, at most twice as long and 100 kB longer."""
    for _ in range(chosen.choice((1, 1, 1, 2, 2, 4))):
        content = chosen.choice(DAMAGES)(bytearray(content), chosen)
    return bytes(content)


def _place(content: bytearray, chosen: random.Random) -> int:
    """Often among the first bytes, where formats keep what the rest depends on."""
    end = len(content) if chosen.random() < 0.6 else min(len(content), chosen.choice((8, 64, 512)))
    return chosen.randrange(end + 1)


def _stretch(content: bytearray, chosen: random.Random) -> tuple[int, int]:
    begin = _place(content, chosen)
    return begin, min(len(content), begin + chosen.choice((1, 2, 4, 8, 32, 200, 2_000)))


def _flip_bits(content: bytearray, chosen: random.Random) -> bytearray:
    for _ in range(chosen.choice((1, 1, 2, 8, 64)) if content else 0):
        content[min(_place(content, chosen), len(content) - 1)] ^= 1 << chosen.randrange(8)
    return content


def _noise(content: bytearray, chosen: random.Random) -> bytearray:
    begin, end = _stretch(content, chosen)
    content[begin:end] = chosen.randbytes(end - begin)
    return content


def _cut_off(content: bytearray, chosen: random.Random) -> bytearray:
    return content[:_place(content, chosen)]


def _leave_out(content: bytearray, chosen: random.Random) -> bytearray:
    begin, end = _stretch(content, chosen)
    del content[begin:end]
    return content


def _put_in(content: bytearray, chosen: random.Random) -> bytearray:
    begin = _place(content, chosen)
    content[begin:begin] = chosen.randbytes(chosen.choice((1, 4, 100)))
    return content


def _move(content: bytearray, chosen: random.Random) -> bytearray:
    """A stretch to another place, over what is there or between."""
    begin, end = _stretch(content, chosen)
    piece, to = content[begin:end], _place(content, chosen)
    content[to:to + (len(piece) if chosen.random() < 0.5 else 0)] = piece
    return content


def _repeat(content: bytearray, chosen: random.Random) -> bytearray:
    """A stretch again and again: nested brackets, long lists, boxes within boxes."""
    begin, end = _stretch(content, chosen)
    piece = content[begin:end]
    times = min(chosen.choice((1, 10, 1_000, 100_000)), 100_000 // max(len(piece), 1))
    content[end:end] = piece * times
    return content


def _set_length(content: bytearray, chosen: random.Random) -> bytearray:
    begin, size = _place(content, chosen), chosen.choice((1, 2, 4, 8))
    value = chosen.choice(LENGTHS) & (1 << 8 * size) - 1
    content[begin:begin + size] = value.to_bytes(size, chosen.choice(("big", "little")))
    return content


def _replace_token(content: bytearray, chosen: random.Random) -> bytearray:
    """A number, word or quoted text of a text becomes another, or one from elsewhere in it."""
    tokens = list(TOKENS.finditer(content, 0, 20_000))
    if tokens:
        begin, end = chosen.choice(tokens).span()
        content[begin:end] = chosen.choice((*WORDS, chosen.choice(tokens)[0]))
    return content


Damage = Callable[[bytearray, random.Random], bytearray]
DAMAGES: tuple[Damage, ...] = (_flip_bits, _flip_bits, _noise, _cut_off, _leave_out, _put_in, _move, _repeat,
                               _set_length, _set_length, _replace_token, _replace_token)
