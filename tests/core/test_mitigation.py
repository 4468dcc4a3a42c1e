"""Mitigations without an index: formulas by brute force, seeds, one sample at a time, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from amg_core.errors import AMGError
from amg_core.mitigation import differentiation, embeddings, prompts, transition
from amg_core.mitigation.adaptation import adapt
from amg_core.mitigation.differentiation import BudgetExceeded, Ledger
from benchmarks import mitigations

CAPTION = "a portrait of an old man with a red hat"
VOCABULARY = [f"word{i}" for i in range(50)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def word(generator: torch.Generator) -> str:
    return VOCABULARY[prompts.below(len(VOCABULARY), generator)]


@pytest.fixture(autouse=True)
def no_global_draw():
    """Nothing here may draw from the global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- prompts


def test_the_settings_of_paper_and_code():
    """Somepalli et al.: p 0.1 / 0.4 / 0.4, four times, numbers up to 10⁶; their program: always, 10⁵."""
    assert {m: r.probability for m, r in prompts.PAPER.items()} == {
        "RT": 0.1,
        "CWR": 0.4,
        "RNA": 0.4,
    }
    assert {r.probability for r in prompts.CODE.values()} == {1.0}
    assert {r.repeats for table in prompts.RECIPES.values() for r in table.values()} == {4}
    assert prompts.PAPER["RNA"].numbers == 10**6 + 1
    assert prompts.CODE["RNA"].numbers == 10**5
    assert prompts.PAPER["RT"].replaces and not prompts.CODE["RT"].replaces


def without(words: list[str], added: list[int]) -> list[str]:
    return [w for i, w in enumerate(words) if i not in added]


@pytest.mark.parametrize("method", prompts.METHODS)
def test_code_adds_four_words_and_keeps_the_others(method):
    given = CAPTION.split()
    places = set()
    for seed in range(40):
        out = prompts.randomise(CAPTION, method, prompts.CODE[method], seeded(seed), word).split()
        assert len(out) == len(given) + 4
        if method == "CWR":
            assert set(out) == set(given)
        else:
            new = [w for w in out if w not in given]
            assert len(new) == 4
            allowed = (lambda w: w in VOCABULARY) if method == "RT" else str.isdigit
            assert all(allowed(w) for w in new)
            places |= {i for i, w in enumerate(out) if w not in given}
        left = iter(out)  # the caption is a subsequence
        assert all(any(w == seen for seen in left) for w in given)
    if places:
        assert {0, len(given) + 3} <= places  # both ends are places like any other


@pytest.mark.parametrize("method", prompts.METHODS)
def test_the_same_seed_makes_the_same_prompt(method):
    made = {
        prompts.randomise(CAPTION, method, prompts.CODE[method], seeded(s), word)
        for s in (1, 1, 1, 2, 3)
    }
    assert len(made) == 3


