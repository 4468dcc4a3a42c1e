"""Read SSCD's published weights without running anything the file says.

Meta publishes the network in three layouts, all of them zip archives around a pickle:

=====================  ===========================================================================
``*.torchvision.pt``   state dict, ``backbone.layer1.0.conv1.weight`` … ``backbone.fc.weight``
``*.classy.pt``        state dict, ``backbone.blocks.0.block0-0.convolutional_block.0.weight`` …
``*.torchscript.pt``   traced module of the Classy Vision network: code, and the same names as
                       attributes of nested modules
=====================  ===========================================================================

A pickle can call any function and a TorchScript archive carries code, so neither `torch.jit.load`
nor a general unpickler touches these files. `_Reader` rebuilds tensors and inert containers and
refuses every other name. Safetensors of the same keys are read too.

References
----------
.. [1] E. Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022;
   https://github.com/facebookresearch/sscd-copy-detection (model.py, gem_pooling.py).
.. [2] Classy Vision's ``resnext.py``, for the names of its layers.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AMGError
from .tensors import tensors_sha256

FILE_NAME = "sscd_disc_mixup.torchvision.pt"
STAGES = (3, 4, 6, 3)  # blocks a stage, ResNet-50
DIMENSIONS = 512

_WHERE = (
    f"SSCD needs Meta's weights file {FILE_NAME} (98 MB, MIT licence), from the table of models in "
    "github.com/facebookresearch/sscd-copy-detection. Put it into the models/amg folder of your "
    "ComfyUI, or give its path. The descriptor 'pixel' works without any file."
)
_MAX_BYTES = 1 << 30
_MAX_PICKLE_BYTES = 16 << 20
_MAX_ENTRIES = 20_000


def load(path: Path | None) -> tuple[dict[str, Tensor], str]:
    """The network's tensors under torchvision's names, and their SHA-256.

    Parameters
    ----------
    path : Path or None
        Any of Meta's three layouts, or safetensors.

    Returns
    -------
    state : dict of str to Tensor
        `expected_shapes` names them; float32 on the CPU.
    sha256 : str
        Of the tensors, see `tensors.tensors_sha256`: one and the same for all layouts.

    Raises
    ------
    AMGError
        No such file, a damaged or hostile one, or one that holds another network.
    """
    if path is None:
        raise AMGError(f"No weights for SSCD. {_WHERE}")
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise AMGError(f"{path} {what}. {_WHERE}")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is over 1 GiB, and the real file has 98 MB")
        data = path.read_bytes()
        with torch.inference_mode(False):
            state = _checked(_canonical(_tensors(_parse(data))))
    except _OtherNetwork as error:
        raise AMGError(
            f"{path} does not hold SSCD's ResNet-50 with 512 dimensions ({error}). Other sizes, "
            f"such as sscd_disc_large, are not supported. {_WHERE}"
        ) from None
    except (MemoryError, OSError) as error:
        raise AMGError(f"{path} could not be read: {error}") from error
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise AMGError(
            f"{path} is damaged or is not a weights file of SSCD ({error}). Nothing in it was run. "
            f"Download it again. {_WHERE}"
        ) from error
    return state, tensors_sha256(state)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes: torchvision's ``resnet50(num_classes=512)`` without its counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv: str, bn: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update(
            {f"{bn}.{f}": (outputs,) for f in ("weight", "bias", "running_mean", "running_var")}
        )

    conv_bn("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate(STAGES):
        width = 64 * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            conv_bn(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            conv_bn(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            conv_bn(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_bn(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (DIMENSIONS, inputs), (DIMENSIONS,)
    return shapes


class _OtherNetwork(Exception):
    """The file is sound, its contents are not ours."""


# ---------------------------------------------------------------- bytes -> objects


def _parse(data: bytes) -> object:
    if data[:4] == b"PK\x03\x04":
        return _Archive(data).root()
    if data[:1] == b"\x80":
        # torch before 1.6. `torch.load` sees here, as we did, that this is no zip, and can
        # therefore not mistake it for TorchScript (which it would run, before torch 2.6).
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its words advise to load unsafely: not passed on
            raise ValueError("it holds more than tensors, or is cut short") from error
    if data[8:9] == b"{":
        from safetensors.torch import load as load_safetensors

        return load_safetensors(data)
    raise ValueError("neither a PyTorch archive nor safetensors")


class _Archive:
    """A zip of `torch.save` or `torch.jit.save`: ``NAME/data.pkl``, ``NAME/data/0``, …"""

    def __init__(self, data: bytes) -> None:
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        names = set(self.zip.namelist())
        roots = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("no data.pkl in it")
        self.folder = roots[0].removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        if f"{self.folder}byteorder" in names and self.record("byteorder", 16) != b"little":
            raise ValueError("written on a big-endian machine")

    def record(self, name: str, most: int) -> bytes:
        entry = self.zip.getinfo(f"{self.folder}{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise ValueError(f"unusual archive entry {name!r}")
        return self.zip.read(entry)  # checks the CRC

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """One flat storage, read on first use."""
        if key not in self.storages:
            data = self.record(f"data/{key}", _MAX_BYTES)
            if count < 1 or len(data) != count * dtype.itemsize:
                raise ValueError(f"storage {key!r} has the wrong length")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype)
        flat = self.storages[key]
        if flat.dtype != dtype:
            raise ValueError(f"storage {key!r} has two types")
        return flat

    def root(self) -> object:
        return _Reader(self).load()


class _Module:
    """Inert stand-in for every ``__torch__.*`` class of a TorchScript archive."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: object) -> None:
        self.attributes = state


