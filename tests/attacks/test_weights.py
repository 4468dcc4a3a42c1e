"""Weights files made to harm: one reader for all kinds of weights, which hands no file to torch."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amg_core.decoders import load_taesd
from amg_core.descriptors.clip import CLIPDescriptor
from amg_core.descriptors.compact import CompactDescriptor
from amg_core.descriptors.latent import load_taesd_encoder
from amg_core.descriptors.sscd import load as load_sscd
from amg_core.descriptors.tensors import read_tensors
from amg_core.errors import AMGError
from tests.attacks.apart import apart

READERS = {
    "decoder": load_taesd,
    "encoder": load_taesd_encoder,
    "clip": CLIPDescriptor.from_file,
    "sscd": load_sscd,
    "compact": CompactDescriptor.from_file,
}
ROOT = Path(__file__).parents[2]


def archive(root: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", root)
        for name, data in (extra or {}).items():
            made.writestr(f"archive/{name}", data)
    return out.getvalue()


def tensor(size: bytes, stride: bytes, count: int = 2, offset: int = 0) -> bytes:
    """A pickled tensor of that size and stride, on a storage of `count` floats."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([count])
        + b"tQK" + bytes([offset]) + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def named(root: bytes) -> bytes:
    """A table with one tensor in it."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + root + b"s."


TWO = tensor(b"K\x02\x85", b"K\x01\x85")
HUGE = b"J" + struct.pack("<i", 1 << 30)
WIDE = tensor(b"(" + HUGE + HUGE + b"t", b"(K\x00K\x00t")
NUMBERS = {"data/0": bytes(8)}
PICKLES = {
    "deep tuple": b"\x80\x02N" + b"\x85" * 2_000_000 + b".",
    "deep key": b"\x80\x02}N" + b"\x85" * 2_000_000 + b"Ns.",
    "deep list": b"\x80\x02" + b"]" * 200_000 + b"N" + b"a" * 200_000 + b".",
    "deep dict": b"\x80\x02" + b"}K\x00" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "deep module": b"\x80\x02" + b"c__torch__\nX\n)\x81" * 100_000 + b"N" + b"b" * 100_000 + b".",
    "deep list, from outside": b"\x80\x02]q\x00" + b"h\x00]q\x00a" * 300_000 + b".",
    "far memo": b"\x80\x02}r\xff\xff\xff\x0f.",
    "long bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b".",
    "many tables": b"\x80\x02(" + b"}" * 4_000_000 + b"t.",
    "holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "wide view": named(WIDE),
    "odd setitems": b"\x80\x02}(X\x01\x00\x00\x00a" + TWO + b"K\x01u.",
    "no stack": b"\x80\x02s.",
}  # fmt: skip


ODD = {  # a pickle, and why it is refused
    "a builtin": (b"cbuiltins\neval\n(S'1'\ntR.", "names builtins.eval"),
    "torch.load": (b"ctorch\nload\n(S'/etc/passwd'\ntR.", "names torch.load"),
    "an attribute path": (
        b"\x80\x04\x8c\x0btorch._utils\x8c\x16_rebuild_tensor_v2.__class__\x93.", "instruction"
    ),
    "altering a rebuilder": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "cannot be filled"
    ),
    "altering a dtype": (
        b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.", "cannot be filled"
    ),
    "altering the stand-in": (
        b"\x80\x02c__torch__\nX\n}X\x01\x00\x00\x00aK\x01sb.", "cannot be filled"
    ),
    "calling a stand-in": (b"\x80\x02c__torch__\nX\nK\x01\x85R.", "the wrong way"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction"),
    "a list as a tensor": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(]K\x00))tR.", "without storage"
    ),
    "no table": (b"\x80\x02K\x01.", "no table of tensors"),
    "nothing": (b"", "cut short"),
    "short storage": (named(tensor(b"K\x03\x85", b"K\x01\x85")), "larger than its storage"),
    "beyond its storage": (
        named(tensor(b"K\x01\x85", b"K\x01\x85", offset=2)), "larger than its storage"
    ),
    "another length": (named(tensor(b"K\x04\x85", b"K\x01\x85", count=4)), "wrong length"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles_are_refused(tmp_path, name):
    pickled, words = ODD[name]
    (tmp_path / "odd.pt").write_bytes(archive(pickled, NUMBERS))
    with pytest.raises(ValueError, match=words):
        read_tensors(tmp_path / "odd.pt")


def hostile(folder: Path) -> list[Path]:
    for name, data in PICKLES.items():
        (folder / f"{name}.pth").write_bytes(archive(data, NUMBERS))
        (folder / f"bare {name}.pth").write_bytes(data)
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", named(TWO))
        made.writestr("archive/data/0", bytes(1 << 28))
    with zipfile.ZipFile(folder / "many entries.pth", "w") as made:
        for number in range(100_000):
            made.writestr(f"archive/{number}", b"")
    with open(folder / "sparse.pth", "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 40)
    return sorted(folder.glob("*.pth"))


def test_no_reader_leaves_the_file_to_torch(tmp_path, monkeypatch):
    """``torch.load(weights_only=True)`` runs the code of a TorchScript archive, before torch 2.6."""

    def forbidden(*_, **__):
        raise SystemExit("torch was asked to read a file of unknown origin")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x)

    files = [tmp_path / name for name in ("taesd_encoder.pth", "old.pth", "evil.pt")]
    torch.jit.script(Net()).save(files[0])
    torch.save(Net().state_dict(), files[1], _use_new_zipfile_serialization=False)
    files[2].write_bytes(pickle.dumps({"1.weight": ValueError("not run")}, 2))
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch.jit, "load", forbidden)
    for read in READERS.values():
        for path in files:
            with pytest.raises(AMGError, match=path.name):
                read(path)


def test_the_product_calls_no_unpickler():
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("amg_core", "amg_webui", "amg_demo", "index_tools", "nodes", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text("utf-8") for word in ("torch.load(", "pickle.load", "Unpickler("))
    ]  # fmt: skip
    assert found == []


def test_hostile_files_are_refused_in_little_memory(tmp_path):
    """In a process of its own: what goes wrong here ends it."""
    files = hostile(tmp_path)
    report, grown = apart(
        "from pathlib import Path\n"
        "from amg_core.decoders import load_taesd\n"
        "from amg_core.descriptors.sscd import load\n"
        "load_taesd, load\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    tell(load_taesd, Path(path))\n"
        "    tell(load, Path(path))\n",
        *files,
    )
    assert len(report) == 2 * len(files)
    for path, words in zip([path for path in files for _ in range(2)], report, strict=True):
        assert words.startswith("AMGError: ") and path.name in words, (path.name, words[:200])
    assert grown < 1 << 30


@pytest.mark.parametrize("name", ["fifo.pth", "folder.pth", "taesd_decoder.safetensors"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "fifo.pth":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no pipes with names")
        os.mkfifo(path)
    elif name == "folder.pth":
        path.mkdir()
    else:
        path.write_bytes((1 << 40).to_bytes(8, "little") + b"{" + bytes(100))
    for kind in ("decoder", "encoder", "sscd", "compact"):
        with pytest.raises(AMGError, match=name):
            READERS[kind](path)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["state dict", "torchscript", "legacy", "bare pickle"])
def test_a_pickle_that_is_a_program_is_not_run(kind, tmp_path):
    marker, path = tmp_path / "owned", tmp_path / "evil.pt"
    bomb = {"backbone.conv1.weight": Bomb(marker)}
    if kind in ("state dict", "legacy"):
        torch.save(bomb, path, _use_new_zipfile_serialization=kind != "legacy")
    elif kind == "torchscript":
        path.write_bytes(archive(pickle.dumps(bomb), {"constants.pkl": b"", "code/x.py": b"0"}))
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(AMGError, match=r"evil\.pt.*Nothing in it was run"):
        load_sscd(path)
    assert not marker.exists()


def test_what_is_alike_is_still_read(tmp_path):
    """Of every layout: shared tensors, views, parameters, nested tables, scalars, other types."""
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": base, "b": base.T, "c": base[1:3, ::2], "again": base,
        "p": torch.nn.Parameter(torch.ones(3)), "scalar": torch.tensor(7),
        "half": torch.ones(2, 2).half(), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    network = torch.nn.BatchNorm2d(3).state_dict()  # an OrderedDict with attributes of its own
    for new in (True, False):
        path = tmp_path / f"{new}.pth"
        torch.save({"state_dict": state | {"net": network}, "epoch": 3}, path,
                   _use_new_zipfile_serialization=new)  # fmt: skip
        found = read_tensors(path)
        wanted = state | {f"net.{name}": value for name, value in network.items()}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("cut", [3, 40, 200, 700, 1200])
def test_a_file_that_is_cut_short_is_refused(tmp_path, cut):
    for new in (True, False):
        path = tmp_path / "cut.pth"
        torch.save({"1.weight": torch.ones(64)}, path, _use_new_zipfile_serialization=new)
        data = path.read_bytes()
        path.write_bytes(data[: min(cut, len(data) - 1)])
        with pytest.raises(AMGError, match=r"cut\.pth"):
            load_taesd(path)


# ---------------------------------------------------------------- right tables of wrong tensors


LAYERS = "vision_model.encoder.layers"


def clip_state(width=8, patch=4, side=16, layers=1) -> dict[str, torch.Tensor]:
    state = {
        "vision_model.embeddings.class_embedding": torch.ones(width),
        "vision_model.embeddings.patch_embedding.weight": torch.ones(width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": torch.ones((side // patch) ** 2 + 1, width),
        "visual_projection.weight": torch.ones(4, width),
    }  # fmt: skip
    for number in range(layers):
        state[f"{LAYERS}.{number}.mlp.fc1.bias"] = torch.ones(16)
    return state


WRONG = {
    "width of 0": clip_state(width=0),
    "patch of 0": clip_state() | {"vision_model.embeddings.patch_embedding.weight": torch.ones(8, 3, 0, 0)},
    "one position": clip_state() | {"vision_model.embeddings.position_embedding.weight": torch.ones(1, 8)},
    "huge picture": clip_state(width=1, patch=64, side=64 * 64),
    "flat patch": clip_state() | {"vision_model.embeddings.patch_embedding.weight": torch.ones(8)},
    "a billion layers": clip_state() | {f"{LAYERS}.999999999.mlp.fc1.bias": torch.ones(16)},
    "no layers": clip_state(layers=0),
    "a layer with a name": clip_state() | {f"{LAYERS}.x.mlp.fc1.bias": torch.ones(16)},
    "empty": {"nothing": torch.ones(0)},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_refused_in_words(tmp_path, name):
    path = tmp_path / "wrong.safetensors"
    save_file(WRONG[name], path)
    for kind, read in READERS.items():
        with pytest.raises(AMGError, match=r"wrong\.safetensors"):
            read(path)
        assert kind


@pytest.mark.parametrize("key", ["1.weight", "14.weight"])
def test_taesd_of_no_channels_is_refused(tmp_path, key):
    for shape in ((64, 0, 3, 3), (0, 64, 3, 3), (64,), ()):
        path = tmp_path / "taesd_decoder.safetensors"
        save_file({key: torch.ones(shape)}, path)
        for kind in ("decoder", "encoder"):
            with pytest.raises(AMGError, match="taesd_decoder"):
                READERS[kind](path)


@pytest.mark.parametrize(
    "config",
    ['{"num_attention_heads": 0.5}', '{"num_attention_heads": "8"}', '{"num_attention_heads": 3}',
     '{"num_attention_heads": -8}', "[" * 100_000, "[]", "7"],
)  # fmt: skip
def test_a_config_beside_the_weights_is_checked(tmp_path, config):
    save_file(clip_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(AMGError, match=r"config\.json"):
        CLIPDescriptor.from_file(tmp_path)