@pytest.mark.parametrize("method", prompts.METHODS)
def test_paper_acts_with_its_probability(method):
    """Rounds that act, over 1,500 prompts of four: binomial, within four standard deviations."""
    recipe, rounds = prompts.PAPER[method], 6000
    acted = 0
    for seed in range(rounds // 4):
        out = prompts.randomise(CAPTION, method, recipe, seeded(seed), word).split()
        acted += len(out) - len(CAPTION.split())
        if method == "RT":
            gone = [w for w in set(CAPTION.split()) if out.count(w) < CAPTION.split().count(w)]
            acted += len(gone)
    p = recipe.probability
    assert abs(acted - p * rounds) < 4 * math.sqrt(rounds * p * (1 - p)) + 0.02 * rounds * p


def test_paper_rt_replaces_in_half_of_the_rounds_that_act():
    recipe = replace(prompts.PAPER["RT"], probability=1.0, repeats=1)
    lengths = [
        len(prompts.randomise(CAPTION, "RT", recipe, seeded(s), word).split()) for s in range(600)
    ]
    replaced = lengths.count(len(CAPTION.split()))
    assert lengths.count(len(CAPTION.split()) + 1) == 600 - replaced
    assert abs(replaced - 300) < 4 * math.sqrt(150)


def test_tokens_are_treated_like_words():
    ids = [320, 2368, 4337]
    recipe = prompts.CODE["RT"]
    out = prompts.random_tokens(ids, lambda g: prompts.below(49_400, g), recipe, seeded(0))
    assert len(out) == 7
    assert [i for i in out if i in ids] == ids
    assert sorted(set(prompts.repeated_words(ids, recipe, seeded(0)))) == sorted(ids)


def test_numbers_reach_over_their_whole_range():
    recipe = prompts.Recipe(numbers=10)
    drawn = [w for s in range(60) for w in prompts.random_numbers([], recipe, seeded(s))]
    assert set(drawn) == {str(i) for i in range(10)}


def test_weights_and_brackets_stay_in_place():
    assert prompts.bare("(red:1.2)") == "red"
    assert prompts.bare("8:30") == "8:30"
    text = "a (red:1.2) [fox]"
    for seed in range(30):
        again = prompts.randomise(text, "CWR", prompts.CODE["CWR"], seeded(seed))
        assert again.count("(") == again.count(")") == again.count("[") == 1
        always = prompts.Recipe(replaces=True)
        swapped = prompts.randomise(text, "RT", always, seeded(seed), word)
        assert swapped.count("(") == swapped.count(":1.2)") == swapped.count("[") == 1


@pytest.mark.parametrize("method", prompts.METHODS)
def test_empty_prompts(method):
    out = prompts.randomise("", method, prompts.CODE[method], seeded(0), word)
    assert len(out.split()) == (0 if method == "CWR" else 4)
    assert prompts.randomise("", "RT", prompts.Recipe(replaces=True), seeded(1), word)


def test_errors_name_the_widget():
    with pytest.raises(AMGError, match=r"method.*CLIP"):
        prompts.randomise("a", "RT", prompts.CODE["RT"], seeded(0))
    with pytest.raises(AMGError, match=r"method.*RT, CWR, RNA"):
        prompts.randomise("a", "odd", prompts.CODE["RT"], seeded(0))


# ---------------------------------------------------------------- embeddings


def test_gni_is_the_formula():
    embedding = torch.randn(2, 7, 5, generator=seeded(0)) * 3
    noisy = embeddings.gaussian_noise(embedding, 0.1, embeddings.generators(11, 2))
    for row in range(2):
        noise = torch.randn(7, 5, generator=seeded(11 + row))
        assert torch.allclose(noisy[row], embedding[row] + 0.1 * noise)
    relative = embeddings.gaussian_noise(embedding, 0.1, embeddings.generators(11, 2), True)
    for row in range(2):
        noise = torch.randn(7, 5, generator=seeded(11 + row))
        wanted = embedding[row] + 0.1 * embedding[row].std() * noise
        assert torch.allclose(relative[row], wanted, atol=1e-6)


def test_gni_off_types_and_rows():
    embedding = torch.randn(3, 7, 5, generator=seeded(0)).half()
    assert embeddings.gaussian_noise(embedding, 0, []) is embedding
    noisy = embeddings.gaussian_noise(embedding, 0.2, embeddings.generators(5, 3), True)
    assert noisy.dtype == torch.float16
    alone = embeddings.gaussian_noise(embedding[1:2], 0.2, [seeded(6)], True)
    assert torch.equal(noisy[1:2], alone)
    assert embeddings.generators(2**64 - 1, 2)[1].initial_seed() == 0


def test_noise_in_training_is_new_in_each_step():
    """Against noises drawn one after the other; its gradient is that of the embedding."""
    embedding = torch.randn(2, 7, 5, generator=seeded(0)).requires_grad_()
    ours, theirs = seeded(4), seeded(4)
    for _ in range(3):
        noisy = embeddings.training_noise(embedding, ours)
        noise = torch.stack([torch.randn(7, 5, generator=theirs) for _ in range(2)])
        assert torch.allclose(noisy, embedding + 0.1 * noise, atol=1e-6)
    (gradient,) = torch.autograd.grad(noisy.sum(), embedding)
    assert torch.equal(gradient, torch.ones(2, 7, 5))
    assert embeddings.training_noise(embedding, ours, 0.0) is embedding
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_padding_is_what_follows_the_first_end():
    learned = torch.zeros(4)  # hosts put whole embeddings in among the ids
    ids = [49406, 320, learned, 49407, 49407, 49407]
    assert embeddings.padding_after(ids, 49407) == [False] * 4 + [True] * 2
    assert embeddings.first_end(ids, 49407) == 3
    assert embeddings.first_end(ids[:3], 49407) is None
    assert not any(embeddings.padding_after(ids[:3], 49407))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_zeroed_padding(share):
    embedding = torch.randn(2, 12, 5, generator=seeded(0))
    padding = torch.tensor([[False] * 2 + [True] * 10, [False] * 9 + [True] * 3])
    out = embeddings.zero_padding(embedding, padding, share, embeddings.generators(3, 2))
    for row, count in enumerate((10, 3)):
        zero = (out[row] == 0).all(dim=1)
        assert int(zero.sum()) == round(share * count)
        assert not (zero & ~padding[row]).any()
        assert torch.equal(out[row, ~zero], embedding[row, ~zero])
    alone = embeddings.zero_padding(embedding[1:], padding[1:], share, [seeded(4)])
    assert torch.equal(alone, out[1:])


# ---------------------------------------------------------------- when guidance begins


def test_the_norm_is_that_of_the_noise_predictions():
    """D = x − σ·ε: ‖ε_c − ε_u‖ comes back, sample by sample."""
    x, a, b = (torch.randn(3, 4, 6, 6, generator=seeded(i)) for i in range(3))
    sigma = torch.tensor([14.6, 3.0, 0.2])
    s = sigma[:, None, None, None]
    norm = transition.guidance_norm(x - s * a, x - s * b, sigma)
    wanted = [float((a[i] - b[i]).square().sum().sqrt()) for i in range(3)]
    assert norm.tolist() == pytest.approx(wanted, rel=1e-4)


def authors_loop(values: list[float]) -> bool:
    """The loop of Jain et al.'s program, with its start values of −1."""
    found, before, last = False, -1.0, -1.0
    for value in values:
        found = found or (value > last and before > last)
        before, last = last, value
    return found


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=9))
@hypothesis_settings(max_examples=300, deadline=None)
def test_first_minimum_is_the_authors_loop(values):
    history = torch.tensor(values)[:, None]
    assert bool(transition.first_minimum(history)) == authors_loop(values)


