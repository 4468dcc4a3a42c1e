"""Small work runs on one core, and no other thread of the host notices."""

from __future__ import annotations

import threading

import pytest
import torch

from amg_core import threads
from amg_core.descriptors import create
from amg_core.images import low_pass, resize
from amg_core.index import exact
from amg_core.similarity import verifier

MANY = 3


@pytest.fixture(autouse=True)
def many():
    """All threads may compute on three cores, whatever the machine has."""
    if threads._limit() is None:
        pytest.skip("the number of threads cannot be changed for one thread alone here")
    before = torch.get_num_threads()
    torch.set_num_threads(MANY)
    yield
    torch.set_num_threads(before)


def elsewhere(work) -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def of_a_new_thread() -> int:
    torch.ones(9).sum()
    return torch.get_num_threads()


def test_only_the_calling_thread_is_limited():
    with threads.one_thread():
        assert torch.get_num_threads() == 1
        assert elsewhere(of_a_new_thread) == MANY  # it keeps for good what it gets now
    assert torch.get_num_threads() == MANY


def test_it_is_restored_after_an_error_and_when_nested():
    with pytest.raises(ZeroDivisionError), threads.one_thread(), threads.one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == MANY


def test_without_openmp_nothing_happens(monkeypatch):
    monkeypatch.setattr(threads, "_limit", lambda: None)
    with threads.one_thread():
        assert torch.get_num_threads() == MANY


def counted(monkeypatch, module, name) -> list[int]:
    """The number of threads at each call of a function."""
    seen, function = [], getattr(module, name)

    def counting(*arguments, **options):
        seen.append(torch.get_num_threads())
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return seen


def test_the_checks_of_a_picture_take_one_core(monkeypatch):
    picture = torch.rand(1, 3, 80, 90)
    seen = counted(monkeypatch, torch.nn.functional, "avg_pool2d")
    verifier.registered(picture, [torch.rand(3, 64, 64)])
    verifier.flat(picture)
    assert seen and set(seen) == {1}
    seen = counted(monkeypatch, torch.nn.functional, "interpolate")
    seen += counted(monkeypatch, torch.nn.functional, "adaptive_avg_pool2d")
    resize(picture, 32)
    low_pass(picture, 16)
    assert set(seen) == {1}
    assert torch.get_num_threads() == MANY


def test_large_work_takes_all_cores(monkeypatch):
    compact = create("compact")
    seen = []
    compact.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    compact.embed(torch.rand(2, 3, 96, 96), 96)
    compact.embed(torch.rand(4, 3, 96, 96), 96)
    assert seen == [1, MANY]

    rows = exact.Resident(torch.rand(50, 8).numpy(), torch.device("cpu"))
    seen = counted(monkeypatch, exact, "_scores")
    none = torch.empty(0, dtype=torch.int64)
    first = exact.nearest(torch.rand(2, 8), rows, 3, False, none)
    monkeypatch.setattr(exact, "SMALL", 100)
    exact.nearest(torch.rand(2, 8), rows, 3, False, none)
    assert seen == [1, MANY] and len(first) == 2
