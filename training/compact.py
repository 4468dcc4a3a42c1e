"""Train the `compact` descriptor: python -m training.compact --drawings DIR … --halves DIR … --minutes 60

It trains on all pictures of --drawings and on half of those of --halves (`pool.trained_on`). The weights of
the plugin were trained on openclipart-png, Fluent and Noto emoji, and half of tuxpaint's stamps, for an
hour on two cores. With --start FILE training continues from earlier weights.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from amg_core.descriptors.compact import SCALES, SIDE, CompactNetwork, batch_norms, fold
from benchmarks import harness

from . import edits, pool

BATCH = 224  # pictures a step, two views each
TEMPERATURE, SPREAD = 0.06, 0.1  # of the softmax; weight of the term that keeps neighbours apart
RATE = 3e-3
LOW = 0.35  # share of steps in which both views are half-formed
SMALL, SMALL_SHARE = 64, 0.6  # px of the network's input in the first part of the time: more steps


def loss_of(views: Tensor, references: Tensor) -> Tensor:
    """NT-Xent over both views (B, D) of each picture, and the entropy term of SSCD (KoLeo)."""
    rows, count = torch.cat([views, references]), len(views)
    logits = rows @ rows.T / TEMPERATURE
    own = torch.eye(2 * count, dtype=torch.bool)
    target = torch.arange(2 * count).roll(count)
    contrast = F.cross_entropy(logits.masked_fill(own, -1e4), target)
    apart = (2 - 2 * (references @ references.T)).clamp_min(1e-6)
    nearest = apart.masked_fill(own[:count, :count], 9).amin(dim=1)
    return contrast - SPREAD * nearest.log().mean() / 2


def main() -> int:
    parser = pool.parser("training.compact", __doc__, seed=1)
    parser.add_argument("--start", type=Path, help="weights to go on from (none)")
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    arguments = harness.parse(parser)
    rng = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)
    dice = torch.Generator().manual_seed(arguments.seed)

    started = time.time()
    drawn = pool.drawings(arguments.drawings, arguments.halves)
    print(f"{len(drawn)} drawings, {time.time() - started:.0f} s", flush=True)
    parts, share = os.cpu_count() or 1, arguments.pictures // (os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(parts) as workers:
        jobs = [(share, drawn[i::parts], arguments.seed + i) for i in range(parts)]
        stock = np.concatenate(workers.starmap(_made, jobs))
    print(f"{len(stock)} pictures, {time.time() - started:.0f} s", flush=True)

    def take(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(stock[rows]).permute(0, 3, 1, 2).float() / 255

    network = CompactNetwork(norm=True).to(memory_format=torch.channels_last)
    if arguments.start:
        unfold(network, arguments.start, F.interpolate(take(np.arange(BATCH)), (SIDE, SIDE)))
    mean = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    started, step, said, saved = time.time(), 0, time.time(), time.time()
    losses: list[float] = []
    while (done := (time.time() - started) / (60 * arguments.minutes)) < 1:
        rate = RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = max(rate, 1e-5)
        side = SMALL if done < SMALL_SHARE else SIDE
        rows = rng.choice(len(stock), 2 * BATCH, replace=False)
        both = take(rows)
        pictures, others = both[:BATCH], both[BATCH:]
        with torch.no_grad():
            views = edits.edited(pictures, others, side, dice)
            references = edits.reference(pictures, side)
            if rng.random() < LOW:
                cells = int(rng.choice(SCALES[:-1]))
                views = edits.half_formed(views, cells, dice)
                references = F.interpolate(
                    F.adaptive_avg_pool2d(pictures, cells), (side, side), mode="bilinear"
                )
            batch = torch.cat([views, references]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(batch)
        loss = loss_of(*found.float().chunk(2))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimiser.step()
        mean.update_parameters(network)
        losses.append(float(loss.detach()))
        step += 1
        if time.time() - said > 60:
            said = time.time()
            print(f"step {step}, {100 * done:.0f} %, loss {np.mean(losses[-50:]):.3f}", flush=True)
        if time.time() - saved > 300:
            saved = time.time()
            save(mean.module, arguments.out)
    save(mean.module, arguments.out)
    print(f"step {step}, loss {np.mean(losses[-50:]):.3f}, written to {arguments.out}")
    return 0


def _made(count: int, drawn: list[np.ndarray], seed: int) -> np.ndarray:
    return np.stack(list(pool.pictures(count, drawn, np.random.default_rng(seed))))


def unfold(network: CompactNetwork, path: Path, pictures: Tensor) -> None:
    """Load what `save` wrote into a network with normalisation, with the statistics of `pictures`."""
    folded = CompactNetwork()
    folded.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    network.head.load_state_dict(folded.head.state_dict())
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    hooks = []
    for (own, norm), other in zip(batch_norms(network), convolutions, strict=True):
        own.weight.data = other.weight.data.clone()

        def fit(norm, inputs, bias=other.bias.data):
            mean, variance = inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.data = (variance + norm.eps).sqrt()
            norm.bias.data = bias + mean

        hooks.append(norm.register_forward_pre_hook(fit))
    with torch.no_grad():
        network.eval()(pictures)
    for hook in hooks:
        hook.remove()
    network.train()


def save(network: CompactNetwork, path: Path) -> None:
    state = {name: t.half().contiguous() for name, t in fold(network).state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part)
    part.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
