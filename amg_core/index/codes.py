"""4-bit codes of the rows of one scale: 64 bytes a row, scanned exhaustively (FAISS fast scan).

Product quantisation (Jégou et al., PAMI 2011) with 16 centroids for every 4 dimensions, after the
rows were centred and rotated so that all groups of 4 have equal variance (the closed-form start of
optimised product quantisation: Ge et al., CVPR 2013, §4.2). On SSCD rows the rotation halves the squared
error of a code, so that fewer rows have to be measured exactly. More than 512 dimensions are first
reduced to the 512 principal ones. This makes the estimates less precise, which the calibration measures,
but does not change the answers.

A cache file holds, all little-endian: magic (8 bytes); SHA-256 of the header (32); the header, JSON
padded with spaces to 4,056 bytes; float32 mean (D), rotation (D, E), centroids (M, 16, 4); the codes in
blocks of 32 rows in the layout of `faiss.IndexPQFastScan`. "sha256" in the header is the hash of the
SHA-256s of the tables and of the codes of every PIECE rows, so that pieces are checked in parallel.
"layout" is the hash of a fixed pattern, encoded by this FAISS. A FAISS with another layout of codes has
another hash and does not read them. A file that is damaged or of other rows is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeGuard

import numpy as np
import torch

from ..files import open_regular
from .exact import Stored

VERSION = 1
MAGIC = b"AMGPQ4\r\n"
HEADER = 4096
SUB, CENTROIDS, BLOCK = 4, 16, 32  # dimensions of a code, centroids of 4 bits, rows of a block
MOST_DIMS = 512
MOST_EIGEN = 2048  # side of the largest eigenproblem: 2 s
PIECE = 65_536  # rows rotated, encoded, written and hashed at once; a multiple of BLOCK
TRAIN = 65_536  # rows from which the rotation is computed
SEED = 0x414D47
MOST_THREADS = 8  # these already use the whole memory bandwidth of a desktop
STALE = 86_400  # seconds after which a temporary file counts as left by a crash
TINY = 1e-12
LARGEST = 1e8  # largest value in the tables: rows are float16, so their sums are far smaller
log = logging.getLogger(__name__)

# Calibration: queries made of rows, and the ranks at which the stopping rule is tested.
SCAN = 8192  # number of best codes that a first scan returns
FIRST = 512  # rows measured exactly before the stopping rule is tested
LEAST = 128  # smallest number of errors for an estimate of their deviation
REHEARSALS = 64
BLENDS = (0.34, 0.72, 1.22, 1.90)  # x + t·(y - z): cosine 0.9, 0.7, 0.5, 0.35 with x if unrelated
RARE, RARE_Z = 0.9999, 3.719  # a probability, and its quantile in the normal distribution


Faiss = Any  # an index of faiss, which has no types


class Wanted(TypedDict):
    """The contents that a cache file must have to be used."""

    version: int
    rows: str | None  # hash of the rows; None: they have none, and are not cached
    count: int
    dim: int
    metric: str


class Header(Wanted):
    """The header of a cache file."""

    width: int  # E
    block_bytes: int  # of BLOCK rows
    layout: str
    sha256: str
    tail: float
    floor: float


@dataclass(frozen=True)
class Tables:
    """The tables of the codes: mean (D,), rotation (D, E), centroids (M, 16, 4), all float32. E = 4 M."""

    mean: np.ndarray
    turn: np.ndarray
    centroids: np.ndarray
    cosine: bool

    def empty(self) -> Faiss:
        """A FAISS index for these tables, without rows."""
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self.cosine else faiss.METRIC_L2
        index = faiss.IndexPQFastScan(self.turn.shape[1], len(self.centroids), 4, metric)
        faiss.copy_array_to_vector(self.centroids.ravel(), index.pq.centroids)
        index.is_trained = True
        return index

    def turned(self, rows: np.ndarray) -> np.ndarray:
        """Centre and rotate stored rows for encoding: (n, D) -> (n, E) float32."""
        return _times(_whole(rows, self.cosine) - self.mean, self.turn)

    def asked(self, query: np.ndarray) -> tuple[np.ndarray, np.float32]:
        """Rotate a query (D,) for searching: (1, E) float32, and the term to add to its scores."""
        if self.cosine:
            return (query @ self.turn)[None], query @ self.mean
        return ((query - self.mean) @ self.turn)[None], np.float32(0)

    def to_bytes(self) -> bytes:
        parts = (self.mean, self.turn, self.centroids)
        return b"".join(part.astype("<f4").tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes, dim: int, width: int, cosine: bool) -> Tables:
        values = np.frombuffer(data, "<f4").astype(np.float32)
        mean, turn, centroids = np.split(values, [dim, dim + dim * width])
        return cls(mean, turn.reshape(dim, width), centroids.reshape(-1, CENTROIDS, SUB), cosine)

    def layout(self) -> str:
        """Hash of a fixed pattern, as this FAISS encodes it."""
        index, groups = self.empty(), np.arange(len(self.centroids))
        picked = [(row + groups) % CENTROIDS for row in range(BLOCK)]
        index.add(np.stack([self.centroids[groups, one].ravel() for one in picked]))
        return hashlib.sha256(_codes_of(index).tobytes()).hexdigest()


@dataclass(frozen=True)
class Scanned:
    """The best codes of one query: all rows whose estimate is above `rest`, and no others.

    Attributes
    ----------
    scores : (n,) float32, descending
        Estimates of the cosine, or of minus the distance.
    ids : (n,) int64
        Ascending among equal scores.
    rest : float
        No other row has a higher estimate. -inf if all rows are included.
    """

    scores: np.ndarray
    ids: np.ndarray
    rest: float


class Codes:
    """Codes in memory, in one part for each thread that searches.

    Attributes
    ----------
    tail : float
        At least 1. The ratio between the errors of estimates and those of a normal distribution at the
        one-in-10,000 quantile.
    floor : float
        Lower limit for the deviation of errors.
    """

    def __init__(self, tables: Tables, parts: Sequence[tuple[int, Faiss]], count: int) -> None:
        self.tables, self.count, self._parts = tables, count, list(parts)
        self.tail, self.floor = 1.0, TINY
        self._threads = ThreadPoolExecutor(len(self._parts), "pq4", initializer=_one_thread)

    def scan(self, queries: np.ndarray, amount: int) -> list[Scanned]:
        """About the `amount` best codes for each query, (B, D) float32.

        Rows that tie with the last are left out, so the result depends on the query only.
        """
        asked = [self.tables.asked(query) for query in queries]
        turned = np.concatenate([vector for vector, _ in asked])

        def one(part: tuple[int, Faiss]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            start, index = part
            scores, ids = index.search(turned, min(amount, index.ntotal))
            scores = np.where(ids < 0, -np.inf, self._score(scores))
            whole = (amount >= index.ntotal) & (ids >= 0).all(1)
            return scores, ids + start, np.where(whole, -np.inf, _last(scores))

        found = list(self._threads.map(one, self._parts))
        result = []
        for b, (_, added) in enumerate(asked):
            scores = np.concatenate([part[0][b] for part in found]) + added
            ids = np.concatenate([part[1][b] for part in found])
            rest = max(part[2][b] for part in found) + added
            above = scores > rest
            result.append(Scanned(*_ordered(scores[above], ids[above]), float(rest)))
        return result

    def _score(self, estimates: np.ndarray) -> np.ndarray:
        return estimates if self.tables.cosine else -np.sqrt(np.maximum(estimates, 0))


def open_codes(
    cache: Path | None, key: str | None, scale: int, rows: Stored, cosine: bool
) -> Codes:
    """Codes of `rows` (N, D), N >= 1. They are read from the cache if it is valid, or else made.

    Nothing is cached if `cache` or `key` is None, or if the folder cannot be written.
    """
    path = cache / f"pq4-{scale}.bin" if cache is not None and key else None
    wanted: Wanted = {
        "version": VERSION, "rows": key, "count": rows.shape[0], "dim": rows.shape[1],
        "metric": "cosine" if cosine else "nl2",
    }  # fmt: skip
    if path is not None:
        codes = read(path, wanted)
        if codes is not None:
            return codes
        with suppress(OSError):
            _sweep(path.parent)
            return _make(path, wanted, rows)
    with tempfile.TemporaryDirectory() as folder:
        return _make(Path(folder) / "codes", wanted, rows)


def _make(path: Path, wanted: Wanted, rows: Stored) -> Codes:
    """Build the codes, calibrate them, and write them to `path`."""
    log.info("Making search codes of %d pictures, once: %s", rows.shape[0], path.parent)
    handle, name = tempfile.mkstemp(".tmp", "pq4-", path.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            header = _write(file, wanted, rows)
        codes = read(temporary, wanted)
        if codes is None:
            raise OSError(f"{temporary} differs from what was written")
        codes.tail, codes.floor = calibrate(codes, rows)
        with open(temporary, "r+b") as file:
            file.write(_header({**header, "tail": codes.tail, "floor": codes.floor}))
        with suppress(OSError):  # on Windows, while another process reads the old one
            os.replace(temporary, path)
        return codes
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, wanted: Wanted, rows: Stored) -> Header:
    """Train, encode in pieces, and write everything except the calibration. Returns the header."""
    cosine = wanted["metric"] == "cosine"
    tables = train(sample(rows, TRAIN), cosine)
    file.write(bytes(HEADER))
    data = tables.to_bytes()
    file.write(data)
    digests = [hashlib.sha256(data).digest()]
    index = tables.empty()
    for start in range(0, rows.shape[0], PIECE):
        index.reset()
        index.add(tables.turned(rows[start : start + PIECE]))
        piece = _codes_of(index).data
        file.write(piece)
        digests.append(hashlib.sha256(piece).digest())
    header: Header = {
        **wanted,
        "width": tables.turn.shape[1],
        "block_bytes": index.get_block_stride(),
        "layout": tables.layout(),
        "sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "tail": 1.0,
        "floor": TINY,
    }
    file.seek(0)
    file.write(_header(header))
    return header


def read(path: Path, wanted: Wanted) -> Codes | None:
    """Codes from a cache file, or None if it is missing, damaged or of other rows than `wanted`."""
    try:
        return _read(path, wanted)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _sound(header: Any, wanted: Wanted) -> TypeGuard[Header]:
    """Whether it is a header for the rows `wanted`, with valid numbers."""
    if not isinstance(header, dict) or any(header.get(k) != v for k, v in wanted.items()):
        return False
    width, stride = header["width"], header["block_bytes"]
    sizes = all(type(n) is int and 0 < n < 1 << 31 for n in (width, stride))
    if not sizes or width % SUB or width > -(-min(wanted["dim"], MOST_DIMS) // SUB) * SUB:
        return False
    tail, floor = header["tail"], header["floor"]
    return all(type(n) is float for n in (tail, floor)) and tail >= 1 and floor > 0


def _read(path: Path, wanted: Wanted) -> Codes | None:
    with open_regular(path) as file:
        head = file.read(HEADER)
        if len(head) != HEADER or head[:8] != MAGIC:
            return None
        if hashlib.sha256(head[40:]).digest() != head[8:40]:
            return None
        header = json.loads(head[40:])
        if not _sound(header, wanted):
            return None
        count, dim = header["count"], header["dim"]
        width, stride = header["width"], header["block_bytes"]
        size = 4 * (dim + dim * width + CENTROIDS * width)
        blocks = -(-count // BLOCK)
        if os.fstat(file.fileno()).st_size != HEADER + size + blocks * stride:
            return None
        data = file.read(size)
    if not (np.abs(np.frombuffer(data, "<f4")) < LARGEST).all():
        return None
    tables = Tables.from_bytes(data, dim, width, wanted["metric"] == "cosine")
    if tables.layout() != header["layout"] or tables.empty().get_block_stride() != stride:
        return None
    pieces = -(-count // PIECE)
    threads = max(1, min(torch.get_num_threads(), MOST_THREADS, pieces // 4))
    bounds = [pieces * i // threads for i in range(threads + 1)]

    def part(first: int, last: int) -> tuple[tuple[int, Faiss], list[bytes]]:
        index, digests = tables.empty(), []
        start, stop = first * PIECE, min(last * PIECE, count)
        with open(path, "rb") as file:
            file.seek(HEADER + size + start // BLOCK * stride)
            _resize(index, stop - start, stride)
            codes = _codes_of(index).data
            step = PIECE // BLOCK * stride
            for begin in range(0, len(codes), step):
                piece = codes[begin : begin + step]
                if file.readinto(piece) != len(piece):
                    raise OSError(f"{path} ended early")
                digests.append(hashlib.sha256(piece).digest())
        return (start, index), digests

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(part, bounds[:-1], bounds[1:]))
    digests = [hashlib.sha256(data).digest(), *(d for _, some in parts for d in some)]
    if hashlib.sha256(b"".join(digests)).hexdigest() != header["sha256"]:
        return None
    codes = Codes(tables, [one for one, _ in parts], count)
    codes.tail, codes.floor = float(header["tail"]), float(header["floor"])
    return codes


def train(rows: np.ndarray, cosine: bool) -> Tables:
    """Compute mean, rotation and centroids from sample rows (n, D), n >= 1. Deterministic."""
    rows = _whole(rows, cosine)
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    centred = rows - mean
    variances, axes = _principal(centred, min(rows.shape[1], MOST_DIMS))
    groups = -(-len(variances) // SUB)
    turn = np.zeros((rows.shape[1], groups * SUB), np.float32)
    for group, members in enumerate(balanced(variances, groups)):
        turn[:, group * SUB : group * SUB + len(members)] = axes[:, members]
    blank = np.zeros((groups, CENTROIDS, SUB), np.float32)
    index = Tables(mean, turn, blank, cosine).empty()
    index.pq.cp.min_points_per_centroid = 1
    turned = _times(centred, turn)
    index.pq.train(np.resize(turned, (max(len(turned), CENTROIDS), turned.shape[1])))
    import faiss

    centroids = faiss.vector_to_array(index.pq.centroids).reshape(blank.shape)
    return Tables(mean, turn, centroids.copy(), cosine)


def balanced(variances: np.ndarray, groups: int) -> list[list[int]]:
    """Distribute axes of descending variances to groups of at most SUB with about equal products."""
    logs = np.log(np.maximum(variances / max(variances[0], TINY), 1e-6) / 1e-6)
    dealt: list[list[int]] = [[] for _ in range(groups)]
    total = np.zeros(groups)
    for axis, value in enumerate(logs):
        group = int(total.argmin())
        dealt[group].append(axis)
        total[group] += value
        if len(dealt[group]) == SUB:
            total[group] = np.inf
    return dealt


def _principal(centred: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Descending variances (E,) and principal axes (D, E) of centred rows (n, D), E <= most.

    For very long rows only a few rows are used, so that an eigenproblem of their number is cheap.
    """
    count, dim = centred.shape
    if dim <= MOST_EIGEN:
        values, axes = np.linalg.eigh(_times(centred.T.copy(), centred).astype(np.float64))
        return values[::-1][:most].clip(0), axes[:, ::-1][:, :most].astype(np.float32)
    some = centred[:: -(-count // MOST_EIGEN)]
    values, mixes = np.linalg.eigh(_times(some, some.T.copy()).astype(np.float64))
    values, mixes = values[::-1][:most].clip(0), mixes[:, ::-1][:, :most]
    axes = _times(some.T.copy(), mixes.astype(np.float32))
    return values, axes / np.maximum(np.linalg.norm(axes, axis=0), TINY)


def calibrate(codes: Codes, rows: Stored) -> tuple[float, float]:
    """Measure `Codes.tail` and `Codes.floor`: the errors of estimates beyond the rows measured exactly.

    Queries made of rows are searched. After FIRST, 2 FIRST, … rows, `spread` predicts the errors of as
    many further rows, and they are compared with the true errors. This tests the stopping rule of `pq4`.
    `floor` is the median deviation, or inf if nothing could be tested.
    """
    count = rows.shape[0]
    rng = np.random.default_rng(SEED)
    picked = rng.integers(0, count, 3 * REHEARSALS)
    x, y, z = np.split(_whole(rows[picked], codes.tables.cosine), 3)
    queries = x + np.resize(BLENDS, REHEARSALS)[:, None].astype(np.float32) * (y - z)
    if codes.tables.cosine:
        queries /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), TINY)
    deviations, surprises = [], []
    for query in queries:
        (found,) = codes.scan(query[None], SCAN)
        near = _whole(rows[found.ids], codes.tables.cosine)
        true = near @ query if codes.tables.cosine else -np.linalg.norm(near - query, axis=1)
        errors = true - found.scores
        looked = FIRST
        while looked < len(errors):
            mean, deviation = spread(errors[:looked])
            if 0 < deviation < np.inf:
                deviations.append(deviation)
                surprises.append((errors[looked : 2 * looked] - mean) / deviation)
            looked *= 2
    if not deviations:
        return 1.0, np.inf
    tail = float(np.quantile(np.concatenate(surprises), RARE)) / RARE_Z
    return max(1.0, tail), float(np.median(deviations))


