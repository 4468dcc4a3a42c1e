"""PyTorch's own files as data: nothing in them is run, and nothing in them decides how much memory is used.

`torch.save` and `torch.jit.save` write a zip archive around a pickle; torch before 1.6 wrote pickles
and the numbers one behind the other. A pickle is a program: `torch.jit.load` runs the code of an archive,
and so does `torch.load`, for weights only, before torch 2.6 (CVE-2025-32434), which hosts still pin.
Python's own unpickler takes gigabytes for one number in the file, and ends the process on a deep one.
So `_Machine` knows the few instructions that weights are written with, and stops at any other; so do its
names. What is no tensor, text or number becomes an inert table.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MOST_PICKLE = 16 << 20  # bytes; 3,000 tensors take 0.6 MB
_MOST_STEPS = 1 << 19
_DEEPEST = 64  # tables in tables
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


class Module:
    """Inert stand-in for every ``__torch__.*`` class of a TorchScript archive."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: object = None


def read(path: Path) -> object:
    """What the pickle of a file holds: tensors, texts, numbers, None, and dicts, lists, tuples, `Module`s.

    Together the tensors have at most four times the bytes of the file. Raises whatever a damaged or
    foreign file provokes; the caller names the file.
    """
    with open(path, "rb") as file:
        kind = _Archive if file.read(4) == b"PK\x03\x04" else _Legacy
        return kind(file).root()


# ---------------------------------------------------------------- the two kinds of file