def test_first_minimum_is_found_sample_by_sample():
    falls_and_rises, rises, falls = [3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]
    norms = torch.tensor([falls_and_rises, rises, falls]).T
    assert transition.first_minimum(norms).tolist() == [True, False, False]
    assert transition.first_minimum(norms[:2]).tolist() == [False] * 3


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0])
def test_guided_by_another_scale(scale):
    cond, uncond = (torch.randn(3, 4, 6, 6, generator=seeded(i)) for i in range(2))
    denoised = uncond + 7.5 * (cond - uncond)
    where = torch.tensor([True, False, True])
    out = transition.guided_by(denoised, cond, uncond, 7.5, scale, where)
    wanted = uncond + scale * (cond - uncond)
    assert torch.allclose(out[[0, 2]], wanted[[0, 2]], atol=1e-5)
    assert torch.equal(out[1], denoised[1])
    others = denoised + 1  # what other nodes did stays
    moved = transition.guided_by(others, cond, uncond, 7.5, scale, where)
    assert torch.allclose(moved[where] - out[where], torch.ones(()), atol=1e-4)


def test_nothing_to_do_is_the_same_tensor():
    cond, uncond, denoised = (torch.randn(2, 4, 6, 6, generator=seeded(i)) for i in range(3))
    nobody = torch.zeros(2, dtype=torch.bool)
    assert transition.guided_by(denoised, cond, uncond, 7.5, 0.0, nobody) is denoised
    assert transition.guided_by(denoised, cond, uncond, 7.5, 7.5, ~nobody) is denoised


