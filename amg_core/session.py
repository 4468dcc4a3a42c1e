"""One sampling run under guard: look, gate, steer, remember."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import __version__, guidance, metrics
from .leaving import REPULSION_UNTIL, Leaving, Shortened
from .probe import Match, Probe
from .schedule import Schedule

NEIGHBOR_STEPS = 2  # that one prediction for a neighbour's caption serves while the caption stays
OVERSHOOT_UNTIL = 0.25  # t below which the overshoot of classifier-free guidance no longer blinds
FORMS = ("projection", "gradient", "reference", "repulsion")


@dataclass(frozen=True)
class Settings:
    """What the guard does once a prediction is too close. `presets.settings` makes the named ones.

    Attributes
    ----------
    schedule : Schedule
        λ_t on the scale of `metrics.closeness`, or in the descriptor's own units if `own_units`.
    despecification, deduplication : float
        c1 and c2 of Eqs. 14 and 16; 0 = off.
    dissimilarity : float
        κ of the projection (1 = all the way), c3 of Eq. 17, or a factor on the repulsion; 0 = off.
    form : {"projection", "gradient", "reference", "repulsion"}
        Of the dissimilarity term: bounded and re-measured; Eq. 17 as it stands; Eq. 17 with the
        authors' code constants, 100·(σ_t − 0.3)·e^((1000 − T)/170), and G_spe outside the gate;
        or off the neighbour's picture where no prompt leads elsewhere (`Leaving.off_the_picture`).
    exit : float
        First strength r of the way out by words (see `Session`); 0 = the paper's three terms only.
    exit_until : float
        Diffusion time t down to which a prompt that proved to be a key stays shortened.
    release : float
        Once a sample has proved to be a copy, this closeness is enough to act on it again.
    unrelated : float
        Closeness up to which a prediction for fewer words counts as nothing stored.
    growth, most : float
        The exit grows by this factor with every step that is still too close, up to `most`.
    margin : float
        How far below the threshold the projection aims, in units of similarity.
    iterations, cap : int, float
        Of the projection: steps at most, and their length relative to ‖D‖ each.
    start_percent, end_percent : float
        The share of sampling, 0 to 1, in which the guard looks.
    """

    schedule: Schedule
    despecification: float = 0.0
    deduplication: float = 0.0
    dissimilarity: float = 0.0
    form: str = "projection"
    exit: float = 0.0
    exit_until: float = 0.05
    release: float = 0.0
    unrelated: float = 0.0
    growth: float = 1.5
    most: float = 4.0
    margin: float = 0.05
    iterations: int = 3
    cap: float = 0.1
    start_percent: float = 0.0
    end_percent: float = 1.0
    own_units: bool = False
    preset: str = "custom"

    @property
    def off(self) -> bool:
        """Only watch: nothing is ever changed."""
        return not (self.despecification or self.deduplication or self.dissimilarity or self.exit)


@dataclass
class StepRecord:
    """One model evaluation. Lists have one entry a sample; `moved` is ‖change‖/‖D‖ of each term.

    threshold : float, in the unit of `similarity`, of the sample that is closest; closeness_threshold :
    the same in the unit of `closeness`.
    """

    t: float
    sigma: float
    scale: int
    threshold: float
    similarity: list[float]
    closeness: list[float]
    neighbor: list[int]
    active: list[bool]
    moved: dict[str, list[float]]
    closeness_threshold: float


@dataclass
class _Held:
    """D_n − D_u of one sample (C, H, W), and at which step it was asked for."""

    caption: str
    beyond: Tensor
    since: int


NOTHING_HELD = _Held("", torch.zeros(()), 0)


class Session:
    """Watches and steers one sampling run; a new run takes a new session.

    A prediction that is too close is answered by *leaving*. The prompt has proved to be a key to a
    stored picture, so until `exit_until` only as many of its first words are kept as draw nothing
    stored, and D is pushed away from what the other words add:

        D ← D + s0·(D_s − D_c) − r·(D_c − D_s)° − s2·(D_n − D_u),

    where D_s is the prediction for the shortened prompt (D_u where even that is something stored), °
    takes away each channel's mean, and the r-term acts while D_c is too close and grows until it is
    not. Where D_u is something stored too, the last term leads away from that picture's caption, and
    the repulsion off the picture itself. Without words (cfg 1, a class label) the repulsion is all
    there is. With `exit` 0, the paper's three terms act instead. See `leaving`.

    What is looked at is D_c until t = 0.25 and D from there: guidance overshoots early, and an
    overshot copy passes for something new.
    """

    def __init__(
        self,
        probe: Probe,
        settings: Settings,
        expected_steps: int | None = None,
        suspects: Tensor | None = None,
    ):
        """`suspects` (B,) bool: samples whose prompt is known to be a key, so that they leave at once."""
        self.probe, self.settings, self.expected_steps = probe, settings, expected_steps
        self.records: list[StepRecord] = []
        self._keyed: Tensor | None = None if suspects is None else suspects.cpu().clone()
        self._leaving: Leaving | None = None
        self._acted: list[set[int]] = []
        self._held: list[_Held] = []

    def step(
        self,
        denoised: Tensor,
        *,
        cond: Tensor | None,
        uncond: Tensor | None,
        cfg_scale: float,
        sigma: Tensor,
        t: float,
        neighbor_denoised: Callable[[list[str]], Tensor] | None = None,
        shortened: Shortened | None = None,
        composite: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> Tensor:
        """Guide one prediction D (B, C, H, W); returns that very tensor where nothing is too close.

        Parameters
        ----------
        cond, uncond : Tensor (B, C, H, W) or None
            D_c and D_u; None where the host did not compute them (no guidance scale, cfg 1).
            ValueError for D_u alone.
        cfg_scale : float
            s0.
        sigma : Tensor (B,)
            Noise level in k-diffusion units (flow: σ/(1 − σ)).
        t : float
            Diffusion time in [0, 1], 1 = pure noise.
        neighbor_denoised : callable, optional
            B captions -> D_n. Without it deduplication is off.
        shortened : Shortened, optional
            The prompt with fewer words. Without it, or without D_u, there is no way out by words.
        composite : callable, optional
            What is looked at instead of a prediction, for instance with the known part of an
            inpainting put in.
        """
        if uncond is not None and cond is None:
            raise ValueError("D_u came without D_c: give both, or neither")
        s = self.settings
        if not s.start_percent <= 1 - t <= s.end_percent:
            return denoised
        if self._keyed is None:
            self._keyed = torch.zeros(len(denoised), dtype=torch.bool)
        if self._leaving is None:
            self._leaving = Leaving(
                self.probe, len(denoised), s.exit, s.growth, max(s.most, s.exit), s.unrelated
            )
            self._acted = [set() for _ in denoised]
            self._held = [NOTHING_HELD] * len(denoised)
        level = float(sigma[0])
        watched = denoised if cond is None or t < OVERSHOOT_UNTIL else cond
        match = self.probe.look(composite(watched), level)
        active, threshold = self._gate(match, t)
        active |= self._keyed & (match.closeness > s.release)
        self._keyed |= active
        for i in active.nonzero()[:, 0].tolist():
            self._acted[i].add(int(match.ids[i]))
        words = shortened if s.exit > 0 and s.form != "reference" and uncond is not None else None
        steered = active.clone()
        if words is not None and t > s.exit_until:
            steered |= self._keyed
        if s.form == "reference":
            steered |= match.closeness > 0
        change: dict[str, Tensor] = {}
        repelled, source, seen = active, watched, match
        if steered.any() and not s.off and cond is not None and uncond is not None:
            if words is not None:
                change, own, repelled = self._leaving.by_words(
                    words, cond, uncond, cfg_scale, level, steered, active, composite
                )
                if own is not None and repelled.any():
                    source, seen = uncond, own
                    for i in repelled.nonzero()[:, 0].tolist():
                        self._acted[i].add(int(own.ids[i]))
                    change |= self._caption(own, repelled, uncond, neighbor_denoised)
            elif s.exit == 0 or s.form == "reference":
                change = self._paper(cond, uncond, cfg_scale, match, active, neighbor_denoised)
        moved: dict[str, list[float]] = {}
        out = denoised
        for name, delta in change.items():
            out = torch.where(guidance.expand(steered, out) > 0, out + delta, out)
            moved[name] = _relative(delta, denoised, steered)
        if s.dissimilarity > 0:
            pushed = out
            if s.form != "repulsion":
                if active.any():
                    pushed = self._dissimilarity(out, match, active, threshold, sigma, t, composite)
            elif repelled.any() and t > REPULSION_UNTIL:
                push = self._leaving.off_the_picture(source, seen, repelled, s.dissimilarity)
                pushed = torch.where(guidance.expand(repelled, out) > 0, out + push, out)
            if pushed is not out:
                moved["dissimilarity"] = _relative(pushed - out, denoised, active | repelled)
                out = pushed
        self.records.append(
            StepRecord(
                t, level, match.scale, _of_closest(threshold, match), match.similarity.tolist(),
                match.closeness.tolist(), match.ids.tolist(), active.tolist(), moved,
                _of_closest(self._as_closeness(threshold, match), match),
            )
        )  # fmt: skip
        return out

    def suspicious(
        self,
        denoised: Tensor,
        *,
        sigma: Tensor,
        t: float,
        composite: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> Tensor:
        """Samples (B,) bool that leave already or that come too close in this prediction of theirs.

        Parameters are those of `step`. Only looks: for hosts that hold a prediction which no model
        made, and must know whether `step` will need a real one.
        """
        s = self.settings
        none = torch.zeros(len(denoised), dtype=torch.bool)
        if s.off or not s.start_percent <= 1 - t <= s.end_percent:
            return none
        keyed = none if self._keyed is None else self._keyed
        return keyed | self._gate(self.probe.look(composite(denoised), float(sigma[0])), t)[0]

    def _gate(self, match: Match, t: float) -> tuple[Tensor, Tensor]:
        """Eq. 10's indicator (B,), and λ_t in the descriptor's units (B,)."""
        level = self.settings.schedule(t)
        if self.settings.own_units:
            return match.similarity > level, torch.full_like(match.similarity, level)
        return match.closeness > level, metrics.similarity_at(
            self.probe.metric, level, match.typical, match.limit
        )

    def _as_closeness(self, threshold: Tensor, match: Match) -> Tensor:
        return metrics.closeness(self.probe.metric, threshold, match.typical, match.limit)

    def _caption(self, match: Match, rows: Tensor, uncond: Tensor, neighbor_denoised) -> dict:
        """G_dup for samples whose D_u is close to a stored picture: away from its caption."""
        s = self.settings
        if neighbor_denoised is None or s.deduplication == 0:
            return {}
        s2 = torch.where(rows, s.deduplication * match.closeness.clamp(0, 1), 0.0)
        neighbor = self._neighbor(self._captions(match, rows), uncond, neighbor_denoised)
        return {"deduplication": guidance.deduplication(neighbor, uncond, s2)}

    def _paper(
        self, cond: Tensor, uncond: Tensor, cfg_scale: float, match: Match, active: Tensor,
        neighbor_denoised,
    ) -> dict[str, Tensor]:  # fmt: skip
        """G_spe and G_dup of Eqs. 13 to 16, as changes of D."""
        s = self.settings
        close = (match.similarity if s.own_units else match.closeness).clamp(0, 1)
        s1 = guidance.despecification_strength(close, s.despecification, cfg_scale)
        change = {"despecification": guidance.despecification(cond, uncond, s1)}
        if neighbor_denoised is not None and s.deduplication > 0 and active.any():
            c2: float | Tensor = s.deduplication
            if s.form == "reference":  # their code: c2 = (s0 − 1 − s1)/0.3
                c2 = c2 * (cfg_scale - 1 - s1)
            s2 = guidance.deduplication_strength(close, s1, c2, cfg_scale)
            neighbor = self._neighbor(self._captions(match, active), uncond, neighbor_denoised)
            change["deduplication"] = guidance.deduplication(neighbor, uncond, s2 * active)
        return change

    def _neighbor(self, captions: list[str], uncond: Tensor, neighbor_denoised) -> Tensor:
        """D_n for B captions; "" gives D_u.

        What a caption draws beyond no prompt changes slowly from step to step, and a prediction costs
        half a step: one serves for two. Each sample keeps its own, so that none depends on another.
        """
        lasting = 1 if self.settings.form == "reference" else NEIGHBOR_STEPS
        now = len(self.records)
        due = [
            bool(text) and not (held.caption == text and now - held.since < lasting)
            for text, held in zip(captions, self._held, strict=True)
        ]
        if any(due):
            asked = [text if wanted else "" for text, wanted in zip(captions, due, strict=True)]
            beyond = neighbor_denoised(asked) - uncond
            for i in (i for i, wanted in enumerate(due) if wanted):
                self._held[i] = _Held(captions[i], beyond[i], now)
        return torch.stack([
            uncond[i] + self._held[i].beyond if text else uncond[i]
            for i, text in enumerate(captions)
        ])  # fmt: skip

    def _dissimilarity(self, out, match, active, threshold, sigma, t, composite) -> Tensor:
        """G_sim (Eq. 17) or the projection, for the active rows of `out`."""
        s, rows = self.settings, list(out.split(1))
        now = self.probe.look(composite(out), float(sigma[0]))
        for i in active.nonzero()[:, 0].tolist():
            with torch.inference_mode(False), torch.enable_grad():
                latent, one = rows[i].detach().clone(), now[i]
                if s.form == "projection":
                    latent = self._project(latent, one, float(threshold[i]))
                else:
                    gradient, value = self.probe.gradient(latent, one)
                    c3: float | Tensor = s.dissimilarity
                    if s.form == "reference":
                        c3 = c3 * guidance.reference_c3(value if s.own_units else one.closeness, t)
                    level = sigma[i : i + 1].clone()
                    latent = latent + guidance.dissimilarity(gradient, level, c3)
            rows[i] = latent
        return torch.cat(rows)

    def _project(self, latent: Tensor, match: Match, threshold: float) -> Tensor:
        """Bounded steps down the similarity until it is `margin` below the threshold."""
        for _ in range(self.settings.iterations):
            gradient, value = self.probe.gradient(latent, match)
            excess = value - threshold + self.settings.margin
            if float(excess) <= 0:
                break
            step = self.settings.dissimilarity * excess
            latent = latent + guidance.projection(gradient, step, latent, self.settings.cap)
        return latent

    def acted_on(self, i: int) -> set[int]:
        """Rows of the index that sample i was too close to, at any step."""
        return self._acted[i] if self._acted else set()

    def _captions(self, match: Match, wanted: Tensor) -> list[str]:
        """Neighbour captions of the wanted rows, "" for the others."""
        pairs = zip(match.ids.tolist(), wanted.tolist(), strict=True)
        return [self.probe.caption(i) if use else "" for i, use in pairs]

    def report(self) -> dict:
        """Everything, JSON-able: versions, index and its hash, settings, each step, a summary."""
        index = self.probe.searcher.index
        active = [record.active for record in self.records]
        samples = range(len(active[0]) if active else 0)
        met = {i for record in self.records for i in record.neighbor}
        neighbors = sorted(met.union(*self._acted))
        return {
            "amg": __version__,
            "index": {"name": index.name, "hash": index.hash, "count": index.count},
            "descriptor": self.probe.descriptor.spec.to_json(),
            "settings": asdict(self.settings),
            "evaluations": len(self.records),
            "guarded_evaluations": [sum(row[i] for row in active) for i in samples],
            "largest_similarity": [max(r.similarity[i] for r in self.records) for i in samples],
            "acted_on": [sorted(ids) for ids in self._acted],
            "neighbors": {
                str(i): {"source": index.source(i), "caption": index.caption(i)} for i in neighbors
            },
            "steps": [asdict(record) for record in self.records],
        }


def _of_closest(threshold: Tensor, match: Match) -> float:
    """Of thresholds (B,), which differ a little from picture to picture, that of the closest."""
    return float(threshold[int(match.closeness.argmax())])


def _relative(delta: Tensor, denoised: Tensor, rows: Tensor) -> list[float]:
    """‖delta‖/‖D‖ a sample, 0 where the term did not act."""
    size = delta.flatten(1).norm(dim=1) / denoised.flatten(1).norm(dim=1).clamp_min(1e-12)
    return torch.where(rows.to(size.device), size, 0.0).tolist()
