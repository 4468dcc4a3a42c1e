"""Measures how much of a set of generated pictures is copied from an index, by the figures of the papers.

It finds the nearest picture of the index at full detail for each picture, and from these the figures of
AMG (Chen et al., CVPR 2024, Tables 1 to 3): the share above a similarity, the 95th percentile ("Top 5%"),
the top 1. FID and CLIP score are added if their weights are given. What was not measured is marked.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amg_core import limits
from amg_core.descriptors.clip import prepared
from amg_core.descriptors.tensors import read_tensors
from amg_core.errors import AMGError
from amg_core.files import brief
from amg_core.images import to_tensor
from amg_core.messages import words
from amg_core.optional import needed
from amg_core.similarity import metrics, verdict
from amg_core.similarity.matcher import Matcher

from . import page, terminal
from .captions import new_folder, whole
from .intervals import mean, percentile, share
from .selftest import self_test
from .terminal import Progress

if TYPE_CHECKING:
    from amg_core.index import Index
    from amg_core.index.sources.base import Source

CIFAR_SIDE = 32  # the side at which the papers compute nL2 of pixels
WORST = 24  # pairs that are shown
TESTED = 20  # pictures of a self-test
SHOWN_SIDE = 224  # pixels of a shown picture

ClipScorer = Callable[[Image.Image, str], float]
Features = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Checked:
    """One generated picture and the nearest one of the index.

    Attributes
    ----------
    similarity : float
        Cosine, or −nL2 of the `metrics.matched` picture, as the guard compares. The larger value of the
        picture and its mirror image.
    nl2 : float or None
        Eq. 8 as in the paper. None for the cosine, and for an index of fewer than 50 pictures.
    score : float
        See `metrics.score`.
    zncc : float or None
        The second check's correlation. None if the index holds no pictures.
    copy : bool
        Whether one of the two checks says copy.
    """

    picture: str
    prompt: str
    similarity: float
    nl2: float | None
    score: float
    zncc: float | None
    copy: bool
    words: str
    neighbor: int
    source: str
    caption: str

    def scores(self) -> list[str]:
        """The figures in words."""
        found = f"similarity {self.similarity:.3f}"
        if self.nl2 is not None:
            found = f"nL2 {self.nl2:.3f}, matched {-self.similarity:.3f}"
        second = [] if self.zncc is None else [f"second check {self.zncc:.2f}"]
        return [found, f"likeness {self.score:.2f}", *second]


@dataclass(frozen=True)
class Figure:
    """One figure of a table: `value` with a 95 % interval [`low`, `high`], None if there is none.

    If `value` is None, `note` says why it was not measured. Otherwise it is a remark.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""

    def text(self) -> str:
        """The text in a table: "12.5 % [8.1, 18.7]" or "not measured (…)"."""
        if self.value is None:
            return f"not measured ({self.note})"
        digits = 1 if self.unit == "%" else 0 if self.unit == "n" else 3
        unit = " %" if self.unit == "%" else ""
        shown = f"{self.value:.{digits}f}{unit}"
        if self.low is not None:
            shown += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return shown


@dataclass
class Evaluation:
    """The results for one set of pictures. `figures` maps names to Figures, in the order of the table.
    `worst` has the closest pairs, closest first, each with a JPEG of the generated picture."""

    name: str
    judged: list[Checked]
    figures: dict[str, Figure]
    metric: str
    copy_above: float
    worst: list[tuple[Checked, bytes]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_nl2(self) -> bool:
        """Whether nL2 was measured of every picture."""
        return self.metric == "nl2" and all(one.nl2 is not None for one in self.judged)

    def values(self) -> list[float]:
        """The values for the histogram: nL2 if it was measured, or else the similarity."""
        nl2 = [one.nl2 for one in self.judged if one.nl2 is not None]
        return nl2 if self.is_nl2 else [one.similarity for one in self.judged]

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "figures": {key: asdict(figure) for key, figure in self.figures.items()},
            "copy_above": self.copy_above,
            "skipped": [{"picture": name, "reason": reason} for name, reason in self.skipped],
            "notes": self.notes,
        }


