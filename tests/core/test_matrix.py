"""The benchmark of guiders and samplers: its rule against escapes can fail."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from amg_core.similarity import verdict
from benchmarks import matrix


@pytest.mark.parametrize("outcome", [verdict.COPY, verdict.NO_COPY, verdict.CANNOT_TELL])
def test_only_a_copy_that_is_called_none_is_an_escape(monkeypatch, outcome):
    stored = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(matrix.host, "module", import_module)
    domain = SimpleNamespace(
        stored=stored,
        vae=SimpleNamespace(decode=lambda latents: stored[:1].movedim(1, -1)),
        _keep=lambda *_: None,
    )
    written = {"verdicts": [{"outcome": outcome, "score": 0.1, "zncc": 0.2}]}
    cell = matrix.Cell("CFGGuider", "euler", "plain", 0, 0)
    found = matrix.Domain._copies(domain, cell, torch.zeros(1), written, "guarded")
    assert matrix._print(Counter(cells=1) + found) == (outcome == verdict.NO_COPY)


def test_pictures_that_are_no_copy_are_no_escape(monkeypatch):
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(matrix.host, "module", import_module)
    domain = SimpleNamespace(
        stored=pictures[:1],
        vae=SimpleNamespace(decode=lambda latents: pictures[1:].movedim(1, -1)),
    )
    written = {"verdicts": [{"outcome": verdict.NO_COPY}]}
    cell = matrix.Cell("CFGGuider", "euler", "plain", 0, 0)
    found = matrix.Domain._copies(domain, cell, torch.zeros(1), written, "guarded")
    assert matrix._print(Counter(cells=1) + found) == 0


def test_what_is_not_equal_is_counted():
    assert matrix._print(Counter(cells=1, **{"not equal": 1})) == 1