class _Rebuild:
    """The allowed calls, as objects that a pickle cannot alter (no ``__dict__``)."""

    __slots__ = ()


class _Tensor(_Rebuild):
    __slots__ = ()

    def __call__(self, flat, offset, size, stride, *_unused) -> Tensor:
        if not isinstance(flat, Tensor):
            raise pickle.UnpicklingError("a tensor without storage")
        return flat.as_strided(tuple(size), tuple(stride), offset)  # checks the bounds


class _First(_Rebuild):
    """A parameter's tensor, a typed list's list: the first argument as it is."""

    __slots__ = ()

    def __call__(self, data, *_unused) -> object:
        return data


_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}
_AS_IT_IS = {("torch._utils", "_rebuild_parameter")} | {
    ("torch.jit._pickle", name)
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
}


class _Reader(pickle.Unpickler):
    """Tensors, dicts and inert modules; any other name in the pickle ends the reading."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.record("data.pkl", _MAX_PICKLE_BYTES)))
        self.archive = archive

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _Tensor()
        if (module, name) in _AS_IT_IS:
            return _First()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.partition(".")[0] == "__torch__":
            return _Module
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights file needs")

    def persistent_load(self, pid: object) -> Tensor:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown kind of reference")
        return self.archive.storage(key, dtype, int(count))


# ---------------------------------------------------------------- objects -> named tensors

_WRAPPERS = ("classy_state_dict", "base_model", "state_dict", "model_state_dict", "model")


def _children(node: object) -> Mapping | None:
    if isinstance(node, _Module):
        node = getattr(node, "attributes", None)
    return node if isinstance(node, Mapping) else None


def _tensors(root: object) -> dict[str, Tensor]:
    """Flatten nested dicts and modules to dotted names, without a checkpoint's other contents."""
    node = _children(root)
    if node is None:
        raise ValueError("no table of tensors in it")
    for wrapper in _WRAPPERS:
        inner = _children(node.get(wrapper))
        if inner is not None:
            node = inner
    seen = 0

    def walk(node: Mapping, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal seen
        for key, value in node.items():
            seen += 1
            if seen > _MAX_ENTRIES or depth > 12:
                raise ValueError("far too many entries")
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif (inner := _children(value)) is not None:
                yield from walk(inner, f"{prefix}{key}.", depth + 1)

    return dict(walk(node, "", 0))


_PREFIX = re.compile(r"(?:(?:module|model|trunk|backbone)\.)*")
_CLASSY = re.compile(
    r"blocks\.(\d)\.block\d-(\d+)\.(convolutional_block\.[01346]|bn|downsample\.[01])\.(\w+)"
)
_CLASSY_LAYERS = {
    "convolutional_block.0": "conv1",
    "convolutional_block.1": "bn1",
    "convolutional_block.3": "conv2",
    "convolutional_block.4": "bn2",
    "convolutional_block.6": "conv3",
    "bn": "bn3",
    "downsample.0": "downsample.0",
    "downsample.1": "downsample.1",
}
_CLASSY_ENDS = {
    "initial_block._module.0": "conv1",
    "initial_block._module.1": "bn1",
    "embeddings.1": "fc",
}


def _torchvision_name(name: str) -> str:
    """Classy Vision's or torchvision's name, with or without wrappers -> torchvision's."""
    name = name[_PREFIX.match(name).end() :]
    if match := _CLASSY.fullmatch(name):
        stage, block, layer, field = match.groups()
        return f"layer{int(stage) + 1}.{block}.{_CLASSY_LAYERS[layer]}.{field}"
    layer, _, field = name.rpartition(".")
    return f"{_CLASSY_ENDS.get(layer, layer)}.{field}"


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        key = _torchvision_name(name)
        if key in state:
            raise ValueError(f"two tensors for {key}")
        state[key] = tensor
    if not state:
        raise ValueError(
            "no named tensors in it; a frozen TorchScript module has lost the names of its layers"
        )
    return state


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exactly the expected tensors, as contiguous float32."""
    shapes = expected_shapes()
    for kind, names in (
        ("missing", [n for n in shapes if n not in state]),
        ("unexpected", [n for n in state if n not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise _OtherNetwork(f"{kind}: {', '.join(names[:3])}{more}")
    checked = {}
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise _OtherNetwork(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _OtherNetwork(f"{name} is {tensor.dtype}, expected float32")
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not numbers")
        checked[name] = tensor
    return checked