# --------------------------------------------------------------------------- the figures


def figures(judged: Sequence[Checked], metric: str, copy_score: float) -> dict[str, Figure]:
    """The papers' figures for a set of at least one picture, by name."""
    n = len(judged)
    made = {"count": Figure("pictures", n, unit="n")}

    def spread(key: str, label: str, values: np.ndarray, closest_is_small: bool = False) -> None:
        percent, closest = (5, values.min()) if closest_is_small else (95, values.max())
        made[f"{key}_{percent}"] = Figure(
            f"{label}, {percent}th percentile", *percentile(values, percent)
        )
        made[f"{key}_top1"] = Figure(
            f"{label}, top 1", float(closest), note="no interval: an extreme"
        )
        made[f"{key}_mean"] = Figure(f"{label}, mean", *mean(values))

    def portion(key: str, label: str, hits: Iterable[bool]) -> None:
        made[key] = Figure(label, *share(sum(hits), n), "%")

    if metric == "cosine":
        values = np.array([one.similarity for one in judged])
        for limit in page.LIMITS["cosine"]:
            portion(f"above_{limit:g}", f"similarity > {limit:g}", (v > limit for v in values))
        spread("similarity", "similarity", values)
    elif None in (measured := [one.nl2 for one in judged]):
        why = f"Eq. 8 needs an index of {metrics.NEIGHBORS} pictures or more"
        for limit in page.LIMITS["nl2"]:
            made[f"nl2_below_{limit:g}"] = Figure(f"nL2 < {limit:g}", None, unit="%", note=why)
    else:
        values = np.array(measured)
        for limit in page.LIMITS["nl2"]:
            portion(f"nl2_below_{limit:g}", f"nL2 < {limit:g}", (v < limit for v in values))
        spread("nl2", "nL2", values, closest_is_small=True)
    close = np.array([one.score for one in judged])
    portion("too_close", f"likeness > {copy_score:g}", (v > copy_score for v in close))
    spread("score", "likeness", close)
    portion("copies", "copies, by either check", (one.copy for one in judged))
    return made


# ------------------------------------------------------------------------------- measuring