def test_dynamic_transition_counts_each_level_once():
    """A sampler that asks twice a level, and goes back to one, finds the same transition."""
    norms = [[3.0, 3.0], [2.0, 4.0], [2.5, 3.0], [3.0, 3.5]]
    levels = [14.0, 10.0, 6.0, 3.0]
    plain, nervous = transition.Transition(True), transition.Transition(True)
    seen = []
    for norm, level in zip(norms, levels, strict=True):
        norm = torch.tensor(norm)
        seen.append(plain.waiting(norm, level, True).tolist())
        for again in (norm, norm * 9):
            waits = nervous.waiting(again, level, True)
        assert waits.tolist() == seen[-1]
    # Known one step after the minimum: sample 0 at the third, sample 1 at the fourth evaluation.
    assert seen == [[True, True], [True, True], [False, True], [False, False]]
    assert plain.waiting(torch.ones(2), 1.0, early=False).tolist() == [False, False]


def test_static_transition():
    run = transition.Transition(False)
    for early in (True, True, False):
        norm = torch.tensor([1.0, 5.0])
        assert run.waiting(norm, 3.0, early).tolist() == [early, early]


# ---------------------------------------------------------------- adapting


def norm_to(goal: torch.Tensor):
    return lambda value: (value - goal).norm()


def test_adapt_is_adamw_until_the_target():
    """Against Wen et al.'s loop written out: AdamW at 0.05, stop as soon as the score is under l."""
    given, goal = (torch.randn(1, 4, 6, generator=seeded(i)) for i in range(2))
    score = norm_to(goal)
    target = float(score(given)) - 1.0
    out = adapt(given, score, target)
    value = given.clone()
    mean, square, wanted = torch.zeros_like(value), torch.zeros_like(value), []
    for step in range(1, 11):
        wanted.append(float(score(value)))
        if wanted[-1] <= target:
            break
        gradient = (value - goal) / (value - goal).norm()
        value = value * (1 - 0.05 * 0.01)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = (square / (1 - 0.999**step)).sqrt() + 1e-8
        value = value - 0.05 * (mean / (1 - 0.9**step)) / corrected
    assert out.scores == pytest.approx(wanted, rel=1e-4)
    assert torch.allclose(out.embedding, value, atol=1e-5)
    assert out.reached and out.best == out.steps == len(wanted) - 1 < 10


def test_an_ordinary_prompt_is_left_alone_after_one_look():
    given, looks = torch.randn(1, 4, 6, generator=seeded(0)), []

    def score(value):
        looks.append(torch.is_grad_enabled())
        return value.norm()

    out = adapt(given, score, 1e3)
    assert out.embedding is given
    assert looks == [False]
    assert out.steps == 0 and out.reached
    assert adapt(given, score, 0.0, iterations=0).embedding is given
    assert looks == [False, False]


def test_any_score_will_do_and_the_lowest_is_kept():
    """A score that rises again: what is returned is the best that was seen."""
    values = iter([5.0, 5.0, 4.0, 2.0, 3.0, 6.0])  # the first is looked at without gradients

    def score(value):
        return 0 * value.sum() + next(values)

    report = []
    out = adapt(
        torch.ones(1, 2, 2),
        score,
        1.0,
        iterations=4,
        on_step=lambda *a: report.append(a),
    )
    assert out.scores == (5.0, 4.0, 2.0, 3.0, 6.0)
    assert out.best == 2 and not out.reached
    assert report == list(enumerate(out.scores))


def test_adapt_keeps_the_type_and_refuses_what_is_no_number():
    half = torch.randn(1, 4, 6, generator=seeded(0)).half()
    assert adapt(half, norm_to(torch.zeros(())), 0.1).embedding.dtype == torch.float16
    with pytest.raises(AMGError, match="finite"):
        adapt(half, lambda v: v.sum() * float("nan"), 0.1)
    with pytest.raises(AMGError, match="finite"):
        adapt(torch.zeros(1, 2, 2), lambda v: v.norm().sqrt() + 1, 0.1)


