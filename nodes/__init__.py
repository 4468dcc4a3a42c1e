"""The ComfyUI nodes. Importing this registers the model folders and loads no weights."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import paths, routes
from .arrange import CombineIndexesNode, MutePicturesNode
from .check_folder import CheckFolderNode
from .demo import DemoModelNode
from .detect import CalibratePromptProbeNode, PromptProbeNode
from .grid import StrengthGridNode
from .guard import GuardNode
from .index import BuildIndexNode, IndexFromImagesNode, LoadIndexNode
from .mitigate import (
    AdaptPromptNode,
    DelayedGuidanceNode,
    PaddingFixNode,
    PromptNoiseNode,
    RandomisePromptNode,
)
from .probe import SimilarityProbeNode
from .sampling import ApplyNode, ReportNode, SamplerNode
from .save import SaveImageNode

NODES = [
    LoadIndexNode,
    SamplerNode,
    ApplyNode,
    SimilarityProbeNode,
    BuildIndexNode,
    IndexFromImagesNode,
    CombineIndexesNode,
    MutePicturesNode,
    DemoModelNode,
    ReportNode,
    PromptProbeNode,
    CalibratePromptProbeNode,
    RandomisePromptNode,
    PromptNoiseNode,
    AdaptPromptNode,
    PaddingFixNode,
    DelayedGuidanceNode,
    GuardNode,
    StrengthGridNode,
    SaveImageNode,
    CheckFolderNode,
]


class AMGExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        paths.register()
        routes.register()
        return NODES
