"""clip-retrieval folders, written here as its code writes them, and the index made of them."""

import sys

import numpy as np
import pytest
import torch

from amg_core.descriptors import create, for_spec
from amg_core.errors import AMGError
from amg_core.index import Index
from amg_core.index import clip_retrieval as cr
from amg_core.index.search import Searcher

DIM = 16


@pytest.fixture(autouse=True)
def any_width(monkeypatch, request):
    """Small vectors will do, but where widths are the question."""
    if "width" not in request.node.name:
        monkeypatch.setattr(cr, "WIDTHS", {})


def vectors(count, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 3, (count, dtype and DIM)).astype(dtype)


def tables(folder, counts, columns=("image_path", "caption", "url")):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in counts.items():
        ids = range(first, first + count)
        every = {
            "image_path": [f"pictures/ä {i}.jpg" for i in ids],
            "caption": [None if i == 1 else f"caption {i}" for i in ids],
            "url": [f"https://example.org/{i}" for i in ids],
            "key": [f"{i:09d}" for i in ids],
            "width": [640 + i for i in ids],
            "height": [480] * count,
        }
        table = pa.table({name: every[name] for name in columns})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet", row_group_size=3)
        first += count


def embeddings(folder, counts, dtype=np.float16):
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    parts = []
    for number, count in counts.items():
        parts.append(vectors(count, number, dtype))
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", parts[-1])
    return np.concatenate(parts).astype(np.float32)


COUNTS = {0: 7, 2: 1, 10: 5}  # in the order of numbers, not of letters


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "laion"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("block", [4, 1 << 14])
def test_import(folder, tmp_path, dtype, block, monkeypatch):
    monkeypatch.setattr(cr, "BLOCK", block)
    given = embeddings(folder, COUNTS, dtype)
    tables(folder, COUNTS)
    seen = []
    report = cr.import_clip_retrieval(
        folder, tmp_path / "index", progress=lambda *done: seen.append(done)
    )
    assert report.count == 13 and not report.skipped and not report.notes
    assert seen[-1] == (13, 13, "pictures/ä 12.jpg")
    with Index.open(tmp_path / "index") as index:
        assert index.hash == report.hash and index.count == 13
        assert index.spec == cr.spec_of("ViT-B/32")
        assert (index.spec.id, index.spec.preprocessing, index.spec.scales) == (
            "clip_vit_b_32", "clip-retrieval-quick_gelu/1", (224,),
        )  # fmt: skip
        rows = np.asarray(index.rows(224)[0:13], np.float32)
        unit = given / np.linalg.norm(given, axis=1, keepdims=True)
        np.testing.assert_allclose(rows, unit, atol=1e-3)
        assert [index.source(i) for i in (0, 7, 12)] == [f"pictures/ä {i}.jpg" for i in (0, 7, 12)]
        assert index.caption(0) == "caption 0" and index.caption(1) == ""
        assert len({record.sha256 for record in index.records()}) == 13
        with pytest.raises(AMGError):
            index.thumbnail(0)
        values, ids = Searcher(index).nearest(torch.from_numpy(given[[9, 3]]), 224, 2)
        assert ids[:, 0].tolist() == [9, 3] and values[:, 0].min() > 0.999


def test_shards_are_cut_and_a_second_import_replaces(folder, tmp_path, monkeypatch):
    from amg_core.index import writer

    monkeypatch.setattr(writer, "ROWS_PER_SHARD", 4)
    given = embeddings(folder, COUNTS)
    first = cr.import_clip_retrieval(folder, tmp_path / "index")
    assert len(list((tmp_path / "index" / "shards").iterdir())) == 4
    assert first.notes and "no captions" in first.notes[0]
    with Index.open(tmp_path / "index") as index:
        unit = given / np.linalg.norm(given, axis=1, keepdims=True)
        np.testing.assert_allclose(index.rows(224)[0:13].astype(np.float32), unit, atol=1e-3)
        assert index.source(12) == "img_emb_10#4"
    again = cr.import_clip_retrieval(folder, tmp_path / "index", replace_index=True)
    assert again.hash == first.hash
    with pytest.raises(AMGError, match="all of it would be replaced"):
        cr.import_clip_retrieval(folder, tmp_path / "index")


def test_vectors_of_another_width_are_refused(folder, tmp_path):
    embeddings(folder, {0: 2})
    for model, width in (("ViT-B/32", 512), ("open_clip:ViT-H-14", 1024), ("ViT-L/14@336px", 768)):
        with pytest.raises(AMGError, match=f"16 values, and .* makes {width}"):
            cr.import_clip_retrieval(folder, tmp_path / "index", model)
    assert not (tmp_path / "index").exists()


def test_unusable_rows_are_reported(folder, tmp_path):
    given = embeddings(folder, {0: 4}, np.float32)
    given[1], given[2, 3] = 0, np.nan
    np.save(folder / "img_emb" / "img_emb_0.npy", given)
    report = cr.import_clip_retrieval(folder, tmp_path / "index")
    assert report.count == 2 and [name for name, _ in report.skipped] == [
        "img_emb_0#1",
        "img_emb_0#2",
    ]
    np.save(folder / "img_emb" / "img_emb_0.npy", given[1:3])
    with pytest.raises(AMGError, match="no usable embedding"):
        cr.import_clip_retrieval(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(("key", "url"), "https://example.org/2"), (("key", "caption"), "000000002"),
     (("image_path", "url"), "pictures/ä 2.jpg"), (("caption",), "metadata_0#2")],
)  # fmt: skip
def test_what_names_a_row(folder, columns, expected):
    embeddings(folder, {0: 3})
    tables(folder, {0: 3}, columns)
    ((_, records),) = cr.read_clip_retrieval(folder)
    expected = expected.replace("metadata_0", "img_emb_0")
    assert records[2].source == expected


