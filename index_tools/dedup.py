"""Finds duplicates in an index, and chooses which to keep. No file is ever deleted.

As in Somepalli et al., *Understanding and Mitigating Copying in Diffusion Models* (NeurIPS 2023), pairs
above a similarity are joined to clusters. It is the similarity of the index's descriptor (docs/dedup.md).
The tool also measures how alike the captions of a cluster are, and how complex the pictures are, because
simple pictures that occur several times are memorised first.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from amg_core import sheet
from amg_core.descriptors.registry import kinds
from amg_core.errors import AMGError
from amg_core.optional import needed
from amg_core.similarity.metrics import GAIN, OFFSET

from . import captions, terminal
from .terminal import Progress

if TYPE_CHECKING:
    from amg_core.descriptors import DescriptorSpec
    from amg_core.index import Alias, Index
    from amg_core.index.shard import Rows

BLOCK = 2048  # rows compared with as many others at once
FLAT = 1.0  # lower limit for the contrast ‖x − mean‖ of a picture
JPEG_QUALITY = 90  # as in the authors' code
DROP, KEEP = "drop", "keep"

# ------------------------------------------------------------------------------- pairs


def default_threshold(spec: DescriptorSpec) -> float:
    """The similarity above which two pictures are duplicates. AMGError if it was not measured."""
    known = {kind.name: kind.duplicates for kind in kinds() if kind.duplicates is not None}
    if spec.kind not in known:
        *others, last = known
        raise AMGError(
            f"The descriptor {spec.id} has no default threshold for duplicates: give --threshold, "
            f"or use an index of {', '.join(others)} or {last}."
        )
    return known[spec.kind]


def pairs(
    rows: Rows,
    metric: str,
    scale: int,
    threshold: float,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find all pairs of rows more similar than `threshold`, in blocks.

    Every row is compared with every other. The work is O(N²·D), and the memory does not grow with N.
    Values for "nl2" are accurate to about 0.002 (float32, the difference of large squares).

    Parameters
    ----------
    rows : (N, D) float16, sliceable (`Index.rows`)
    metric : "cosine" (similarity = cosine) or "nl2" (see `mirrored_too`)
    scale : side of the rows; for "nl2" they are D / scale² channels

    Yields
    ------
    (a, b, similarity) : ids with a < b, int64, and float32, of one block each.
    """
    count = rows.shape[0]
    compare = COMPARE[metric]
    total = -(-count // BLOCK)
    blocks, done = total * (total + 1) // 2, 0
    with torch.inference_mode():
        for i in range(0, count, BLOCK):
            first = _prepared(rows[i : i + BLOCK], metric, scale, device)
            for j in range(i, count, BLOCK):
                second = first if j == i else _prepared(rows[j : j + BLOCK], metric, scale, device)
                similarity = compare(first, second)
                at = (similarity > threshold).nonzero(as_tuple=True)
                values = similarity[at].cpu().numpy()
                a, b = at[0].cpu().numpy() + i, at[1].cpu().numpy() + j
                once = a < b  # in a block on the diagonal each pair is found twice
                done += 1
                if progress:
                    progress(done, blocks, "")
                if once.any():
                    yield a[once], b[once], values[once]


def _prepared(rows: np.ndarray, metric: str, scale: int, device: torch.device | str) -> Tensor:
    """Rows of norm 1, (M, D), or for nl2 (M, C, P): C channels of P = scale² values."""
    block = torch.from_numpy(np.asarray(rows, np.float32)).to(device)
    if metric == "cosine":
        return nn.functional.normalize(block)
    return block.reshape(len(block), -1, scale * scale)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def likeness_of_pictures(a: Tensor, b: Tensor) -> Tensor:
    """How much structure small pictures have in common: (A, C, P), (B, C, P) -> (A, B).

    1 − ‖m(a) − b‖ / ‖b − b̄‖, the smaller value of both directions. m applies the best gain (½ to 2) and
    offset (±0.25) to each channel, as `metrics.matched`, and b̄ are the means of the channels. 1 is the
    same picture apart from contrast, brightness and tint, and 0 is nothing in common. Unlike nL2 (Eq. 8)
    it does not depend on the other pictures: with fifty duplicates the denominator of Eq. 8 would vanish.
    """
    a_mean, b_mean = a.mean(2), b.mean(2)
    a_part, b_part = a - a_mean[..., None], b - b_mean[..., None]
    a_power, b_power = a_part.square().sum(2), b_part.square().sum(2)
    there = torch.zeros(len(a), len(b), device=a.device)
    back = torch.zeros_like(there)
    for c in range(a.shape[1]):
        product = a_part[:, c] @ b_part[:, c].T
        shift = (a_mean[:, None, c] - b_mean[None, :, c]).abs()
        level = a.shape[2] * (shift - OFFSET).clamp_min(0).square()
        there += _left_over(product, a_power[:, None, c], b_power[None, :, c]) + level
        back += _left_over(product, b_power[None, :, c], a_power[:, None, c]) + level
    a_size = a_power.sum(1).clamp_min(FLAT**2)
    b_size = b_power.sum(1).clamp_min(FLAT**2)
    worse = torch.maximum(there / b_size[None, :], back / a_size[:, None])
    return 1 - worse.clamp_min(0).sqrt()


def mirrored_too(a: Tensor, b: Tensor) -> Tensor:
    """`likeness_of_pictures` of a to b or to b's mirror image, whichever is larger. Square pictures."""
    side = math.isqrt(b.shape[2])
    mirrored = b.reshape(*b.shape[:2], side, side).flip(-1).flatten(2)
    return torch.maximum(likeness_of_pictures(a, b), likeness_of_pictures(a, mirrored))


# A network such as SSCD recognises mirrored pictures itself.
COMPARE = {"cosine": _cosine, "nl2": mirrored_too}


def _left_over(product: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """min over the gain g of ‖g·x − y‖² from x·y, ‖x‖², ‖y‖²."""
    gain = (product / own.clamp_min(1e-6)).clamp(*GAIN)
    return gain.square() * own - 2 * gain * product + other


# ---------------------------------------------------------------------------- clusters


class Components:
    """Connected components of 0 .. n−1 from arrays of pairs. `root` is the smallest id of each.

    AMGError if SciPy is missing.
    """

    def __init__(self, n: int) -> None:
        step = "pip install scipy"
        self._graphs = needed("scipy.sparse.csgraph", "Finding duplicates", step)
        self._matrices = needed("scipy.sparse", "Finding duplicates", step)
        self.root = np.arange(n)
        self.weakest = np.full(n, np.inf, np.float32)
        self.strongest = np.full(n, -np.inf, np.float32)

    def join(self, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        """Join a[i] with b[i], and record the weakest and the strongest link of each id."""
        for ends in (a, b):
            np.minimum.at(self.weakest, ends, similarity)
            np.maximum.at(self.strongest, ends, similarity)
        n = len(self.root)
        links = np.concatenate([a, np.arange(n)]), np.concatenate([b, self.root])
        matrix = self._matrices.coo_matrix((np.ones(len(links[0]), bool), links), (n, n))
        _, label = self._graphs.connected_components(matrix, directed=False)
        _, least = np.unique(label, return_index=True)
        self.root = least[label]

    def groups(self) -> list[np.ndarray]:
        """Ascending ids of each component of two or more, ordered by their smallest ids."""
        order = np.argsort(self.root, kind="stable")
        starts = np.flatnonzero(np.diff(self.root[order])) + 1
        return [part for part in np.split(order, starts) if len(part) > 1]


@dataclass(frozen=True)
class Member:
    """One file of a cluster.

    Attributes
    ----------
    id : int
        Row of the index.
    alias : bool
        Whether it is a further file with the same bytes.
    width, height : int
        Pixels of the original.
    kept_id, likeness
        Row of the picture that is kept instead of this one, and its similarity to that.
    entropy : float
        Of the grey levels, in bits.
    jpeg : float
        Bytes for each pixel, as a JPEG of quality 90.
    measured : str
        Whether entropy and jpeg are those of the "file" or the "thumbnail" ("" = not measured).
    index : str
        The name of its index, if there are several, or "".
    """

    id: int
    source: str
    caption: str
    sha256: str
    width: int
    height: int
    alias: bool = False
    muted: bool = False
    keep: bool = False
    kept_id: int = -1
    likeness: float = 1.0
    entropy: float | None = None
    jpeg: float | None = None
    measured: str = ""
    index: str = ""


@dataclass(frozen=True)
class Cluster:
    """Files of one picture. `weakest` and `strongest` are the similarities of the links that join them (1
    if all are byte-identical). For `captions` see `captions.Likeness`."""

    members: tuple[Member, ...]
    weakest: float
    strongest: float
    captions: captions.Likeness

    @property
    def kept(self) -> list[Member]:
        return [member for member in self.members if member.keep]

    @property
    def dropped(self) -> list[Member]:
        return [member for member in self.members if not member.keep]


def clusters(
    index: Index,
    threshold: float | None = None,
    *,
    scale: int | None = None,
    one_each: bool = False,
    encode: captions.Encoder | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Cluster]:
    """Clusters of duplicates in an open index, largest first.

    They are the connected components of the pairs above `threshold`, with excluded (muted) rows, and with
    further files of the same bytes. `choose` decides which to keep.

    Parameters
    ----------
    threshold : similarity, default `Kind.duplicates` of the descriptor
    scale : one of the index's, default full detail
    one_each : keep exactly one picture of each cluster
    encode : text encoder for the captions, see `captions.text_encoder`
    """
    scale = terminal.scale(index, scale)
    threshold = default_threshold(index.spec) if threshold is None else threshold
    components = Components(index.count)
    found = pairs(
        index.rows(scale), index.spec.metric, scale, threshold, device=device, progress=progress
    )
    for a, b, similarity in found:
        components.join(a, b, similarity)
    further: dict[int, list[Alias]] = {}
    start = 0
    for member in index.members:  # separately, because one file may be a row in several indexes
        for alias in member.aliases():
            further.setdefault(start + alias.id, []).append(alias)
        start += member.count
    groups = components.groups()
    grouped = {int(i) for group in groups for i in group}
    groups += [np.array([i]) for i in sorted(further) if i not in grouped]
    made, compare, owner = [], _comparer(index, scale), _owners(index)
    for group in groups:
        members = [
            replace(one, index=owner(i))
            for i in group.tolist()
            for one in _files(index, i, further.get(i, ()))
        ]
        linked = len(group) > 1
        made.append(
            Cluster(
                tuple(choose(members, compare, -np.inf if one_each else threshold)),
                float(components.weakest[group].min()) if linked else 1.0,
                float(components.strongest[group].max()) if linked else 1.0,
                captions.likeness([member.caption for member in members], encode),
            )
        )
    return sorted(made, key=lambda one: (-len(one.members), one.members[0].id))


def _files(index: Index, i: int, aliases: Sequence[Alias]) -> list[Member]:
    """Row i and its aliases."""
    record, muted = index.record(i), i in index.muted
    row = Member(
        i, record.source, record.caption, record.sha256, record.width, record.height, muted=muted
    )
    return [row] + [
        replace(row, source=alias.source, caption=alias.caption, alias=True) for alias in aliases
    ]


def _owners(index: Index) -> Callable[[int], str]:
    """A function from an id to the unique name of its index, or to "" if there is only one index."""
    if len(index.members) == 1:
        return lambda i: ""
    names: list[str] = []
    for member in index.members:
        same = names.count(member.name)
        names.append(f"{member.name}-{same + 1}" if same else member.name)
    ends = np.cumsum([member.count for member in index.members])
    return lambda i: names[int(np.searchsorted(ends, i, "right"))]


def preference(member: Member) -> tuple[int, int, int, bool, str]:
    """The sort order for which member to keep: first the largest area, then the longest caption, the
    smallest id, the row's own file before byte-identical ones, and the first name."""
    area = member.width * member.height
    return -area, -len(member.caption), member.id, member.alias, member.source


def choose(
    members: Sequence[Member], compare: Callable[[int, list[int]], list[float]], threshold: float
) -> list[Member]:
    """Mark the members to keep, and give each other one its similarity to the one kept instead.

    In the order of `preference`, a picture is kept unless its similarity to one that is already kept is
    above `threshold`. So every dropped picture is itself a duplicate of a kept one: of a chain a–b–c whose
    ends differ, both ends are kept. A threshold of −inf keeps exactly one.

    `compare` maps (id, ids) to the similarities of that row to each of the others.
    """
    ordered = sorted(members, key=preference)
    left = list(dict.fromkeys(member.id for member in ordered))
    keeper: dict[int, tuple[int, float]] = {}
    while left:
        kept, *others = left
        keeper[kept] = (kept, 1.0)
        values = compare(kept, others) if others else []
        left = []
        for other, value in zip(others, values, strict=True):
            if value > threshold:
                keeper[other] = (kept, value)
            else:
                left.append(other)
    first = {member.id: member for member in reversed(ordered)}  # the best file of each row
    return [
        replace(
            member,
            keep=keeper[member.id][0] == member.id and first[member.id] is member,
            kept_id=keeper[member.id][0],
            likeness=keeper[member.id][1],
        )
        for member in members
    ]


def _comparer(index: Index, scale: int) -> Callable[[int, list[int]], list[float]]:
    """`compare` of `choose` for the rows of an index."""
    rows, metric = index.rows(scale), index.spec.metric
    similarity = COMPARE[metric]

    def compare(one: int, others: list[int]) -> list[float]:
        own = _prepared(rows[np.array([one])], metric, scale, "cpu")
        values: list[float] = []
        for start in range(0, len(others), BLOCK):
            part = np.array(others[start : start + BLOCK])
            values += similarity(own, _prepared(rows[part], metric, scale, "cpu"))[0].tolist()
        return values

    return compare


# -------------------------------------------------------------------------- complexity


def entropy(picture: Image.Image) -> float:
    """Shannon entropy of the grey levels (256 bins, Rec. 709 weights), in bits: 0 to 8."""
    grey = np.asarray(picture.convert("RGB"), np.float64) @ (0.2125, 0.7154, 0.0721)
    counts = np.bincount(grey.round().astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def jpeg_bytes(picture: Image.Image) -> float:
    """Bytes for each pixel of the picture, as a JPEG of quality 90."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
    return file.tell() / (picture.width * picture.height)


def measure(found: Sequence[Cluster], index: Index, pictures: Path | None = None) -> list[Cluster]:
    """The clusters with the complexity of each member.

    It is measured on the original if `pictures` (a folder, or any other source) has one of that name, or
    else on the thumbnail. `Member.measured` says which. Thumbnails have less detail, so figures of
    thumbnails and of files cannot be compared with each other.
    """
    wanted = {member.source for one in found for member in one.members}
    originals = _originals(pictures, wanted) if pictures else {}

    def measured(member: Member) -> Member:
        if member.source in originals:
            bits, size = originals[member.source]
            return replace(member, entropy=bits, jpeg=size, measured="file")
        try:
            small = index.thumbnail(member.id)
        except AMGError:  # an index of imported embeddings has no pictures
            return member
        return replace(member, entropy=entropy(small), jpeg=jpeg_bytes(small), measured="thumbnail")

    return [replace(one, members=tuple(map(measured, one.members))) for one in found]


def _originals(place: Path, wanted: set[str]) -> dict[str, tuple[float, float]]:
    from amg_core.index.picture import Unreadable, decode
    from amg_core.index.sources import open_source

    found = {}
    for item in open_source(place):
        if item.source not in wanted:
            continue
        try:
            picture = Image.fromarray(decode(item.read(), item.source).pixels)
        except Unreadable:
            continue
        found[item.source] = (entropy(picture), jpeg_bytes(picture))
    return found


# ----------------------------------------------------------------------------- reports


@dataclass(frozen=True)
class Summary:
    """The figures of all clusters together, JSON-serialisable. Means are None if not measured.

    `jaccard`, `text` and `text_x_jaccard` are means over clusters of the medians over their pairs.
    `captions` has the number of clusters with captions of each kind, see `captions.Likeness`.
    """

    clusters: int
    pictures: int
    keep: int
    drop: int
    least_likeness: float | None
    byte_identical: int
    captions: dict[str, int]
    jaccard: float | None
    text: float | None
    text_x_jaccard: float | None
    entropy: float | None
    jpeg: float | None


def summary(found: Sequence[Cluster]) -> Summary:
    members = [member for one in found for member in one.members]
    kinds = Counter(one.captions.words for one in found)
    return Summary(
        clusters=len(found),
        pictures=len(members),
        keep=sum(member.keep for member in members),
        drop=sum(not member.keep for member in members),
        least_likeness=min((member.likeness for member in members), default=None),
        byte_identical=sum(member.alias for member in members),
        captions={k: kinds[k] for k in ("identical", "alike", "different", "missing")},
        jaccard=_mean(one.captions.jaccard for one in found),
        text=_mean(one.captions.text for one in found),
        text_x_jaccard=_mean(one.captions.product for one in found),
        entropy=_mean(member.entropy for member in members),
        jpeg=_mean(member.jpeg for member in members),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def report(found: Sequence[Cluster], name: str, threshold: float, *, limit: int = 20) -> str:
    """The report as text: the counts, the clusters, and the next step."""
    if not found:
        return f"{name}: no two pictures are more alike than {threshold:g}. Nothing to drop."
    every = summary(found)
    kinds = every.captions
    lines = [
        f"{name}: {every.pictures} pictures in {len(found)} clusters of duplicates "
        f"(similarity above {threshold:g}).",
        f"Keep {every.keep}, drop {every.drop}"
        + (f"; {every.byte_identical} of these files are byte-identical to another."
           if every.byte_identical else "."),
        "Captions within a cluster: "
        + ", ".join(f"{kinds[kind]} {kind}" for kind in kinds if kinds[kind])
        + ". Pictures that occur several times with one caption are memorised most.",
    ]  # fmt: skip
    if every.jaccard is not None:
        lines.append(
            f"Unigram overlap of captions: {every.jaccard:.2f} (Jaccard, mean of the clusters)."
        )
        if every.text is None:
            lines.append(
                "Text similarity, the other factor of the paper's measure, was not measured: "
                "no text encoder was given (--text-encoder FOLDER)."
            )
        else:
            lines.append(
                f"Text similarity {every.text:.2f}, text × overlap {every.text_x_jaccard:.2f}."
            )
    if every.least_likeness is not None and every.least_likeness <= threshold:
        far = sum(member.likeness <= threshold for one in found for member in one.dropped)
        lines.append(
            f"{far} of those to drop are like the one kept only through others (their figure "
            f"is {threshold:g} or less): look at these before you drop them."
        )
    elif every.keep > len(found):
        lines.append(
            "Every picture to drop is a duplicate of one that is kept, not only of a chain."
        )
    for number, one in enumerate(found[:limit], 1):
        lines.append("")
        lines.append(f"{number}. {title(one)}")
        ordered = sorted(one.members, key=lambda member: (member.kept_id, not member.keep))
        lines += [f"   {_line(member)}" for member in ordered[:limit]]
        if len(one.members) > limit:
            lines.append(f"   … and {len(one.members) - limit} more")
    if len(found) > limit:
        lines += ["", f"… and {len(found) - limit} more clusters (--out DIR writes all)"]
    return "\n".join(lines)


def title(one: Cluster) -> str:
    """One line about a cluster."""
    links = f"{one.weakest:.2f}" if one.weakest > 0.995 else f"{one.weakest:.2f} or more"
    text = f"{len(one.members)} pictures, similarity {links}, captions {one.captions.words}"
    if one.captions.jaccard is not None and one.captions.words != "identical":
        text += f" ({one.captions.jaccard:.2f})"
    return text


def _line(member: Member) -> str:
    word = "keep" if member.keep else "drop"
    notes = [f"{member.width}x{member.height}"]
    if member.index:
        notes.insert(0, f"in {member.index}")
    if not (member.keep or member.alias):
        notes.append(f"{member.likeness:.2f}")
    if member.entropy is not None:
        notes.append(f"{member.entropy:.1f} bits, {member.jpeg:.2f} B/px")
    notes += ["same bytes"] * member.alias + ["muted"] * member.muted
    caption = " ".join(member.caption.split())
    return f"{word}  {member.source}  ({', '.join(notes)})" + (f"  {caption}" if caption else "")


def to_json(found: Sequence[Cluster], name: str, threshold: float) -> dict[str, object]:
    return {
        "index": name,
        "threshold": threshold,
        **asdict(summary(found)),
        "jpeg_quality": JPEG_QUALITY,
        "members": [
            {
                "weakest": one.weakest,
                "strongest": one.strongest,
                "captions": asdict(one.captions),
                "pictures": [asdict(member) for member in one.members],
            }
            for one in found
        ],
    }


def write(folder: Path, found: Sequence[Cluster], name: str, threshold: float) -> list[str]:
    """Write drop.txt, keep.txt (one path a line), clusters.json and clusters.csv into a new folder.

    If there are several indexes, each has its own lists, drop.<index>.txt and so on.
    Returns notes, for example on names with a line break, which are left out of the text files.
    """
    captions.new_folder(folder)
    notes = []
    names = sorted({member.index for one in found for member in one.members}) or [""]
    lists: dict[str, list[str]] = {
        _list_name(kind, name): [] for name in names for kind in (DROP, KEEP)
    }
    for one in found:
        for member in one.members:
            if member.source.splitlines() == [member.source]:
                kind = KEEP if member.keep else DROP
                lists[_list_name(kind, member.index)].append(member.source)
            else:
                notes.append(f"{member.source!r} has a line break: it is in clusters.json only")
    try:
        for file_name, sources in lists.items():
            text = "".join(source + "\n" for source in sources)
            (folder / file_name).write_text(text, encoding="utf-8")
        data = json.dumps(to_json(found, name, threshold), indent=1, ensure_ascii=False)
        (folder / "clusters.json").write_text(data, encoding="utf-8")
        rows = ((number, m) for number, one in enumerate(found, 1) for m in one.members)
        terminal.write_csv(folder / "clusters.csv", "cluster", Member, rows)
    except OSError as error:
        raise AMGError(f"Cannot write to {folder} ({error}): choose another folder.") from error
    return notes


def _list_name(kind: str, name: str) -> str:
    """ "drop.txt", "drop.my_index.txt"."""
    return f"{kind}.{name}.txt" if name else f"{kind}.txt"


def draw(
    found: Sequence[Cluster], index: Index, *, most: int = 40, columns: int = 8
) -> Image.Image:
    """A contact sheet of the clusters, largest first: the kept picture in green, the others in red."""
    groups = []
    for number, one in enumerate(found[:most], 1):
        cells = []
        order = sorted(one.members, key=lambda m: (m.kept_id, not m.keep))
        for member in order[: 3 * columns]:
            lines = [member.source.rsplit("/", 1)[-1]]
            if not member.keep:
                lines[0] = f"{member.likeness:.2f}  {lines[0]}"
            if member.caption.strip():
                lines.append(member.caption)
            frame = sheet.GOOD if member.keep else sheet.BAD
            cells.append(sheet.Tile(index.thumbnail(member.id), lines, frame))
        groups.append(sheet.Group(cells, f"{number}. {title(one)}"))
    total = sum(len(one.members) for one in found)
    heading = f"{total} pictures in {len(found)} clusters"
    if len(found) > most:
        heading += f"; the {most} largest"
    return sheet.draw(groups, heading=heading, columns=columns, side=128)


# ------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", type=Path, nargs="+", help="index folder(s)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="similarity above which two pictures are duplicates (that of the descriptor)",
    )
    parser.add_argument("--scale", type=int, help="compare at this side in pixels (full detail)")
    parser.add_argument(
        "--one-each", action="store_true",
        help="keep exactly one picture of each cluster, even if the ends of a chain differ",
    )  # fmt: skip
    parser.add_argument("--pictures", type=Path, help="folder of the originals, to measure them")
    parser.add_argument("--no-complexity", action="store_true", help="do not measure the pictures")
    parser.add_argument(
        "--text-encoder", type=Path, metavar="FOLDER",
        help="CLIP or sentence model (transformers folder) to compare captions",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write lists, JSON and CSV there")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the clusters")
    terminal.add_device(parser)
    terminal.add_json(parser)
    group = parser.add_argument_group("other captions for training (Somepalli et al. 2023)")
    group.add_argument(
        "--captions", type=Path, metavar="DIR", help="write changed captions into this new folder"
    )
    group.add_argument(
        "--method", choices=captions.METHODS, default="mc",
        help="mc: any caption of the cluster, rc: random words instead, rt: random words added, "
        "cwr: words repeated, rna: numbers added (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--caption-form", choices=("jsonl", "txt"), default="jsonl",
        help="one metadata.jsonl, or a .txt for each picture (%(default)s)",
    )  # fmt: skip
    group.add_argument("--all", action="store_true", help="for all pictures, not only duplicates")
    group.add_argument(
        "--variants", type=terminal.count, default=1, help="captions for each picture (%(default)s)"
    )
    group.add_argument(
        "--probability", type=float, help="probability of a change (rc, cwr, rna 0.4; rt 0.1)"
    )
    group.add_argument(
        "--more-captions", type=Path, metavar="JSONL", help="further captions for mc"
    )
    group.add_argument(
        "--words", type=Path, metavar="FILE", help="words for rc and rt (those of the captions)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the random words (%(default)s)")


def run(options: argparse.Namespace) -> int | None:
    from amg_core.index import Index

    _check(options)
    device = terminal.device(options.device)
    encode = captions.text_encoder(options.text_encoder, device) if options.text_encoder else None
    with Index.combine([Index.open(path) for path in options.index]) as index:
        threshold = (
            default_threshold(index.spec) if options.threshold is None else options.threshold
        )
        found = clusters(
            index,
            threshold,
            scale=options.scale,
            one_each=options.one_each,
            encode=encode,
            device=device,
            progress=blocks_as_pictures(index.count, terminal.progress_printer(sys.stderr)),
        )
        if not options.no_complexity:
            found = measure(found, index, options.pictures)
        notes = write(options.out, found, index.name, threshold) if options.out else []
        if options.sheet:
            terminal.save(draw(found, index), options.sheet)
        if options.captions:
            written = _write_captions(options, index, found)
            notes.append(f"{written} captions written to {options.captions}")
        if options.json:
            print(json.dumps(to_json(found, index.name, threshold) | {"notes": notes}, indent=1))
            return None
        print(report(found, index.name, threshold))
        for path in filter(None, (options.out, options.sheet)):
            notes.append(f"written: {path}")
        for note in notes:
            print(note)
    return None


def blocks_as_pictures(count: int, show: Progress) -> Progress:
    """A progress callback for pairs of blocks, which are shown as a number of pictures."""

    def progress(done: int, total: int, source: str) -> None:
        show(count * done // total, count, source)

    return progress


def _check(options: argparse.Namespace) -> None:
    """Check options that argparse cannot check."""
    if options.threshold is not None and not -1 <= options.threshold < 1:
        raise AMGError(f"--threshold {options.threshold:g} is no similarity: give one below 1.")
    if options.probability is not None and not 0 <= options.probability <= 1:
        raise AMGError("--probability must be between 0 and 1.")
    for folder in filter(None, (options.out, options.captions)):
        terminal.check_new(folder)


def _write_captions(options: argparse.Namespace, index: Index, found: Sequence[Cluster]) -> int:
    more = captions.extra_captions(options.more_captions) if options.more_captions else {}
    known: list[captions.Captioned] = []
    for one in found:
        texts = tuple(dict.fromkeys(m.caption for m in one.members if m.caption.strip()))
        known += [
            # files with the same bytes must not all get the same random words
            captions.Captioned(
                m.source,
                m.caption,
                f"{m.sha256}/{m.source}" if m.alias else m.sha256,
                (*texts, *more.get(m.source, ())),
            )
            for m in one.members
        ]
    if options.all:
        there = {picture.source for picture in known}
        known += [
            captions.Captioned(r.source, r.caption, r.sha256, tuple(more.get(r.source, ())))
            for r in index.records()
            if r.source not in there
        ]
    made = captions.diversify(
        known,
        options.method,
        words=_words(options, index),
        variants=options.variants,
        seed=options.seed,
        probability=options.probability,
    )
    captions.export(options.captions, made, options.caption_form)
    return sum(len(texts) for _, texts in made)


def _words(options: argparse.Namespace, index: Index) -> list[str]:
    """The words for random draws, from a file of words, or from the captions of the index."""
    if options.method not in ("rc", "rt"):
        return []
    if options.words is None:
        return captions.vocabulary(record.caption for record in index.records())
    try:
        return captions.vocabulary([options.words.read_text(encoding="utf-8-sig")])
    except (OSError, UnicodeDecodeError) as error:
        raise AMGError(f"Cannot read {options.words} ({error}): give a text file.") from error
