"""The guard as a guider of Modular Diffusers: classifier-free guidance, and away from stored pictures.

A guider is given only the model's outputs. So a hook on the denoiser keeps the arguments of its next call,
and removes itself at once. With them the guider makes further predictions for other texts when it needs
them: how many depends on the prompt, so they are no `_input_predictions`, which have a fixed number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from amg_core import report as reports
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.similarity.verdict import Verdict

from .evaluations import Encoded, Evaluation, Parts
from .guarding import Runs, chosen
from .opening import open_matcher
from .texts import Encoder, Words

ENCODERS = ("", "_2", "_3")  # endings of "text_encoder", "tokenizer" and "prompt"
REMEMBERED = 4  # calls of a text encoder, of which a pipeline makes one or two


class AMGGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance that steers away from the pictures of an index.

    Its configuration saves and loads as that of every guider. `connect` it to the pipeline before it draws.
    Where nothing is too close, the result is that of ClassifierFreeGuidance, bit for bit.

    Parameters
    ----------
    index : str
        The folder of the index.
    preset : one of `presets.PRESETS`
    despecification, deduplication, dissimilarity, exit : float
        Strengths, see `presets.settings`.
    decoder, weights : str, optional
        Files, see `opening.open_matcher`.
    guidance_scale, guidance_rescale, start, stop, enabled
        Those of ClassifierFreeGuidance. The guard also acts where guidance is off.
    """

    @register_to_config
    def __init__(
        self,
        index: str = "",
        preset: str = "main",
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        despecification: float = 1.0,
        deduplication: float = 1.0,
        dissimilarity: float = 1.0,
        exit: float = 1.0,
        decoder: str | None = None,
        weights: str | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, start=start, stop=stop, enabled=enabled)
        self._pipe: Any = None
        self._runs: Runs | None = None
        self._encoder: Encoder | None = None
        self._heard: list[list[list[str]]] = []  # of each text encoder its latest batches of texts
        self._listening: list[Any] = []
        self._hook: Any = None
        self._calls: list[tuple[nn.Module, Any, Any]] = []

    def connect(self, pipe: Any, **options: Any) -> AMGGuidance:
        """Take VAE, scheduler and text encoders of a modular pipeline, and open the index. Returns itself.

        `options` are further ones of `presets.settings`. `disconnect` ends it.

        Raises
        ------
        AMGError
            The pipeline has no VAE, there is no such index, or an option is not valid.
        """
        if getattr(pipe, "vae", None) is None:
            raise AMGError(
                "AMGGuidance needs the pipeline's VAE: load its components before `connect`."
            )
        self.disconnect()
        config = self.config
        matcher = open_matcher(
            config.index, pipe.vae, decoder=config.decoder, weights=config.weights
        )
        names = ("despecification", "deduplication", "dissimilarity", "exit")
        strengths = {name: config[name] for name in names}
        self._runs = Runs(matcher, chosen(config.preset, matcher.metric, strengths | options))
        self._pipe = pipe
        block = _text_block(pipe)
        if block is not None:
            self._encoder = Encoder(lambda texts: _encoded(block, pipe, texts))
            self._listen()
        return self

    def disconnect(self) -> None:
        """Forget the pipeline and remove every hook from it."""
        for hook in self._listening:
            hook.remove()
        self._listening, self._heard, self._calls = [], [], []
        self._unhook()
        if self._runs is not None:
            self._runs.rest()
        self._pipe = self._runs = self._encoder = None

    # --- the finished pictures

    def check(self, pictures: Any) -> list[Verdict]:
        """Check the pictures of the latest drawing: tensors (B, 3, H, W) in [0, 1], or Pillow pictures.

        Then `report` has the result. AMGError if nothing was drawn.
        """
        if not isinstance(pictures, Tensor):
            pictures = torch.cat([to_tensor(picture.convert("RGB")) for picture in pictures])
        return self._connected().judge(pictures)

    @property
    def report(self) -> dict[str, Any]:
        """The report of the latest drawing, see `amg_core.report`. Its verdicts are there after `check`."""
        runs = self._connected()
        if runs.waiting:
            runs.unjudged(reports.NOT_ENDED)
        if not runs.reports:
            raise AMGError("Nothing has been drawn under guard yet.")
        return runs.reports[-1]

    # --- what the pipeline calls

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self._calls = []
        if step == 0 and self._runs is not None:
            self._runs.begin()
            self._learn()

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self._connected()

        def called(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._unhook()  # before the model can fail
            self._calls.append((module, args, kwargs))

        self._hook = denoiser.register_forward_pre_hook(called, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._unhook()
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        guided = super().forward(pred_cond, pred_uncond)
        if not self._calls:
            raise AMGError("AMGGuidance was asked for a prediction without a call of the model.")
        scale = 1.0 if pred_uncond is None else float(self.guidance_scale)
        made = Parts(Evaluation(*self._calls[0], pred_cond), pred_uncond, scale)
        runs, self._calls = self._connected(), []
        guided.pred = runs.step(
            made, guided.pred, self._timestep, self._pipe.scheduler, self._encoder
        )
        return guided

    def _connected(self) -> Runs:
        if self._runs is None:
            raise AMGError(
                "AMGGuidance is not connected: call guider.connect(pipe) before it draws."
            )
        return self._runs

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # --- the texts of the prompts

    def _listen(self) -> None:
        """Hear what the text encoders are given. Their tokens make texts again."""
        for ending in ENCODERS:
            encoder, tokenizer = (
                getattr(self._pipe, name + ending, None) for name in ("text_encoder", "tokenizer")
            )
            if encoder is None or tokenizer is None:
                continue
            heard: list[list[str]] = []
            self._heard.append(heard)

            def hear(
                _: nn.Module, args: Any, kwargs: Any, heard: Any = heard, tokenizer: Any = tokenizer
            ) -> None:
                ids = args[0] if args else kwargs.get("input_ids")
                heard.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
                del heard[:-REMEMBERED]

            self._listening.append(encoder.register_forward_pre_hook(hear, with_kwargs=True))

    def _learn(self) -> None:
        """Give what was heard to the encoder. It is compared before it counts as the prompts' texts."""
        if self._encoder is not None:
            calls = zip(*self._heard, strict=False)
            known = [list(zip(*texts, strict=False)) for texts in calls]
            self._encoder = Encoder(self._encoder.encode, [words for words in known if words])


def _text_block(pipe: Any) -> Any:
    """The block of a modular pipeline that encodes prompts, or None."""
    for block in pipe.blocks.sub_blocks.values():
        given, made = ({each.name for each in some} for some in (block.inputs, block.outputs))
        if "prompt" in given and "prompt_embeds" in made:
            return block
    return None


def _encoded(block: Any, pipe: Any, texts: Sequence[Words]) -> Encoded:
    """Texts -> Encoded, by the pipeline's own block with all else as by default."""
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    state, given = PipelineState(), {each.name for each in block.inputs}
    for each in block.inputs:
        if each.name is not None:
            state.set(each.name, each.default, each.kwargs_type)
    for i, name in enumerate(f"prompt{ending}" for ending in ENCODERS):
        if name in given:
            state.set(name, [words[i] if i < len(words) else words[0] for words in texts])
    block(pipe, state)
    return Encoded(state.get("prompt_embeds"), state.get("pooled_prompt_embeds"))