class _Bounded:
    """A file of which no piece over `most` bytes is read at once."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise ValueError("far too many entries in the archive")
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
        self.left -= entry.file_size  # entries that overlap would make more of the file than it is
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
        data = self.record("data.pkl", MOST_PICKLE)
        return _Machine(data, self.storage, 4 * self.size).load()


class _Legacy:
    """torch before 1.6: magic number, version, machine, contents, keys; then the storages by key."""

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
        machine = _Machine(self.file.read(MOST_PICKLE), self.storage, 4 * self.size)
        if (machine.load(), machine.load()) != (_LEGACY_MAGIC, _LEGACY_VERSION):
            raise ValueError("neither a PyTorch file nor safetensors")
        about, found, keys = machine.load(), machine.load(), machine.load()
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise ValueError("written on a big-endian machine")
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self.storages):
            raise ValueError("its storages are not those of its contents")
        self.file.seek(machine.at)
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
    """What a global of the pickle stands for: a storage of some type, or something to call."""

    __slots__ = ("dtype", "kind")

    def __init__(self, kind: str, dtype: torch.dtype | None = None) -> None:
        self.kind, self.dtype = kind, dtype


_CALLS = {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    # a parameter's tensor, a typed list's list: the first argument as it is
    ("torch._utils", "_rebuild_parameter"): "first",
    ("torch.jit._pickle", "build_intlist"): "first",
    ("torch.jit._pickle", "build_doublelist"): "first",
    ("torch.jit._pickle", "build_boollist"): "first",
    ("torch.jit._pickle", "build_tensorlist"): "first",
    ("collections", "OrderedDict"): "table",
}
_MARK = object()


class _Machine:
    """Runs the pickles of `data`, one a `load`, on inert values alone.

    A container is filled before it goes into another one and is left alone after that: so depth is
    known as it is built, and nothing holds itself. `most`: bytes of all tensors.
    """

    def __init__(
        self, data: bytes, storage: Callable[[str, torch.dtype, int], Tensor], most: int
    ) -> None:
        self.data, self.at, self.storage, self.most = data, 0, storage, most
        self.steps = 0

    def load(self) -> object:
        """The value of the pickle that begins at `at`, which is its end afterwards."""
        self.stack: list = []
        self.memo: dict[int, object] = {}
        self.depth: dict[int, int] = {}  # of containers, by identity
        self.alive: list = []  # an identity is that of one object only as long as it lives
        self.inside: set[int] = set()
        while True:
            code = self._take(1)[0]
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise ValueError("its pickle is far too long")
            if code == 0x2E:  # STOP
                return self._pop()
            if code not in _STEPS:
                raise ValueError(f"its pickle has an instruction {code:#x} that no weights need")
            _STEPS[code](self)

    # what the steps are made of

    def _take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError("it is cut short")
        self.at += count
        return piece

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise ValueError("it is cut short")
        return self._take(end + 1 - self.at)[:-1].decode()

    def _pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle takes what is not there")
        return self.stack.pop()

    def _pops(self, count: int) -> list:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list:
        found = []
        while self.stack and self.stack[-1] is not _MARK:
            found.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its pickle takes what is not there")
        self.stack.pop()
        return found[::-1]

    def _push(self, container) -> None:
        self.alive.append(container)
        self.depth[id(container)] = 1
        self.stack.append(container)

    def _tuple(self, parts: list) -> None:
        if not parts:  # there is but one empty tuple, and nothing to note of it
            self.stack.append(())
            return
        self._push(tuple(parts))
        self._put_into(self.stack[-1], parts)

    def _put_into(self, container: object, parts) -> None:
        """Note that `parts` are in `container` now."""
        if id(container) in self.inside or id(container) not in self.depth:
            raise ValueError("its pickle changes what is already in its place")
        for part in parts:
            if id(part) in self.depth:
                self.inside.add(id(part))
                deep = max(self.depth[id(container)], self.depth[id(part)] + 1)
                if deep > _DEEPEST:
                    raise ValueError("its tables are nested far too deep")
                self.depth[id(container)] = deep
        if id(container) in self.inside:
            raise ValueError("its pickle puts a table into itself")

    def _top(self, kind: type):
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError("its pickle fills what cannot be filled")
        return self.stack[-1]

    # the steps

    def _text(self) -> None:
        self.stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def _long(self) -> None:
        self.stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _append(self, parts: list) -> None:
        into = self._top(list)
        self._put_into(into, parts)
        into.extend(parts)

    def _set(self, parts: list) -> None:
        into = self._top(dict)
        keys = parts[::2]
        if len(parts) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise ValueError("its pickle has a table with odd keys")
        self._put_into(into, parts)
        into.update(zip(keys, parts[1::2], strict=True))

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if module == "torch" and name in STORAGES:
            found = _Name("storage", STORAGES[name])
        elif (module, name) in _CALLS:
            found = _Name(_CALLS[module, name])
        elif module.partition(".")[0] == "__torch__":
            found = _Name("module")
        else:
            raise ValueError(f"it asks for {module}.{name}, which no weights file needs")
        self.stack.append(found)

    def _call(self) -> None:
        name, given = self._pops(2)
        if not isinstance(name, _Name) or not isinstance(given, tuple):
            raise ValueError("its pickle calls what cannot be called")
        if name.kind == "tensor" and len(given) >= 4:
            self.stack.append(self._tensor(*given[:4]))
        elif name.kind == "first" and given:
            self.stack.append(given[0])
        elif name.kind == "table" and not given:
            self._push({})
        elif name.kind == "module" and not given:
            self._push(Module())
        else:
            raise ValueError("its pickle calls something the wrong way")

    def _tensor(self, flat, offset, size, stride) -> Tensor:
        shape = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not isinstance(flat, Tensor) or not shape:
            raise ValueError("a tensor without storage or shape")
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError("a tensor of an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if prod(size) > flat.numel() or last >= flat.numel() or len(size) > 8:
            raise ValueError("a tensor larger than its storage")
        self.most -= prod(size) * flat.itemsize
        if self.most < 0:
            raise ValueError("its tensors are far larger than the file")
        return flat.as_strided(size, stride, offset)

    def _build(self) -> None:
        state = self._pop()
        if isinstance(into := self._top(object), Module):
            self._put_into(into, [state])
            into.attributes = state
        elif not isinstance(into, dict):  # an OrderedDict's own attributes: not wanted
            raise ValueError("its pickle fills what cannot be filled")

    def _reference(self) -> None:
        found = self._pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise ValueError("an unknown kind of reference")
        name, key, count = found[1], found[2], found[4]
        right = isinstance(name, _Name) and name.dtype and isinstance(key, str)
        if not right or type(count) is not int or (len(found) == 6 and found[5] is not None):
            raise ValueError("an unknown kind of reference")
        self.stack.append(self.storage(key, name.dtype, count))

    def _note(self, key: int) -> None:
        self.memo[key] = self._top(object)

    def _recall(self, key: int) -> None:
        if key not in self.memo:
            raise ValueError("its pickle takes what is not there")
        self.stack.append(self.memo[key])


_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord("("): lambda m: m.stack.append(_MARK),
    ord(")"): lambda m: m._tuple([]),
    ord("t"): lambda m: m._tuple(m._pop_to_mark()),
    0x85: lambda m: m._tuple(m._pops(1)),
    0x86: lambda m: m._tuple(m._pops(2)),
    0x87: lambda m: m._tuple(m._pops(3)),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._append(m._pops(1)),
    ord("e"): lambda m: m._append(m._pop_to_mark()),
    ord("}"): lambda m: m._push({}),
    ord("s"): lambda m: m._set(m._pops(2)),
    ord("u"): lambda m: m._set(m._pop_to_mark()),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m._number("<B")),
    ord("M"): lambda m: m.stack.append(m._number("<H")),
    ord("J"): lambda m: m.stack.append(m._number("<i")),
    ord("G"): lambda m: m.stack.append(m._number(">d")),
    0x8A: _Machine._long,
    ord("X"): _Machine._text,
    ord("q"): lambda m: m._note(m._number("<B")),
    ord("r"): lambda m: m._note(m._number("<I")),
    ord("h"): lambda m: m._recall(m._number("<B")),
    ord("j"): lambda m: m._recall(m._number("<I")),
    ord("c"): _Machine._global,
    0x81: _Machine._call,  # NEWOBJ
    ord("R"): _Machine._call,
    ord("b"): _Machine._build,
    ord("Q"): _Machine._reference,
    0x80: lambda m: m._number("<B"),  # PROTO
}
