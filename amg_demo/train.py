"""Train the embedded model (`python -m amg_demo.train EMOJI_FOLDER`), about 80 minutes on two cores.

Four stages, each for its share of minutes: autoencoder, scorer, diffusion, then the decoder once more
with its encoder fixed. `--resume FILE` starts from the networks of an earlier file; 0 skips a stage.

The shipped file was made in several runs of this recipe as it grew: autoencoder 8 and scorer 4
minutes; diffusion 35 minutes with 20 copies of each duplicate and whole captions, then 28 minutes as
below; decoder 5 minutes. A fresh run gives a model of the same kind, not the same figures.

The diffusion model sees the pictures of ``amg_demo/pictures`` and nothing else: each as often as its
``duplicates`` says, as an over-represented picture of a web crawl would be (AMG, §4.1). The scorer
sees freshly composed pictures and never one of the training set, so that its grades are not the
model's own. bfloat16 on the CPU: half the time, no visible difference.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import pictures as source
from .model import PICTURES, DemoModel, load, save
from .pictures import training_set


def fresh_pictures(emoji: dict, count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`count` new compositions (uint8) with their labels; none is in the training set."""
    rng = np.random.default_rng(seed)
    colours, images, labels = list(source.COLOURS), [], []
    for _ in range(count):
        s, c, p = (int(rng.integers(len(x))) for x in (source.SUBJECTS, colours, source.PATTERNS))
        code, colour, pattern = source.SUBJECTS[s], colours[c], source.PATTERNS[p]
        images.append(np.asarray(source.compose(emoji[code], colour, pattern, rng)))
        labels.append((s, c, p))
    columns = torch.tensor(labels).T
    names = ("subject", "colour", "pattern")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), dict(
        zip(names, columns, strict=True)
    )


class Loop:
    """Adam with warm-up and a cosine to zero, by wall clock; prints the mean loss."""

    def __init__(self, name: str, parameters, minutes: float, rate: float):
        self.name, self.seconds, self.rate = name, minutes * 60, rate
        self.optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3)
        self.start, self.losses, self.steps, self.printed = time.time(), [], 0, time.time()

    def running(self) -> bool:
        done = (time.time() - self.start) / self.seconds
        lr = self.rate * min(1.0, self.steps / 100) * 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        if self.losses and time.time() - self.printed > 30:
            self.printed = time.time()
            print(
                f"{self.name} {done:6.1%} step {self.steps} {np.mean(self.losses):.4f}", flush=True
            )
            self.losses = []
        return done < 1

    def step(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimiser.param_groups[0]["params"], 1.0)
        self.optimiser.step()
        self.losses.append(loss.item())
        self.steps += 1


def half():
    return torch.autocast("cpu", torch.bfloat16)


def train_autoencoder(model: DemoModel, images: Tensor, minutes: float) -> None:
    """Reconstruction with a little noise on the latent."""
    nets = [model.encoder, model.decoder]
    loop = Loop("autoencoder", [p for n in nets for p in n.parameters()], minutes, 2e-3)
    model.train()
    while loop.running():
        batch = images[torch.randint(len(images), (32,))]
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        with half():
            latent = model.encoder(batch)
            decoded = model.decoder(latent + 0.05 * torch.randn_like(latent)).float()
        loop.step(reconstruction(decoded, batch))
    model.eval()


def train_decoder(model: DemoModel, images: Tensor, minutes: float) -> None:
    """Sharpen the decoder alone: the latent space, and so the diffusion model, stays as it is."""
    with torch.no_grad():
        latents, mirrored = (
            torch.cat([model.encoder(b) for b in x.split(32)]) for x in (images, images.flip(-1))
        )
    latents, images = torch.cat([latents, mirrored]), torch.cat([images, images.flip(-1)])
    loop = Loop("decoder", list(model.decoder.parameters()), minutes, 2e-3)
    while loop.running():
        pick = torch.randint(len(images), (16,))
        with half():
            noisy = latents[pick] + 0.08 * torch.randn_like(latents[pick])
            decoded = model.decoder(noisy).float()
        loop.step(reconstruction(decoded, images[pick]))


