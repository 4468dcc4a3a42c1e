"""Finds duplicates in an index, and chooses which to keep. No file is ever deleted.

Pairs above a similarity of the index's descriptor are candidates. A verification of the stored pictures
(`verifying`) decides which of them are duplicates. A cluster is one picture that is kept, with those that
are duplicates of it. Somepalli et al., *Understanding and Mitigating Copying in Diffusion Models* (NeurIPS
2023), take the connected components of all pairs above a similarity instead: the linkage "components".
The tool also measures how alike the captions of a cluster are, and how complex the pictures are, because
simple pictures that occur several times are memorised first. See docs/dedup.md.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from amg_core import sheet
from amg_core.descriptors.registry import kinds
from amg_core.errors import AMGError
from amg_core.optional import needed

from . import captions, near, placing, review, terminal, verifying
from .terminal import Progress
from .verifying import Verify

if TYPE_CHECKING:
    from amg_core.descriptors import DescriptorSpec
    from amg_core.index import Alias, Index

LINKAGES = STARS, COMPONENTS = "stars", "components"
SERIES = 20  # similar pictures from which on a picture belongs to a series
COMPARED = 4  # kept pictures with which a picture is verified, at most
SHOWN_SIDE = 180  # pixels of a picture on the page
JPEG_QUALITY = 90  # as in the authors' code
DROP, KEEP = "drop", "keep"

# ------------------------------------------------------------------------------ limits


def default_threshold(spec: DescriptorSpec, checked: bool = False) -> float:
    """The similarity above which two pictures are duplicates, or candidates if they are `checked`.

    AMGError if it was not measured.
    """
    known = {
        kind.name: kind.candidates if checked and kind.candidates is not None else kind.duplicates
        for kind in kinds()
        if kind.duplicates is not None
    }
    if spec.kind not in known:
        *others, last = known
        raise AMGError(
            f"The descriptor {spec.id} has no default threshold for duplicates: give --threshold, "
            f"or use an index of {', '.join(others)} or {last}."
        )
    return known[spec.kind]


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
    verified : float or None
        The score of the verification with the kept picture. None for kept pictures, and if none was made.
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
    verified: float | None = None


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
    linkage: str = STARS,
    verify: Verify | None = None,
    one_each: bool = False,
    encode: captions.Encoder | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Cluster]:
    """Clusters of duplicates in an open index, largest first, with the files to keep marked.

    They include excluded (muted) rows, and further files of the same bytes.

    Parameters
    ----------
    threshold : similarity of candidates, see `default_threshold`
    scale : one of the index's, default full detail
    linkage : "stars": one kept picture with its duplicates (`stars`). "components": connected components of
        the candidates, without `verify`, as in the paper; `choose` decides which to keep.
    verify : whether candidates are duplicates (`verifying.verification`), or None: all of them are
    one_each : with components, keep exactly one picture of each
    encode : text encoder for the captions, see `captions.text_encoder`
    """
    scale = terminal.scale(index, scale)
    threshold = (
        default_threshold(index.spec, verify is not None) if threshold is None else threshold
    )
    found = near.pairs(
        index.rows(scale), index.spec.metric, scale, threshold, device=device, progress=progress
    )
    further: dict[int, list[Alias]] = {}
    start = 0
    for member in index.members:  # separately, because one file may be a row in several indexes
        for alias in member.aliases():
            further.setdefault(start + alias.id, []).append(alias)
        start += member.count
    owner = _owners(index)

    @lru_cache(maxsize=1 << 16)
    def files(i: int) -> tuple[Member, ...]:
        every = _files(index, i, further.get(i, ()))
        return tuple(replace(one, index=owner(i)) for one in every)

    groups = (
        _components(found, index, scale, threshold, one_each, files)
        if linkage == COMPONENTS
        else _starred(found, verify, files)
    )
    grouped = {member.id for group, _, _ in groups for member in group}
    groups += [
        (choose(files(i), lambda one, others: [], 0.0), 1.0, 1.0)
        for i in sorted(further)
        if i not in grouped
    ]
    made = [
        Cluster(
            tuple(members), weakest, strongest,
            captions.likeness([member.caption for member in members], encode),
        )
        for members, weakest, strongest in groups
    ]  # fmt: skip
    return sorted(made, key=lambda one: (-len(one.members), one.members[0].id))


Group = tuple[list[Member], float, float]  # members, similarity of the weakest and strongest link
Files = Callable[[int], Sequence[Member]]  # the files of a row


def _components(
    found: Iterable[near.Pairs], index: Index, scale: int, threshold: float, one_each: bool,
    files: Files,
) -> list[Group]:  # fmt: skip
    components = Components(index.count)
    for a, b, similarity in found:
        components.join(a, b, similarity)
    compare = _comparer(index, scale)
    least = -np.inf if one_each else threshold
    return [
        (
            choose([one for i in group.tolist() for one in files(i)], compare, least),
            float(components.weakest[group].min()),
            float(components.strongest[group].max()),
        )
        for group in components.groups()
    ]


def _starred(found: Iterable[near.Pairs], verify: Verify | None, files: Files) -> list[Group]:
    """The clusters of `stars`. A member's `verified` is the score of the verification."""
    similarity: dict[int, dict[int, float]] = {}
    a, b, alike = near.strongest(found)
    for i, j, value in zip(a.tolist(), b.tolist(), alike.tolist(), strict=True):
        similarity.setdefault(i, {})[j] = similarity.setdefault(j, {})[i] = value
    order = sorted(similarity, key=lambda i: min(map(preference, files(i))))
    made = []
    for kept, others in stars(order, similarity, verify).items():
        values = {i: similarity[kept][i] for i in others}
        compare = partial(_looked_up, values)
        members = choose(
            [one for i in sorted((kept, *others)) for one in files(i)], compare, -np.inf
        )
        members = [
            replace(m, verified=others[m.id]) if others.get(m.id) is not None else m
            for m in members
        ]
        made.append((members, min(values.values()), max(values.values())))
    return made


