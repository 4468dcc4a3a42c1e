"""The rows of the table: ways to sample with one and the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import host

PLAIN, AUTHORS = "plain", "authors"
NEVER, ALWAYS = 1e3, -1e3  # thresholds of likeness
DESCRIPTORS = ("compact", "pixel", "latent", "sscd")
# name: preset, whether a text encoder is connected, what likeness counts as nothing stored
GUARDS = {
    "watch": ("main", True, ALWAYS),
    "terms": ("paper", False, ALWAYS),
    "terms+neighbour": ("paper", True, ALWAYS),
    "exit": ("main", True, NEVER),
    "exit+neighbour": ("main", True, ALWAYS),
}
WORDS = f"""
  {PLAIN:17} the model alone
  watch             the guard looks at every step and never acts
  terms             acts at every step: preset paper without the neighbour's caption
  terms+neighbour   the same with the neighbour's caption: one more branch of the model
  exit              acts at every step: preset main, which draws a shorter prompt: one more branch, and
                    several in the first step, in which the words to keep are looked for
  exit+neighbour    the same where no words lead elsewhere: the neighbour's caption is drawn too, and
                    the repulsion acts
  {AUTHORS:17} as the authors' code: the full VAE and SSCD with gradients twice at every step, and
                    the neighbour's caption
"""


def names(descriptors: list[str]) -> list[str]:
    """Every row, for these descriptors."""
    guarded = [f"{guard} {which}" for which in descriptors for guard in GUARDS]
    return [PLAIN, *guarded, AUTHORS]


@dataclass
class Shared:
    """The model and what the rows share; parts are made when a row first needs them.

    folder : Path, temporary; pictures : int, rows of the index.
    """

    folder: Path
    small: bool
    pictures: int
    model: Any = None
    _made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.inference_mode():  # as a host loads it
            self.model = host.diffusion_model(self.small)
        host.install_taesd(self.folder)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def clip(self):
        return self.part("clip", lambda: host.text_encoder(self.small))

    @property
    def vae(self):
        return self.part("vae", lambda: host.vae(self.small))

    def matcher(self, name: str):
        """A `Matcher` on a random index, without a decoder."""

        def make():
            chosen = host.descriptor(name)
            index = host.RandomIndex(self.folder, chosen.spec, self.pictures)
            searcher = host.module("amg_core.index.search").Searcher(index)
            return host.module("amg_core.similarity.matcher").Matcher(searcher, chosen)

        return self.part(f"probe {name}", make)


def patched(row: str, scene: Shared):
    """A clone of the model with what the row does; the guard by the plugin's own hook."""
    if row == PLAIN:
        return scene.model.clone()
    if row == AUTHORS:
        return authors_way(scene)
    guard, which = row.split()
    preset, captions, safe_score = GUARDS[guard]
    matcher = scene.matcher(which)
    threshold = NEVER if guard == "watch" else ALWAYS
    settings = _forced(preset, matcher.metric, threshold, safe_score)
    clip = scene.clip if captions else None
    return host.module("nodes.hook").attach(
        scene.model, matcher, settings, clip=clip, decoder="auto"
    )


def _forced(preset: str, metric: str, threshold: float, safe_score: float):
    """A preset that acts never or always, and whose ways out are all or none of them good."""
    level = host.module("amg_core.schedule").Schedule("constant", threshold, threshold)
    settings = host.module("amg_core.presets").settings(preset, metric, schedule=level)
    reduction = host.module("amg_core.guidance").PromptReduction
    return replace(settings, release=threshold).tuned(reduction, safe_score=safe_score)


def authors_way(scene: Shared):
    """AMG-sd's `cond_fn`: decode in full with the VAE, embed, differentiate; twice a step.

    The second time is after the guidance by the neighbour's caption, which is one more branch.
    """
    from comfy.patcher_extension import WrappersMP

    matcher, vae, clip = scene.matcher("sscd"), scene.vae, scene.clip
    decoding, conditioning = host.module("nodes.decoding"), host.module("nodes.conditioning")
    space = scene.model.get_model_object("latent_format")
    decoder = decoding.choose(space, "vae", vae)
    scale = matcher.scales[-1]
    model = scene.model.clone()
    device = model.load_device

    def gradient(latent: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.inference_mode(False), torch.enable_grad():
            latent = latent.detach().clone().requires_grad_()
            query = matcher.descriptor.embed(decoder(latent), scale)
            _, ids = matcher.searcher.nearest(query.cpu(), scale, 1)
            neighbor = matcher.searcher.rows(ids[0], scale).to(query)
            (found,) = torch.autograd.grad((query * neighbor).sum(), latent)
        return found, int(ids[0, 0])

    def step(args: dict) -> torch.Tensor:
        denoised = args["denoised"]
        first = [gradient(one) for one in denoised.split(1)]
        captions = [matcher.index.caption(i) for _, i in first]
        other = conditioning.OtherTexts(clip, None, {}, args).neighbor(captions)
        moved = denoised - (other - args["uncond_denoised"])
        second = [gradient(one)[0] for one in moved.split(1)]
        return moved - 1e-3 * torch.cat(second).to(moved)

    def run(executor, *args, **kwargs):
        with torch.inference_mode(False):
            decoder.to(device), matcher.descriptor.to(device)
        try:
            return executor(*args, **kwargs)
        finally:
            with torch.inference_mode(False):
                decoder.to("cpu"), matcher.descriptor.to("cpu")

    model.set_model_sampler_post_cfg_function(step)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "authors", run)
    return model
