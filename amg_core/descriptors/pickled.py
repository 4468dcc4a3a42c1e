"""Reads PyTorch's files as data, without running code from them and within a limit of memory.

`torch.save` and `torch.jit.save` write a zip archive around a pickle. Torch before 1.6 wrote pickles
and the numbers one after the other. A pickle is a program: `torch.jit.load` runs the code of an archive,
and so does `torch.load` with weights only before torch 2.6 (CVE-2025-32434), which hosts still pin.
Python's own unpickler allocates gigabytes for one number in the file, and crashes on deep nesting.

So `_Machine` implements only the few instructions, and accepts only the few names, that weights are
written with. It stops at any other. What is no tensor, text or number becomes an inert table.
docs/decisions/reading-weights.md has the alternatives.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import brief

MOST_PICKLE = 16 << 20  # bytes; 3,000 tensors take 0.6 MB
_MOST_STEPS = 1 << 19
_MOST_DIRECTORY = 4 << 20  # bytes of a zip's list of contents
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}

Storage = Callable[[str, torch.dtype, int], Tensor]  # key, type, number of values -> flat tensor


class Module:
    """Inert replacement for every ``__torch__.*`` class of a TorchScript archive."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: object = None


def read(path: Path) -> object:
    """The contents of a file's pickle: tensors, texts, numbers, None, dicts, lists, tuples, `Module`s.

    Together the tensors have at most four times the bytes of the file. Tables may be nested to any depth
    or contain themselves, so the caller has to limit how far it walks them. A damaged or foreign file
    can raise any exception. The caller adds the name of the file.
    """
    with open(path, "rb") as file:
        kind = _Archive if file.read(4) == b"PK\x03\x04" else _Legacy
        return kind(file).root()


# ---------------------------------------------------------------- the two kinds of file


class _Bounded:
    """A file that refuses to read more than `most` bytes at once."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise ValueError("the archive has far too many entries")
        return self.file.read(self.most if count < 0 else count)


class _Archive:
    """A zip of `torch.save` or `torch.jit.save`: ``NAME/data.pkl``, ``NAME/data/0``, …"""

    def __init__(self, file: BinaryIO) -> None:
        self.left = self.size = os.fstat(file.fileno()).st_size
        bounded = _Bounded(file, _MOST_DIRECTORY)
        self.zip = zipfile.ZipFile(bounded)
        bounded.most = self.size
        names = self.zip.namelist()
        if len(set(names)) < len(names):
            raise ValueError("two entries of the archive have one name")
        roots = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("no data.pkl in it")
        self.folder = roots[0].removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        if f"{self.folder}byteorder" in names and self.record("byteorder", 16) != b"little":
            raise ValueError("written on a big-endian machine")

    def record(self, name: str, most: int) -> bytes:
        entry = self.zip.getinfo(f"{self.folder}{name}")
        stored = (
            entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        )
        if not stored or entry.file_size > most:
            raise ValueError(f"unusual archive entry {name!r}")
        self.left -= entry.file_size  # overlapping entries could add up to more than the file
        if self.left < 0:
            raise ValueError("the entries of the archive are longer than itself")
        return self.zip.read(entry)  # checks the CRC

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """One flat storage, read on first use."""
        if key not in self.storages:
            data = self.record(f"data/{key}", self.size)
            if count < 1 or len(data) != count * dtype.itemsize:
                raise ValueError(f"storage {key!r} has the wrong length")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype)
        return _typed(self.storages, key, dtype)

    def root(self) -> object:
        data = io.BytesIO(self.record("data.pkl", MOST_PICKLE))
        return _Machine(data, self.storage, 4 * self.size).load()


class _Legacy:
    """The layout before torch 1.6: magic number, version, machine, contents, keys, then the storages."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.left = self.size
        self.storages: dict[str, Tensor] = {}

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """One flat storage, filled by `root`."""
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if count < 1 or self.left < 0:
                raise ValueError(f"storage {key!r} has the wrong length")
            self.storages[key] = torch.zeros(count, dtype=dtype)
        return _typed(self.storages, key, dtype)

    def root(self) -> object:
        self.file.seek(0)
        pickles = io.BytesIO(self.file.read(MOST_PICKLE))
        machine = _Machine(pickles, self.storage, 4 * self.size)
        if (machine.load(), machine.load()) != (_LEGACY_MAGIC, _LEGACY_VERSION):
            raise ValueError("neither a PyTorch file nor safetensors")
        about, found, keys = machine.load(), machine.load(), machine.load()
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise ValueError("written on a big-endian machine")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its storages have no names")
        if sorted(keys) != sorted(self.storages):
            raise ValueError("its storages are not those of its contents")
        self.file.seek(pickles.tell())
        for key in keys:
            self._fill(self.storages[key])
        return found

    def _fill(self, flat: Tensor) -> None:
        head = self.file.read(8)
        if len(head) < 8 or struct.unpack("<q", head)[0] != flat.numel():
            raise ValueError("a storage has the wrong length")
        data = self.file.read(flat.numel() * flat.itemsize)
        if len(data) < flat.numel() * flat.itemsize:
            raise ValueError("it is cut short")
        flat.copy_(torch.frombuffer(bytearray(data), dtype=flat.dtype))


