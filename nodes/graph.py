"""What the running graph says of a picture: the model files that drew it, and the pictures that went in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.model_management
import folder_paths

from ..amg_core.files import open_regular

# Folders of models whose files shape a picture, the most telling name first.
KINDS = (
    "checkpoints", "diffusion_models", "unet_gguf", "loras", "text_encoders", "vae", "controlnet",
    "style_models", "gligen", "hypernetworks", "clip_vision",
)  # fmt: skip
BLOCK = 1 << 24
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_hashes: dict[tuple[str, int, int], str] = {}  # (path, time of change, size) -> SHA-256

Node = Mapping[str, object]


def upstream(prompt: Mapping[str, Node] | None, node_id: str | None, slot: str) -> Iterator[Node]:
    """The nodes that an input of a node depends on, each once. Nothing without a prompt."""
    start = _inputs((prompt or {}).get(str(node_id), {})).get(slot)
    waiting, seen = [start], set()
    while waiting:
        link = waiting.pop()
        if not isinstance(link, list) or len(link) != 2 or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        node = (prompt or {}).get(str(link[0]))
        if node is not None:
            yield node
            waiting += _inputs(node).values()


def models(nodes: list[Node], hashed: bool) -> list[dict]:
    """The model files that these nodes name: kind, name, SHA-256 ("" if not `hashed`), strengths."""
    found: dict[str, dict] = {}
    for node in nodes:
        for name, numbers in _names(_inputs(node)):
            for kind in KINDS:
                path = _model(kind, name)
                if path and path not in found:
                    digest = _hash(path) if hashed else ""
                    strengths = {"strengths": numbers} if numbers else {}
                    found[path] = {"kind": kind, "name": name, "sha256": digest} | strengths
                if path:
                    break
    return list(found.values())


def pictures(nodes: list[Node]) -> list[Path]:
    """The picture files in the host's folders that these nodes load."""
    names = [name for node in nodes for name, _ in _names(_inputs(node))]
    found = [
        folder_paths.get_annotated_filepath(name)
        for name in names
        if name.partition(" [")[0].lower().endswith(PICTURES)
        and folder_paths.exists_annotated_filepath(name)
    ]
    return [Path(path) for path in dict.fromkeys(found)]


def _inputs(node: Node) -> dict:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _names(inputs: object) -> Iterator[tuple[str, dict[str, float]]]:
    """Every text among the inputs, in lists of LoRAs too, with the strengths beside it."""
    if not isinstance(inputs, dict) or inputs.get("on") is False:
        return
    numbers = {
        key: float(value)
        for key, value in inputs.items()
        if key.startswith("strength")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }
    for value in inputs.values():
        if isinstance(value, str):
            yield value, numbers
        else:
            yield from _names(value)


def _model(kind: str, name: str) -> str | None:
    if kind not in folder_paths.folder_names_and_paths or "." not in name or len(name) > 1000:
        return None
    path = folder_paths.get_full_path(kind, name)
    return path if path and os.path.isfile(path) else None


def _hash(path: str) -> str:
    """SHA-256 (hex) of a file, remembered until it changes. Can be interrupted."""
    state = os.stat(path)
    key = os.path.realpath(path), state.st_mtime_ns, state.st_size
    if key not in _hashes:
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while block := file.read(BLOCK):
                comfy.model_management.throw_exception_if_processing_interrupted()
                digest.update(block)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]