# ---------------------------------------------------------------- gradients through foreign weights


class Writing(nn.Module):
    """Writes into its input, as blocks of hosts do, and notes itself in a dictionary."""

    def __init__(self, number):
        super().__init__()
        self.number, self.inner = number, nn.Linear(6, 6)

    def forward(self, x, context, options=None):
        assert options["block"] == self.number  # on the way back too
        h = self.inner(torch.tanh(x))
        h += context.mean(dim=1, keepdim=True)
        x += 1
        return h, torch.sin(context)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.blocks = nn.ModuleList([Writing(0), Writing(1)])
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, context):
        options = {}
        h = self.enter(x)
        for i, block in enumerate(self.blocks):
            options["block"] = i
            h, context = block(h.clone(), context, options=options)
        return self.norm(h) + context.sum() * 0.1


def make(inference: bool) -> Network:
    with torch.random.fork_rng(), torch.inference_mode(inference):
        torch.manual_seed(0)
        network = Network().eval()
        if inference:  # as hosts do, which copy and move weights inside of inference mode
            for part in network.modules():
                for name, weight in list(part.named_parameters(recurse=False)):
                    setattr(part, name, nn.Parameter(weight.data.clone()))
                for name, buffer in list(part.named_buffers(recurse=False)):
                    setattr(part, name, buffer.clone())
        return network


def gradient(network, x, context, *managers):
    context = context.clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(network(x, context).square().sum(), context)
    return found


