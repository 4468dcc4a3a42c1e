"""A descriptor is one `Kind`: what a toy says about itself is all that the program needs to know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from amg_core import limits
from amg_core.decoders import LinearDecoder
from amg_core.descriptors import DescriptorSpec, create, for_spec, registry
from amg_core.descriptors.registry import (
    Kind,
    Weights,
    described,
    for_index,
    for_new,
    guarding,
    kinds,
    named,
    register,
)  # fmt: skip
from amg_core.errors import AMGError
from amg_core.images import low_pass, to_tensor
from amg_core.index import Index, build
from amg_core.index.picture import load_picture
from amg_core.index.search import Searcher
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from index_tools import cli, dedup
from tests.index.helpers import fill

# ---------------------------------------------------------------- the toy, as its file would be


class Grey:
    """Grey pictures of `cells` cells a side, without their mean: (B, cells²) unit rows.

    Its "weights" are a file with the name of a channel.
    """

    space = "picture"

    def __init__(self, channel: int, cells: int = 8, scales=None) -> None:
        if not 2 <= cells <= 16:
            raise ValueError(f"cells are 2 to 16, not {cells}")
        self.channel, self.cells = channel, cells
        hashed = f"{channel}" * 64
        self.spec = DescriptorSpec("grey", "cosine", f"c{cells}/1", tuple(scales or (16,)), hashed)

    @classmethod
    def from_file(cls, path: Path | None, cells: int | str = 8, scales=None) -> Grey:
        if path is None:
            raise AMGError("No channel for grey: give a file.")
        return cls("rgb".index(path.read_text()), int(cells), scales)

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None) -> Grey:
        return cls.from_file(path, re.fullmatch(r"c(\d+)/1", spec.preprocessing)[1], spec.scales)

    def embed(self, pictures, scale):
        seen = low_pass(low_pass(pictures[:, self.channel : self.channel + 1], scale), self.cells)
        rows = seen.flatten(1)
        return F.normalize(rows - rows.mean(dim=1, keepdim=True))

    def to(self, device):
        return self


KIND = Kind(
    name="grey",
    description="one channel, very small.",
    descriptor=Grey,
    levels={16: ((0.5, 0.9),) * 5},
    duplicates=0.95,
    weights=Weights("channel", (("toys", "grey*"),)),
    options={"cells": "cells a side of grey"},
)

# ---------------------------------------------------------------- what follows from it


@pytest.fixture(autouse=True)
def known():
    register(KIND)
    yield
    registry._known.cache_clear()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "grey-g.txt"
    path.write_text("g")
    return path


@pytest.fixture
def find(tmp_path, file):
    """A host that finds two files by the name, of which the second is the one."""
    (tmp_path / "grey-b.txt").write_text("b")
    (tmp_path / "other.txt").write_text("r")

    def found(kind):
        listed = kind.weights.among(lambda place: [p.name for p in tmp_path.glob("*.txt")])
        assert all(place == "toys" for place, _ in listed)
        return [tmp_path / name for _, name in listed]

    return found


def test_it_builds_opens_probes_and_judges(tmp_path, file, find):
    pictures = fill(tmp_path / "pictures", 6)
    build(pictures, tmp_path / "index", create("grey", file, cells=6))
    with Index.open(tmp_path / "index") as index:
        assert index.spec.kind == "grey"
        descriptor = for_index(index.spec, find)
        assert descriptor.spec == index.spec and descriptor.cells == 6
        matcher = Matcher(Searcher(index), descriptor, LinearDecoder(torch.eye(3)))
        assert limits.levels(index.spec, 16, index.count) == (0.5, 0.9)
        own = to_tensor(load_picture(pictures / "p003.png").pixels)
        match = matcher.match_pictures(own)
        assert index.source(int(match.ids)) == "p003.png" and match.score > 0.99
        latent = own * 2 - 1
        gradient, similarity = matcher.gradient(latent, matcher.match(latent, 0.01))
        assert gradient.abs().sum() > 0 and similarity > 0.99
        other = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(1))
        assert [v.copy for v in verdict(matcher, torch.cat([own, other]))] == [True, False]
        assert dedup.default_threshold(index.spec) == 0.95


def test_the_command_line_takes_it(tmp_path, file, capsys):
    pictures = fill(tmp_path / "pictures", 3)
    made = ["build", str(pictures), str(tmp_path / "index")]
    grey = ["--descriptor", "grey", "--weights", str(file), "--cells", "5"]
    assert cli.main([*made, *grey]) == 0
    with Index.open(tmp_path / "index") as index:
        assert index.spec.preprocessing == "c5/1"
    assert cli.main([*made, "--cells", "5"]) == 1
    assert "--cells can only be used with --descriptor grey" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["build", "--help"])
    report = " ".join(capsys.readouterr().out.split())
    assert "grey: one channel, very small." in report and "grey's channel" in report


def test_it_is_offered_last(file):
    assert [kind.name for kind in kinds()] == [*registry.MODULES, "grey"]
    ours = [named(name) for name in registry.MODULES]
    pictures = [kind.name for kind in ours if kind.guards and kind.space == "picture"]
    assert [kind.name for kind in guarding()] == [*pictures, "grey"]
    last = [kind for kind in ours if kind.guards][-1]
    assert described(guarding(latents=True)).endswith(
        f"{last.name}: {last.description} grey: one channel, very small."
    )


def test_weights_are_found_by_name(file, find):
    assert for_new("grey", find).channel == 2  # the first by name
    assert for_index(create("grey", file).spec, find).channel == 1
    spec = Grey(0).spec
    with pytest.raises(AMGError, match="other weights of grey than"):
        for_index(spec, find)
    with pytest.raises(AMGError, match="No channel for grey"):
        for_index(spec, lambda kind: [])


def test_what_does_not_fit_is_refused(file):
    with pytest.raises(AMGError, match="grey cannot be made: cells are 2 to 16, not 90"):
        create("grey", file, cells=90)
    with pytest.raises(AMGError, match="grey cannot be made: cells are 2 to 16, not 90"):
        for_spec(DescriptorSpec("grey", "cosine", "c90/1", (16,)), file)
    with pytest.raises(AMGError, match="Unknown descriptor 'dino': choose one of compact"):
        create("dino")
    with pytest.raises(AMGError, match="dino_v9, which this version does not have"):
        for_index(DescriptorSpec("dino_v9", "cosine", "", (224,)), lambda kind: [])
    with pytest.raises(ValueError, match="already a descriptor"):
        register(KIND)


# ---------------------------------------------------------------- those in the box


@pytest.mark.parametrize("name", registry.MODULES)
def test_each_says_all_about_itself(name):
    kind = named(name)
    assert kind.description.endswith(".") and ": " not in kind.description
    assert kind.space in ("picture", "latent")
    assert set(kind.usual) <= set(kind.levels)


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("pixel", {"amg": ["pixel.pt"]}, []),
        (
            "sscd",
            {"amg": ["sscd_disc_mixup.torchvision.pt", "sscd_disc_large.pt", "x.pt"]},
            [("amg", "sscd_disc_mixup.torchvision.pt")],
        ),
        (
            "clip",
            {"amg": ["x.pt", "clip_b.pt"], "clip_vision": ["b.safetensors", "sub/a.pt"]},
            [("amg", "clip_b.pt"), ("clip_vision", "b.safetensors"), ("clip_vision", "sub/a.pt")],
        ),
        (
            "latent",
            {"vae_approx": ["taesd_decoder.pth", "sub/taesd_encoder.pth", "vae_encoder.pth"]},
            [("vae_approx", "sub/taesd_encoder.pth")],
        ),
    ],
)
def test_where_weights_are_looked_for(name, files, found):
    assert named(name).weights.among(lambda place: files.get(place, ())) == found
