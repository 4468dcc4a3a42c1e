"""A model whose output is right by `noise.level` leads every scheduler to the picture it predicts."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers transformers")

import diffusers
import torch

from amg_core.errors import AMGError
from amg_diffusers.noise import level

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDIMScheduler": [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")],
    "DDPMScheduler": [{}, {"prediction_type": "v_prediction"}],
    "PNDMScheduler": [{"skip_prk_steps": True}],
    "LCMScheduler": [{}],
    "TCDScheduler": [{}],
    "EulerDiscreteScheduler": [
        {},
        {"prediction_type": "v_prediction"},
        {"use_karras_sigmas": True},
    ],
    "EulerAncestralDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{}],
    "KDPM2DiscreteScheduler": [{}],
    "LMSDiscreteScheduler": [{}],
    "DPMSolverMultistepScheduler": [
        {},
        {"use_karras_sigmas": True},
        {"prediction_type": "v_prediction"},
        FLOW,
    ],
    "DPMSolverSinglestepScheduler": [{}],
    "DEISMultistepScheduler": [{}],
    "UniPCMultistepScheduler": [{}, FLOW],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchHeunDiscreteScheduler": [{}],
}
EACH = [(name, options) for name, several in SCHEDULERS.items() for options in several]


@pytest.mark.parametrize("name, options", EACH, ids=[f"{name} {' '.join(o)}" for name, o in EACH])
def test_the_prediction_is_where_the_scheduler_ends(name, options):
    own = (
        {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler") else {}
    )
    stable = {} if name.startswith("FlowMatch") else STABLE
    scheduler = getattr(diffusers, name)(**stable, **own, **options)
    scheduler.set_timesteps(12)
    draw = torch.Generator().manual_seed(2)
    picture, x = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    torch.manual_seed(5)
    times = []
    for timestep in scheduler.timesteps:
        given = x
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(x, timestep)
        at = level(scheduler, timestep)
        output = (picture - at.a * given) / at.b
        assert torch.allclose(at.denoised(given, output), picture, atol=1e-3)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        times.append(at.t)
    assert (x - picture).norm() < 0.05 * picture.norm()
    assert times[0] > 0.85 and times[-1] < 0.25 and times == sorted(times, reverse=True)


def test_a_change_of_the_prediction_is_the_change_that_the_scheduler_sees():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    draw = torch.Generator().manual_seed(3)
    x, output, change = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(3))
    change[1] = 0.0
    timestep = scheduler.timesteps[4]
    at = level(scheduler, timestep)
    new = at.output(output, change)
    before, after = (
        scheduler.step(each, timestep, x).pred_original_sample for each in (output, new)
    )
    assert torch.allclose(before, at.denoised(x, output), atol=1e-4)
    assert torch.allclose(after - before, change, atol=1e-4)
    assert torch.equal(new[1], output[1])


def test_unknown_noise_is_refused_by_name():
    with pytest.raises(AMGError, match="EDMEulerScheduler"):
        level(diffusers.EDMEulerScheduler(), 1.0)