def spread(errors: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the errors (n,) of measured rows, ordered by descending estimate.

    Only the last half is used, which is most like the rows that follow. Equal errors count once,
    because a thousand copies of a picture are no more evidence than one. The deviation is an upper
    confidence limit (about 3 of its own standard errors), or inf if there are too few errors.
    """
    rounded = np.round(errors / max(np.abs(errors).max(), TINY), 5)
    distinct = errors[np.sort(np.unique(rounded, return_index=True)[1])]
    window = distinct[len(distinct) // 2 :]
    if len(window) < LEAST:
        return 0.0, np.inf
    return float(window.mean()), float(window.std()) * (1 + 3 / np.sqrt(2 * len(window)))


def sample(rows: Stored, most: int) -> np.ndarray:
    """At most `most` rows, uniformly random, with a fixed seed."""
    count = rows.shape[0]
    if count <= most:
        return np.asarray(rows[0:count])
    ids = np.random.default_rng(SEED).choice(count, most, replace=False)
    return np.asarray(rows[np.sort(ids)])


def _whole(rows: np.ndarray, cosine: bool) -> np.ndarray:
    """Stored rows (n, D) in float32, scaled to norm 1 for `cosine` (zero stays zero)."""
    rows = np.asarray(rows).astype(np.float32)
    if cosine:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
    return rows


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product by torch, with the host's number of threads."""
    product: np.ndarray = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return product


def _resize(index: Faiss, rows: int, stride: int) -> None:
    blocks = -(-rows // BLOCK)
    index.codes.resize(blocks * stride)
    index.ntotal, index.ntotal2 = rows, blocks * BLOCK


def _codes_of(index: Faiss) -> np.ndarray:
    """A (bytes,) uint8 view of the codes in a FAISS index. Valid until the index is changed."""
    import faiss

    size = -(-index.ntotal // BLOCK) * index.get_block_stride()
    codes: np.ndarray = faiss.rev_swig_ptr(index.codes.get(), size)
    return codes


def _header(header: Header) -> bytes:
    text = json.dumps(header).encode().ljust(HEADER - 40)
    return MAGIC + hashlib.sha256(text).digest() + text


def _sweep(folder: Path) -> None:
    """Remove temporary files of crashed builds, recognised by the names that `tempfile` makes."""
    for left in folder.glob(f"pq4-{'?' * 8}.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _ordered(scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by descending score (n,) float32, then by ascending id (n,) < 2³², in one integer sort."""
    bits = scores.view(np.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the same order as the float
    keys = np.sort((~rank).astype(np.int64) << 32 | ids)
    rank = ~(keys >> 32).astype(np.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(np.float32), keys & 0xFFFFFFFF


def _last(scores: np.ndarray) -> np.ndarray:
    """The lowest finite score of each query, (B, n) -> (B,), or inf if there is none.

    FAISS does not return rows that have the smallest estimate it can express. Here they have -inf.
    """
    finite: np.ndarray = np.where(np.isfinite(scores), scores, np.inf).min(1)
    return finite


def _one_thread() -> None:
    """Use one OpenMP thread in the calling thread. The setting is per thread, so the host's stays."""
    import faiss

    faiss.omp_set_num_threads(1)