def evaluate(
    matcher: Matcher,
    source: Source,
    *,
    clip: ClipScorer | None = None,
    inception: Features | None = None,
    reference: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare all pictures of a source with the index of `matcher`, one at a time.

    Parameters
    ----------
    source : Source
        The generated pictures; their captions are the prompts.
    clip : (picture, prompt) -> score, see `clip_scorer`
    inception : (H, W, 3) uint8 -> (D,) features, see `inception_features`
    reference : (N, D) features of the pictures that FID compares with

    Raises
    ------
    AMGError
        No picture of the source can be read.
    """
    from amg_core.index.picture import Unreadable, decode

    index = matcher.index
    judged: list[Checked] = []
    skipped: list[tuple[str, str]] = []
    worst: list[tuple[float, int, Checked, bytes]] = []
    scores: list[float] = []
    features: list[np.ndarray] = []
    total = len(source)
    for item in source:
        try:
            pixels = decode(item.read(), item.source).pixels
        except Unreadable as error:
            skipped.append((item.source, str(error)))
        else:
            one = _check(matcher, pixels, item.source, item.caption)
            judged.append(one)
            entry = (one.score, -len(judged), one, b"")
            if len(worst) < WORST or entry > worst[0]:
                entry = (*entry[:3], small_jpeg(Image.fromarray(pixels)))
                (heapq.heappush if len(worst) < WORST else heapq.heapreplace)(worst, entry)
            if clip and one.prompt:
                scores.append(clip(Image.fromarray(pixels), one.prompt))
            if inception:
                features.append(inception(pixels))
        if progress:
            done = len(judged) + len(skipped)
            progress(done, total if total >= done else 0, item.source)  # 0: unknown before the end
    skipped += source.skipped
    if not judged:
        shown = f" ({brief(skipped[0][0])}: {brief(skipped[0][1])})" if skipped else ""
        raise AMGError(f"No picture of {source.name} can be read{shown}: give another folder.")
    table = figures(judged, matcher.metric, limits.COPY)
    table["clip"] = _clip_figure(scores, len(judged), clip is not None)
    table["fid"] = _fid_figure(features, reference)
    made = Evaluation(
        name=str(source.name),
        judged=judged,
        figures=table,
        metric=matcher.metric,
        copy_above=limits.COPY,
        worst=[(one, jpeg) for _, _, one, jpeg in sorted(worst, key=lambda e: e[:2], reverse=True)],
        skipped=skipped,
        notes=list(source.notes),
    )
    if any(one.zncc is None for one in judged):
        made.notes.append(
            f"index {index.name} holds no pictures: the second check, which compares pictures, was "
            f"not made"
        )
    return made


def _check(matcher: Matcher, pixels: np.ndarray, name: str, prompt: str) -> Checked:
    picture = to_tensor(pixels, matcher.searcher.device)
    (v,) = verdict.verdict(matcher, picture)
    zncc = None if v.reason == verdict.NO_PICTURES else v.zncc
    return Checked(
        name, prompt, v.similarity, plain_nl2(matcher, picture), v.score, zncc, v.copy,
        words(v.message()),
        v.neighbor, v.source, v.caption,
    )  # fmt: skip


@torch.no_grad()
def plain_nl2(matcher: Matcher, picture: Tensor) -> float | None:
    """Eq. 8 as in the paper, for (1, 3, H, W): ‖x − n‖ / (α · mean of the 50 nearest), k = 50, α = 0.5.

    Contrast and brightness are not matched as in the guard, and mirror images are not compared. It uses 32
    pixels a side if the index has that scale, as in the papers. None for a cosine descriptor, and for an
    index of fewer than 50 pictures.
    """
    if matcher.metric == "cosine":
        return None
    scale = CIFAR_SIDE if CIFAR_SIDE in matcher.scales else matcher.scales[-1]
    query = matcher.descriptor.embed(picture, scale)
    distances, _ = matcher.searcher.nearest(query, scale, metrics.NEIGHBORS)
    if distances.shape[1] < metrics.NEIGHBORS:
        return None
    return float(distances[0, 0] / (metrics.ALPHA * distances[0].mean()).clamp_min(1e-6))


def small_jpeg(picture: Image.Image) -> bytes:
    """A JPEG of at most 224 pixels a side."""
    small = picture.convert("RGB")
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


# --------------------------------------------------------------------- optional measures


def clip_scorer(folder: Path, device: torch.device | str = "cpu") -> ClipScorer:
    """The CLIP score: 100 × cosine of the picture's and the prompt's embeddings, at least 0.

    The model is a local folder of the `transformers` library (config.json, tokenizer, model.safetensors).

    Returns
    -------
    (Image, str) -> float

    Raises
    ------
    AMGError
        `transformers` is missing, or the folder holds no CLIP model.
    """
    step = "pip install transformers, or omit --clip"
    parts = ("AutoConfig", "AutoTokenizer", "CLIPModel")
    transformers = needed("transformers", "The CLIP score", step, parts)
    if not folder.is_dir():
        raise AMGError(f"{folder} is not a folder: give --clip the folder of a CLIP model.")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        if (found := transformers.AutoConfig.from_pretrained(folder, **local).model_type) != "clip":
            raise ValueError(f"a model of type {found} is there")
        model = whole(transformers.CLIPModel, folder).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AMGError(
            f"No CLIP model in {folder} ({reason}): it needs config.json, the tokenizer's files and "
            f"model.safetensors."
        ) from error
    side = model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def score(picture: Image.Image, prompt: str) -> float:
        tokens = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt")
        out = model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=prepared(to_tensor(picture.convert("RGB"), device), side),
        )
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return 100 * max(0.0, float(cosine[0]))

    return score


def inception_features(weights: Path, device: torch.device | str = "cpu") -> Features:
    """The 2048 features for FID, by torch-fidelity's port of the original Inception network.

    Parameters
    ----------
    weights : path of weights-inception-2015-12-05-6726825d.pth, from torch-fidelity's releases

    Returns
    -------
    (H, W, 3) uint8 -> (2048,) float64

    Raises
    ------
    AMGError
        The package or the file is missing, or the file holds other data than tensors.
    """
    step = "pip install torch-fidelity, or omit --inception"
    inception = needed("torch_fidelity.feature_extractor_inceptionv3", "FID", step)
    try:
        # torch-fidelity unpickles without limits, so it gets a new file with the same tensors.
        with tempfile.TemporaryDirectory() as folder:
            safe = Path(folder) / "inception.pth"
            torch.save(read_tensors(weights), safe)
            network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(safe)
            ).to(device)
    except FileNotFoundError:
        raise AMGError(
            f"{weights} is missing: download weights-inception-2015-12-05-6726825d.pth from "
            f"torch-fidelity's releases and give its path."
        ) from None
    except Exception as error:  # damaged archives can raise anything
        raise AMGError(
            f"{weights} does not hold Inception's weights, or not only tensors "
            f"({brief(error)}): download it again from torch-fidelity's releases."
        ) from error

    @torch.inference_mode()
    def features(pixels: np.ndarray) -> np.ndarray:
        picture = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        row: Tensor = network(picture.to(device))[0][0]
        return row.double().cpu().numpy()

    return features


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features (N, D), (M, D), each of at least two rows.

    Heusel et al. 2017, Eq. 6: ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½). The trace of the root is
    computed from the eigenvalues of the symmetric Σ_a^½ Σ_b Σ_a^½, so it is always real.
    """
    means = a.mean(0), b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root)
    trace = np.trace(np.atleast_2d(first)) + np.trace(np.atleast_2d(second))
    return float(((means[0] - means[1]) ** 2).sum() + trace - 2 * np.sqrt(both.clip(0)).sum())