@pytest.mark.parametrize("twice", [False, True])
def test_gradients_through_weights_made_in_inference_mode(twice):
    x, context = (torch.randn(2, 3, 6, generator=seeded(i)) for i in range(2))
    wanted = gradient(make(False), x, context)
    network = make(True)
    own = [*network.parameters(), *network.buffers()]
    before = [t.clone() for t in own]
    assert all(t.is_inference() for t in own)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        gradient(network, x, context)
    ledger = Ledger(2**30, network)
    with (
        torch.inference_mode(),
        torch.inference_mode(False),  # as inside of a host's run
        differentiation.ordinary_weights(network),
        ledger.counting(),
    ):
        inside = [*network.parameters(), *network.buffers()]
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(own, inside, strict=True))
        if twice:
            with differentiation.blocks_run_twice(network, ledger):
                found = gradient(network, x, context)
        else:
            found = gradient(network, x, context)
    assert torch.allclose(found, wanted, atol=1e-6)
    after = [*network.parameters(), *network.buffers()]
    assert all(a is b for a, b in zip(own, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    assert all("forward" not in vars(part) for part in network.modules())


def test_weights_come_back_after_an_error():
    network = make(True)
    own = list(network.parameters())
    with pytest.raises(ZeroDivisionError), differentiation.ordinary_weights(network):
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(own, network.parameters(), strict=True))


def test_the_ledger_counts_what_is_kept():
    """tanh keeps its output, a product the other factor; weights and repeats are not counted."""
    with torch.random.fork_rng():
        network = nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.ones(4, 8, requires_grad=True)
    ledger = Ledger(2**20, network)
    with ledger.counting(), torch.enable_grad():
        y = torch.tanh(x)  # y
        z = y * y  # y once more
        _ = z * z.detach().clone()  # the copy, not z: the copy needs no gradient
        network(z)  # the weight
    assert ledger.peak == 2 * 4 * 8 * 4
    ledger.restart()
    with ledger.counting(), torch.enable_grad():
        torch.tanh(x)
    assert ledger.peak == 2 * 4 * 8 * 4


def test_the_budget_is_kept():
    x, context = (torch.randn(2, 3, 6, generator=seeded(i)) for i in range(2))
    network = make(False)
    whole, little = Ledger(2**30, network), Ledger(2**30, network)
    with differentiation.ordinary_weights(network):
        with whole.counting():
            gradient(network, x, context)
        with differentiation.blocks_run_twice(network, little), little.counting():
            gradient(network, x, context)
        assert little.peak > 0
        with pytest.raises(BudgetExceeded), Ledger(whole.peak - 1, network).counting():
            gradient(network, x, context)
        with Ledger(whole.peak, network).counting():
            gradient(network, x, context)


def test_running_twice_keeps_less():
    """A deep network: what is kept is one block and the borders."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Tanh()) for _ in range(12)]

    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    network = nn.Sequential(*(Block(b) for b in blocks)).requires_grad_(False)
    peaks, found = [], []
    for twice in (False, True):
        ledger, x = Ledger(2**30, network), torch.ones(5, 32, requires_grad=True)
        with torch.enable_grad(), ledger.counting():
            if twice:
                with differentiation.blocks_run_twice(network, ledger):
                    found += torch.autograd.grad(network(x).sum(), x)
            else:
                found += torch.autograd.grad(network(x).sum(), x)
        peaks.append(ledger.peak)
    assert torch.equal(*found)
    assert peaks[1] < 0.7 * peaks[0]


def test_quantised_weights_are_refused_by_name():
    class Packed(nn.Parameter):
        pass

    with torch.random.fork_rng():
        network = nn.Linear(3, 3)
    network.weight = Packed(torch.ones(3, 3))
    network.weight.requires_grad_(True)
    with pytest.raises(AMGError, match="Packed"), differentiation.ordinary_weights(network):
        pass


# ---------------------------------------------------------------- the evidence program


class Toy:
    """A world whose prediction for a caption is a constant: guidance can be followed by hand."""

    shape, cfg_scale, conditional, flow = (2, 4, 4), 3.0, True, False
    sigmas = torch.linspace(0.01, 10, 100)
    matchers = None

    class data:
        captions = ("fox on red", "owl on blue")

    @staticmethod
    def encode(captions):
        return torch.tensor([[[float(len(c))] * 3] * 8 for c in captions])

    @staticmethod
    def denoise(x, sigma, context):
        return context[:, :1, :1, None].expand_as(x) + 0 * x

    @staticmethod
    def decode(latents):
        return latents


def test_rows_have_names_of_their_own_and_plain_is_first():
    rows = mitigations.mitigations()
    assert rows[0].name == "plain"
    assert len({row.name for row in rows}) == len(rows)
    assert [r.name for r in mitigations.chosen(["GNI 0.1"])] == ["plain", "GNI 0.1"]
    with pytest.raises(AMGError, match="No such row: odd"):
        mitigations.chosen(["odd"])


def test_a_row_is_drawn_as_by_hand_and_rows_are_chained():
    """Euler on a constant prediction ends at it: cfg 3 of the prompt, or the scale of the delay."""
    captions, seeds = ["fox on red", "owl on blue"], [5, 6]
    lengths = torch.tensor([10.0, 11.0])
    rows = {row.name: row for row in mitigations.mitigations()}
    drawn, _ = mitigations.draw(Toy, rows["plain"], captions, seeds, 4)
    assert torch.allclose(drawn.mean(dim=(1, 2, 3)), 3 * lengths, atol=1e-3)
    whole = mitigations.delayed("all the way", -2.0, False, until=1.01)
    drawn, _ = mitigations.draw(Toy, whole, captions, seeds, 4)
    assert torch.allclose(drawn.mean(dim=(1, 2, 3)), -2 * lengths, atol=1e-3)
    more = replace(whole, steps=lambda w: [*whole.steps(w), lambda denoised, **_: denoised + 1])
    drawn, _ = mitigations.draw(Toy, more, captions, seeds, 4)
    assert torch.allclose(drawn.mean(dim=(1, 2, 3)), -2 * lengths + 1, atol=1e-3)


def test_what_rows_ask_for_depends_on_the_own_seed_alone():
    captions, seeds = ["fox on red", "owl on blue", "fox on red"], [5, 6, 7]
    for row in mitigations.mitigations():
        if row.name.startswith("adapted"):
            continue  # the toy has no gradient: see above for `adapt` itself
        every = row.context(Toy, captions, seeds)
        alone = row.context(Toy, captions[1:2], seeds[1:2])
        assert torch.equal(every[1:2], alone), row.name
