"""A picture that is published, drawn beside an index that is not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from amg_core import presets, report
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.retry import Attempt, Outcome
from amg_core.run import SamplingRun
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from tests.index.helpers import Identity, paint

SECRETS = ("confidential", "unreleased", "sequel")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """The report of a run that ended in copies of pictures of a private index."""
    folder = tmp_path_factory.mktemp("private")
    for i in range(8):
        (folder / "made").mkdir(exist_ok=True)
        paint(i, (64, 64)).save(folder / "made" / f"unreleased-{i}.png")
        (folder / "made" / f"unreleased-{i}.txt").write_text(f"the hero of the sequel, {i}")
    build(folder / "made", folder / "confidential-client", create("pixel"))
    with Index.open(folder / "confidential-client") as index:
        matcher = Matcher(Searcher(index), create("pixel"), Identity())
        run = SamplingRun(matcher, presets.settings("main", "nl2"))
        scale = matcher.scales[-1]
        copies = matcher.searcher.rows(torch.tensor([3, 5]), scale).reshape(2, 3, scale, scale)
        arguments = {"cond": copies, "uncond": copies.flip(0), "cfg_scale": 3.0, "t": 0.5}
        run.step(copies, sigma=torch.full((2,), 0.5), **arguments)
        found, drawn = verdict(matcher, copies), run.report()
        outcome = Outcome(copies, found, [0, 1], [
            Attempt([0, 1], drawn, found), Attempt([1], drawn, found[1:]),
        ])  # fmt: skip
        return report.compose(drawn, outcome, judged_by="vae", seed=7)


def test_the_report_itself_has_names(written):
    """Else the tests below could not fail."""
    assert all(secret in json.dumps(written) for secret in SECRETS)
    assert all(secret in json.dumps(report.travelling(written, report.FULL)) for secret in SECRETS)


def test_what_travels_by_itself_gives_no_name_away(written):
    text = json.dumps(report.travelling(written))
    assert not [secret for secret in SECRETS if secret in text]
    assert written["index"]["hash"] in text  # and can be checked all the same
    short = report.travelling(written)
    assert [v["neighbor"] for v in short["verdicts"]] == [
        v["neighbor"] for v in written["verdicts"]
    ]


def test_a_key_that_somebody_adds_stays_at_home(written):
    """What is let out is listed, not what is kept in."""
    more = written | {"notes": "sequel"}
    more["verdicts"] = [v | {"where": "unreleased"} for v in written["verdicts"]]
    more["attempts"] = [a | {"why": "confidential"} for a in written["attempts"]]
    text = json.dumps(report.travelling(more))
    assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("choice", [*report.TELLS, "step 3/20 · similarity 0.1"])
def test_nodes_write_what_was_chosen(pack, written, choice):
    sampling = pack.module("nodes.sampling")
    hidden = SimpleNamespace(unique_id="7", extra_pnginfo={})
    sampling.write_into_pictures(hidden, written, sampling.tells_of(choice))
    text = json.dumps(hidden.extra_pnginfo)
    assert ("amg_report" in text) == (choice != report.OFF)
    assert ("unreleased" in text) == (choice == report.FULL)


@pytest.mark.parametrize("name", ["AMG_Sampler", "AMG_Guard", "AMG_Report"])
def test_nodes_that_write_keep_names_unless_asked(pack, name):
    inputs = {each.id: each for each in pack.nodes[name].define_schema().inputs}
    assert inputs["report_in_picture"].default == report.ANONYMOUS
    if name != "AMG_Report":  # there is no live text on it, so the host checks its list
        validate = pack.nodes[name].validate_inputs
        assert validate(report_in_picture="everything") is not True
        assert validate(report_in_picture="step 3/20 · similarity 0.1") is True
    with pytest.raises(pack.module("amg_core.errors").AMGError, match="report_in_picture"):
        pack.module("nodes.sampling").tells_of("everything")


def test_the_webui_keeps_names_unless_asked():
    from amg_webui.options import TELLS, Options

    assert TELLS == report.TELLS and Options().report_in_picture == report.ANONYMOUS
    with pytest.raises(AMGError, match="report_in_picture"):
        Options.read(SimpleNamespace(), ({"report_in_picture": "everything"},))