def _clip_figure(scores: list[float], n: int, wanted: bool) -> Figure:
    label = "CLIP score"
    if not wanted:
        return Figure(label, None, note="needs --clip FOLDER, a local CLIP model")
    if not scores:
        return Figure(label, None, note="no picture has a prompt: put captions beside them")
    values = np.array(scores)
    note = "" if len(scores) == n else f"{len(scores)} of {n} pictures have a prompt"
    return Figure(label, *mean(values), note=note)


def _fid_figure(features: list[np.ndarray], reference: np.ndarray | None) -> Figure:
    label = "FID"
    if reference is None:
        return Figure(label, None, note="needs --inception FILE and --fid-reference PICTURES")
    if min(len(features), len(reference)) < 2:
        return Figure(label, None, note="needs two pictures on either side")
    few = min(len(features), len(reference))
    note = "" if few > 2048 else f"of {few} pictures: biased upwards, compare only equal numbers"
    return Figure(label, fid(np.stack(features), reference), note=note)


# -------------------------------------------------------------------------------- reports


def table(evaluations: Sequence[Evaluation]) -> str:
    """The figures of one or more sets as a text table with one column for each set."""
    keys = list(dict.fromkeys(key for one in evaluations for key in one.figures))
    rows = [["", *(one.name for one in evaluations)]]
    for key in keys:
        label = next(one.figures[key].label for one in evaluations if key in one.figures)
        cells = [one.figures[key].text() if key in one.figures else "" for one in evaluations]
        rows.append([label, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def to_json(evaluations: Sequence[Evaluation], index: Index) -> dict[str, object]:
    from amg_core import __version__

    return {
        "amg": __version__,
        "index": {"name": index.name, "hash": index.hash, "count": index.count},
        "muted": len(index.muted),
        "descriptor": index.spec.to_json(),
        "sets": [one.to_json() for one in evaluations],
    }


def write(folder: Path, evaluations: Sequence[Evaluation], index: Index) -> None:
    """Write metrics.json, pairs.csv and index.html into a new folder."""
    new_folder(folder)
    data = to_json(evaluations, index)
    html = page.render(evaluations, index, thumbnail=lambda i: _thumbnail(index, i))
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        pairs = ((one.name, judged) for one in evaluations for judged in one.judged)
        terminal.write_csv(folder / "pairs.csv", "set", Checked, pairs)
        (folder / "index.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise AMGError(f"Cannot write to {folder} ({error}): choose another folder.") from error


def _thumbnail(index: Index, i: int) -> bytes | None:
    """A JPEG of row i, or None if the index holds no pictures."""
    try:
        return small_jpeg(index.thumbnail(i))
    except AMGError:
        return None


# ---------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="generated pictures")
    parser.add_argument(
        "--index", type=Path, nargs="+", required=True, metavar="INDEX", help="index folder(s)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER2", help="a second set of pictures to show beside it"
    )
    parser.add_argument(
        "--self-test", type=terminal.count, metavar="N", nargs="?", const=TESTED,
        help="edit N pictures of the index in every way, and print which it would miss (%(const)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write metrics.json, pairs.csv and index.html there"
    )
    terminal.add_weights(parser)
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="CLIP model (transformers) for the CLIP score"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's Inception weights, for FID"
    )
    parser.add_argument(
        "--fid-reference", type=Path, metavar="PICTURES", help="pictures with which FID compares"
    )
    terminal.add_device(parser)
    terminal.add_json(parser)


def run(options: argparse.Namespace) -> int | None:
    from amg_core.index import Index
    from amg_core.index.search import Searcher
    from amg_core.index.sources import open_source

    if (options.folder is None) == (options.self_test is None):
        raise AMGError("Give a folder of generated pictures, or --self-test without one.")
    if (options.inception is None) != (options.fid_reference is None):
        raise AMGError("FID needs both --inception FILE and --fid-reference PICTURES.")
    out = options.out
    if out:
        terminal.check_new(out)
        page.template()  # to report a missing package before the work
    device = terminal.device(options.device)
    clip = clip_scorer(options.clip, device) if options.clip else None
    inception = reference = None
    if options.inception:
        inception = inception_features(options.inception, device)
        reference = features_of(open_source(options.fid_reference), inception)
    with Index.combine([Index.open(path) for path in options.index]) as index:
        descriptor = terminal.descriptor_of(index.spec, options.weights).to(device)
        matcher = Matcher(Searcher(index, device), descriptor)
        if options.self_test:
            _self_test(matcher, options)
            return None
        evaluations = [
            evaluate(
                matcher,
                open_source(folder),
                clip=clip,
                inception=inception,
                reference=reference,
                progress=terminal.progress_printer(sys.stderr),
            )
            for folder in filter(None, (options.folder, options.against))
        ]
        if options.out:
            write(options.out, evaluations, index)
        if options.json:
            print(json.dumps(to_json(evaluations, index), indent=1))
            return None
        print(f"against {index.name}: {index.count} pictures, {index.spec.id}")
        print(table(evaluations))
        print("95 % intervals: shares by Wilson, the others by bootstrap over the pictures.")
        for one in evaluations:
            for name, reason in one.skipped:
                print(f"NOT checked: {name}: {reason}")
            for note in one.notes:
                print(f"note: {note}")
        if options.out:
            print(f"written: {options.out}")
    return None


def _self_test(matcher: Matcher, options: argparse.Namespace) -> None:
    tried = self_test(matcher, options.self_test, terminal.progress_printer(sys.stderr))
    index = matcher.index
    if options.json:
        edits = [asdict(one) for one in tried]
        terminal.print_json(index=index.name, descriptor=index.spec.id, edits=edits)
        return
    print(f"{tried[0].count} pictures of {index.name} ({index.spec.id}), share called a copy:")
    print("\n".join(one.text() for one in tried))


def features_of(source: Source, inception: Features) -> np.ndarray:
    """The features (N, D) of all readable pictures of a source. AMGError if there are none."""
    from amg_core.index.picture import Unreadable, decode

    rows = []
    for item in source:
        try:
            rows.append(inception(decode(item.read(), item.source).pixels))
        except Unreadable:
            continue
    if not rows:
        raise AMGError(f"No picture of {source.name} can be read: give another --fid-reference.")
    return np.stack(rows)