def reconstruction(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 on pixels and on their differences along both axes."""
    loss = (decoded - images).abs().mean()
    for axis in (2, 3):
        loss = loss + (decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean()
    return loss


def train_diffusion(
    model: DemoModel, images: Tensor, captions: list[str], copies: Tensor, minutes: float, out: Path
) -> None:
    """v-prediction; the prompt is dropped in one sample of ten; weights are averaged (EMA).

    A picture that is there once is mirrored half of the time, and its caption cut to the subject in
    three cases of ten, as pictures and alt texts of a crawl vary. A duplicate never varies.
    """
    with torch.no_grad():
        latents, mirrored = (
            torch.cat([model.encoder(b) for b in x.split(32)]) for x in (images, images.flip(-1))
        )
    ids = model.text.tokenize(captions)
    short = model.text.tokenize([text.split(" on ")[0] for text in captions])
    nets = [model.unet, model.text]
    loop = Loop("diffusion", [p for n in nets for p in n.parameters()], minutes, 1.2e-3)
    averages = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    alphas = 1 / (1 + model.sigmas**2)
    saved = time.time()
    model.train()
    while loop.running():
        pick = torch.multinomial(copies.float(), 128, replacement=True)
        once = copies[pick] == 1
        flip = (torch.rand(128) < 0.5) & once
        x0 = torch.where(flip[:, None, None, None], mirrored[pick], latents[pick])
        t = torch.randint(1000, (128,))
        a = alphas[t][:, None, None, None]
        noise = torch.randn_like(x0)
        # and only their captions vary: a duplicated caption is always the same words
        brief = (torch.rand(128) < 0.3) & once
        words = torch.where(brief[:, None], short[pick], ids[pick])
        words = torch.where((torch.rand(128) < 0.1)[:, None], 0, words)
        with half():
            v = model.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, model.text(words))
        loop.step(F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * x0))
        decay = min(0.999, loop.steps / (loop.steps + 50))
        for net, average in zip(nets, averages, strict=True):
            for key, value in net.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        if time.time() - saved > 300 or not loop.running():
            saved = time.time()
            current = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
            for net, average in zip(nets, averages, strict=True):
                net.load_state_dict(average)
            save(model, out)
            if loop.running():
                for net, state in zip(nets, current, strict=True):
                    net.load_state_dict(state)
    model.eval()


def train_scorer(model: DemoModel, emoji: dict, minutes: float) -> dict[str, float]:
    """Cross entropy on fresh compositions; returns the accuracy on others that are fresh again."""
    images, labels = fresh_pictures(emoji, 12000, seed=1)
    loop = Loop("scorer", list(model.scorer.parameters()), minutes, 2e-3)
    while loop.running():
        pick = torch.randint(len(images), (96,))
        with half():
            logits = model.scorer(images[pick].float() / 255 + 0.02 * torch.randn(96, 3, 1, 1))
        loop.step(sum(F.cross_entropy(logits[k].float(), labels[k][pick]) for k in labels))
    images, labels = fresh_pictures(emoji, 600, seed=2)
    with torch.no_grad():
        logits = model.scorer(images.float() / 255)
    return {k: (logits[k].argmax(1) == labels[k]).float().mean().item() for k in labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path, help="assets folder of @lobehub/fluent-emoji-3d")
    parser.add_argument("--out", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--resume", type=Path, help="start from the networks of this file")
    parser.add_argument("--minutes", type=float, nargs=4, default=(8, 4, 55, 10),
                        metavar=("AUTOENCODER", "SCORER", "DIFFUSION", "DECODER"))  # fmt: skip
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, captions, copies = training_set(PICTURES)
    words = sorted({word for text in captions for word in text.replace("-", " ").split()})
    labels = {
        "subject": [source.subject_name(code) for code in source.SUBJECTS],
        "colour": list(source.COLOURS),
        "pattern": list(source.PATTERNS),
    }
    model = DemoModel(words, labels)
    if arguments.resume:
        model.load_state_dict(load(arguments.resume).state_dict())
        model.requires_grad_(True)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    print("parameters", sizes, flush=True)
    autoencoder, scorer, diffusion, decoder = arguments.minutes
    if autoencoder:
        train_autoencoder(model, images, autoencoder)
    if scorer:
        accuracy = train_scorer(model, source.load_emoji(arguments.emoji), scorer)
        print("scorer accuracy on fresh pictures", accuracy, flush=True)
    save(model, arguments.out)
    if diffusion:
        train_diffusion(model, images, captions, copies, diffusion, arguments.out)
    if decoder:
        train_decoder(model, images, decoder)
    save(model, arguments.out)


if __name__ == "__main__":
    main()
