"""The embedded model: it memorises, the guard prevents it, and elsewhere nothing changes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amg_core import limits, presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import create
from amg_core.images import low_pass
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.messages import words
from amg_core.retry import until_no_copy
from amg_core.run import SamplingRun
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import CANNOT_TELL, CLOSE, NO_COPY, verdict
from amg_demo import model as demo
from amg_demo.__main__ import choose_prompts, training_set
from amg_demo.evaluate import kid
from amg_demo.sample import sample
from tests.index.helpers import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "index"
    model = demo.load()
    build(demo.PICTURES, folder, create("pixel"))
    decoder = ModuleDecoder("demo", model.decoder, 4)
    matcher = Matcher(Searcher(Index.open(folder)), create("pixel"), decoder)
    training, captions, copies = training_set(demo.PICTURES)
    return model, matcher, training, captions, copies


def draw(domain, prompts, preset=None):
    model, matcher, *_ = domain
    sampling = None if preset is None else SamplingRun(matcher, presets.settings(preset, "nl2"))
    guide = None if sampling is None else sampling.step
    seeds = list(range(50, 50 + len(prompts)))
    return sample(model, prompts, seeds, guide=guide), sampling


def test_copies_are_drawn_plain_and_not_under_guard(domain):
    _, matcher, training, captions, copies = domain
    prompts = choose_prompts(captions, copies)[0][:4]
    own = training[[captions.index(text) for text in prompts]]
    plain, _ = draw(domain, prompts)
    guarded, sampling = draw(domain, prompts, "main")
    assert all(v.copy for v in verdict(matcher, plain))
    near = [sampling.acted_on(i) for i in range(len(prompts))]
    assert all(near) and sum(v.copy for v in verdict(matcher, guarded, near)) <= 1
    assert verifier.zncc(plain, own).min() > 0.9  # the judge that the guard never sees
    assert verifier.zncc(guarded, own).max() < 0.75
    assert min(sampling.report()["guarded_evaluations"]) > 0


def test_a_picture_too_near_another_is_not_called_no_copy(domain, monkeypatch):
    """Blurred until the second check says no more, and as if the first did not see it either."""
    _, matcher, training, captions, _ = domain
    monkeypatch.setattr(limits, "COPY", 2.0)
    row = captions.index("pig face on orange waves")
    blurred = low_pass(training[[row]], 10)
    (found,) = verdict(matcher, blurred)
    assert (found.outcome, found.reason, found.neighbor) == (CANNOT_TELL, CLOSE, row)
    assert not found.copy and not found.checks and found.zncc < limits.REGISTERED
    assert found.source in words(found.message())
    (other,) = verdict(matcher, blurred.rot90(dims=(2, 3)))
    assert other.reason != CLOSE
    for limit in ("CLOSE", "CLOSE_ZNCC"):
        with monkeypatch.context() as patch:
            patch.setattr(limits, limit, 2.0)
            assert verdict(matcher, blurred)[0].outcome == NO_COPY


def test_what_leaves_the_closed_loop_is_no_copy(domain):
    model, matcher, training, captions, copies = domain
    prompts = choose_prompts(captions, copies)[0][:4]
    seeds = list(range(50, 54))

    def once(settings, suspects, anew):
        sampling = SamplingRun(matcher, settings, suspects=suspects)
        return sampling.drawn(sample(model, prompts, seeds, guide=sampling.step))

    def judged(pictures, named, samples):
        return verdict(matcher, pictures, named)

    settings = presets.settings("main", "nl2")
    generation = SimpleNamespace(
        draw=once, judge=judged, stopped=lambda: False, restarts=lambda: False
    )
    outcome = until_no_copy(generation, settings, len(prompts), retries=3)
    assert outcome.copies == []
    own = training[[captions.index(text) for text in prompts]]
    assert verifier.zncc(outcome.latents, own).max() < 0.7


def test_new_prompts_are_drawn_bit_for_bit_as_without_a_guard(domain):
    prompts = choose_prompts(*domain[3:])[1][16:20]
    plain, _ = draw(domain, prompts)
    guarded, sampling = draw(domain, prompts, "main")
    still = [n == 0 for n in sampling.report()["guarded_evaluations"]]
    assert sum(still) >= 3
    assert torch.equal(guarded[still], plain[still])


def test_one_prompt_of_a_batch_does_not_change_another(domain):
    memorised, others = choose_prompts(*domain[3:])
    plain, _ = draw(domain, [others[20], others[21]])
    mixed, _ = draw(domain, [others[20], memorised[0]], "main")
    assert torch.equal(mixed[0], plain[0])


def test_the_training_set_is_as_it_says(domain):
    _, matcher, training, captions, copies = domain
    assert training.shape == (matcher.searcher.index.count, 3, 128, 128)
    assert [matcher.searcher.index.caption(i) for i in range(len(captions))] == captions
    assert (copies > 1).sum() == 32


def test_kid_is_zero_for_one_distribution_and_large_for_two():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 16, generator=generator) for _ in range(2))
    assert abs(kid(a, b)) < 0.05 < kid(a + 1, b)


def test_install_explains_and_changes_nothing():
    first = subprocess.run(
        [sys.executable, ROOT / "install.py"], capture_output=True, text=True, check=True
    )
    assert "Everything the guard needs is here" in first.stdout


def test_run_without_a_task_teaches():
    out = subprocess.run([sys.executable, ROOT / "run.py"], capture_output=True, text=True)
    assert out.returncode == 2 and "run.py demo" in out.stdout


def test_the_core_imports_no_host_and_nothing_heavy():
    code = (
        "import sys, json, torch; before = set(sys.modules); import amg_core, amg_core.run, "
        "amg_core.presets, amg_core.decoders; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    names = {name.split(".")[0] for name in json.loads(run(code))}
    assert not names & {"PIL", "faiss", "comfy", "nodes", "folder_paths", "scipy", "pandas"}