def _looked_up(values: Mapping[int, float], one: int, ids: list[int]) -> list[float]:
    return [values[i] for i in ids]


def stars(
    order: Sequence[int], similarity: Mapping[int, Mapping[int, float]], verify: Verify | None
) -> dict[int, dict[int, float | None]]:
    """Clusters of one kept picture and its duplicates each.

    In the given order, a picture joins the kept one of which it is a duplicate, or else it is kept itself.
    It is compared with at most `COMPARED` kept pictures, the most similar ones. So every picture that is
    dropped was itself found to be a duplicate of the one that is kept, which chains do not ensure.

    Parameters
    ----------
    order : ids, best to keep first
    similarity : of each id, those that are similar enough, with the similarity
    verify : None: they all are duplicates

    Returns
    -------
    {kept id: {id of a duplicate: score of the verification, or None}}, without clusters of one.
    """
    made: dict[int, dict[int, float | None]] = {}
    kept: set[int] = set()
    for i in order:
        mine = similarity[i]
        near_ones = heapq.nlargest(COMPARED, (j for j in mine if j in kept), key=mine.__getitem__)
        if near_ones and verify is None:
            made.setdefault(near_ones[0], {})[i] = None
            continue
        scores = verify(i, near_ones, len(mine) > SERIES) if near_ones and verify else []
        best = max(zip(scores, near_ones, strict=True), default=(0.0, -1))
        if best[0] > 0:
            made.setdefault(best[1], {})[i] = best[0]
        else:
            kept.add(i)
    return made


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


def preference(member: Member) -> tuple[bool, int, int, int, bool, str]:
    """The sort order for which member to keep: first those with a caption, then the largest area, the
    longest caption, the smallest id, the row's own file before byte-identical ones, and the first name."""
    area, caption = member.width * member.height, member.caption.strip()
    return not caption, -area, -len(caption), member.id, member.alias, member.source


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
    similarity = near.COMPARE[metric]

    def compare(one: int, others: list[int]) -> list[float]:
        own = near.prepared(rows[np.array([one])], metric, scale, "cpu")
        values: list[float] = []
        for start in range(0, len(others), near.BLOCK):
            part = np.array(others[start : start + near.BLOCK])
            values += similarity(own, near.prepared(rows[part], metric, scale, "cpu"))[0].tolist()
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
        return f"{name}: no duplicates (similarity above {threshold:g}). Nothing to drop."
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
        lines += [f"   {_line(member)}" for member in review.ordered(one.members)[:limit]]
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
    word = KEEP if member.keep else DROP
    notes = [review.why(member)]
    if member.entropy is not None:
        notes.append(f"{member.entropy:.1f} bits, {member.jpeg:.2f} B/px")
    notes += ["muted"] * member.muted
    caption = f"  {terminal.short(member.caption)}" if member.caption else ""
    return f"{word}  {member.source}  ({', '.join(notes)}){caption}"


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


def files_of(index: Index) -> Iterator[Member]:
    """Every file of an index, of all rows and aliases, in the order of the rows."""
    owner = _owners(index)
    start = 0
    for part in index.members:
        further: dict[int, list[Alias]] = {}
        for alias in part.aliases():
            further.setdefault(start + alias.id, []).append(alias)
        for i in range(start, start + part.count):
            for one in _files(index, i, further.get(i, ())):
                yield replace(one, index=owner(i))
        start += part.count


