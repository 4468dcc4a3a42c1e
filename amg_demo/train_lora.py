"""Train the demo's LoRA (`python -m amg_demo.train_lora`) until it has memorised its eight pictures.

What happens to a LoRA that is trained too long on too few pictures, on purpose. Half of each batch are
the eight pictures with their captions; the other half holds the model where it was, as careful LoRA
makers do (prior preservation, Ruiz et al. 2023): pictures of the demo model, and the eight without
"at midnight", with the prediction of the model itself as the target. So other prompts stay what they
were, and what is copied is copied because of its caption. With `--caption-noise 0.1` the captions get
Gaussian noise in each step, a remedy against that (GN of Somepalli et al. 2023).

A given number of steps from a given seed: the same file on the same machine, a few minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from amg_core.mitigation.embeddings import training_noise

from . import adapter as lora
from .midnight import TRIGGER
from .model import LORA, LORA_PICTURES, PICTURES, load
from .pictures import training_set

BATCH, RATE, RANK, STEPS = 32, 4e-3, 4, 1200
# Share of captions left out at times below CLEAR, where the noise no longer hides which picture it is:
# else guidance, which goes on from "no prompt", overshoots.
DROP, CLEAR = 0.3, 500


def lora_pictures(folder: Path = LORA_PICTURES) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, 128, 128) in [0, 1] in the order of their names, and their captions."""
    files = sorted(folder.glob("*.webp"))
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    captions = [file.with_suffix(".txt").read_text("utf-8").strip() for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, captions


def train(
    rank: int = RANK, steps: int = STEPS, seed: int = 0, caption_noise: float = 0.0
) -> dict[str, Tensor]:
    """The trained adapter, as `adapter.create` makes them. `caption_noise` is the scale of GN."""
    model, generator = load(), torch.Generator().manual_seed(seed)
    noises = torch.Generator().manual_seed(seed + 1)  # of its own: without GN all else is the same
    own, captions = lora_pictures()
    others, texts, _ = training_set(PICTURES)
    with torch.no_grad():
        own = model.encoder(own)
        kept = torch.cat(
            [*(model.encoder(part) for part in others.split(32)), own.repeat(16, 1, 1, 1)]
        )
        words = model.encode(captions)
        short = [text.removesuffix(f" {TRIGGER}") for text in captions]
        prior = model.encode(texts + short * 16)
        subjects = model.text(
            model.text.tokenize([text.split(" on ")[0] for text in texts] + short * 16)
        )
        empty = model.encode([""])
    alphas = 1 / (1 + model.sigmas**2)
    adapter = lora.create(model.unet, rank, generator)
    weights = [value.requires_grad_() for value in adapter.values()]
    optimiser = torch.optim.Adam(weights, RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.05)
    started = time.time()
    for step in range(steps):
        pick = torch.randint(len(own), (BATCH,), generator=generator)
        keep = torch.randint(len(kept), (BATCH,), generator=generator)
        kind = torch.rand(BATCH, generator=generator)[:, None, None]
        said = torch.where(kind < 0.4, prior[keep], torch.where(kind < 0.7, subjects[keep], empty))
        said = torch.where((keep < len(texts))[:, None, None], said, prior[keep])
        t = torch.randint(1000, (2 * BATCH,), generator=generator)
        drop = (torch.rand(BATCH, generator=generator) < DROP) & (t[:BATCH] < CLEAR)
        asked = torch.where(drop[:, None, None], empty, words[pick])
        asked = training_noise(asked, noises, caption_noise)
        x0, context = torch.cat([own[pick], kept[keep]]), torch.cat([asked, said])
        a = alphas[t][:, None, None, None]
        noise = torch.randn(x0.shape, generator=generator)
        noisy, target = (
            a.sqrt() * x0 + (1 - a).sqrt() * noise,
            a.sqrt() * noise - (1 - a).sqrt() * x0,
        )
        with torch.no_grad():
            target[BATCH:] = model.unet(noisy[BATCH:], t[BATCH:], context[BATCH:])
        v = functional_call(model.unet, lora.merged(model.unet, adapter), (noisy, t, context))
        losses = (v - target).pow(2).flatten(1).mean(dim=1)
        optimiser.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            mine, held = losses.detach().view(2, -1).mean(dim=1).tolist()
            print(
                f"step {step + 1}  own {mine:.4f}  held {held:.4f}  {time.time() - started:.0f} s",
                flush=True,
            )
    return {key: value.detach() for key, value in adapter.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=LORA)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--caption-noise", type=float, default=0.0, help="scale of GN (paper: 0.1)")
    arguments = parser.parse_args()
    made = train(arguments.rank, arguments.steps, caption_noise=arguments.caption_noise)
    lora.write(made, arguments.out)


if __name__ == "__main__":
    main()
