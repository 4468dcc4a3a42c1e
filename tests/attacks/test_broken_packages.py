"""A package that is installed and cannot be imported is an error with a next step, or done without."""

from __future__ import annotations

import importlib
import io
import logging
import sys

import numpy as np
import pytest
import torch

from amg_core import optional as module
from amg_core.errors import AMGError
from amg_core.index import Index, build, search
from amg_core.index.search import Searcher
from amg_core.index.sources import open_source
from index_tools import captions, evaluate, terminal
from tests.index.helpers import fill

FAULTS = {
    "DLL": "raise OSError('libcublas.so.12: cannot open shared object file')",
    "numpy": "raise AttributeError('_ARRAY_API not found')",
    "own": "raise ImportError('numpy.core.multiarray failed to import')",
    "needs": "import a_package_that_is_not_there",
    "clash": "raise RuntimeError('two runtimes')",
}


@pytest.fixture(params=FAULTS)
def broken(request, tmp_path, monkeypatch):
    """``broken(name)`` puts such a package where the real one would be."""
    monkeypatch.setattr(module, "_broken", {})
    importlib.invalidate_caches()

    def put(name: str) -> None:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(FAULTS[request.param])
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for known in [key for key in sys.modules if key.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)

    return put


@pytest.fixture
def index(tmp_path, pixel, monkeypatch):
    monkeypatch.setattr(search, "FEW", 3)
    monkeypatch.setattr(search.sys, "platform", "linux")
    build(fill(tmp_path / "in", 6), tmp_path / "out", pixel)
    with Index.open(tmp_path / "out") as opened:
        yield opened


def test_searches_go_on_without_faiss(index, broken, caplog):
    broken("faiss")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            searcher = Searcher(index)
            assert searcher.prepare(16) == "exact"
            row = torch.from_numpy(np.asarray(index.rows(16)[2:3])).float()
            assert searcher.nearest(row, 16, 1)[1].item() == 2
    (report,) = [record for record in caplog.records if "faiss" in record.getMessage()]
    assert "installed but cannot be used" in report.getMessage()


def test_a_chosen_engine_names_what_is_broken(index, broken):
    broken("faiss")
    with pytest.raises(
        AMGError, match=r"pq4 needs faiss, which is installed but cannot be used.*pip"
    ):
        Searcher(index, engine="pq4")


def test_parquet(tmp_path, broken):
    broken("pyarrow")
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(AMGError, match=r"list\.parquet needs pyarrow, which is installed.*again"):
        open_source(tmp_path / "list.parquet")


def test_transformers(tmp_path, broken):
    broken("transformers")
    for load in (captions.text_encoder, evaluate.clip_scorer):
        with pytest.raises(AMGError, match=r"needs transformers, which is installed.*again"):
            load(tmp_path)


def test_the_bar(broken):
    broken("tqdm")
    stream = io.StringIO()
    terminal.progress_printer(stream)(4, 4, "a")
    assert stream.getvalue().startswith("4/4 pictures")


def test_a_package_that_breaks_when_its_parts_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_broken", {})
    (tmp_path / "lazy_one.py").write_text("def __getattr__(name): raise RuntimeError('late')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AMGError, match=r"lazy_one, which is installed but cannot be used.*late"):
        module.needed("lazy_one", "This", "pip install it", ["Part"])


def test_absent_is_not_broken(monkeypatch, caplog):
    monkeypatch.setattr(module, "_broken", {})
    assert module.optional("a_package_that_is_not_there") is None and caplog.records == []
    with pytest.raises(AMGError, match="needs a_package_that_is_not_there: pip install it"):
        module.needed("a_package_that_is_not_there", "This", "pip install it")
