"""The second check: measures that never steer, so that the guidance cannot have fooled them.

`zncc` compares two pictures without moving them. `registered` first finds the alignment: which part of one
shows which part of the other, at what size, mirrored or slightly rotated. Then it correlates them there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import low_pass, luminance
from ..threads import one_thread

ZNCC_SIDE = 16

COARSE, SIDE, PATCH = (
    32,
    64,
    8,
)  # sides in pixels: candidate in the search, candidate after it, patch
SIDES = [(side, side) for side in (20, 23, 26, 28, 32, 36, 40, 45, 50, 56, 63, 71)]
SIDES += [(22, 32), (32, 22)]  # a square part of a wide or of a tall picture
LEVELS = (40, 52, 64, 84, 108, 140)  # sides of the picture, to get about the candidate's detail
MIN_OVERLAP = 0.22  # share of the larger area; half-size in a collage is 0.25
HYPOTHESES, STEPS = 4, 7  # places of each candidate that are refined, Gauss-Newton steps for each
SMOOTH, NEARBY = 1.5, 3.5  # widths in pixels: of the blur, of the neighbourhood for the energy
FLOOR = 0.008  # smallest visible slope, in grey levels from 0 to 1 per pixel
CHANCE = 8  # patches that can match by chance; fewer are weak evidence
SEEN = 4  # energy at which a patch counts half
FLAT = 3  # patches with visible structure, of 64, below which a picture is flat


class Registered(NamedTuple):
    """How well a picture agrees with each of K others at the best alignment.

    Attributes
    ----------
    score : Tensor (K,) in [0, 1]
        The correlation, reduced if the overlap is small, if it shows little, or if light and dark differ.
    correlation : Tensor (K,) in [−1, 1]
        Correlation of the slopes in the overlap.
    overlap : Tensor (K,) in [0, 1]
        Share of the overlap in the picture or in the other, whichever is larger.
    place : Tensor (K, 2, 3)
        Maps (x, y, 1) in the other, each from −1 to 1, to x, y in the picture or its mirror image.
    mirrored : Tensor (K,) bool
    """

    score: Tensor
    correlation: Tensor
    overlap: Tensor
    place: Tensor
    mirrored: Tensor


@one_thread()
@torch.no_grad()
def registered(picture: Tensor, others: Sequence[Tensor] | Tensor) -> Registered:
    """Compare a picture with others at the best alignment, independently of colour and contrast.

    The picture may show the other, or a crop of 70 % of its side or more, or contain it at half its size
    or larger. Both may be squeezed to another format. Slopes of grey are compared, divided by the local
    energy, so contrast, brightness and tint do not matter, and plain ramps do not count. All shifts at 14
    sizes, with and without mirroring, are tried by Fourier transform (gradient correlation: Argyriou and
    Vlachos 2003; Tzimiropoulos et al., IEEE TPAMI 32, 2010; normalised in the overlap: Padfield,
    IEEE TIP 21, 2012). The best four are refined to the best affine fit (Baker and Matthews, IJCV 56,
    2004). A flat picture has score 0 with all others.

    Parameters
    ----------
    picture : Tensor (1, 3, H, W) in [0, 1].
    others : K pictures (3, h, w) or (1, 3, h, w) of any size, or Tensor (K, 3, h, w), in [0, 1].
    """
    grey = _grey(picture)
    theirs = [_grey(other.to(picture.device).reshape(1, *other.shape[-3:])) for other in others]
    coarse, fine = (
        _field(torch.cat([_resized(other, side, side) for other in theirs]))
        for side in (COARSE, SIDE)
    )
    place, mirrored = _searched(grey, coarse)
    each = place.shape[:2]
    place, mirrored = place.flatten(0, 1), mirrored.flatten()
    fine = fine.repeat_interleave(each[1], 0)
    views, zoom = _views(grey, place, mirrored)
    place = _refined(views, zoom, fine, place)
    score, correlation, overlap = _scored(*_sampled(views, zoom, place, SIDE), fine, place)
    best = score.reshape(each).argmax(dim=1) + torch.arange(each[0], device=score.device) * each[1]
    place, mirrored = place[best], mirrored[best]
    score = score[best] * _tones(grey, theirs, place, mirrored).clamp_min(0).sqrt()
    return Registered(score, correlation[best], overlap[best], place, mirrored)


def _tones(grey: Tensor, others: Sequence[Tensor], place: Tensor, mirrored: Tensor) -> Tensor:
    """ZNCC (K,) of the coarse greys in the overlap: whether light and dark agree, not only outlines.

    For example, a ring and a disc have the same outline. Brightness and contrast do not matter.
    """
    both = _resized(grey, COARSE, COARSE)
    both = torch.cat([both, both.flip(-1)])[mirrored.long()]
    at, inside = _positions(place, COARSE)
    mine = F.grid_sample(both, at, align_corners=False, padding_mode="border")
    pair = [mine, torch.cat([_resized(other, COARSE, COARSE) for other in others])]
    count = inside.sum((1, 2, 3), keepdim=True).clamp_min(1)
    a, b = ((x - (x * inside).sum((1, 2, 3), keepdim=True) / count) * inside for x in pair)
    power = (a * a).sum((1, 2, 3)) * (b * b).sum((1, 2, 3))
    return (a * b).sum((1, 2, 3)) / power.clamp_min(1e-6).sqrt()


@one_thread()
def flat(picture: Tensor) -> bool:
    """Whether a picture (1, 3, H, W) shows too little to tell whether it is a copy."""
    field = _field(_resized(_grey(picture), SIDE, SIDE))
    energy = F.avg_pool2d((field * field).sum(1, keepdim=True), PATCH) * PATCH**2
    return int((energy > SEEN).sum()) < FLAT


def _grey(picture: Tensor) -> Tensor:
    return luminance(picture.float())[:, None]


def _resized(grey: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(grey, size=(height, width), mode="bilinear", antialias=True)


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _blur(n: int, width: float, continued: bool, device: torch.device) -> Tensor:
    """The matrix (n, n) that blurs n pixels in a line. Beyond its ends the line is continued.

    With `continued` so are its slopes, so that a ramp has no edge at the border.
    """
    r = math.ceil(2.5 * width)
    t = torch.arange(-r, r + 1, device=device, dtype=torch.float32)
    kernel = torch.softmax(-(t**2) / (2 * width**2), 0)
    lines = _continued(n, r, device) if continued else _repeated(n, r, device)
    blurred = F.conv1d(lines.T[:, None], kernel[None, None])[:, 0].T
    return blurred.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _slope(n: int, device: torch.device) -> Tensor:
    """The matrix (n, n) of central differences."""
    lines = _continued(n, 1, device)
    return (lines[2:] - lines[:-2]) / 2


def _continued(n: int, r: int, device: torch.device) -> Tensor:
    """The matrix (n + 2r, n) that pads a line by r pixels, with its slopes continued."""
    x = torch.eye(n, device=device)
    return torch.cat([2 * x[:1] - x[1 : r + 1].flip(0), x, 2 * x[-1:] - x[-r - 1 : -1].flip(0)])


def _repeated(n: int, r: int, device: torch.device) -> Tensor:
    """The matrix (n + 2r, n) that pads a line by r pixels, with its ends repeated."""
    x = torch.eye(n, device=device)
    return torch.cat([x[:1].expand(r, n), x, x[-1:].expand(r, n)])


def _blurred(x: Tensor, width: float, continued: bool = True) -> Tensor:
    rows, columns = (_blur(n, width, continued, x.device) for n in x.shape[-2:])
    return rows @ x @ columns.T


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and along y, for each channel."""
    rows, columns = (_slope(n, x.device) for n in x.shape[-2:])
    return x @ columns.T, rows @ x


