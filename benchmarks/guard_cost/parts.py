"""The parts that a step is made of, each alone: multiply-accumulates and time for one picture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import host, measure, rows

XL_SIDE = 1024
AT_MOST = 0.3  # seconds that one part is repeated for
LONG = 5.0  # seconds of a part that counting in Python does not disturb
SIGMAS = (4.0, 1.2, 0.6, 0.3, 0.05)  # one for each scale that a 512² latent is compared at


def table(scene: rows.Shared, sizes: list[int], wanted: list[str]) -> list[dict]:
    """Every part that the rows `wanted` use, and for comparison one branch of SDXL, counted only."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    larger = measure.network_macs(UNetModel, host.XL_UNET, XL_SIDE, host.XL_UNET["context_dim"])
    found: list[dict] = [{"part": f"SDXL, one branch, {XL_SIDE}²", "macs": larger, "seconds": 0.0}]
    found += [
        {"part": f"model, one branch, {size}²", "macs": measure.branch_macs(scene.model, size),
         "seconds": 0.0}
        for size in sizes
    ]  # fmt: skip
    device = scene.model.load_device
    with torch.inference_mode():
        latent = torch.randn(1, 4, sizes[0] // 8, sizes[0] // 8, device=device)
        for name in {row.split()[1] for row in wanted if " " in row}:
            found += _of_descriptor(scene, name, latent)
        if rows.AUTHORS in wanted:
            decoder = _decoder(scene, "vae")
            found.append(_measured(f"full VAE, {sizes[0]}²", lambda: decoder(latent), device))
            decoder.to("cpu")
        if any("neighbour" in row for row in wanted):
            found.append(_measured("a caption, encoded", lambda: _encode(scene), device))
    return found


def _encode(scene: rows.Shared) -> None:
    scene.clip.encode_from_tokens_scheduled(scene.clip.tokenize("picture 1 of a random index"))


def _of_descriptor(scene: rows.Shared, name: str, latent: torch.Tensor) -> list[dict]:
    """A look, and a look's gradient, at each scale; and of what they are made."""
    found, matcher = [], scene.matcher(name)
    watch = matcher.through(None if matcher.latent else _decoder(scene, "taesd")).to(latent.device)
    for scale, sigma in {watch.scale_at(s, latent.shape[-1]): s for s in SIGMAS}.items():
        found += _at_scale(watch, latent, sigma, f"{name}, scale {scale}")
    watch.rest()
    return found


def _at_scale(watch, latent: torch.Tensor, sigma: float, where: str) -> list[dict]:
    match = watch.match(latent, sigma)  # the first look at a scale makes its rows ready
    look = _measured(f"{where}: look", lambda: watch.match(latent, sigma), latent.device)
    with torch.inference_mode(False):
        own = latent.clone()
        gradient = _measured(f"{where}: gradient", lambda: _gradient(watch, own, match), own.device)
    return [look, gradient]


def _gradient(matcher, latent: torch.Tensor, match) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        matcher.gradient(latent, match)


def _decoder(scene: rows.Shared, name: str):
    space = scene.model.get_model_object("latent_format")
    vae = scene.vae if name == "vae" else None
    decoder = host.module("nodes.decoding").choose(space, name, vae)
    with torch.inference_mode(False):
        return decoder.to(scene.model.load_device)


def _measured(part: str, call: Callable[[], object], device: torch.device) -> dict:
    """Count once, then repeat for a while and take the smallest time; of what takes long, the only one."""
    clock = measure.Clock(device)
    before = clock()
    with measure.Macs() as counter:
        call()
    first, times = clock() - before, []
    if first > LONG:
        times.append(first)
    while sum(times) < AT_MOST:
        before = clock()
        call()
        times.append(clock() - before)
    return {"part": part, "macs": counter.total, "seconds": min(times)}
