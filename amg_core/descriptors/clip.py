"""The `clip` descriptor: the subject of a picture, compared by cosine. Needs weights and transformers.

It is the coarse stage of the papers' two-stage search: CLIP finds a thousand candidates, and SSCD
ranks them (`index.two_stage`). CLIP alone cannot tell copies, because two pictures of one subject are
close.

It reads the weights that ComfyUI users have in models/clip_vision: one file, or a folder with
``config.json``, with the tensor names of transformers (``vision_model.…``) or of OpenAI and open_clip
(``visual.…``).

References
----------
.. [1] A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
.. [2] G. Ilharco et al., OpenCLIP, https://github.com/mlfoundations/open_clip
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AMGError
from ..files import brief, read_bounded
from ..messages import message
from ..optional import needed
from .base import DescriptorSpec, full_precision, subset
from .registry import Kind, Weights
from .tensors import read_tensors, tensors_sha256

ACTIVATIONS = ("quick_gelu", "gelu")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
IMPORTED = "clip-retrieval-{}/1"  # preprocessing of rows made elsewhere, with the activation
_SIZES = {768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}  # by width
_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_PREPROCESSING = re.compile(r"crop(\d+)-bicubic-clip-(quick_gelu|gelu)-heads(\d+)/1")
_MOST_BYTES = 12 << 30  # ViT-bigG with its text encoder, in float32
_MOST_CONFIG = 1 << 20
_LARGEST_SIDE = 1024
_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
          "pytorch_model.bin")  # fmt: skip


class CLIPDescriptor:
    """CLIP's image embedding: (B, 3, H, W) in [0, 1] -> (B, D) rows of norm 1, at one scale.

    The preprocessing is that of CLIP and clip-retrieval: the shorter side is resized to the input side
    (224) by antialiased bicubic interpolation, then comes a centre crop, then CLIP's mean and
    deviation. What lies outside the centre square is ignored. Always float32.

    Use `from_file`. The constructor takes tensors under transformers' names.
    """

    space = "picture"

    def __init__(
        self,
        state: Mapping[str, Tensor],
        activation: str,
        heads: int,
        scales: Sequence[int] | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        positions = len(state["vision_model.embeddings.position_embedding.weight"])
        self.side = math.isqrt(positions - 1) * patch
        size = _SIZES.get(width, str(width))
        self.spec = DescriptorSpec(
            id=f"clip_vit_{size}_{patch}",
            metric="cosine",
            preprocessing=f"crop{self.side}-bicubic-clip-{activation}-heads{heads}/1",
            scales=subset(scales, (self.side,)),
            weights_sha256=tensors_sha256(state),
        )
        with torch.inference_mode(False):
            self._network = _network(state, activation, heads, self.side)

    @classmethod
    def from_file(
        cls,
        path: Path | None,
        activation: str | None = None,
        heads: int | None = None,
        scales: Sequence[int] | None = None,
    ) -> CLIPDescriptor:
        """Read a weights file, or the folder of a model as Hugging Face publishes it.

        The tensors do not show `activation` and `heads`. They come from a ``config.json`` in the same
        folder, or else from the arguments, or else from what models of that size usually have:
        OpenAI's quick_gelu for ViT-B and ViT-L, LAION's gelu for larger ones. For LAION's own ViT-B and
        ViT-L give ``activation="gelu"``.

        Raises
        ------
        AMGError
            The file is missing, damaged or of another network, or transformers is not installed.
        """
        if path is None:
            raise AMGError(
                "The descriptor clip needs weights: give a file from models/clip_vision "
                "(.safetensors), or the folder of a CLIP model."
            )
        file, config = _find(path)
        try:
            with torch.inference_mode(False):  # where float16 is widened
                state = _checked(_renamed(read_tensors(file, _MOST_BYTES)))
        except Exception as error:
            raise AMGError(
                f"{file} holds no CLIP image encoder that can be read ({brief(error)}): give a ViT of "
                f"OpenAI's CLIP or OpenCLIP, as in models/clip_vision."
            ) from error
        width = state["vision_model.embeddings.class_embedding"].shape[0]
        rule = "gelu" if width >= 1280 else "quick_gelu"
        activation = config.get("hidden_act") or activation or rule
        heads = config.get("num_attention_heads") or heads or _HEADS.get(width, max(1, width // 64))
        if type(heads) is not int or heads < 1 or width % heads:
            raise AMGError(
                f"{file} has an image encoder of width {width}, which {str(heads)[:20]} heads do not "
                f"divide: correct num_attention_heads in its config.json, or give another file."
            )
        return cls(state, activation, heads, scales)

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None) -> CLIPDescriptor:
        """The descriptor of `spec`. For rows of clip-retrieval, which do not name their weights, any
        weights of that size are accepted."""
        if found := _PREPROCESSING.fullmatch(spec.preprocessing):
            return cls.from_file(path, found[2], int(found[3]), spec.scales)
        for activation in ACTIVATIONS:
            if spec.preprocessing == IMPORTED.format(activation):
                made = cls.from_file(path, activation, scales=spec.scales)
                made.spec = replace(made.spec, preprocessing=spec.preprocessing, weights_sha256="")
                return made
        raise AMGError(
            f"The index was made with {spec.id}, {spec.preprocessing!r}, which this version does not "
            f"support: update the plugin, or build the index again."
        )

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, side, side). `embed` of the result gives the same rows."""
        return centre(pictures.float(), self.side)

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """See `Descriptor.embed`."""
        if scale not in self.spec.scales:
            raise ValueError(f"clip has no scale {scale}, only {self.spec.scales}")
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected (B, 3, H, W), got {tuple(pictures.shape)}")
        with full_precision(pictures.device):
            seen = prepared(pictures, self.side)
            return F.normalize(self._network(pixel_values=seen).image_embeds)

    def to(self, device: torch.device | str) -> CLIPDescriptor:
        """Move the weights, outside inference mode. Returns self."""
        with torch.inference_mode(False):
            self._network.to(device)
        return self


