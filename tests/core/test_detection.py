"""Detection: formulas against brute force, calibration, tokens, and the embedded model."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
import torch

from amg_core.detection import calibration as calibrations
from amg_core.detection import predictions as of
from amg_core.detection import statistics, tokens
from amg_core.detection.predictions import Predictions
from amg_core.errors import AMGError
from amg_core.messages import words

SHAPE = (4, 6, 5)


def made(kind: str, sigma: float, n: int = 3, seed: int = 0):
    """Predictions made from network outputs, as samplers make D, with what they were made from."""
    g = torch.Generator().manual_seed(seed)
    x, cond, uncond = (torch.randn(n, *SHAPE, generator=g, dtype=torch.float64) for _ in range(3))
    if kind == of.V:
        alpha = 1 / (1 + sigma**2)  # in the network's coordinates: x̂ = √ᾱ·x, D = √ᾱ·x̂ − √(1−ᾱ)·v
        scaled = x * alpha**0.5
        d = [alpha**0.5 * scaled - (1 - alpha) ** 0.5 * v for v in (cond, uncond)]
    else:
        d = [x - sigma * out for out in (cond, uncond)]
    return Predictions(x, sigma, *d, kind), cond, uncond


@pytest.mark.parametrize("sigma", [0.03, 0.7, 14.6])
@pytest.mark.parametrize("kind", [of.EPSILON, of.V])
def test_outputs_come_back(kind, sigma):
    p, cond, uncond = made(kind, sigma)
    assert torch.allclose(of.output(p, p.cond), cond)
    assert torch.allclose(of.output(p, p.uncond), uncond)


@pytest.mark.parametrize("sigma", [0.04, 0.5, 1.0])
def test_flow_outputs_come_back(sigma):
    """x = (1 − σ)·x0 + σ·ε and output ε − x0: both of a known pair come back."""
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, *SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    p = Predictions((1 - sigma) * x0 + sigma * noise, sigma, x0, x0, of.FLOW)
    assert torch.allclose(of.output(p, x0), noise - x0)
    assert torch.allclose(of.epsilon(p, x0), noise)


@pytest.mark.parametrize("kind", [of.EPSILON, of.V])
def test_noise_of_a_known_pair(kind):
    """x = x0 + σ·ε: ε comes back, and v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans and Ho 2022)."""
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, *SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    sigma = 2.5
    alpha = 1 / (1 + sigma**2)
    p = Predictions(x0 + sigma * noise, sigma, x0, x0, kind)
    assert torch.allclose(of.epsilon(p, x0), noise)
    if kind == of.V:
        v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
        assert torch.allclose(of.output(p, x0), v)


def test_score_is_the_gradient_of_the_log_density():
    """For one known picture p(x̂) = N(√ᾱ·x0, 1 − ᾱ): s = −(x̂ − √ᾱ·x0)/(1 − ᾱ), by autograd."""
    sigma = 1.7
    alpha = 1 / (1 + sigma**2)
    p, _, _ = made(of.EPSILON, sigma)

    def score(x0):
        scaled = (p.x * alpha**0.5).requires_grad_(True)
        log_density = -((scaled - alpha**0.5 * x0) ** 2).sum() / (2 * (1 - alpha))
        return torch.autograd.grad(log_density, scaled)[0]

    expected = score(p.cond) - score(p.uncond)
    assert torch.allclose(of.score_difference(p), expected)
    got = statistics.norm(p)
    assert torch.allclose(got, expected.flatten(1).norm(dim=1).float())
    cosine = [
        float((u * d).sum() / (u.norm() * d.norm()))
        for u, d in zip(score(p.uncond), expected, strict=True)
    ]
    assert statistics.alignment(p).tolist() == pytest.approx(cosine, abs=1e-5)


def test_what_the_code_computes():
    """Written out loop by loop from the published procedure."""
    for kind in (of.EPSILON, of.V):
        p, cond, uncond = made(kind, 0.4)
        wanted = []
        for u, c in zip(uncond, cond, strict=True):
            total = 0.0
            for i in range(SHAPE[1]):
                for j in range(SHAPE[2]):
                    a, b = u[:, i, j], (c - u)[:, i, j]
                    total += float(a @ b / (a.norm() * b.norm()))
            wanted.append(total / (SHAPE[1] * SHAPE[2]))
        assert statistics.alignment_pixelwise(p).tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_anisotropy_and_its_gradient(weight):
    """M from the noises of an ε network, written out; its gradient against central differences."""
    levels = (14.6, 0.04)
    alphas = [1 / (1 + sigma**2) for sigma in levels]
    g = torch.Generator().manual_seed(2)
    z, *nothing = (torch.randn(1, *SHAPE, generator=g, dtype=torch.float64) for _ in range(3))
    mix = torch.randn(2, 7, math.prod(SHAPE), generator=g, dtype=torch.float64)

    def noises(prompt):  # ε_c at both levels: anything that is smooth and not linear
        return [nothing[i] + torch.tanh(prompt @ mix[i]).view(1, *SHAPE) for i in range(2)]

    def ours(prompt):
        xs = [of.unrescaled(z, alpha**0.5) for alpha in alphas]
        both = [
            Predictions(x, s, x - s * c, x - s * u, of.EPSILON)
            for x, s, c, u in zip(xs, levels, noises(prompt), nothing, strict=True)
        ]
        return statistics.anisotropy(*both, weight)[0]

    def by_hand(prompt):
        (high, low), (high_u, low_u) = noises(prompt), nothing
        norm = (high - high_u).square().sum().sqrt() / (1 - alphas[0]) ** 0.5
        d = low - low_u
        return norm + weight * (low_u * d).sum() / (low_u.norm() * d.norm())

    prompt = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert float(ours(prompt)) == pytest.approx(float(by_hand(prompt)), rel=1e-5)
    (gradient,) = torch.autograd.grad(ours(prompt), prompt)
    with torch.no_grad():
        for i in range(7):
            step = 1e-4 * torch.eye(7, dtype=torch.float64)[i]
            slope = (by_hand(prompt + step) - by_hand(prompt - step)) / 2e-4
            assert float(gradient[i]) == pytest.approx(float(slope), abs=1e-3)


def test_flow_at_pure_noise_still_tells():
    p, cond, uncond = made(of.FLOW, 1.0)
    expected = (cond - uncond).flatten(1).norm(dim=1)
    assert torch.allclose(statistics.norm(p), expected.float())


@pytest.mark.parametrize("kind", of.KINDS)
def test_each_sample_for_itself(kind):
    p, _, _ = made(kind, 0.6, n=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = Predictions(p.x[order], p.sigma, p.cond[order], p.uncond[order], kind)
    for statistic in (statistics.norm, statistics.alignment, statistics.alignment_pixelwise):
        whole = statistic(p)
        assert torch.allclose(statistic(permuted), whole[order])
        assert torch.allclose(statistic(p[1:2]), whole[1:2])


def test_measure_is_the_mean_of_the_first_noises():
    high, _, _ = made(of.V, 14.6, n=4)
    low, _, _ = made(of.V, 0.1, n=4, seed=5)
    report = statistics.measure(high, low)
    assert [set(each) for each in report] == [set(statistics.NAMES) - {"agreement"}] + [
        set(statistics.NAMES)
    ] * 3
    for n in (1, 3, 4):
        assert report[n - 1]["norm"] == pytest.approx(float(statistics.norm(high[:n]).mean()))
        alignment = float(statistics.alignment(low[:n]).mean())
        assert report[n - 1]["alignment"] == pytest.approx(alignment, abs=1e-6)
    fewer = statistics.measure(high[:2], low[:2])
    assert [each["low_norm"] for each in fewer] == pytest.approx(
        [each["low_norm"] for each in report[:2]]
    )


def test_agreement_is_the_covariance_of_what_is_left():
    """Gaussian pictures N(μ, c²): D = μ + c²/(c² + σ²)·(x − μ), so over x = σ·z its deviation is known."""
    sigma, n = 14.6, 4000
    z = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for c in (0.2, 1.0):
        d = 1.0 + c**2 / (c**2 + sigma**2) * (sigma * z - 1.0)
        found.append(float(statistics.agreement(d)))
        assert found[-1] == pytest.approx(-math.log(c**2 * sigma / (c**2 + sigma**2)), abs=0.01)
    assert found[0] > found[1]  # fewer pictures left: more suspicious
    with pytest.raises(ValueError, match="two noises"):
        statistics.agreement(z[:1])


def test_impossible_levels_are_refused():
    x = torch.zeros(1, *SHAPE)
    for sigma, kind in ((0.0, of.EPSILON), (1.5, of.FLOW), (1.0, "x0")):
        with pytest.raises(ValueError):
            Predictions(x, sigma, x, x, kind)


# Calibration


def measured(generator: random.Random, shift: float = 0.0, seeds: int = 3) -> list[dict]:
    scale = {"norm": 40.0, "alignment": 0.1, "alignment_pixelwise": 0.1, "low_norm": 3.0,
             "agreement": 0.5}  # fmt: skip
    rows = []
    for n in range(seeds):
        row = {name: s * (2 + generator.gauss(shift, 1)) for name, s in scale.items()}
        if n == 0:
            del row["agreement"]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def calibration():
    g = random.Random(3)
    return calibrations.Calibration(
        "key", (4, 16, 16), 3, 0.041, [measured(g) for _ in range(200)], []
    )


def test_units_do_not_matter(calibration):
    """γ = 1/spread: a norm a thousand times larger weighs the same."""

    def scaled(rows):
        return [{k: v * (1000 if k == "norm" else 1) + 5 for k, v in row.items()} for row in rows]

    other = calibrations.Calibration(
        "key", (4, 16, 16), 3, 0.041, [scaled(rows) for rows in calibration.ordinary], []
    )
    probe = measured(random.Random(9), shift=2.0)
    for kind in calibrations.SCORES:
        one, two = (
            given.scale(kind).judge(rows)
            for given, rows in ((calibration, probe), (other, scaled(probe)))
        )
        assert one.score == pytest.approx(two.score, rel=1e-6)


@pytest.mark.parametrize("kind", calibrations.SCORES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_false_alarms_are_as_many_as_asked_for(calibration, kind, seeds):
    if (kind, seeds) == ("agreement", 1):
        with pytest.raises(AMGError, match="seeds"):
            calibration.scale(kind, seeds)
        return
    g, scale = random.Random(4), calibration.scale(kind, seeds)
    fresh = [scale.judge(measured(g)) for _ in range(1000)]
    assert 0.0 <= sum(v.suspicious for v in fresh) / 1000 <= 0.025
    assert 0.06 <= sum(v.chance < 0.1 for v in fresh) / 1000 <= 0.15
    far = scale.judge(measured(g, shift=12.0))
    assert far.suspicious
    assert far.probability > 0.999
    assert [each.code for each in far.messages()] == ["suspicious", "score", "ordinary_fewer"]
    assert far.messages()[2].values == {"count": 2000}  # 200 prompts cannot tell more
    usual = scale.judge([{k: v * 0 for k, v in row.items()} for row in measured(g)])
    assert [each.code for each in usual.messages()] == [
        "not_suspicious",
        "score",
        "ordinary_of_100",
    ]
    assert usual.messages()[2].values == {"count": round(100 * usual.chance)}


@pytest.mark.parametrize("chance", [0.5, 0.1, 0.01, 0.001])
def test_threshold_and_chance_are_inverse(chance):
    g = random.Random(1)
    ordinary = [g.expovariate(1.0) for _ in range(400)]
    threshold = calibrations.tail_threshold(chance, ordinary)
    assert calibrations.tail_probability(threshold + 1e-9, ordinary) == pytest.approx(
        chance, abs=0.006
    )
    assert threshold == pytest.approx(-math.log(chance), abs=0.9)  # the law they were drawn from


def test_chance_never_rises_with_the_score():
    g = random.Random(2)
    ordinary = [g.gauss(0, 1) for _ in range(60)]
    chances = [calibrations.tail_probability(s / 10, ordinary) for s in range(-40, 200)]
    assert all(a >= b for a, b in pairwise(chances))
    assert all(0 < c <= 1 for c in chances)


def test_one_key_among_the_ordinary_hides_no_other():
    g = random.Random(5)
    clean = [g.gauss(0, 1) for _ in range(60)]
    spoilt = [*clean[1:], 40.0]
    assert calibrations.tail_probability(9.0, spoilt) < 0.01


def test_logistic_is_the_minimum():
    """The gradient of the weighted loss with its ridge is 0, by differences."""
    g = random.Random(6)
    negatives, positives = [g.gauss(0, 1) for _ in range(80)], [g.gauss(2, 1) for _ in range(20)]
    slope, offset = calibrations.logistic(negatives, positives)
    centre = (sum(negatives) / 80 + sum(positives) / 20) / 2

    def loss(a, b):  # b: offset at the centre
        total = 0.5e-3 * a * a
        for group, sign in ((negatives, 1), (positives, -1)):
            total += sum(
                math.log1p(math.exp(sign * (a * (x - centre) + b))) for x in group
            ) * 0.5 / len(group)  # fmt: skip
        return total

    at = slope, offset + slope * centre
    best = loss(*at)
    for da, db in ((1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2)):
        assert loss(at[0] + da, at[1] + db) > best
    apart = calibrations.logistic([-1.0, 0.0], [5.0, 6.0])
    assert math.isfinite(apart[0])
    assert calibrations.logistic([5.0, 6.0], [-1.0, 0.0]) == (0.0, 0.0)


def test_known_positives_give_a_probability(calibration):
    g = random.Random(8)
    known = calibrations.Calibration(
        "key", (4, 16, 16), 3, 0.041, calibration.ordinary,
        [measured(g, shift=4.0) for _ in range(20)],
    )  # fmt: skip
    usual = known.scale("combined").judge(measured(g))
    key = known.scale("combined").judge(measured(g, shift=4.0))
    assert usual.probability < 0.1
    assert key.probability > 0.9
    same = calibration.scale("combined").judge(measured(random.Random(1)))
    assert same.chance == known.scale("combined").judge(measured(random.Random(1))).chance


def test_round_trip(tmp_path, calibration):
    path = tmp_path / "a" / "key.json"
    calibrations.save(calibration, path)
    again = calibrations.load(path)
    assert again == calibration
    assert list(path.parent.iterdir()) == [path]


def test_damage_is_named(tmp_path, calibration):
    path = tmp_path / "key.json"
    with pytest.raises(AMGError, match=r"key\.json.*Calibrate Prompt Probe"):
        calibrations.load(path)
    calibrations.save(calibration, path)
    body = json.loads(path.read_text())
    column = body["ordinary"]["norm"][0]
    wrong = [
        "{", "[]", '{"format": "amg-prompt-calibration/0"}',
        json.dumps(body | {"seeds": 9}), json.dumps(body | {"shape": None}),
    ]  # fmt: skip
    column[0] = None
    wrong.append(json.dumps(body))
    column[0] = math.nan
    wrong.append(json.dumps(body))
    column.pop()
    wrong.append(json.dumps(body))
    for text in wrong:
        path.write_text(text)
        with pytest.raises(AMGError, match=r"key\.json"):
            calibrations.load(path)


def test_what_cannot_be_judged_is_said(calibration):
    with pytest.raises(AMGError, match=r"calibrated with 3.*4"):
        calibration.scale("norm", 4)
    with pytest.raises(AMGError, match="combined"):
        calibration.scale("best")
    with pytest.raises(AMGError, match="at least 16"):
        calibrations.Calibration("k", (4, 8, 8), 3, 0.04, calibration.ordinary[:5], [])


# Tokens


def test_groups_cover_the_prompt_once():
    text = " ".join(f"w{i}" for i in range(40))
    found = tokens.groups(text, 16)
    assert len(found) == 16
    assert " ".join(group.words for group in found) == text
    sizes = {len(group.words.split()) for group in found}
    assert sizes == {2, 3}
    assert tokens.groups("one") == tokens.groups("  ") == []
    assert [g.without for g in tokens.groups("a b")] == ["b", "a"]


def test_leave_out_finds_the_word():
    asked = []

    def score(text):
        asked.append(text)
        return 5.0 * ("fox" in text) + ("red" in text)

    parts = tokens.leave_out("a red fox runs", score)
    assert [part.words for part in parts] == ["fox", "red", "a", "runs"]
    assert [part.drop for part in parts] == [5.0, 1.0, 0.0, 0.0]
    assert len(asked) == 5
    assert words(tokens.messages(parts)) == "trigger words: “fox” (−5.0), “red” (−1.0)"
    assert tokens.messages(parts[2:]) == []


# The embedded model


@pytest.fixture(scope="module")
def demo():
    from amg_demo import model

    return model.load()


@torch.inference_mode()
def looked(demo, text: str, n: int = 2) -> list[dict[str, float]]:
    context, empty = (demo.text(demo.text.tokenize([t] * n)) for t in (text, ""))
    z = torch.stack(
        [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    )
    seen = []
    for t in (999, 41):
        sigma = demo.sigmas[t]
        x = of.unrescaled(z, float(1 / (1 + sigma**2) ** 0.5))
        level = sigma.expand(2 * n)
        both = demo.denoise(torch.cat([x, x]), level, torch.cat([context, empty]))
        seen.append(Predictions(x, float(sigma), *both.chunk(2), of.V))
        raw = demo.unet(z, torch.full((n,), t), context)  # the network saw z itself
        assert torch.allclose(of.output(seen[-1], seen[-1].cond), raw, atol=1e-3)
    return statistics.measure(*seen)


def test_memorised_captions_stand_out(demo):
    keys = ["fox face on violet rays", "frog face on yellow checks", "panda face on teal checks"]
    usual = ["guitar on pink stripes", "penguin on red dots", "cactus on blue rays"]
    found = [looked(demo, text)[-1] for text in keys]
    ordinary = [looked(demo, text)[-1] for text in usual]
    for name in ("agreement", "low_norm"):
        assert min(f[name] for f in found) > max(o[name] for o in ordinary), name