def _typed(storages: dict[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    if storages[key].dtype != dtype:
        raise ValueError(f"storage {key!r} has two types")
    return storages[key]


# ---------------------------------------------------------------- the pickle


class _Name:
    """What a global name of the pickle stands for: a storage of some type, or a callable."""

    __slots__ = ("dtype", "kind")

    def __init__(self, kind: str, dtype: torch.dtype | None = None) -> None:
        self.kind, self.dtype = kind, dtype


_CALLS = {
    "torch._utils _rebuild_tensor_v2": "tensor",
    # The tensor of a parameter and the list of a typed list are the first argument, unchanged.
    "torch._utils _rebuild_parameter": "first",
    "torch.jit._pickle build_intlist": "first",
    "torch.jit._pickle build_doublelist": "first",
    "torch.jit._pickle build_boollist": "first",
    "torch.jit._pickle build_tensorlist": "first",
    "collections OrderedDict": "table",
}
_MARK = object()


class _Machine:
    """Runs the pickles in `file` on inert values only, one for each `load`.

    `most` is the limit for the bytes of all tensors. Nothing here walks a table, so deep nesting does no
    harm. No table can be a dictionary key.
    """

    def __init__(self, file: BinaryIO, storage: Storage, most: int) -> None:
        self.file, self.storage, self.most = file, storage, most
        self.steps = 0

    def load(self) -> object:
        """Read one pickle from the current position of the file, and return its value."""
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        while True:
            code = self.file.read(1)
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise ValueError("its pickle is far too long")
            if code == b".":
                return self._pop()
            if code not in _STEPS:
                wrong = f"its pickle has the instruction {code!r}, which no weights need"
                raise ValueError(wrong if code else "it is cut short")
            _STEPS[code](self, _READERS[code](self.file) if code in _READERS else None)

    # the stack

    def _pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle takes what is not there")
        return self.stack.pop()

    def _pops(self, count: int) -> list[object]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[object]:
        found = []
        while self.stack and self.stack[-1] is not _MARK:
            found.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its pickle takes what is not there")
        self.stack.pop()
        return found[::-1]

    def _top(self) -> object:
        if not self.stack:
            raise ValueError("its pickle takes what is not there")
        return self.stack[-1]

    # the instructions

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _append(self, parts: list[object]) -> None:
        if not isinstance(into := self._top(), list):
            raise ValueError("its pickle fills what cannot be filled")
        into.extend(parts)

    def _set(self, parts: list[object]) -> None:
        keys = parts[::2]
        if len(parts) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise ValueError("its pickle has a table with odd keys")
        if not isinstance(into := self._top(), dict):
            raise ValueError("its pickle fills what cannot be filled")
        into.update(zip(keys, parts[1::2], strict=True))

    def _global(self, words: str) -> None:
        module, _, name = words.partition(" ")
        if module == "torch" and name in STORAGES:
            self._push(_Name("storage", STORAGES[name]))
        elif words in _CALLS:
            self._push(_Name(_CALLS[words]))
        elif module.partition(".")[0] == "__torch__":
            self._push(_Name("module"))
        else:
            raise ValueError(
                f"its pickle names {brief(f'{module}.{name}')}, which no weights file needs"
            )

    def _call(self) -> None:
        name, given = self._pops(2)
        if not isinstance(name, _Name) or not isinstance(given, tuple):
            raise ValueError("its pickle calls what cannot be called")
        if name.kind == "tensor" and len(given) >= 4:
            self._push(self._tensor(*given[:4]))
        elif name.kind == "first" and given:
            self._push(given[0])
        elif name.kind == "table" and not given:
            self._push({})
        elif name.kind == "module" and not given:
            self._push(Module())
        else:
            raise ValueError("its pickle calls something the wrong way")

    def _tensor(self, flat: object, offset: object, size: object, stride: object) -> Tensor:
        if not (
            isinstance(flat, Tensor)
            and isinstance(size, tuple)
            and isinstance(stride, tuple)
            and len(size) == len(stride)
        ):
            raise ValueError("a tensor without storage or shape")
        given = (offset, *size, *stride)
        start, *numbers = [n if type(n) is int else -1 for n in given]
        if start < 0 or any(n < 0 for n in numbers):
            raise ValueError("a tensor of an impossible shape")
        shape, steps = numbers[: len(size)], numbers[len(size) :]
        last = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if prod(shape) > flat.numel() or last >= flat.numel() or len(shape) > 8:
            raise ValueError("a tensor larger than its storage")
        self.most -= prod(shape) * flat.itemsize
        if self.most < 0:
            raise ValueError("its tensors are far larger than the file")
        return flat.as_strided(shape, steps, start)

    def _build(self) -> None:
        state = self._pop()
        if isinstance(into := self._top(), Module):
            into.attributes = state
        elif not isinstance(into, dict):  # the attributes of an OrderedDict are ignored
            raise ValueError("its pickle fills what cannot be filled")

    def _reference(self) -> None:
        found = self._pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise ValueError("an unknown kind of reference")
        name, key, count = found[1], found[2], found[4]
        right = isinstance(name, _Name) and name.dtype and isinstance(key, str)
        if not right or type(count) is not int or (len(found) == 6 and found[5] is not None):
            raise ValueError("an unknown kind of reference")
        self._push(self.storage(key, name.dtype, count))

    def _note(self, key: int) -> None:
        self.memo[key] = self._top()

    def _recall(self, key: int) -> None:
        if key not in self.memo:
            raise ValueError("its pickle takes what is not there")
        self._push(self.memo[key])


# Python's own reader for the argument of each instruction. They read no more than the file holds.
_READERS = {op.code.encode("latin-1"): op.arg.reader for op in pickletools.opcodes if op.arg}
# The second parameter of each function is the argument of the instruction, of that instruction's type.
_STEPS: dict[bytes, Callable[[_Machine, Any], None]] = {
    b"(": lambda m, _: m._push(_MARK),
    b")": lambda m, _: m._push(()),
    b"t": lambda m, _: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m, _: m._push(tuple(m._pops(1))),
    b"\x86": lambda m, _: m._push(tuple(m._pops(2))),
    b"\x87": lambda m, _: m._push(tuple(m._pops(3))),
    b"]": lambda m, _: m._push([]),
    b"a": lambda m, _: m._append(m._pops(1)),
    b"e": lambda m, _: m._append(m._pop_to_mark()),
    b"}": lambda m, _: m._push({}),
    b"s": lambda m, _: m._set(m._pops(2)),
    b"u": lambda m, _: m._set(m._pop_to_mark()),
    b"N": lambda m, _: m._push(None),
    b"\x88": lambda m, _: m._push(True),
    b"\x89": lambda m, _: m._push(False),
    **dict.fromkeys((b"K", b"M", b"J", b"G", b"\x8a", b"X"), _Machine._push),
    **dict.fromkeys((b"q", b"r"), _Machine._note),
    **dict.fromkeys((b"h", b"j"), _Machine._recall),
    b"c": _Machine._global,
    b"\x81": lambda m, _: m._call(),  # NEWOBJ
    b"R": lambda m, _: m._call(),
    b"b": lambda m, _: m._build(),
    b"Q": lambda m, _: m._reference(),
    b"\x80": lambda m, _: None,  # PROTO
}
