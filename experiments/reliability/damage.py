"""Damage to files: bytes, JSON, YAML, tables and NIfTI headers. Every function draws from the generator it is given."""

import gzip
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

DEEP = 200_000
"""Levels of nesting that end Python's parsers of JSON and YAML, which are recursive."""
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "nan", "\x00", "\ud800", "é" * 1000, "../../etc",
    [], {}, [[]], {"": None}, [1, "a"], "step",
)  # fmt: skip


def damage_bytes(content: bytes, rng: Random) -> bytes:
    """Flipped bytes, a part only, zeros, noise, or something inserted."""
    how, size = rng.randrange(6), len(content)
    if how == 0:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if how == 1:
        return content[: rng.randrange(size)]
    if how == 2:
        start = rng.randrange(size)
        return content[:start] + bytes(min(size - start, rng.choice((1, 100, size)))) + content[start + 100 :]
    if how == 3:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 400, size)))
    if how == 4:
        place = rng.randrange(min(size, 400))
        return content[:place] + rng.randbytes(rng.choice((1, 8, 64))) + content[place:]
    return struct.pack("<Q", rng.choice((0, 2**63, 2**40, 10**6))) + content[8:]


def damage_json(content: bytes, rng: Random) -> bytes:
    """A value of another type, a missing or added key, deep nesting, or damaged text."""
    how = rng.randrange(8)
    if how == 0:
        return damage_bytes(content, rng)
    if how == 1:
        return rng.choice((b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP))
    if how == 2:
        return json.dumps(rng.choice(ODD)).encode()
    tree = json.loads(content)
    places = list(_places(tree))
    holder, key = rng.choice(places)
    if how == 3 and isinstance(holder, dict):
        del holder[key]
    elif how == 4:
        return json.dumps(tree).encode().replace(b"null", b"[" * DEEP + b"]" * DEEP, 1)
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each value."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def damage_yaml(content: bytes, rng: Random, *, canary: Path) -> bytes:
    """Another value in a line, code in tags, an alias that grows, deep nesting, or damaged text."""
    how, lines = rng.randrange(9), content.decode().splitlines()
    if how == 0:
        return damage_bytes(content, rng)
    if how == 1:
        return rng.choice((b"a: " + b"[" * DEEP, b"- " * DEEP, b"? " * 1000))
    if how == 2:
        names = "abcdefghij"
        grown = [f"{names[0]}: &{names[0]} [x, x, x, x, x, x, x, x, x]"]
        grown += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
        return "\n".join([*lines, *grown]).encode()
    if how == 3:
        return "\n".join([*lines, f'extra: !!python/object/apply:os.system ["touch {canary}"]']).encode()
    place = rng.choice([number for number, line in enumerate(lines) if ":" in line])
    key = lines[place].partition(":")[0]
    odd = (
        "null", "nan", ".inf", "-1", "[]", "{}", "'é\\0'", "'${oc.env:HOME}'", "${nothing.there}", "1e400", "true",
        "!!binary x", "*none", "0x10", "2026-01-01", f'!!python/object/apply:os.system ["touch {canary}"]', "'???'",
    )  # fmt: skip
    lines[place] = f"{key}: {rng.choice(odd)}" if how < 8 else f"\t{lines[place]}"
    return "\n".join(lines).encode()


def damage_table(content: bytes, rng: Random) -> bytes:
    """Damage to the text of a CSV or JSONL file with the columns `prompt` and `completion`."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines) - 1)
    line = lines[number]
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: line + b"\xff\xfe",
        lambda: line[: len(line) // 2] + b"\x00" + line[len(line) // 2 :],
        lambda: line.replace(b"prompt", b"other"),
        lambda: line.replace(b"completion", b""),
        lambda: line[: len(line) // 2],
        lambda: b'"' + line,
        lambda: line + b',"more"',
        lambda: b"",
        lambda: line.replace(b" ", b" " + b"x" * 3_000_000, 1),
        lambda: b"[" * DEEP,
        lambda: b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        lambda: b'{"prompt": NaN, "completion": 1e999}',
        lambda: b'{"prompt": "\\ud800", "completion": "a"}',
        lambda: b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}",
        lambda: b'{"prompt": {"a": 1}, "completion": ["b"]}',
        lambda: line.replace(b"\r", b"").replace(b" ", b"\r"),
        lambda: b"\xef\xbb\xbf" + line,
        lambda: "٣,‮a\u2028b\x1b[31m".encode(),
    )
    whole: tuple[Callable[[], bytes], ...] = (
        lambda: content.decode().encode("utf-16"),
        lambda: damage_bytes(content, rng),
        lambda: b"",
        lambda: lines[0],
        lambda: b"\n" * 1000,
        lambda: gzip.compress(content),
        lambda: content.replace(b"\n", b"\r"),
    )
    if rng.random() < 0.25:
        return rng.choice(whole)()
    lines[number] = rng.choice(changes)()
    return b"\n".join(lines)


def damage_nifti(content: bytes, rng: Random) -> bytes:
    """Damage to a compressed NIfTI-1 file: to a field of its header, to its voxels, or to the compressed bytes."""
    if rng.random() < 0.35:
        return damage_bytes(content, rng)
    header = bytearray(gzip.decompress(content))
    if rng.random() < 0.2:
        return gzip.compress(damage_bytes(bytes(header), rng), 1)
    short = rng.choice((0, 1, -1, 2, 7, 3, 32767, -32768, 512, 2304))
    real = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-38, -5.0))
    fields: tuple[tuple[int, str, Any], ...] = (
        (0, "<i", short),  # sizeof_hdr
        (40 + 2 * rng.randrange(8), "<h", short),  # dim
        (70, "<h", rng.choice((0, 1, 2, 32, 128, 1536, 2048, 2304, 999))),  # datatype
        (72, "<h", short),  # bitpix
        (76 + 4 * rng.randrange(8), "<f", real),  # pixdim
        (108, "<f", rng.choice((0.0, 1.0, 1e9, 1e30, float("nan"), float("inf"), -352.0))),  # vox_offset
        (112, "<f", real),  # scl_slope
        (116, "<f", real),  # scl_inter
        (252, "<h", short),  # qform_code
        (254, "<h", short),  # sform_code
        (256 + 4 * rng.randrange(6), "<f", real),  # quaternion
        (280 + 4 * rng.randrange(12), "<f", real),  # sform
        (344, "4s", rng.choice((b"ni1\0", b"n+2\0", b"\0\0\0\0"))),  # magic
        (348, "<i", short),  # extensions
    )
    for offset, form, value in rng.sample(fields, rng.choice((1, 1, 2))):
        struct.pack_into(form, header, offset, value)
    return gzip.compress(bytes(header), 1)
