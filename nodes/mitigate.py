"""Nodes for mitigations without an index: they change the prompt, or delay guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from comfy_api.latest import io

from ..amg_core.detection.statistics import WEIGHT
from ..amg_core.errors import AMGError
from ..amg_core.mitigation.adaptation import METRICS, NORM
from . import live, show
from .types import EXPERT, PROMPT, place

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
SETTINGS = ["paper", "code"]
PADDING = ["replace", "zero"]
MODES = ["delayed", "opposite", "off"]
POINTS = ["dynamic", "static"]
EXCLAMATION_MARK = 0  # its id in CLIP's vocabulary
CLIP_WORDS = 49_400  # the authors' code draws ids below this
DRAWS = 1000  # largest number of ids that are drawn to get a word
KEY = "amg_delayed_guidance"


def seed_input(tooltip: str) -> io.Input:
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True, tooltip=tooltip
    )


class RandomisePromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_RandomisePrompt",
            display_name="AMG Randomise Prompt",
            **place(PROMPT),
            description="Puts random words into a prompt, so that it is no longer exactly the "
            "caption of a memorised picture (Somepalli et al. 2023). Costs nothing and needs no "
            "index. The picture changes and follows the prompt a little less.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="The prompt. Brackets and weights such as (red:1.2) stay in place.",
                ),
                io.Combo.Input(
                    "method",
                    options=["RT", "CWR", "RNA"],
                    default="RT",
                    tooltip="RT: adds random words; the strongest, and the furthest from your "
                    "prompt. CWR: repeats words of the prompt. RNA: adds numbers; the mildest.",
                ),
                io.Combo.Input(
                    "settings",
                    options=SETTINGS,
                    default=SETTINGS[0],
                    tooltip="paper: each round changes something with probability 0.1 (RT) or 0.4 "
                    "(CWR, RNA), so the prompt may come out unchanged. code: every round changes "
                    "something, as in the authors' program. It is stronger and loses the subject "
                    "sooner.",
                ),
                io.Int.Input(
                    "repeats",
                    default=4,
                    min=0,
                    max=50,
                    tooltip="Number of rounds. The authors' 4 suits captions of about ten words. "
                    "Longer prompts may need more. 0 = off.",
                ),
                seed_input("The same seed makes the same prompt."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed only for RT, which takes its random words from the "
                    "vocabulary of this text encoder. Nothing is encoded.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    tooltip="The new prompt, for CLIP Text Encode. It is also shown on the node.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text, method, settings, repeats, seed, clip=None) -> io.NodeOutput:
        from ..amg_core.mitigation.prompts import METHODS, RECIPES, randomise

        _check_choice("method", method, METHODS)
        _check_choice("settings", settings, SETTINGS)
        recipe = replace(RECIPES[settings][method], repeats=repeats)
        generator = torch.Generator().manual_seed(seed)
        draw = None if clip is None else vocabulary(clip)
        prompt = text if repeats == 0 else randomise(text, method, recipe, generator, draw)
        show.text_on(cls.hidden.unique_id)(prompt)
        return io.NodeOutput(prompt, ui=live.lines(cls, [prompt]))


class PromptNoiseNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_PromptNoise",
            display_name="AMG Noise on Prompt",
            **place(PROMPT),
            description="Adds noise to an encoded prompt (GNI of Somepalli et al. 2023). Costs "
            "nothing and needs no index. It is the mildest remedy, and the weakest against "
            "pictures that are strongly memorised.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded prompt."),
                io.Float.Input(
                    "strength",
                    default=0.1,
                    min=0.0,
                    max=5.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="How much noise. 0 = off, 0.1 is the authors' value. Above 0.5 the "
                    "prompt gets lost.",
                ),
                seed_input("The same seed makes the same noise."),
                io.Boolean.Input(
                    "relative",
                    default=True,
                    label_on="to the prompt's deviation",
                    label_off="absolute",
                    tooltip="On: strength is in units of the prompt's own standard deviation, "
                    "which differs from encoder to encoder. Off: as in the paper. For the CLIP "
                    "of SD 1.x, where the deviation is about 1, both mean the same.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "noisy", display_name="CONDITIONING", tooltip="The prompt with noise added."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, strength, seed, relative) -> io.NodeOutput:
        from ..amg_core.mitigation.embeddings import gaussian_noise, generators

        if strength == 0:
            return io.NodeOutput(conditioning)
        out = []
        for embedding, more in conditioning:
            rows = generators(seed, len(embedding))
            out.append([gaussian_noise(embedding, strength, rows, relative), dict(more)])
        return io.NodeOutput(out)


class PaddingFixNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_PaddingFix",
            display_name="AMG Padding Fix",
            **place(PROMPT),
            description="Encodes a prompt for Stable Diffusion 1.x without its usual padding, "
            "which carries most of what such models memorised. Use it in place of CLIP Text "
            "Encode for the positive prompt. Costs nothing and needs no index. Other text "
            "encoders are refused.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder of a Stable Diffusion 1.x model. A LoRA on it is "
                    "kept.",
                ),
                io.String.Input(
                    "text", multiline=True, tooltip="The prompt. Weights such as (red:1.2) work."
                ),
                io.Combo.Input(
                    "method",
                    options=PADDING,
                    default=PADDING[0],
                    tooltip="replace: padding becomes '!', as in SDXL, and the end of the prompt "
                    "is set to zero. zero: a random part of the padding, as large as share says, "
                    "is set to zero.",
                ),
                io.Float.Input(
                    "share",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="For method zero: how much of the padding is set to zero. 0 = off, "
                    "0.7 is the authors' value. At 1 pictures fall apart.",
                ),
                seed_input(
                    "For method zero: which part of the padding is set to zero. The same "
                    "seed chooses the same part."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip="The encoded prompt, for positive of a sampler.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip, text, method, share, seed) -> io.NodeOutput:
        from ..amg_core.mitigation import embeddings

        _check_choice("method", method, PADDING)
        end = end_token(clip)
        tokens = clip.tokenize(text)
        ids = [[token[0] for token in chunk] for chunk in tokens["l"]]
        padding = torch.tensor([p for chunk in ids for p in embeddings.padding_after(chunk, end)])
        if method == "replace":
            ends = [embeddings.first_end(chunk, end) for chunk in ids]
            tokens["l"] = [_replaced(chunk, end) for chunk in tokens["l"]]
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        out = []
        for embedding, more in conditioning:
            if method == "zero":
                rows = embeddings.generators(seed, len(embedding))
                embedding = embeddings.zero_padding(embedding, padding[None], share, rows)
            else:
                embedding, start = embedding.clone(), 0
                for chunk, place in zip(ids, ends, strict=True):
                    if place is not None:
                        embedding[:, start + place] = 0
                    start += len(chunk)
            out.append([embedding, more])
        return io.NodeOutput(out)


class AdaptPromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_AdaptPrompt",
            display_name="AMG Adapt Prompt",
            **place(PROMPT),
            description="Changes an encoded prompt until the model no longer follows it as "
            "strongly as a memorised caption (Wen et al. 2024, or Asthana and Belagiannis "
            "2026). Needs no index. A prompt under the target stays exactly as it is, and costs "
            "only two model calls, or four with anisotropy.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will draw."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, as one text. Combine prompts, set areas and apply "
                    "ControlNets after this node.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt of your sampler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent that goes into your sampler. It gives the size and the "
                    "number of pictures. Each picture gets its own prompt.",
                ),
                seed_input(
                    "The seed of your sampler. The prompt is adapted to the noise that this seed "
                    "gives."
                ),
                io.Float.Input(
                    "target",
                    default=3.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    round=0.001,
                    tooltip="The score to reach. Its scale differs from model to model, so read "
                    "the scores of ordinary prompts in report first. 1 to 5 is usual for SD 1.x "
                    "at 512 px. Lower changes more.",
                ),
                io.Int.Input(
                    "iterations",
                    default=10,
                    min=0,
                    max=100,
                    tooltip="At most this many steps. Each costs about as much as a sampling "
                    "step. 0 = only measure the score.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.05,
                    min=0.0001,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Size of a step. 0.05 is the authors' value. Larger steps reach the "
                    "target sooner, but may go too far.",
                ),
                io.Float.Input(
                    "memory_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    tooltip="How much memory a step may use beside the model, in GiB. 0 = most "
                    "of what is free. If a step does not fit, the network runs twice, which "
                    "takes half as long again. If it still does not fit, you get an error.",
                ),
                io.Combo.Input(
                    "metric",
                    options=list(METRICS),
                    default=NORM,
                    optional=True,
                    tooltip="The score. norm: how strongly the prompt pulls the first step, as in "
                    "the paper of 2024. anisotropy: the norm, and near the end how far the pull "
                    "goes the way the picture goes anyway, as in the paper of 2026. It costs "
                    "twice as much and needs a target of its own.",
                ),
                io.Float.Input(
                    "alignment_weight",
                    default=WEIGHT,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    optional=True,
                    tooltip="For anisotropy: how much the second part counts beside the norm. The "
                    "authors use 2 for SD 1.4 and 0.1 for SD 2.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "adapted",
                    display_name="positive",
                    tooltip="The adapted prompt, for positive of the sampler. It fits this seed "
                    "and this latent.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="One line for each picture: score before and after, and number of "
                    "steps. Then the memory used.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, target, iterations, learning_rate,
        memory_gb=0.0, metric=NORM, alignment_weight=WEIGHT,
    ) -> io.NodeOutput:  # fmt: skip
        from .adapting import adapt_prompt

        _check_choice("metric", metric, METRICS)
        adapted, outcome = adapt_prompt(
            model, positive, negative, latent_image, seed, target, iterations, learning_rate,
            int(memory_gb * 2**30), metric, alignment_weight,
        )  # fmt: skip
        report = summary(outcome, target)
        show.text_on(cls.hidden.unique_id)(report)
        return io.NodeOutput(adapted, report, ui=live.lines(cls, report.splitlines()))


class DelayedGuidanceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_DelayedGuidance",
            display_name="AMG Delayed Guidance",
            **place(EXPERT),
            description="Weakens the prompt in the first part of the sampling, or steers away "
            "from it, so that the picture does not become a memorised one (Jain et al. 2025). "
            "Costs nothing, needs no index, and works with every sampler and with Apply AMG. It "
            "changes ordinary prompts too.",
            inputs=[
                io.Model.Input("model", tooltip="The model. It is not changed itself."),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=MODES[0],
                    tooltip="delayed: little or nothing of the prompt at first. opposite: steers "
                    "away from the prompt at first, which is stronger and follows the prompt "
                    "less in the end. off: the model as it is.",
                ),
                io.Combo.Input(
                    "transition",
                    options=POINTS,
                    default=POINTS[0],
                    tooltip="When normal guidance begins. dynamic: for each picture, when the "
                    "pull of the prompt has its first minimum, and at until at the latest. "
                    "static: for all pictures at until.",
                ),
                io.Float.Input(
                    "until",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the sampling after which normal guidance begins. 0 = off. "
                    "The authors used 0.3 to 0.5. A later start avoids more copies and loses "
                    "more of the prompt.",
                ),
                io.Float.Input(
                    "keep",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="For mode delayed: the cfg before the prompt begins. 0 = no prompt "
                    "at all, 1 = the prompt without guidance.",
                ),
                io.Float.Input(
                    "away",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    round=0.001,
                    tooltip="For mode opposite: how hard to steer away from the prompt before it "
                    "begins, as a negative cfg. The authors used 2 to 7.5.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "delayed",
                    display_name="MODEL",
                    tooltip="The model, for any sampler node with cfg above 1. If you use this "
                    "node twice, the later one counts.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, mode, transition, until, keep, away) -> io.NodeOutput:
        _check_choice("mode", mode, MODES)
        _check_choice("transition", transition, POINTS)
        changed = model.clone()
        hooks = changed.model_options.get("sampler_post_cfg_function", [])
        if any(getattr(hook, KEY, False) for hook in hooks):
            kept = [hook for hook in hooks if not getattr(hook, KEY, False)]
            changed.model_options["sampler_post_cfg_function"] = kept
        if mode != "off" and until > 0:
            scale = keep if mode == "delayed" else -away
            changed.set_model_sampler_post_cfg_function(
                delayed_guidance(scale, transition == "dynamic", until)
            )
        return io.NodeOutput(changed)


def delayed_guidance(scale: float, dynamic: bool, until: float) -> Callable[[dict], torch.Tensor]:
    """A post-CFG function that replaces cfg by `scale` until the transition point.

    It is a plain closure, which the host does not copy. Its state is stored in the `model_options`, which
    the host makes for every run.
    """
    from ..amg_core.mitigation.transition import Transition, guidance_norm, guided_by

    def delay(args: dict) -> torch.Tensor:
        if not args["uncond"] or not args["cond"]:
            raise AMGError(
                "cfg: Delayed Guidance needs a cfg above 1, because at 1 there is no guidance to "
                "delay. Raise cfg, or set mode to off."
            )
        run = args["model_options"].setdefault(KEY, Transition(dynamic))
        cond, uncond, sigma = args["cond_denoised"], args["uncond_denoised"], args["sigma"]
        level = float(sigma[0])
        early = level > args["model"].model_sampling.percent_to_sigma(until)
        waiting = run.waiting(guidance_norm(cond, uncond, sigma), level, early)
        return guided_by(args["denoised"], cond, uncond, float(args["cond_scale"]), scale, waiting)

    setattr(delay, KEY, True)
    return delay


def vocabulary(clip) -> Callable[[torch.Generator], str]:
    """A function that draws random words from a text encoder's vocabulary, uniformly by id.

    This is as in the authors' code. Tokens with brackets or weights, or without letters, are drawn again.
    """
    from ..amg_core.mitigation.prompts import bare, below

    count, word = _words(clip.tokenizer)

    def draw(generator: torch.Generator) -> str:
        for _ in range(DRAWS):
            text = word(below(count, generator)).strip()
            if text and text.isprintable() and bare(text) == text and " " not in text:
                return text
        raise AMGError("clip: the vocabulary of this text encoder has no words. Choose CWR or RNA.")

    return draw


def _words(tokenizer) -> tuple[int, Callable[[int], str]]:
    """The number of ids to draw from, and a function from an id to its word."""
    own = getattr(getattr(tokenizer, "text", None), "words", None)  # AMG Demo Model
    if own is not None:
        return len(own), lambda i: own[i]
    for part in [tokenizer, *vars(tokenizer).values()]:
        inner = getattr(part, "tokenizer", None)
        if hasattr(inner, "decode"):
            size = getattr(inner, "vocab_size", None) or len(part.inv_vocab)
            return min(size, CLIP_WORDS), partial(_decoded, inner)
    raise AMGError(
        f"clip: {type(tokenizer).__name__} does not give its vocabulary. Choose CWR or RNA, which "
        "need none."
    )


def _decoded(tokenizer, token: int) -> str:
    return str(tokenizer.decode([token]))


def end_token(clip) -> int:
    """The end token of a Stable Diffusion 1.x text encoder, which it also uses as padding.

    Raises
    ------
    AMGError
        It is another text encoder. The message names it.
    """
    tokens = clip.tokenize("")
    ids = [token[0] for token in tokens["l"][0]] if set(tokens) == {"l"} else []
    if len(ids) < 3 or len(set(ids[1:])) != 1:
        raise AMGError(
            "clip: Padding Fix works only with the text encoder of Stable Diffusion 1.x, which "
            f"pads prompts with its end token. This one is {type(clip.cond_stage_model).__name__} "
            f"({', '.join(tokens)}). Use CLIP Text Encode, and Randomise Prompt or Adapt Prompt."
        )
    return ids[1]


def summary(outcome, target: float) -> str:
    """One line for each picture, and one on memory."""
    lines = []
    for number, one in enumerate(outcome.adapted, 1):
        first, last = one.scores[0], one.scores[one.best]
        if first <= target:
            words = f"score {first:.2f}, under the target {target:g}: unchanged"
        elif one.reached:
            words = f"score {first:.2f} → {last:.2f} in {one.steps} steps"
        else:
            words = f"score {first:.2f} → {last:.2f}, target {target:g} NOT reached in {one.steps} steps"
        lines.append(f"picture {number}: {words}")
    if outcome.peak:
        how = ", network run twice" if outcome.twice else ""
        lines.append(f"memory: {_size(outcome.peak)} of {_size(outcome.budget)} allowed{how}")
    return "\n".join(lines)


def _size(count: int) -> str:
    """A number of bytes in readable units."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _replaced(chunk: list[tuple], end: int) -> list[tuple]:
    """A chunk of (id, weight, …) with '!' in place of the padding."""
    from ..amg_core.mitigation.embeddings import padding_after

    padding = padding_after([token[0] for token in chunk], end)
    return [
        (EXCLAMATION_MARK, *token[1:]) if pad else token
        for token, pad in zip(chunk, padding, strict=True)
    ]


def _check_choice(name: str, value: str, options) -> None:
    """Raise AMGError unless widget `name` has one of its options, which the host does not check."""
    if value not in options:
        raise AMGError(
            f"{name}: {value!r} is not one of the choices. Choose one of {', '.join(options)}."
        )
