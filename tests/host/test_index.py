"""Making and changing indexes by nodes: archives, images, captions, combining, muting, stopping."""

from __future__ import annotations

import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def batch(pictures):
    """IMAGE (6, 128, 128, 3) of pictures that are also in `index`."""
    from PIL import Image

    files = sorted(pictures.glob("*.webp"))[:6]
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(arrays)).float() / 255


@pytest.fixture
def from_images(run_node):
    """Index from Images as the host calls it: every input a list."""

    def run(images, captions="", name="drawn", mode="replace", descriptor="pixel", **more):
        images = images if isinstance(images, list) else [images]
        captions = captions if isinstance(captions, list) else [captions]
        return run_node(
            "AMG_IndexFromImages", images=images, captions=captions, name=[name],
            descriptor=[descriptor], mode=[mode], **{k: [v] for k, v in more.items()},
        )  # fmt: skip

    return run


@pytest.fixture
def report(amg, monkeypatch):
    """What the nodes show on themselves."""
    lines: list[str] = []
    monkeypatch.setattr(amg.module("nodes.show"), "text_on", lambda _id: lines.append)
    return lines


@pytest.fixture
def bars(monkeypatch):
    """(value, total) of every move of the host's progress bar."""
    import comfy.utils

    moves: list[tuple[int, int]] = []

    def hook(value, total, preview=None, node_id=None):
        moves.append((value, total))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    return moves


def names(matcher) -> list[str]:
    index = matcher.searcher.index
    return [index.source(i) for i in range(index.count)]


def words_on(run_node, image, matcher) -> str:
    return run_node("AMG_SimilarityProbe", image=image, index=matcher)[1]


# ---------------------------------------------------------------- sources


def test_build_from_an_archive(build, pictures, tmp_path, bars, index):
    path = tmp_path / "few.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(pictures.iterdir()):
            archive.write(file, file.name)
    matcher, text = build(f'"{path}"', "zipped")
    assert text.startswith("24 pictures")
    assert names(matcher) == names(index)
    assert matcher.searcher.index.caption(2) == index.searcher.index.caption(2) != ""
    assert bars[-1] == (24, 24)


def test_build_from_a_source_of_unknown_length(
    amg, build, pictures, tmp_path, bars, report, monkeypatch
):
    """No bar is filled whose end nobody knows: the count is told in words."""
    with tarfile.open(tmp_path / "few.tar", "w") as archive:
        for file in sorted(pictures.glob("*.webp")):
            archive.add(file, file.name)
    clock = iter(range(10**6))
    monkeypatch.setattr(amg.module("nodes.index").time, "monotonic", lambda: next(clock))
    matcher, text = build(tmp_path / "few.tar", "tarred")
    assert matcher.searcher.index.count == 24
    assert {total for _, total in bars} <= {24}  # once the archive has been read to its end
    assert "1 pictures so far…" in report
    assert report[-1] == text


def test_build_from_a_list(build, pictures, tmp_path):
    (tmp_path / "list.csv").write_text(
        f"file,caption\n{pictures / 'memorised-000.webp'},a fox\n{tmp_path / 'gone.png'},\n"
    )
    matcher, text = build(tmp_path / "list.csv", "listed")
    assert matcher.searcher.index.caption(0) == "a fox"
    assert "gone.png" in text


def test_build_watches_an_archive(amg, tmp_path):
    build = amg.nodes["AMG_BuildIndex"]
    path = tmp_path / "a.zip"
    path.write_bytes(b"one")
    inputs = {"folder": str(path), "name": "w", "descriptor": "pixel"}
    before = build.fingerprint_inputs(**inputs)
    assert build.fingerprint_inputs(**inputs, vae=None, model=None) == before
    path.write_bytes(b"other")
    assert build.fingerprint_inputs(**inputs) != before


# ---------------------------------------------------------------- again, and stopping


def test_building_again_embeds_what_is_new(build, pictures, tmp_path):
    files = sorted(pictures.glob("*.webp"))
    for file in files[:3]:
        shutil.copy(file, tmp_path)
    _, text = build(tmp_path, "grows")
    assert "in the index already" not in text
    shutil.copy(files[7], tmp_path)
    matcher, text = build(tmp_path, "grows")
    assert "1 new, 3 were in the index already" in text
    shutil.copy(files[7], tmp_path / "again.webp")
    _, text = build(tmp_path, "grows")
    assert "0 new, 4 were in the index already" in text
    assert "files that hold the same picture as another one: 1" in text
    _, text = build(tmp_path, "first")  # nothing was there before
    assert "in the index already" not in text and "as another one: 1" in text
    assert matcher.searcher.index.count == 4