def test_bare_vectors_and_the_folder_inside(folder):
    embeddings(folder, COUNTS)
    tables(folder, COUNTS)
    inside = list(cr.read_clip_retrieval(folder / "img_emb"))
    assert sum(len(rows) for rows, _ in inside) == 13
    assert inside[0][1][0].caption == "caption 0" and inside[0][1][0].width == 0
    np.save(folder / "one.npy", vectors(3))
    (folder / "img_emb").rename(folder / "gone")
    with pytest.raises(AMGError, match="do not belong together"):
        cr.look(folder)


def test_damaged_and_odd_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(AMGError, match="not a folder"):
        cr.look(folder)
    folder.mkdir()
    with pytest.raises(AMGError, match="holds no embeddings"):
        cr.look(folder)
    embeddings(folder, {0: 3, 1: 3})
    tables(folder, {0: 3, 1: 2})
    with pytest.raises(AMGError, match=r"metadata_1\.parquet has 2 rows.*incomplete"):
        list(cr.read_clip_retrieval(folder))
    tables(folder, {0: 3, 1: 3})
    (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(AMGError, match=r"metadata_1\.parquet is not parquet, or is damaged"):
        cr.import_clip_retrieval(folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    np.save(folder / "img_emb" / "img_emb_1.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(AMGError, match=r"img_emb_1\.npy is damaged"):
        list(cr.read_clip_retrieval(folder))
    np.save(folder / "img_emb" / "img_emb_1.npy", np.zeros((3, DIM + 1), np.float16))
    with pytest.raises(AMGError, match="several sizes"):
        list(cr.read_clip_retrieval(folder))
    for wrong in (np.zeros(3, np.float32), np.zeros((3, DIM), np.int64)):
        np.save(folder / "img_emb" / "img_emb_1.npy", wrong)
        with pytest.raises(AMGError, match="not rows of embeddings"):
            list(cr.read_clip_retrieval(folder))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    embeddings(folder, {0: 3, 1: 3})
    with pytest.raises(AMGError, match="pip install pyarrow"):
        list(cr.read_clip_retrieval(folder))


@pytest.mark.parametrize("kind", ["Flat", "SQfp16", "IVF4,Flat", "HNSW8,Flat"])
def test_faiss_files_give_their_vectors_back(folder, tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    given = vectors(200)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(given)
    index.add(given)
    folder.mkdir()
    (folder / "image.index").write_bytes(faiss.serialize_index(index).tobytes())
    tables(folder, {0: 120, 1: 80})
    assert cr.import_clip_retrieval(folder, tmp_path / "index").count == 200
    with Index.open(tmp_path / "index") as made:
        np.testing.assert_allclose(made.rows(224)[0:200].astype(np.float32), given, atol=2e-3)
        assert made.caption(150) == "caption 150"
    tables(folder, {0: 100})
    with pytest.raises(AMGError, match="do not belong together"):
        list(cr.read_clip_retrieval(folder))


def test_compressed_faiss_files_are_refused_by_type(folder):
    faiss = pytest.importorskip("faiss")
    given = vectors(400)
    folder.mkdir()
    for kind, name in (("PQ4x4", "IndexPQ"), ("IVF4,PQ4x4", "IndexIVFPQ"),
                       ("SQ8", "IndexScalarQuantizer")):  # fmt: skip
        index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(given)
        index.add(given)
        (folder / "image.index").write_bytes(faiss.serialize_index(index).tobytes())
        with pytest.raises(AMGError, match=f"{name}: it holds compressed codes"):
            list(cr.read_clip_retrieval(folder))
    (folder / "image.index").write_bytes(b"nothing of the kind")
    with pytest.raises(AMGError, match=r"image\.index is damaged"):
        list(cr.read_clip_retrieval(folder))


def test_models_are_told_apart():
    specs = {name: cr.spec_of(name) for name in (
        "ViT-B/32", "ViT-L/14", "ViT-L/14@336px", "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "open_clip:ViT-B-32-quickgelu", "open_clip:ViT-H-14", "open_clip:ViT-L-14/openai",
    )}  # fmt: skip
    assert specs["ViT-B/32"] == specs["open_clip:ViT-B-32-quickgelu"]
    assert specs["ViT-L/14"] == specs["open_clip:ViT-L-14/openai"] != specs["ViT-L/14@336px"]
    assert specs["open_clip:ViT-B-32/laion2b_s34b_b79k"].preprocessing == "clip-retrieval-gelu/1"
    assert specs["open_clip:ViT-H-14"].id == "clip_vit_h_14"
    with pytest.raises(AMGError, match="names no CLIP"):
        cr.spec_of("resnet50")


def test_an_imported_index_takes_weights_of_its_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    sizes = {"hidden_size": 768, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 12, "image_size": 224, "projection_dim": DIM}  # fmt: skip
    for patch in (32, 16):
        config = transformers.CLIPVisionConfig(**sizes, patch_size=patch)
        state = transformers.CLIPVisionModelWithProjection(config).state_dict()
        save_file(dict(state), tmp_path / f"b{patch}.safetensors")
    spec = cr.spec_of("ViT-B/32")
    made = for_spec(spec, tmp_path / "b32.safetensors")
    assert made.spec == spec and made.embed(torch.rand(1, 3, 64, 64), 224).shape == (1, DIM)
    with pytest.raises(AMGError, match="clip_vit_b_16"):
        for_spec(spec, tmp_path / "b16.safetensors")
    assert create("clip", tmp_path / "b32.safetensors").spec != spec
