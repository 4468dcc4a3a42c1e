"""Every sampler that the host lists, on a small model: dormant is equal, and no step goes unseen."""

from __future__ import annotations

import torch


def test_dormant_is_equal_and_every_step_is_seen(amg, tiny, index, settings, sample):
    from comfy.samplers import KSampler

    model, report = tiny("v"), amg.hook.Report()
    guarded = amg.hook.attach(model, index, settings("dormant"), report=report)
    wrong = {}
    for sampler in KSampler.SAMPLERS:
        same = torch.equal(sample(guarded, sampler, batch=1), sample(model, sampler, batch=1))
        unseen = report.latest["unseen_steps"]
        if not same or unseen or len(report.latest["verdicts"]) != 1:
            wrong[sampler] = same, unseen
    assert len(KSampler.SAMPLERS) > 30 and wrong == {}
