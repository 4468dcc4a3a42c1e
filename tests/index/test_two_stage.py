"""Two-stage search against brute force over the same candidates."""

import pytest
import torch
from torch.nn import functional as F

from amg_core.descriptors import DescriptorSpec, create
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.index import build
from amg_core.index.picture import Unreadable, load_picture
from amg_core.index.reader import Index
from amg_core.index.search import Searcher
from amg_core.index.two_stage import TwoStage

from .helpers import fill

COUNT = 24


class TinyClip:
    """A random projection of an 8x8 picture, unit rows: a coarse descriptor that is wrong enough."""

    space = "picture"
    spec = DescriptorSpec("clip_vit_tiny_8", "cosine", "random/1", (8,), "ab" * 32)

    def __init__(self):
        self.weights = torch.randn(192, 6, generator=torch.Generator().manual_seed(2))

    def embed(self, pictures, scale):
        small = F.adaptive_avg_pool2d(pictures.float(), scale).flatten(1) - 0.5
        return F.normalize(small @ self.weights)

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    fill(folder, COUNT)
    clip = TinyClip()
    build(folder, folder.parent / "index", clip)
    index = Index.open(folder.parent / "index")

    def picture(i):
        return to_tensor(load_picture(folder / index.source(i)).pixels)[0]

    yield clip, Searcher(index), picture
    index.close()


class Counting:
    def __init__(self, picture, gone=(), error=None):
        self.picture, self.gone, self.error, self.asked = picture, gone, error, []

    def __call__(self, i):
        self.asked.append(i)
        if i not in self.gone:
            return self.picture(i)
        if self.error is not None:
            raise self.error
        return None


def query(seed):
    draw = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 4, 4, generator=draw)
    return F.interpolate(small, size=(33, 47), mode="bilinear").clamp(0, 1)


@pytest.mark.parametrize("candidates", [1, 7, 1000])
def test_against_brute_force_over_the_candidates(scene, candidates):
    clip, coarse, picture = scene
    fine = create("pixel")
    search = TwoStage(coarse, clip, fine, picture, candidates, batch=4)
    for seed in range(5):
        (found,) = search.search(query(seed), 5)
        _, near = coarse.nearest(clip.embed(query(seed), 8), 8, candidates)
        every = {
            i: (fine.embed(query(seed), 32) - fine.embed(picture(i)[None], 32)).norm().item()
            for i in near[0].tolist()
        }
        best = sorted(every, key=lambda i: (every[i], i))[:5]
        assert found.ids.tolist() == best and found.missing == ()
        assert found.values.tolist() == pytest.approx([every[i] for i in best], rel=1e-5)


def test_cosine_is_ranked_downwards(scene):
    clip, coarse, picture = scene
    (found,) = TwoStage(coarse, clip, clip, picture).search(query(0), COUNT)
    values, ids = coarse.nearest(clip.embed(query(0), 8), 8, COUNT)
    assert found.ids.tolist() == ids[0].tolist()
    torch.testing.assert_close(found.values, values[0], rtol=0, atol=2e-3)  # rows are float16


@pytest.mark.parametrize("error", [None, Unreadable("gone"), FileNotFoundError("gone")])
def test_pictures_that_cannot_be_had_are_counted(scene, error):
    clip, coarse, picture = scene
    pictures = Counting(picture, gone=(3, 11), error=error)
    search = TwoStage(coarse, clip, create("pixel"), pictures)
    (found,) = search.search(query(1), COUNT)
    assert found.missing == (3, 11) and len(found.ids) == COUNT - 2
    assert not set(found.ids.tolist()) & {3, 11}
    search.search(query(2), 1)
    assert len(pictures.asked) == COUNT, "nothing is asked for twice"
    (nothing,) = TwoStage(coarse, clip, create("pixel"), lambda i: None).search(query(1), 3)
    assert len(nothing.values) == len(nothing.ids) == 0 and len(nothing.missing) == COUNT


def test_cache_is_bounded_and_changes_nothing(scene):
    clip, coarse, picture = scene
    pictures = Counting(picture)
    small = TwoStage(coarse, clip, create("pixel"), pictures, 10, batch=3, cached=6)
    large = TwoStage(coarse, clip, create("pixel"), picture, 10, batch=8)
    for seed in (0, 1, 0):
        (a,), (b,) = small.search(query(seed), 10), large.search(query(seed), 10)
        assert torch.equal(a.values, b.values) and torch.equal(a.ids, b.ids)
    assert len(small._cache) <= 6 and len(pictures.asked) > 10


def test_a_batch_is_its_members(scene):
    clip, coarse, picture = scene
    queries = torch.cat([query(seed) for seed in range(3)])
    search = TwoStage(coarse, clip, create("pixel"), picture, 9)
    for one, ranked in zip(queries, search.search(queries, 4), strict=True):
        fresh = TwoStage(coarse, clip, create("pixel"), picture, 9)
        (alone,) = fresh.search(one[None], 4)
        assert torch.equal(alone.values, ranked.values) and torch.equal(alone.ids, ranked.ids)


def test_another_clip_is_refused(scene):
    _, coarse, picture = scene
    with pytest.raises(AMGError, match="clip_vit_tiny_8"):
        TwoStage(coarse, create("pixel"), create("pixel"), picture)
    with pytest.raises(ValueError, match="at least 1"):
        TwoStage(coarse, TinyClip(), create("pixel"), picture, 0)
