"""The model's predictions for other texts: the neighbour's caption, and the prompt with fewer words."""

from __future__ import annotations

import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..amg_core.errors import AMGError
from ..amg_core.guidance import without
from ..amg_core.hosts import of_one_shape
from ..amg_core.prompt import PARTS, Prompts, split_together
from .guiders import KEY
from .wording import PromptText, Wording, tokens

# What is no fault of a node on the model.
PASSED_ON = (
    AMGError, comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError,
)  # fmt: skip
AROUND = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
LARGE, FEWER = (
    10**9,
    6,
)  # a text encoder of so many parameters takes seconds a text; parts of a prompt then
REMEMBERED = 256  # encoded texts kept for each text encoder
# Where and when a part of the prompt applies, and what is made anew.
DROPPED = (
    "area", "mask", "mask_strength", "set_area_to_bounds", "strength", "default", "gligen",
    "timestep_start", "timestep_end", "start_percent", "end_percent",
    "clip_start_percent", "clip_end_percent",
)  # fmt: skip

_encoded: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_sizes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def encode(clip, text: str | PromptText) -> dict:
    """A text as conditioning: {"cross_attn": (1, T, C), "pooled_output": (1, P) or None, …}.

    Runs the text encoder on the device where it is. The host's own function would first load it onto the
    GPU, which may evict the diffusion model in the middle of a step. The latest texts are cached.
    """
    text = PromptText((text,)) if isinstance(text, str) else text
    model = clip.cond_stage_model
    known = _encoded.setdefault(model, OrderedDict())
    key = (clip.patcher.patches_uuid, clip.layer_idx, text)
    if key not in known:
        tokenized = tokens(clip.tokenize, text)
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        with torch.inference_mode():
            cond, pooled, *more = model.encode_token_weights(tokenized)
        known[key] = {"cross_attn": cond, "pooled_output": pooled} | (more[0] if more else {})
        if len(known) > REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _size(model) -> int:
    """The number of parameters, counted once."""
    if model not in _sizes:
        _sizes[model] = sum(parameter.numel() for parameter in model.parameters())
    return _sizes[model]


def wording_of(clip, candidates: Callable[[], Sequence[PromptText]]) -> Wording | None:
    """What finds the texts of a run's prompts, if they are encoded by this CLIP."""
    if clip is None:
        return None

    def fitting() -> list[PromptText]:
        encoders = clip.tokenize("").keys()
        return [text for text in candidates() if encoders >= set(text.encoders)]

    return Wording(fitting, lambda text: encode(clip, text))