def prepared(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as the network takes them: `centre`, CLIP's mean and deviation."""
    usual = torch.tensor([_MEAN, _STD], dtype=torch.float32, device=pictures.device)
    mean, deviation = usual.view(2, 3, 1, 1).unbind()
    return (centre(pictures.float(), side) - mean) / deviation


def centre(pictures: Tensor, side: int) -> Tensor:
    """Shorter side to `side`, then a centre crop: (B, 3, H, W) -> (B, 3, side, side) in [0, 1].

    The same as torchvision's ``Resize(side, BICUBIC)`` and ``CenterCrop(side)`` on a PIL picture, which
    CLIP, OpenCLIP and clip-retrieval use, but without rounding to 8 bits, so that gradients pass.
    """
    height, width = pictures.shape[-2:]
    ratio = side / min(height, width)
    size = (side, int(width * ratio)) if height <= width else (int(height * ratio), side)
    if size != (height, width):
        pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return pictures[..., top : top + side, left : left + side]


# ---------------------------------------------------------------- files and names


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file, and the image encoder's part of a config.json beside it."""
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        present = [folder / name for name in _FILES if (folder / name).is_file()]
        if not present:
            raise AMGError(f"{folder} holds no CLIP weights: none of {', '.join(_FILES)} is there.")
        file = present[0]
    if not file.is_file():
        raise AMGError(f"{file} does not exist: give a file from models/clip_vision.")
    config = folder / "config.json"
    if (
        file.name not in _FILES or not config.is_file()
    ):  # in a folder of many files, the config may belong to another one
        return file, {}
    try:
        data = json.loads(read_bounded(config, _MOST_CONFIG))
        data = data.get("vision_config", data)
        return file, data if isinstance(data, dict) else {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AMGError(
            f"{config} cannot be read ({brief(error)}): restore it, or remove it."
        ) from error


_LAYER = "vision_model.encoder.layers."
_STEMS = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_LAYERS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(
    r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias|in_proj_weight|in_proj_bias)"
)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the tensors of the image encoder, under transformers' names, in float32."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(("vision_model.", "visual_projection.")):
            if not name.endswith("position_ids"):
                state[name] = tensor.float()
        elif name.startswith("visual."):
            state |= _from_open_clip(name.removeprefix("visual."), tensor.float())
    return state


def _from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "proj":
        return {"visual_projection.weight": tensor.T.contiguous()}
    if found := _BLOCK.fullmatch(name):
        number, layer, field = found.groups()
        at = f"vision_model.encoder.layers.{number}"
        if field.startswith("in_proj_"):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            end = field.removeprefix("in_proj_")
            return {f"{at}.self_attn.{p}_proj.{end}": part.contiguous() for p, part in parts}
        return {f"{at}.{_LAYERS[layer]}.{field}": tensor}
    stem, _, field = name.partition(".") if name.startswith("ln_") else (name, "", "")
    return {"vision_model." + _STEMS[stem] + (f".{field}" if field else ""): tensor}


def _checked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    dimensions = {
        "vision_model.embeddings.class_embedding": 1,
        "vision_model.embeddings.patch_embedding.weight": 4,
        "vision_model.embeddings.position_embedding.weight": 2,
        "visual_projection.weight": 2,
        "vision_model.encoder.layers.0.mlp.fc1.bias": 1,
    }
    for name, count in dimensions.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        if state[name].ndim != count:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, not of {count} dimensions")
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[2]
    positions = len(state["vision_model.embeddings.position_embedding.weight"])
    if not patch <= math.isqrt(positions - 1) * patch <= _LARGEST_SIDE:
        raise ValueError(f"{positions} positions of {patch} pixels are no picture")
    numbers = {name.split(".")[3] for name in state if name.startswith(_LAYER)}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError("some of its layers are missing")
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds values that are not numbers")
    return state


def _network(
    state: Mapping[str, Tensor], activation: str, heads: int, side: int
) -> torch.nn.Module:
    """transformers' CLIPVisionModelWithProjection on these very tensors, frozen."""
    parts = ("CLIPVisionConfig", "CLIPVisionModelWithProjection")
    step = "pip install transformers"
    transformers = needed("transformers", "The descriptor clip", step, parts)
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    layers = len({name.split(".")[3] for name in state if name.startswith(_LAYER)})
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        projection_dim=len(state["visual_projection.weight"]),
        hidden_act=activation,
    )
    try:
        with torch.device("meta"):  # no memory, and no draw from the global generator
            network = transformers.CLIPVisionModelWithProjection(config)
        network.load_state_dict(dict(state), assign=True)
    except (RuntimeError, ValueError) as error:
        raise AMGError(
            f"The weights hold no CLIP image encoder of width {width}, {layers} layers and {heads} heads "
            f"({' '.join(str(error).split())[:300]}): give another file."
        ) from error
    for module in network.modules():  # this buffer is in no weights file
        if getattr(module, "position_ids", None) is not None:
            count = len(state["vision_model.embeddings.position_embedding.weight"])
            module.position_ids = torch.arange(count)[None]
    frozen: torch.nn.Module = network.float().eval().requires_grad_(False)
    return frozen


KIND = Kind(
    name="clip",
    description="finds pictures of the same subject, not copies; for searching, not for guarding.",
    misses=message("misses_clip"),
    descriptor=CLIPDescriptor,
    levels={224: ((0.7, 0.9),) * 5},  # not measured
    guards=False,
    weights=Weights("file or folder", (("amg", "clip*"), ("clip_vision", "*"))),
)
