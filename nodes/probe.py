"""Similarity Probe: is this picture a copy of one in the index?"""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..amg_core.descriptors import registry
from ..amg_core.errors import AMGError
from ..amg_core.limits import COPY, NEAR
from ..amg_core.messages import words as in_words
from ..amg_core.similarity.verdict import verdict
from . import latents, live, show
from .opening import descriptor_of
from .types import CHECK, MemorizationIndex, place

SHOWN = 16  # pictures of a batch that the page shows
SIDE = 384  # their longer side on the page, in pixels


class SimilarityProbeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_SimilarityProbe",
            display_name="AMG Copy Check (Similarity Probe)",
            **place(CHECK),
            description="Compares finished pictures with an index, shows the nearest picture for "
            "each and says whether it is a copy. Works on any picture, guarded or not.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The pictures to check. Each takes a fraction of a second."
                ),
                MemorizationIndex.Input(
                    "index",
                    tooltip="The pictures to compare with. The verdict no copy speaks only of "
                    "this index.",
                ),
                *latents.inputs(),
            ],
            outputs=[
                io.Float.Output(
                    "similarity",
                    display_name="similarity",
                    tooltip="Largest similarity in the batch, in units of the index's "
                    "descriptor. Larger is more alike. The same picture has 1 with compact and "
                    "sscd, 0 with pixel and latent.",
                ),
                io.String.Output(
                    "verdict",
                    display_name="verdict",
                    tooltip="One line for each picture: its likeness (0 = as alike as pictures "
                    "that are not in the index, 1 = the same picture) and a sentence. Two checks "
                    "are made, and either can call it a copy.",
                ),
                io.Image.Output(
                    "nearest",
                    display_name="nearest",
                    tooltip="For each picture the nearest one in the index. Compare the two "
                    "yourself.",
                ),
                io.String.Output(
                    "caption",
                    display_name="caption",
                    tooltip="Caption of the nearest picture, one line for each picture. Empty if "
                    "the index has no captions.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, index, vae=None, model=None) -> io.NodeOutput:
        from ..amg_core.similarity.matcher import Matcher

        if image.shape[0] == 0:
            raise AMGError("image: the batch is empty. Connect at least one picture.")
        if index.latent and (vae is not None or model is not None):
            index = Matcher(index.searcher, descriptor_of(index.descriptor.spec, vae, model))
        pictures = image[..., :3].movedim(-1, 1).float().clamp(0, 1).cpu()
        verdicts = verdict(index, pictures)
        words = "\n".join(f"{v.likeness:.2f}  {in_words(v.message())}" for v in verdicts)
        nearest = show.images([index.index.thumbnail(v.neighbor) for v in verdicts])
        show.text_on(cls.hidden.unique_id)(words)
        shown = ui.PreviewImage(nearest, cls=cls).as_dict()
        shown |= {
            "text": (words,),
            "amg_probe": [_shown(index, pictures, verdicts, shown["images"])],
        }
        shown["amg_verdict"] = [show.text_file(words)]  # App mode shows files alone
        return io.NodeOutput(
            max(v.similarity for v in verdicts),
            words,
            nearest,
            "\n".join(v.caption for v in verdicts),
            ui=shown,
        )


def _shown(matcher, pictures: Tensor, verdicts: list, nearest: list) -> dict:
    """The data for the page: the closest pictures of the batch, at most SHOWN, and the number of others.

    `pictures` are (B, 3, H, W). `nearest` are the host's records of the saved nearest pictures.
    "best" has the `Near` of each picture, with the fields of `live.entry`.
    """
    order = sorted(range(len(verdicts)), key=lambda i: -verdicts[i].score)[:SHOWN]
    order = sorted(order) if len(order) == len(verdicts) else order
    saved = show.preview(pictures[order].movedim(1, -1), SIDE)
    found = [
        live.verdict(verdicts[i])
        | {"picture": picture, "nearest": nearest[i], "copy_above": COPY, "near_above": NEAR}
        | {"best": [live.entry(matcher.index, n.row) | n.to_json() for n in verdicts[i].nearest]}
        for i, picture in zip(order, saved, strict=True)
    ]
    misses = registry.of(matcher.descriptor.spec).misses
    told = live.said([] if misses is None else [misses])
    return {"verdicts": found, "left": len(verdicts) - len(found), "misses": told}