def _field(grey: Tensor) -> Tensor:
    """Grey (B, 1, h, w) -> slopes divided by the local and overall energy, (B, 2, h, w), at most √2."""
    grey = grey - grey.mean(dim=(2, 3), keepdim=True)  # so that one tone is exactly 0
    field = torch.cat(_slopes(_blurred(grey, SMOOTH)), 1)
    field = field - _blurred(field, NEARBY)
    energy = (field * field).sum(1, keepdim=True)
    overall = energy.mean(dim=(2, 3), keepdim=True)
    nearby = _blurred(energy, NEARBY, continued=False)
    field = field / (nearby + overall + FLOOR**2).sqrt()
    return field / (1 + (field * field).sum(1, keepdim=True) / 2).sqrt()


def _mirror(field: Tensor) -> Tensor:
    return torch.cat([-field[:, :1].flip(-1), field[:, 1:].flip(-1)], 1)


def _agreement(match: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    """Correlation times the root of the energy in the overlap, which is seldom large by chance."""
    return match / (mine * theirs + 1).sqrt().sqrt()


def _searched(grey: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The best places of each of the K others, (K, HYPOTHESES, 2, 3), and whether each is mirrored."""
    values, places = [], []
    power = theirs.square().sum(1)  # (K, COARSE, COARSE)
    spectra = {n: torch.fft.rfft2(theirs, s=(n, n)).conj()[:, None] for n in (64, 80)}
    for w, h in SIDES:
        n = 64 if max(w, h) < 54 else 80  # lags that wrap around overlap too little to count
        field = _field(_resized(grey, h, w))
        field = torch.cat([field, _mirror(field)])
        (lag_x, mine_x, their_x), (lag_y, mine_y, their_y) = (
            _lags(side, max(w * h, COARSE**2) / other, grey.device)
            for side, other in ((w, h), (h, w))
        )
        a, b = torch.fft.rfft2(field, s=(n, n)).unbind(1)
        c, d = spectra[n].unbind(2)
        match = torch.fft.irfft2(torch.addcmul(a * c, b, d), s=(n, n))
        match = match.index_select(2, lag_y % n).index_select(3, lag_x % n)
        mine = mine_y @ field.square().sum(1) @ mine_x.T
        z = _agreement(match, mine, (their_y @ power @ their_x.T)[:, None])
        enough = their_y.sum(1)[:, None] * their_x.sum(1) >= MIN_OVERLAP * max(w * h, COARSE**2)
        value, at = z.masked_fill(~enough, -1).flatten(2).max(dim=2)
        values.append(value)
        places.append(_placed(lag_x[at % len(lag_x)], lag_y[at // len(lag_x)], w, h))
    best = torch.stack(values, 1).flatten(1).topk(HYPOTHESES, dim=1).indices
    every = torch.stack(places, 1).flatten(1, 2)
    return every.gather(1, best[..., None, None].expand(-1, -1, 2, 3)), best % 2 == 1


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _lags(side: int, longest: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The shifts (L,) of a line of COARSE pixels along one of `side` pixels that overlap enough.

    With them come the matrices (L, side) and (L, COARSE), which are 1 where the lines overlap.
    """
    lag = torch.arange(1 - COARSE, side, device=device)
    mine, theirs = torch.arange(side, device=device), torch.arange(COARSE, device=device)
    of_mine = mine - lag[:, None]
    of_theirs = theirs + lag[:, None]
    in_mine = ((of_mine >= 0) & (of_mine < COARSE)).float()
    in_theirs = ((of_theirs >= 0) & (of_theirs < side)).float()
    enough = in_theirs.sum(1) >= MIN_OVERLAP * longest
    return lag[enough], in_mine[enough], in_theirs[enough]


def _placed(lag_x: Tensor, lag_y: Tensor, w: int, h: int) -> Tensor:
    place = torch.zeros(*lag_x.shape, 2, 3, device=lag_x.device)
    place[..., 0, 0], place[..., 1, 1] = COARSE / w, COARSE / h
    place[..., 0, 2] = (COARSE + 2 * lag_x) / w - 1
    place[..., 1, 2] = (COARSE + 2 * lag_y) / h - 1
    return place


def _views(grey: Tensor, place: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """The picture's field for each place, (B, 2, S, S), at about the other's level of detail.

    The field fills the upper left corner. The second result, (B,), is its share of the side.
    """
    top, views = LEVELS[-1], []
    for side in LEVELS:
        field = _field(_resized(grey, side, side))
        pad = (0, top - side, 0, top - side)
        views.append(F.pad(torch.cat([field, _mirror(field)]), pad, mode="replicate"))
    sides = torch.tensor(LEVELS, device=place.device)
    scale = place[:, 0, 0] * place[:, 1, 1]
    level = ((sides**2 / SIDE**2) * scale[:, None]).log().abs().argmin(dim=1)
    return torch.stack(views)[level, mirrored.long()], sides[level] / top


def grid(side: int, device: torch.device) -> Tensor:
    """Centres of the pixels of a square, (side, side, 3): x and y from −1 to 1, and 1."""
    line = (torch.arange(side, device=device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1)


def _positions(place: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where the other lies in the picture, (B, side, side, 2), and the mask of the overlap."""
    x, y, shift = place[:, None].unbind(-1)  # (B, 1, 2) each
    line = grid(side, place.device)[0, :, :1]
    at = (x * line)[:, None] + (y * line + shift)[:, :, None]
    return at, (torch.maximum(*at.abs().unbind(-1)) <= 1)[:, None].float()


def _sampled(views: Tensor, zoom: Tensor, place: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The picture's field aligned with the other, (B, 2, side, side), and the mask of the overlap."""
    at, inside = _positions(place, side)
    at = (at.clamp(-1, 1) + 1) * zoom[:, None, None, None] - 1
    return F.grid_sample(views, at, align_corners=False, padding_mode="border") * inside, inside


def _refined(views: Tensor, zoom: Tensor, theirs: Tensor, place: Tensor) -> Tensor:
    """Refine the affine place by inverse compositional Gauss-Newton steps, and return the best."""
    side = SIDE // 2
    slopes = torch.stack([F.avg_pool2d(s, 2).flatten(2) * SIDE / 2 for s in _slopes(theirs)], 1)
    steep = (slopes[:, [0, 0, 1]] * slopes[:, [0, 1, 1]]).sum(2)  # of x and x, x and y, y and y
    theirs = F.avg_pool2d(theirs, 2)
    best, kept = place.new_full((len(place),), -math.inf), place
    for _ in range(STEPS + 1):
        mine, inside = _sampled(views, zoom, place, side)
        shown = theirs * inside
        match, energy = (mine * shown).sum((1, 2, 3)), (mine * mine).sum((1, 2, 3))
        z = _agreement(match, energy, (shown * shown).sum((1, 2, 3)))
        kept = torch.where((z > best)[:, None, None], place, kept)
        best = torch.maximum(best, z)
        gain = (match / energy.clamp_min(1)).clamp(0.5, 2)
        error = gain[:, None, None, None] * mine - shown
        push = (slopes * error.flatten(2)[:, None]).sum(2)
        place = place @ _step(steep * inside.flatten(2), push, grid(side, place.device))
    return kept


def _step(steep: Tensor, push: Tensor, at: Tensor) -> Tensor:
    """One damped Gauss-Newton step: the affine motion (B, 3, 3) that reduces the error.

    Parameters
    ----------
    steep : Tensor (B, 3, N)
        For each pixel the products of the slopes, of x and x, x and y, y and y.
    push : Tensor (B, 2, N)
        The slopes times the error, which is 0 outside the overlap.
    at : Tensor (side, side, 3)
        The N pixels, see `grid`.
    """
    at, b = at.flatten(0, 1), len(push)
    normal = (steep @ (at[:, :, None] * at[:, None]).flatten(1)).reshape(b, 3, 3, 3)
    normal = normal[:, [[0, 1], [1, 2]]].transpose(2, 3).reshape(b, 6, 6)
    damping = 0.02 * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-2
    eye = torch.eye(3, device=push.device)
    normal = normal + torch.diag_embed(damping[:, None].expand(-1, 6))
    move = torch.linalg.solve(normal, (push @ at).reshape(b, 6, 1))
    motion = eye.repeat(b, 1, 1)
    motion[:, :2] += move.reshape(-1, 2, 3).clamp(-0.2, 0.2)
    inverse: Tensor = torch.linalg.inv(motion)
    return inverse


def _scored(
    mine: Tensor, inside: Tensor, theirs: Tensor, place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, correlation and overlap of each place, (B,)."""
    theirs = theirs * inside
    parts = [(x * y).sum(1) for x, y in ((mine, theirs), (mine, mine), (theirs, theirs))]
    patches = F.avg_pool2d(torch.stack([*parts, inside[:, 0]], 1), PATCH).flatten(2) * PATCH**2
    match, energy, other, area = patches.unbind(1)
    correlation = match.sum(1) / (energy.sum(1) * other.sum(1) + 1).sqrt()
    most = torch.maximum(energy, other)
    seen = (most / (most + SEEN) * area / PATCH**2).sum(1)
    of_other = area.sum(1) / SIDE**2
    of_picture = of_other * torch.linalg.det(place[:, :, :2]).abs()
    overlap = torch.maximum(of_other, of_picture).clamp(0, 1)
    score = correlation.clamp_min(0) * overlap.pow(0.25) * seen / (seen + CHANCE)
    return score, correlation, overlap


@one_thread()
def zncc(a: Tensor, b: Tensor) -> Tensor:
    """Zero-mean normalised cross-correlation of the 16x16 grey pictures.

    Brightness, contrast and fine detail do not count. 1 is the same picture apart from these, and about 0
    is usual for two different pictures. A flat picture has 0 with all others.

    Parameters
    ----------
    a, b : Tensor (B, 3, H, W) in [0, 1], any size each.

    Returns
    -------
    Tensor (B,) in [−1, 1].
    """
    return (_standardised(a) * _standardised(b)).sum(dim=1)


@one_thread()
def zncc_matrix(a: Tensor, b: Tensor) -> Tensor:
    """ZNCC of every picture of `a` with every picture of `b`: (A, B)."""
    return _standardised(a) @ _standardised(b).T


def _standardised(pictures: Tensor) -> Tensor:
    grey = luminance(low_pass(pictures.float(), ZNCC_SIDE)).flatten(1)
    grey = grey - grey.mean(dim=1, keepdim=True)
    length: Tensor = grey.norm(dim=1, keepdim=True).clamp_min(1e-3)
    return grey / length