class OtherTexts:
    """The `Texts` of this host: the model's predictions for other texts than the prompt, at one evaluation.

    A prompt can have several entries, combined or for parts of the picture or of the time. All are
    reduced, each in its place and time, and their words are counted one after the other.

    Parameters
    ----------
    clip : CLIP or None
        Only needed for captions, and to leave out single words.
    wording : Wording or None
        Finds the texts of the entries. Without it they are not known.
    run : dict
        `latent_image`, `denoise_mask` and `seed` of the run, as the host's `process_conds` takes them.
    args : dict
        As the host passes them to a post-CFG hook. At cfg 1 there is no "uncond".
    """

    def __init__(self, clip, wording: Wording | None, run: dict, args: dict):
        self.clip, self.wording, self.run, self.args = clip, wording, run, args

    @property
    def captions(self) -> bool:
        return self.clip is not None and bool(self.args["cond"]) and bool(self.args["uncond"])

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        out = self.args["uncond_denoised"].clone()
        prompt = _template(self.args["cond"], self.args["sigma"])
        for rows, filled in of_one_shape(captions, lambda each: _shape(encode(self.clip, each))):
            text = _stack([encode(self.clip, caption) for caption in filled])
            out[rows] = self._evaluate([_fresh(prompt) | text])[rows]
        return out

    @property
    def separable(self) -> bool:
        return self._texts() is not None

    @property
    def words(self) -> Tensor:
        """The number of words of each prompt (B,), or else of its tokens with padding.

        0 if it is no sequence of tokens, or if there is nothing to put in their place.
        """
        batch = len(self.args["input"])
        texts = self._texts()
        if texts is not None:
            counts = [[len(self._split(text).words) for text in entry] for entry in texts]
            return torch.tensor(counts).sum(dim=0)
        prompts = [entry.get("cross_attn") for entry in self.args["cond"] or []]
        usable = all(prompt is not None and prompt.ndim == 3 for prompt in prompts)
        if not prompts or not usable or self._nothing().get("cross_attn") is None:
            return torch.zeros(batch, dtype=torch.long)
        return torch.full((batch,), max(prompt.shape[1] for prompt in prompts))

    def reduced(self, kept: Tensor) -> Tensor:
        """D_s (B, C, H, W), for the words `kept` (B, W) bool of the prompt, encoded anew.

        If its text is not known, the first tokens are kept, and followed by those of no prompt: of the
        empty text if there is a CLIP, or else of the negative prompt. The embedding of the whole prompt
        (`pooled_output`) is then mixed by the share of tokens that is kept.
        """
        texts = self._texts()
        if texts is None:
            return self._evaluate([self._shortened(entry, kept) for entry in self.args["cond"]])
        out = self.args["denoised"].clone()
        asked = [
            tuple(text._replace(texts=parts.keep(row)) for text, parts, row in each)
            for each in self._in_parts(texts, kept)
        ]
        shapes = lambda each: tuple(_shape(encode(self.clip, text)) for text in each)  # noqa: E731
        for rows, filled in of_one_shape(asked, shapes):
            entries = [
                _fresh(entry) | _stack([encode(self.clip, texts[i]) for texts in filled])
                for i, entry in enumerate(self.args["cond"])
            ]
            out[rows] = self._evaluate(entries)[rows]
        return out

    def left_out(self, kept: Tensor) -> list[str]:
        """The words of each prompt that are not `kept`, (B, W) bool, or "" where texts are not known."""
        texts = self._texts()
        if texts is None:
            return [""] * len(kept)
        found = self._in_parts(texts, kept)
        return [" ".join(filter(None, (p.missing(row) for _, p, row in each))) for each in found]

    def _texts(self) -> list[list[PromptText]] | None:
        """The texts of each entry, one for each sample, or None if one is not known."""
        if self.clip is None or self.wording is None or not self.args["cond"]:
            return None
        batch, found = len(self.args["input"]), []
        for entry in self.args["cond"]:
            if entry.get("cross_attn") is None:
                return None
            rows = self.wording.of(entry)
            if None in rows:
                return None
            found.append([rows[i % len(rows)] for i in range(batch)])
        return found

    def _split(self, text: PromptText) -> Prompts:
        return split_together(
            text.texts, FEWER if _size(self.clip.cond_stage_model) > LARGE else PARTS
        )

    def _in_parts(
        self, texts: list[list[PromptText]], kept: Tensor
    ) -> list[list[tuple[PromptText, Prompts, list[bool]]]]:
        """For each sample its text of each entry, with its parts and which are kept by `kept` (B, W)."""
        out = []
        for sample, row in zip(zip(*texts, strict=True), kept.tolist(), strict=True):
            start, found = 0, []
            for text in sample:
                parts = self._split(text)
                end = start + len(parts.words)
                found.append((text, parts, row[start:end]))
                start = end
            out.append(found)
        return out

    def _shortened(self, entry: dict, kept: Tensor) -> dict:
        """An entry with its first tokens only, by `kept` (B, T) bool."""
        nothing, prompt = self._nothing(), entry["cross_attn"]
        _check_width(entry, nothing)
        kept = kept[:, : prompt.shape[1]]
        rows = _rows(len(kept), prompt, _fit(nothing["cross_attn"], prompt))
        text = {"cross_attn": without(*rows, kept)}
        whole, none = entry.get("pooled_output"), nothing.get("pooled_output")
        if whole is not None:
            share = kept.float().mean(dim=1).to(whole)[:, None]
            whole, none = _rows(len(kept), whole, whole if none is None else none.to(whole))
            text["pooled_output"] = torch.lerp(none, whole, share)
        return _fresh(entry) | text

    def _nothing(self) -> dict:
        if self.clip is not None:
            return encode(self.clip, "")
        if not self.args["uncond"]:
            return {}
        return _template(self.args["uncond"], self.args["sigma"])

    def _evaluate(self, conds: list[dict]) -> Tensor:
        """The prediction for these conditionings, whose texts are new."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        x, model = self.args["input"], self.args["model"]
        for before, new in zip(self.args["cond"], conds, strict=False):
            _check_width(before, new)
        conds = comfy.samplers.encode_model_conds(
            model.extra_conds, conds, x, x.device, "positive", **self.run
        )
        try:
            # The first slot stays empty, so that patches of other nodes treat this as unconditional.
            predictions = comfy.samplers.calc_cond_batch(
                model, [None, conds], x, self.args["sigma"], self.args["model_options"]
            )
        except PASSED_ON:
            raise
        except Exception as error:
            patches = _patches(model, self.args["model_options"])
            if not patches:
                raise
            raise AMGError(
                f"In one step the guard asked the model a second time, and that failed ({error}). "
                f"These patches are on the model: {', '.join(patches)}. A cache that keeps one "
                "state, such as TeaCache, cannot be asked twice in a step. Take it off the "
                "guarded model, or use the EasyCache or LazyCache of ComfyUI, which can."
            ) from error
        return predictions[1]


def _patches(model, model_options: dict) -> list[str]:
    """The names of patches that other nodes have put around the network of a BaseModel."""
    names = []
    if "model_function_wrapper" in model_options:
        names.append(_origin(model_options["model_function_wrapper"]))
    for kind in AROUND:
        for key, wrappers in model_options["transformer_options"]["wrappers"].get(kind, {}).items():
            names += [str(key or _origin(each)) for each in wrappers if key != KEY]
    own = vars(model.diffusion_model)
    names += [_origin(own[name]) for name in own if name.startswith("forward")]
    return list(dict.fromkeys(names))


def _origin(function) -> str:
    """The origin of a function of another node, such as "teacache.wrapper"."""
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{name}".replace(".<locals>", "")


def _fit(nothing: Tensor, prompt: Tensor) -> Tensor:
    """No prompt, repeated or cut to the length of the prompt: (1, T', C) -> (1, T, C)."""
    times = -(-prompt.shape[1] // nothing.shape[1])
    return nothing.to(prompt).repeat(1, times, 1)[:, : prompt.shape[1]]


def _rows(batch: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors with a row for every sample, repeated as the host does it."""
    return [comfy.utils.repeat_to_batch_size(tensor, batch) for tensor in tensors]


def _template(conds: list[dict], sigma: Tensor) -> dict:
    """A copy of the entry of a prompt that is active now, for the whole picture and all times.

    Control nets, hooks, size and guidance values are kept. An entry without an area is preferred.
    """
    level = float(sigma[0])

    def acts(cond: dict) -> bool:
        starts, ends = cond.get("timestep_start"), cond.get("timestep_end")
        return (starts is None or level <= starts) and (ends is None or level >= ends)

    best = min(conds, key=lambda c: (not acts(c), "area" in c or "mask" in c))
    return {key: value for key, value in best.items() if key not in DROPPED}


def _fresh(entry: dict) -> dict:
    """A copy of a conditioning that the host takes for another one."""
    return entry | {"model_conds": dict(entry.get("model_conds", {})), "uuid": uuid.uuid4()}


def _shape(text: dict) -> tuple:
    """The properties that must be equal for captions that share one evaluation."""
    return tuple(
        (key, tuple(value.shape) if isinstance(value, Tensor) else repr(value))
        for key, value in sorted(text.items())
    )


def _stack(texts: list[dict]) -> dict:
    """Encoded captions of the same `_shape` -> one conditioning with a row for each."""
    return {
        key: torch.cat([text[key] for text in texts]) if isinstance(value, Tensor) else value
        for key, value in texts[0].items()
    }


def _check_width(prompt: dict, text: dict) -> None:
    wanted, given = prompt.get("cross_attn"), text["cross_attn"]
    if wanted is not None and wanted.shape[-1] != given.shape[-1]:
        raise AMGError(
            f"clip: this text encoder gives {given.shape[-1]} values a token and the prompt has "
            f"{wanted.shape[-1]}. Connect the CLIP that encoded the prompt, or disconnect clip "
            "(then deduplication is off)."
        )