def sorted_out(found: Sequence[Cluster], index: Index) -> tuple[list[Member], list[Member]]:
    """Every file of the index: those that stay, and those to drop."""
    dropped = {(member.index, member.source) for one in found for member in one.dropped}
    stay: list[Member] = []
    drop: list[Member] = []
    for member in files_of(index):
        (drop if (member.index, member.source) in dropped else stay).append(member)
    return stay, drop


def decided(found: Sequence[Cluster], made: Mapping[review.Name, bool]) -> list[Cluster]:
    """The clusters with the decisions of a person (`review.decisions`) in place of the program's."""

    def decide(member: Member) -> Member:
        return replace(member, keep=made.get((member.index, member.source), member.keep))

    return [replace(one, members=tuple(map(decide, one.members))) for one in found]


def write(folder: Path, found: Sequence[Cluster], index: Index, threshold: float) -> list[str]:
    """Write the results into a new folder.

    keep.txt has every file of the index that stays, drop.txt the others, a path a line. clusters.json and
    clusters.csv have the clusters, and review.html is the page to look through them. If there are several
    indexes, each has its own lists, drop.<index>.txt and so on.
    Returns notes, for example on names with a line break, which are left out of the text files.
    """
    captions.new_folder(folder)
    notes = []
    stay, drop = sorted_out(found, index)
    names = sorted({member.index for member in (*stay, *drop)})
    lists: dict[str, list[str]] = {
        _list_name(kind, name): [] for name in names for kind in (DROP, KEEP)
    }
    for kind, members in ((KEEP, stay), (DROP, drop)):
        for member in members:
            if member.source.splitlines() == [member.source]:
                lists[_list_name(kind, member.index)].append(member.source)
            else:
                notes.append(f"{member.source!r} has a line break: it is in no list")
    about = report(found, index.name, threshold, limit=0).splitlines()
    html = review.render(found, " ".join(about[:2]), title, lambda i: small(index, i))
    try:
        for file_name, sources in lists.items():
            text = "".join(source + "\n" for source in sources)
            (folder / file_name).write_text(text, encoding="utf-8")
        data = json.dumps(to_json(found, index.name, threshold), indent=1, ensure_ascii=False)
        (folder / "clusters.json").write_text(data, encoding="utf-8")
        rows = ((number, m) for number, one in enumerate(found, 1) for m in one.members)
        terminal.write_csv(folder / "clusters.csv", "cluster", Member, rows)
        (folder / "review.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise AMGError(f"Cannot write to {folder} ({error}): choose another folder.") from error
    return notes


def small(index: Index, i: int) -> bytes | None:
    """A JPEG of row i for the page, or None if the index holds no pictures."""
    try:
        picture = index.thumbnail(i)
    except AMGError:
        return None
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


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
        order = review.ordered(one.members)
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
    parser.add_argument("index", metavar="INDEX", type=Path, nargs="*", help="index folder(s)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="similarity above which two pictures are compared (that of the descriptor)",
    )
    parser.add_argument(
        "--linkage", choices=LINKAGES, default=STARS,
        help="stars: one kept picture with its duplicates; components: also what is linked through "
        "others, by similarity alone, as in the paper (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="similarity alone decides, pictures are not compared",
    )
    parser.add_argument(
        "--also", choices=verifying.VARIANTS, nargs="+", default=[], metavar="VARIANT",
        help="count mirrored and recoloured pictures as duplicates: "
        f"{' '.join(verifying.VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--scale", type=int, help="compare at this side in pixels (full detail)")
    parser.add_argument(
        "--one-each", action="store_true",
        help="with components: keep exactly one of each, even if the ends of a chain differ",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER",
        help="folder of the originals, to measure them, and to link, copy or move them",
    )  # fmt: skip
    parser.add_argument("--no-complexity", action="store_true", help="do not measure the pictures")
    parser.add_argument(
        "--text-encoder", type=Path, metavar="FOLDER",
        help="CLIP or sentence model (transformers folder) to compare captions",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write lists, the review page, JSON and CSV there"
    )
    parser.add_argument(
        "--decisions", type=Path, metavar="JSON", help="what to keep, as saved on the review page"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the clusters")
    terminal.add_device(parser)
    terminal.add_json(parser)
    places = parser.add_argument_group("put the pictures in their place (with --pictures FOLDER)")
    way = places.add_mutually_exclusive_group()
    for how, what in (
        (placing.LINK, "hard links to the pictures that stay"),
        (placing.COPY, "copies of the pictures that stay"),
        (placing.MOVE, "the pictures to drop, out of their folder"),
    ):
        way.add_argument(f"--{how}", type=Path, metavar="DIR", help=f"new folder: {what}")
    way.add_argument("--undo", type=Path, metavar="DIR", help="take back what was put into DIR")
    places.add_argument(
        "--layout", choices=placing.LAYOUTS, default=placing.PLAIN,
        help="of DIR: the same names, kohya's repeat folders, or OneTrainer's concepts (%(default)s)",
    )  # fmt: skip
    places.add_argument("--repeats", type=terminal.count, default=1, help="for kohya, OneTrainer")
    places.add_argument("--concept", default="", help="its name (that of the folder)")
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

    if options.undo:
        notes = placing.undo(options.undo)
        print("\n".join([f"undone: {options.undo}", *notes]))
        return None
    _check(options)
    device = terminal.device(options.device)
    encode = captions.text_encoder(options.text_encoder, device) if options.text_encoder else None
    with Index.combine([Index.open(path) for path in options.index]) as index:
        verify, notes = _verification(options, index)
        threshold = options.threshold
        if threshold is None:
            threshold = default_threshold(index.spec, verify is not None)
        found = clusters(
            index,
            threshold,
            scale=options.scale,
            linkage=options.linkage,
            verify=verify,
            one_each=options.one_each,
            encode=encode,
            device=device,
            progress=blocks_as_pictures(index.count, terminal.progress_printer(sys.stderr)),
        )
        if options.decisions:
            made = review.decisions(options.decisions)
            notes += [f"in no cluster: {source}" for _, source in review.unknown(made, found)]
            found = decided(found, made)
        if not options.no_complexity:
            found = measure(found, index, options.pictures)
        notes += write(options.out, found, index, threshold) if options.out else []
        if options.sheet:
            terminal.save(draw(found, index), options.sheet)
        if options.captions:
            written = _write_captions(options, index, found)
            notes.append(f"{written} captions written to {options.captions}")
        notes += _placed(options, found, index)
        if options.json:
            print(json.dumps(to_json(found, index.name, threshold) | {"notes": notes}, indent=1))
            return None
        print(report(found, index.name, threshold))
        for path in filter(None, (options.out, options.sheet)):
            notes.append(f"written: {path}")
        for note in notes:
            print(note)
    return None


def _verification(options: argparse.Namespace, index: Index) -> tuple[Verify | None, list[str]]:
    """How pairs are verified, or None with a note if they cannot be."""
    if options.no_verify or options.linkage == COMPONENTS:
        return None, []
    try:
        index.thumbnail(0)
    except AMGError:
        note = "the index holds no pictures: duplicates are those of the descriptor, not verified"
        return None, [note]
    return verifying.verification(index, options.also), []


def _placed(options: argparse.Namespace, found: Sequence[Cluster], index: Index) -> list[str]:
    """Link, copy or move. Returns notes."""
    for how in placing.HOW:
        folder = getattr(options, how)
        if folder is None:
            continue
        stay, drop = sorted_out(found, index)
        chosen = drop if how == placing.MOVE else stay
        notes = placing.place(
            how,
            folder,
            options.pictures,
            [placing.Wanted(one.source, one.sha256, one.caption) for one in chosen],
            staying=[one.source for one in stay],
            layout=options.layout,
            repeats=options.repeats,
            concept=options.concept,
        )
        done = {placing.LINK: "linked", placing.COPY: "copied", placing.MOVE: "moved"}[how]
        return [
            *notes,
            f"{len(chosen) - len(notes)} pictures {done} to {folder}; dedup --undo {folder} takes it back",
        ]
    return []


def blocks_as_pictures(count: int, show: Progress) -> Progress:
    """A progress callback for pairs of blocks, which are shown as a number of pictures."""

    def progress(done: int, total: int, source: str) -> None:
        show(count * done // total, count, source)

    return progress


def _check(options: argparse.Namespace) -> None:
    """Check options that argparse cannot check."""
    if not options.index:
        raise AMGError("No index was given: name the folder of an index, or --undo with a folder.")
    places = [getattr(options, how) for how in placing.HOW if getattr(options, how)]
    if places and (options.pictures is None or len(options.index) > 1):
        raise AMGError(
            "--link, --copy and --move need one index, and --pictures with the folder it was built from."
        )
    if options.one_each and options.linkage != COMPONENTS:
        raise AMGError(
            "--one-each belongs to --linkage components: stars keep one of each already."
        )
    if options.threshold is not None and not -1 <= options.threshold < 1:
        raise AMGError(f"--threshold {options.threshold:g} is no similarity: give one below 1.")
    if options.probability is not None and not 0 <= options.probability <= 1:
        raise AMGError("--probability must be between 0 and 1.")
    for folder in filter(None, (options.out, options.captions, *places)):
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
