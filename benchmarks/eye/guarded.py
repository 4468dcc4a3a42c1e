"""Each eye at work: preset main, and Guard without an index, on the embedded model.

    python -m benchmarks.eye.guarded --descriptors compact pixel sscd_int8

The embedded model's 32 memorised prompts and 32 others, from fresh seeds, drawn plain, under *main* with an
index of its training pictures, and as the node *Guard* does it: every prompt is drawn twice from other
seeds, and where the two are one picture, that is the whole index. `sscd_int8` is the stand-in for Meta's
weights (see `rivals`); it has no gradient, and main needs none.

Graded by what steered none of them alone: correlation of 16x16 grey pictures with the own training picture,
the second check's score with the own and with any of them, and SSCD where it is installed. An escape is a
picture that is a copy to any of these and that its verdict does not call one; each is marked on the sheet
of its eye. Without an index the verdict knows only the picture that was left: a copy of another escapes it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amg_core import limits, presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import create
from amg_core.descriptors.base import DescriptorSpec
from amg_core.images import low_pass
from amg_core.index.sources import Pictures
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from amg_demo import model as demo
from amg_demo.__main__ import choose_prompts, guarded, training_set
from amg_demo.sample import sample
from amg_demo.sheet import sheet

from .. import harness
from .rivals import NotInstalled, SSCDInt8

OPTIONS = {"steps": 20, "cfg_scale": 4.0}
RETRIES, BATCH, OTHER_SEEDS, LED = 2, 16, 1_000_003, 2  # as in the node Guard
OWN_ZNCC, OWN_SSCD = 0.7, 0.5  # with the own training picture: from here on a copy


class SSCDStandIn:
    """SSCD as a descriptor of the product, run by onnxruntime: rows, no gradient."""

    space = "picture"
    spec = DescriptorSpec(
        "sscd_disc_mixup", "cosine", "int8-stand-in/1", (16, 32, 64, 288), "0" * 64
    )

    def __init__(self):
        self.network = SSCDInt8()

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        small = low_pass(pictures.float(), scale) if scale < 288 else pictures.float()
        return torch.from_numpy(self.network.embed([_image(p) for p in small]))

    def to(self, device) -> SSCDStandIn:
        return self


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(
        (picture.clamp(0, 1).movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    )


@dataclass
class Watched:
    """Pictures of one way to draw, and what its verdicts say (True: a copy)."""

    pictures: Tensor
    called: list[bool] = field(default_factory=list)
    acted: list[bool] = field(default_factory=list)
    led: int = 0  # how often the way out proved to be another stored picture


class DemoPrompts:
    """The embedded model, its prompts, and the pictures that they belong to."""

    def __init__(self, first: int):
        self.model = demo.load()
        self.training, captions, copies = training_set(demo.PICTURES)
        self.memorised, self.others = choose_prompts(captions, copies)
        self.prompts = self.memorised + self.others
        self.own = self.training[[captions.index(text) for text in self.memorised]]
        self.seeds = [first + i for i in range(len(self.prompts))]
        self.decoder = ModuleDecoder("demo", self.model.decoder, 4)
        subjects = {name: i for i, name in enumerate(self.model.labels["subject"])}
        self.labels = torch.tensor([subjects[text.split(" on ")[0]] for text in self.prompts])

    def plain(self, seeds: list[int]) -> Tensor:
        parts = [slice(i, i + BATCH) for i in range(0, len(seeds), BATCH)]
        return torch.cat([sample(self.model, self.prompts[p], seeds[p], **OPTIONS) for p in parts])

    def under(
        self, matcher: Matcher, rows: list[int], further: int = 0, retries: int = RETRIES
    ) -> Watched:
        """As the node draws these prompts, from seeds that lie `further`."""
        settings, drawn = presets.settings("main", matcher.metric), Watched(torch.empty(0))
        for i in range(0, len(rows), BATCH):
            part = rows[i : i + BATCH]
            prompts, seeds = (
                [self.prompts[r] for r in part],
                [self.seeds[r] + further for r in part],
            )
            outcome = guarded(self.model, prompts, seeds, matcher, settings, retries, OPTIONS)
            drawn.pictures = torch.cat([drawn.pictures, outcome.latents])
            drawn.called += [v.copy for v in outcome.verdicts]
            report = outcome.attempts[0].report
            again = {n for attempt in outcome.attempts[1:] for n in attempt.samples}
            drawn.acted += [
                n > 0 or i in again for i, n in enumerate(report["guarded_evaluations"])
            ]
        return drawn

    def matcher(self, pictures, descriptor, folder: Path) -> Matcher:
        return harness.matcher(pictures, folder, descriptor, self.decoder)


def without_index(
    domain: DemoPrompts, descriptor, plain: Tensor, folder: Path
) -> tuple[Watched, list[float]]:
    """As *Guard* with *draw twice*; and how close the two drawings of each prompt are."""
    pairs = [domain.plain([s + OTHER_SEEDS * k for s in domain.seeds]) for k in (1, 2)]
    drawn, alike = Watched(plain.clone()), []

    def likeness(two: Tensor, name: str) -> float:
        alone = domain.matcher(Pictures(two[:1].movedim(1, -1)), descriptor, folder / name)
        return float(alone.match_pictures(two[1:]).score)

    for i in range(len(domain.prompts)):
        stored = torch.stack([pair[i] for pair in pairs])
        alike.append(likeness(stored, f"a{i}"))
        called, acted = False, False
        for number in range(LED + 1 if alike[-1] >= limits.ONE_PICTURE else 0):
            own = domain.matcher(
                Pictures(stored.movedim(1, -1)), descriptor, folder / f"b{i} {number}"
            )
            one = domain.under(own, [i])
            drawn.pictures[i : i + 1], called, acted = one.pictures, one.called[0], one.acted[0]
            if number == LED:
                break
            other = domain.under(own, [i], OTHER_SEEDS * (3 + number), retries=0).pictures
            two = torch.cat([one.pictures, other])
            if likeness(two, f"c{i} {number}") < limits.ONE_PICTURE:
                break
            drawn.led += 1
            stored = torch.cat([stored, two])
        drawn.called.append(called)
        drawn.acted.append(acted)
    return drawn, alike


def figures(domain: DemoPrompts, drawn: Watched, plain: Tensor, sscd: SSCDInt8 | None) -> dict:
    count = len(domain.memorised)
    mine = drawn.pictures[:count]
    zncc = torch.maximum(verifier.zncc(mine, domain.own), verifier.zncc(mine, domain.own.flip(-1)))
    score = [
        float(verifier.registered(p[None], o[None]).score)
        for p, o in zip(mine, domain.own, strict=True)
    ]
    own = None
    if sscd is not None:
        rows = sscd.embed([_image(p) for p in mine]) * sscd.embed([_image(p) for p in domain.own])
        own = rows.sum(axis=1)
    copied = (zncc > OWN_ZNCC).numpy() | (np.array(score) > limits.REGISTERED)
    if own is not None:
        copied |= own > OWN_SSCD
    near = _nearest(mine, domain.training)
    copied |= near > limits.REGISTERED
    escapes = copied & ~np.array(drawn.called[:count] or [False] * count)
    with torch.inference_mode():
        seen = domain.model.scorer(drawn.pictures)["subject"].softmax(dim=1)
    subject = seen.gather(1, domain.labels[:, None])[:, 0]
    same = (drawn.pictures == plain).flatten(1).all(dim=1)[count:]
    return {
        "zncc_mean": float(zncc.mean()), "zncc_worst": float(zncc.max()),
        "zncc_copies": int((zncc > OWN_ZNCC).sum()),
        "near_worst": float(near.max()), "near_copies": int((near > limits.REGISTERED).sum()),
        "score_worst": max(score), "score_copies": int((np.array(score) > limits.REGISTERED).sum()),
        "sscd_mean": None if own is None else float(own.mean()),
        "sscd_worst": None if own is None else float(own.max()),
        "sscd_copies": None if own is None else int((own > OWN_SSCD).sum()),
        "escapes": [int(i) for i in np.flatnonzero(escapes)],
        "subject": float(subject[:count].mean()), "same": int(same.sum()), "others": len(same),
        "acted_on_others": sum(drawn.acted[count:]), "zncc": zncc.tolist(),
    }  # fmt: skip


def _nearest(pictures: Tensor, training: Tensor) -> np.ndarray:
    """The second check's score (N,) with the most alike of the training pictures that correlate most.

    The correlation alone is no judge of that: of 32 prompts that the model has never seen, 21 are above
    `limits.ZNCC` with one of its 632 pictures, of the same emoji on another ground.
    """
    close = torch.maximum(
        verifier.zncc_matrix(pictures, training), verifier.zncc_matrix(pictures.flip(-1), training)
    )
    ids = close.topk(limits.CANDIDATES, dim=1).indices
    pairs = zip(pictures, ids, strict=True)
    return np.array(
        [float(verifier.registered(p[None], training[i]).score.max()) for p, i in pairs]
    )


def _marks(one: dict) -> list[tuple[str, bool]]:
    return [(f"ZNCC {z:.2f}", i in one["escapes"]) for i, z in enumerate(one["zncc"])]


def _line(name: str, one: dict, count: int) -> list[str]:
    sscd = "–" if one["sscd_mean"] is None else (
        f"{one['sscd_mean']:.2f} / {one['sscd_worst']:.2f} / {one['sscd_copies']}"
    )  # fmt: skip
    escapes = len(one["escapes"])
    return [
        name,
        f"{one['zncc_mean']:.2f} / {one['zncc_worst']:.2f} / {one['zncc_copies']}",
        f"{one['score_worst']:.2f} / {one['score_copies']}",
        f"{one['near_worst']:.2f} / {one['near_copies']}",
        sscd,
        f"**{escapes}** ({harness.between(escapes, count)} %)",
        f"{one['subject']:.2f}",
        f"{one['same']} of {one['others']}",
    ]


def main() -> int:
    about = {"out": "eye_results", "first": 460_000}
    parser = harness.parser("benchmarks.eye.guarded", __doc__, **about)
    parser.add_argument("--descriptors", nargs="+", default=["compact", "pixel"])
    parser.add_argument("--cfg", type=float, default=OPTIONS["cfg_scale"])
    arguments = harness.parse(parser)
    arguments.out.mkdir(parents=True, exist_ok=True)
    OPTIONS["cfg_scale"] = arguments.cfg
    watch = harness.Watch()
    try:
        sscd = SSCDInt8()
    except NotInstalled as absent:
        sscd = None
        print(f"Not graded by SSCD: {absent}")
    domain = DemoPrompts(arguments.first)
    count = len(domain.memorised)
    plain = domain.plain(domain.seeds)
    written = {"plain": figures(domain, Watched(plain, [True] * len(plain)), plain, sscd)}
    lines = [_line("plain", written["plain"], count)]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.descriptors:
            descriptor = SSCDStandIn() if name == "sscd_int8" else create(name)
            matcher = domain.matcher(demo.PICTURES, descriptor, Path(folder) / name)
            columns = {"training picture": domain.own, "plain": plain[:count]}
            unguarded = verdict(matcher, plain)
            called = sum(v.copy for v in unguarded[count:])
            drawn = domain.under(matcher, list(range(len(domain.prompts))))
            written[f"main, {name}"] = figures(domain, drawn, plain, sscd)
            alone, alike = without_index(domain, descriptor, plain, Path(folder) / f"{name} alone")
            written[f"Guard, {name}"] = figures(domain, alone, plain, sscd) | {
                "alike": alike,
                "led": alone.led,
            }
            for title, each in ((f"main, {name}", drawn), (f"Guard, {name}", alone)):
                lines.append(_line(title, written[title], count))
                columns[title] = each.pictures[:count]
            marks = {title: _marks(written[title]) for title in (f"main, {name}", f"Guard, {name}")}
            sheet(domain.memorised, columns, marks).save(arguments.out / f"guarded_{name}.png")
            found = sum(v.copy for v in unguarded[:count])
            print(f"{name}: plain memorised called copies {found} of {count}, others {called}")
            ends = [
                f"{min(part):.2f} to {max(part):.2f}" for part in (alike[:count], alike[count:])
            ]
            told_ends = f"keys {ends[0]}, others {ends[1]}"
            print(
                f"  two drawings: {told_ends}; led to another {alone.led} times ({watch.seconds:.0f} s)",
                flush=True,
            )
            written[f"{name}: others called copies when plain"] = called
    heading = [
        f"{count} memorised prompts", f"own ZNCC mean / worst / > {OWN_ZNCC}",
        "second check worst / copies", f"with any of {len(domain.training)}",
        f"own SSCD mean / worst / > {OWN_SSCD}", "escapes", "subject", "others identical",
    ]  # fmt: skip
    table = harness.markdown(heading, lines)
    print("\n" + table)
    harness.write(arguments.out / "guarded", written, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