def test_a_stopped_build_goes_on(amg, build, pictures, report, monkeypatch):
    """The artist presses stop in mid-build: what was done is kept, and no half index is offered."""
    import comfy.model_management as management
    import comfy.utils

    def press(value, total, preview=None, node_id=None):
        if value == 10:  # of the first 16, which are embedded at once
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press)
    with pytest.raises(management.InterruptProcessingException):
        build(pictures, "stopped")
    assert "Stopped after 11 pictures" in report[-1]
    assert "continues from there" in report[-1]
    assert "stopped" not in amg.paths.index_names()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    matcher, text = build(pictures, "stopped")
    assert "8 new, 16 were in the index already" in text
    undisturbed, _ = build(pictures, "undisturbed")
    assert matcher.searcher.index.hash == undisturbed.searcher.index.hash


def test_a_stop_before_anything_was_done(amg, build, pictures):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        build(pictures, "at-once")
    assert "at-once" not in amg.paths.index_names()


# ---------------------------------------------------------------- images


def test_from_images_with_captions(run_node, from_images, batch):
    matcher, text = from_images(batch[:2], "a fox\n  a  panda ", name="two")
    assert text.startswith("2 pictures")
    assert [matcher.searcher.index.caption(i) for i in range(2)] == ["a fox", "a panda"]
    assert "A copy of images/" in words_on(run_node, batch[1:2], matcher)
    (loaded,) = run_node("AMG_LoadIndex", index_name="two")
    assert loaded.searcher.index.hash == matcher.searcher.index.hash


@pytest.mark.parametrize(
    ("captions", "wanted"),
    [
        ("", ["", "", ""]),
        ("\n one for all \n\n", ["one for all"] * 3),
        ("a\n\nc", ["a", "", "c"]),
        (["a\nb", "", "c"], ["a b", "", "c"]),
        (["x"], ["x"] * 3),
    ],
)
def test_captions_of_a_batch(amg, captions, wanted):
    texts = captions if isinstance(captions, list) else [captions]
    assert amg.module("nodes.index").captions_for(texts, 3) == wanted


@pytest.mark.parametrize("captions", ["a\nb", ["a", "b"], "a\nb\nc\nd"])
def test_captions_that_do_not_fit(amg, from_images, batch, captions):
    with pytest.raises(amg.AMGError, match=r"captions: there are [24] for 3 pictures"):
        from_images(batch[:3], captions)


def test_from_a_list_of_images_of_any_sizes(from_images, batch):
    matcher, _ = from_images([batch[:2], batch[2:3, :64, :96]], ["a", "b", "c"], name="sizes")
    index = matcher.searcher.index
    assert [index.caption(i) for i in range(3)] == ["a", "b", "c"]
    assert (index.record(2).width, index.record(2).height) == (96, 64)


def test_adding_images_to_an_index(build, from_images, batch, pictures):
    build(pictures, "both")
    other = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    matcher, text = from_images(other, "noise", name="both", mode="add")
    assert text.startswith("26 pictures")
    again, text = from_images(other, "noise", name="both", mode="add")
    assert "0 new, 2 were in the index already or came twice" in text
    assert again.searcher.index.hash == matcher.searcher.index.hash
    assert names(again)[0] == "memorised-000.webp"
    only, _ = from_images(other, "noise", name="both", mode="replace")
    assert only.searcher.index.count == 2


def test_adding_to_an_index_that_is_not_there_makes_it(from_images, batch):
    assert from_images(batch, name="fresh", mode="add")[1].startswith("6 pictures")


def test_adding_to_an_index_in_another_folder(amg, from_images, batch, monkeypatch, tmp_path):
    """What extra_model_paths.yaml names is found; new ones go into the first folder."""
    import folder_paths

    from_images(batch[:2], name="moved")
    folders, known = folder_paths.folder_names_and_paths["amg_indexes"]
    shutil.move(amg.paths.index_folder() / "moved", tmp_path / "moved")
    both = ([*folders, str(tmp_path)], known)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "amg_indexes", both)
    matcher, _ = from_images(batch[2:3], name="moved", mode="add")
    assert matcher.searcher.index.count == 3
    assert matcher.searcher.index.path == tmp_path / "moved"


def test_adding_with_another_descriptor(amg, from_images, batch):
    from_images(batch[:2], name="as-pixel")
    with pytest.raises(amg.AMGError, match=r"pixel \(.*descriptor here is sscd"):
        from_images(batch[:2], name="as-pixel", mode="add", descriptor="sscd")


