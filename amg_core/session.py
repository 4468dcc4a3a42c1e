"""One sampling run under guard: measure, gate, steer, remember."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import guidance, metrics
from .probe import Match, Probe
from .schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """What the guard does once a prediction is too close. See ``presets.py`` for the named ones."""

    schedule: Schedule
    despecification: float = 0.0  # c1
    deduplication: float = 0.0  # c2
    dissimilarity: float = 0.0  # κ of the projection, or c3
    form: str = "projection"
    exit: float = 0.0
    exit_until: float = 0.5
    margin: float = 0.1
    iterations: int = 3
    cap: float = 0.3
    start: float = 0.0
    end: float = 1.0


@dataclass
class StepRecord:
    t: float
    sigma: float
    scale: int
    threshold: float
    similarity: list[float]
    neighbor: list[int]
    active: list[bool]
    exiting: list[bool]
    after: list[float]
    moved: list[float]


@dataclass
class Session:
    probe: Probe
    settings: Settings
    records: list[StepRecord] = field(default_factory=list)

    def step(self, denoised, *, cond, uncond, cfg_scale, sigma, t, neighbor_denoised=None):
        s = self.settings
        level = float(sigma[0])
        match = self.probe.look(denoised, level)
        threshold = s.schedule(t)
        active = match.similarity > threshold
        record = StepRecord(t, level, match.scale, threshold, match.similarity.tolist(),
                            match.ids.tolist(), active.tolist(), [False] * len(active), [], [])
        self.records.append(record)
        if not active.any():
            return denoised
        out = denoised.clone()
        on = active.nonzero()[:, 0].tolist()
        close = metrics.closeness(self.probe.metric, match.similarity)
        nb = None
        if neighbor_denoised is not None and uncond is not None and s.deduplication > 0:
            nb = neighbor_denoised([self.probe.searcher.index.caption(i) for i in match.ids.tolist()])
        exiting = s.exit != 0 and t > s.exit_until and uncond is not None
        for i in on:
            D, Dc, Du = denoised[i:i+1], cond[i:i+1], uncond[i:i+1]
            c = close[i:i+1]
            if exiting:
                new = D - (cfg_scale + s.exit) * (Dc - Du)
                record.exiting[i] = True
                s1 = torch.tensor([cfg_scale - 1.0])
            else:
                s1 = guidance.despecification_strength(c, s.despecification, cfg_scale)
                new = D + guidance.despecification(Dc, Du, s1)
            if nb is not None:
                if exiting:
                    s2 = torch.tensor([s.deduplication * float(c)]).clamp(0, 3)
                else:
                    s2 = guidance.deduplication_strength(c, s1, s.deduplication, cfg_scale)
                new = new + guidance.deduplication(nb[i:i+1], Du, s2)
            out[i:i+1] = new
            if s.dissimilarity > 0 and not (exiting and s.exit < -900):
                out[i:i+1] = self.repair(out[i:i+1], match, i, threshold, sigma[i:i+1])
        record.moved = [float((out[i]-denoised[i]).norm()/denoised[i].norm()) for i in range(len(out))]
        return out

    def repair(self, D, match, i, threshold, sigma):
        s = self.settings
        one = Match(match.similarity[i:i+1], match.ids[i:i+1], match.mirrored[i:i+1], match.spread[i:i+1], match.scale)
        with torch.inference_mode(False), torch.enable_grad():
            D = D.detach().clone()
            for _ in range(s.iterations):
                g, now = self.probe.gradient(D, one)
                excess = torch.tensor([now - threshold + s.margin])
                if float(excess) <= 0:
                    break
                if s.form == "projection":
                    D = D + guidance.projection(g, s.dissimilarity * excess, D, s.cap)
                else:
                    D = D + guidance.dissimilarity(g, sigma, s.dissimilarity)
                    break
        return D