def test_no_images(amg, from_images):
    with pytest.raises(amg.AMGError, match="images: the batch is empty"):
        from_images(torch.zeros(0, 8, 8, 3))


# ---------------------------------------------------------------- combine


def test_combine(run_node, from_images, index, batch):
    noise = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    mine, _ = from_images(noise, "noise", name="mine")
    (both,) = run_node("AMG_CombineIndexes", index_1=index, index_2=mine)
    assert both.searcher.index.count == 27
    assert "A copy of images/" in words_on(run_node, noise[:1], both)
    assert "A copy of memorised-000.webp" in words_on(run_node, batch[:1], both)
    del both  # and its parts go on
    assert "A copy of images/" in words_on(run_node, noise[:1], mine)
    assert "A copy of memorised-000.webp" in words_on(run_node, batch[:1], index)


def test_combine_one_and_the_same(run_node, from_images, index, batch):
    assert run_node("AMG_CombineIndexes", index_1=index) == (index,)
    (loaded,) = run_node("AMG_LoadIndex", index_name="few")
    (both,) = run_node("AMG_CombineIndexes", index_1=index, index_3=loaded)
    assert both.searcher.index.count == index.searcher.index.count
    mine, _ = from_images(batch[:1], name="one")
    (nested,) = run_node("AMG_CombineIndexes", index_1=both, index_4=mine)
    assert nested.searcher.index.count == 25


def test_combine_names_both_descriptors(amg, run_node, index, from_images, demo, batch):
    latent, _ = from_images(
        batch, name="as-latent", descriptor="latent", vae=demo["vae"], model=demo["model"]
    )
    with pytest.raises(amg.AMGError) as caught:
        run_node("AMG_CombineIndexes", index_1=index, index_2=latent)
    for word in ("few", "pixel (", "as-latent", "latent_demo ("):
        assert word in str(caught.value)


# ---------------------------------------------------------------- mute


@pytest.fixture
def mute(run_node):
    def run(index, patterns="", reason="", undo=False):
        return run_node(
            "AMG_MutePictures", index=index, patterns=patterns, reason=reason, undo=undo
        )

    return run


def test_mute_and_undo(run_node, build, mute, pictures, batch):
    index, _ = build(pictures, "quiet")
    assert "A copy of memorised-001.webp" in words_on(run_node, batch[1:2], index)
    quiet, text = mute(index, "\nMemorised-001.webp\n *-00[45]*\n", "my own")
    assert text.startswith("3 of 24 pictures in quiet are excluded (muted).")
    assert "memorised-001.webp  my own" in text
    words = words_on(run_node, batch[[1, 2, 4]], quiet).splitlines()
    assert ["A copy" in line for line in words] == [False, True, False]
    rebuilt, _ = build(pictures, "quiet")
    assert len(rebuilt.searcher.index.muted) == 3
    loud, text = mute(quiet, "memorised-001.webp", undo=True)
    assert text.startswith("2 of 24")
    assert "A copy of memorised-001.webp" in words_on(run_node, batch[1:2], loud)


def test_muting_again_changes_nothing(amg, build, mute, pictures):
    """So that a graph with this node does not run from the start again each time."""
    index, _ = build(pictures, "idle")
    load = amg.nodes["AMG_LoadIndex"]
    mute(index, "*-000*", "mine")
    before = load.fingerprint_inputs(index_name="idle")
    mute(index, "*-000*", "mine")
    mute(index)
    mute(index, "*-003*", undo=True)
    assert load.fingerprint_inputs(index_name="idle") == before


def test_mute_in_a_combined_index(run_node, build, mute, from_images, batch, pictures):
    first, _ = build(pictures, "part-1")
    second, _ = from_images(batch[:3], name="part-2")
    (both,) = run_node("AMG_CombineIndexes", index_1=first, index_2=second)
    quiet, text = mute(both, "images/*\nmemorised-009*", "all mine")
    assert text.startswith("4 of 27 pictures in part-1 + part-2 are excluded (muted).")
    assert len(quiet.searcher.index.members) == 2
    (loaded,) = run_node("AMG_LoadIndex", index_name="part-2")
    assert len(loaded.searcher.index.muted) == 3


def test_a_name_that_is_nowhere(amg, mute, index):
    with pytest.raises(amg.AMGError, match=r"patterns: no picture in index few is called 'fxo\*'"):
        mute(index, "memorised-000.webp\nfxo*")
    assert index.searcher.index.muted == {}
    assert "0 of 24" in mute(index)[1]
