"""SSCD: the network, its gradient, and the reading of Meta's files. Weights are random throughout.

The TorchScript and Classy Vision layouts are made here by modules whose attributes carry the names
of Meta's own (sscd/models/model.py; Classy Vision's resnext.py). Set AMG_SSCD_WEIGHTS to the path
of Meta's file to run the test at the end with the real network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amg_core.descriptors import create, for_spec
from amg_core.descriptors.sscd import (
    BN_EPSILON,
    LARGE,
    SSCDDescriptor,
    SSCDNetwork,
    examine,
    expected_shapes,
    fold,
    load,
    network,
)
from amg_core.descriptors.tensors import tensors_sha256
from amg_core.errors import AMGError

# ---------------------------------------------------------------- Meta's layouts, random weights


class BottleneckLayer(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1):
        super().__init__()
        width = outputs // (4 if groups == 1 else 2)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.se = None
        self.convolutional_block = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
        )

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn(self.convolutional_block(x)) + residual)


class InitialBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self._module = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )

    def forward(self, x):
        return self._module(x)


class ResNeXt(nn.Module):
    def __init__(self, counts=(3, 4, 6, 3), groups=1):
        super().__init__()
        self.initial_block = InitialBlock()
        stages, inputs = [], 64
        for stage, count in enumerate(counts):
            outputs, blocks = 256 * 2**stage, OrderedDict()
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                blocks[f"block{stage}-{block}"] = BottleneckLayer(inputs, outputs, stride, groups)
                inputs = outputs
            stages.append(nn.Sequential(blocks))
        self.blocks = nn.Sequential(*stages)

    def forward(self, x):
        return self.blocks(self.initial_block(x))


class GeM(nn.Module):
    def __init__(self, power: float):
        super().__init__()
        self.pooling_param = power

    def forward(self, x):
        n, c, h, w = x.size()
        mean = x.reshape(n, c, h * w).clamp(min=1e-6).pow(self.pooling_param).mean(dim=2)
        return mean.pow(1.0 / self.pooling_param)


class L2Norm(nn.Module):
    def forward(self, x):
        return F.normalize(x)


class ClassyModel(nn.Module):
    def __init__(self, dimensions=512, **trunk):
        super().__init__()
        self.backbone = ResNeXt(**trunk)
        self.embeddings = nn.Sequential(GeM(3.0), nn.Linear(2048, dimensions), L2Norm())

    def forward(self, x):
        return self.embeddings(self.backbone(x))


def classy_name(name: str) -> str:
    """torchvision's name -> Classy Vision's, written independently of the reader."""
    stem = {"conv1": "initial_block._module.0", "bn1": "initial_block._module.1"}
    layer, field = name.rsplit(".", 1)
    if layer == "fc":
        return f"embeddings.1.{field}"
    if layer in stem:
        return f"backbone.{stem[layer]}.{field}"
    stage, block, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", layer).groups()
    places = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}
    rest = "bn" if rest == "bn3" else rest
    rest = f"convolutional_block.{places[rest]}" if rest in places else rest
    return f"backbone.blocks.{int(stage) - 1}.block{int(stage) - 1}-{block}.{rest}.{field}"


@pytest.fixture
def state(sscd_state):
    return dict(sscd_state)


@pytest.fixture(scope="module")
def classy(sscd_state):
    """Meta's module, here with our random weights."""
    model = ClassyModel().eval()
    missing, unexpected = model.load_state_dict(
        {classy_name(k): v for k, v in sscd_state.items()}, strict=False
    )
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    return model


@pytest.fixture(scope="module")
def descriptor(sscd_state):
    return SSCDDescriptor(sscd_state, "ab" * 32, side=224)


def torchvision_layout(state):
    return OrderedDict((f"backbone.{k}", v) for k, v in state.items())


@pytest.fixture
def write(tmp_path, state, classy):
    """Write one of the layouts; returns its path."""

    def _write(layout: str) -> Path:
        path = tmp_path / f"sscd_disc_mixup.{layout}.pt"
        if layout == "torchvision":
            torch.save(torchvision_layout(state), path)
        elif layout == "classy":
            torch.save(classy.state_dict(), path)
        elif layout == "checkpoint":  # of Classy Vision's own trainer
            trunk = {k.removeprefix("backbone."): v for k, v in classy.state_dict().items()}
            heads = {k: trunk.pop(k) for k in list(trunk) if k.startswith("embeddings")}
            model = {"model": {"trunk": trunk | heads}}
            torch.save({"classy_state_dict": {"base_model": model}, "iteration": 3}, path)
        elif layout == "legacy":  # torch before 1.6
            torch.save(torchvision_layout(state), path, _use_new_zipfile_serialization=False)
        elif layout == "half":
            torch.save({k: v.half() for k, v in torchvision_layout(state).items()}, path)
        elif layout == "traced":
            torch.jit.trace(classy, torch.rand(1, 3, 64, 64), check_trace=False).save(path)
        elif layout == "scripted":
            torch.jit.script(classy).save(path)
        elif layout == "frozen":
            torch.jit.freeze(torch.jit.script(classy)).save(path)
        elif layout == "safetensors":
            save_file = pytest.importorskip("safetensors.torch").save_file
            path = path.with_suffix(".safetensors")
            save_file({k: v.clone() for k, v in torchvision_layout(state).items()}, path)
        return path

    return _write


def by_hand(state) -> str:
    """The identity as the docs word it, written independently."""
    digest = hashlib.sha256()
    for name in sorted(state):
        shape = ",".join(str(n) for n in state[name].shape)
        digest.update(f"{name} {shape}\n".encode() + state[name].numpy().tobytes(order="C"))
    return digest.hexdigest()


EXACT = ("torchvision", "classy", "checkpoint", "legacy", "traced", "scripted", "safetensors")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layout", EXACT)
def test_every_layout_is_read_exactly(layout, write, state, monkeypatch):
    path = write(layout)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("torch.jit.load was called")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    read, sha256 = load(path)
    assert sha256 == tensors_sha256(state) == by_hand(state)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == torch.float32 and read[name].is_contiguous()
        assert torch.equal(read[name], tensor), name


def test_half_precision_is_widened(write, state):
    read, sha256 = load(write("half"))
    assert sha256 != tensors_sha256(state), "other numbers are another network"
    assert all(torch.equal(read[k], v.half().float()) for k, v in state.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_torchscript_is_refused_in_words(write):
    with pytest.raises(AMGError, match="lost the names"):
        load(write("frozen"))


# ---------------------------------------------------------------- files that are wrong


def test_absent_file_says_what_to_do(tmp_path):
    for path in (None, tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(AMGError) as caught:
            create("sscd", path)
        for word in ("sscd_disc_mixup.torchvision.pt", "models/amg", "MIT", "pixel"):
            assert word in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_damaged_and_foreign_files(tmp_path, write, state):
    sound = write("torchvision").read_bytes()
    path = tmp_path / "file.pt"
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 0xFF
    for data in (
        sound[: len(sound) // 2],
        bytes(flipped),
        b"",
        b"hello",
        b"<html>Not found</html>",
    ):
        path.write_bytes(data)
        with pytest.raises(AMGError, match=r"file\.pt.*damaged"):
            load(path)


def test_other_networks_are_named(tmp_path, state):
    path = tmp_path / "other.pt"

    def refused(tensors, *words):
        torch.save(tensors, path)
        with pytest.raises(AMGError) as caught:
            load(path)
        for word in ("other.pt", *words):
            assert word in str(caught.value)

    short = dict(state)
    del short["layer3.5.conv2.weight"]
    refused(short, "missing: layer3.5.conv2.weight")
    refused(state | {"layer5.0.conv1.weight": torch.ones(1)}, "unexpected: layer5.0.conv1.weight")
    refused(state | {"fc.weight": torch.ones(1000, 2048)}, "fc.weight is (1000, 2048)")
    refused(state | {"fc.bias": torch.ones(512, dtype=torch.int64)}, "fc.bias is torch.int64")
    refused(state | {"fc.bias": torch.full((512,), torch.nan)}, "not numbers")
    refused(state | {"backbone.fc.bias": torch.ones(512)}, "two tensors for fc.bias")


# ---------------------------------------------------------------- the network


def test_equals_metas_module(state, classy):
    network = SSCDNetwork().eval()
    network.load_state_dict(fold(state))
    x = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        ours, theirs = network(x), classy(x)
    assert (theirs @ theirs.T).min() < 0.999, "the random network must tell pictures apart"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_large_network_equals_metas_module(tmp_path):
    layout = LARGE._replace(blocks=(1, 1, 11, 1))  # a number of two digits, as in the third stage
    model = ClassyModel(1024, counts=layout.blocks, groups=32).eval()
    for name, values in model.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.5, 1.5)
    ours = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    assert ours == {classy_name(name) for name in expected_shapes(layout)}
    torch.save(model.state_dict(), tmp_path / "large.pt")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            network(tmp_path / "large.pt", layout)(x), model(x), rtol=0, atol=1e-5
        )
    with pytest.raises(AMGError, match="512 dimensions"):
        load(tmp_path / "large.pt")


def test_equals_torchvision(state):
    try:
        from torchvision.models import resnet50
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no working torchvision here: {error}")
    reference = resnet50(num_classes=512)
    reference.avgpool = GeM(3.0)
    reference.load_state_dict(state, strict=False)
    reference.eval()
    network = SSCDNetwork().eval()
    network.load_state_dict(fold(state))
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(network(x), F.normalize(reference(x)), rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences(state):
    network = SSCDNetwork().eval().double()
    network.load_state_dict(fold({k: v.double() for k, v in state.items()}))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 64, 64, generator=draw, dtype=torch.float64).requires_grad_()
    other = F.normalize(torch.randn(512, generator=draw, dtype=torch.float64), dim=0)
    (gradient,) = torch.autograd.grad((network(x) @ other).sum(), x)
    with torch.no_grad():
        for _ in range(2):
            step = F.normalize(torch.randn(x.shape, generator=draw, dtype=x.dtype).flatten(), dim=0)
            step = step.view_as(x) * 1e-6
            slope = (network(x + step) - network(x - step)) @ other / 2e-6
            torch.testing.assert_close(
                slope.squeeze(), (gradient * step).sum() / 1e-6, rtol=1e-4, atol=1e-8
            )


# ---------------------------------------------------------------- the descriptor


def test_spec(descriptor, state):
    spec = descriptor.spec
    assert (spec.id, spec.metric, spec.weights_sha256) == ("sscd_disc_mixup", "cosine", "ab" * 32)
    assert spec.scales == (16, 32, 64, 224) and "224" in spec.preprocessing
    assert nn.BatchNorm2d(1).eps == BN_EPSILON
    with pytest.raises(ValueError, match="288"):
        SSCDDescriptor(state, "", side=300)


def test_an_equivalent_file_opens_the_same_index(write):
    made = create("sscd", write("torchvision"), side=320, scales=(320, 32))
    assert made.spec.scales == (32, 320) and made.side == 320
    again = for_spec(made.spec, write("classy"))
    assert again.spec == made.spec and again.side == 320
    with pytest.raises(ValueError, match="no scale"):
        again.embed(torch.rand(1, 3, 32, 32), 16)


def test_a_file_that_was_fetched_is_examined(write, state):
    """Its size and both hashes; another network is refused, and nothing says where it is."""
    path = write("torchvision")
    said = examine(path).words()
    assert path.name in said and str(path.parent) not in said
    assert f"{path.stat().st_size} bytes" in said
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said
    assert load(path)[1] in said
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AMGError, match="damaged"):
        examine(path)
    with pytest.raises(AMGError, match=r"facebookresearch/sscd-copy-detection.*models/amg"):
        examine(None)


def test_other_weights_and_unknown_descriptors_are_refused(write, state):
    path = write("torchvision")
    spec = create("sscd", path).spec
    with pytest.raises(AMGError, match="other weights"):
        for_spec(replace(spec, weights_sha256="ab" * 32), path)
    with pytest.raises(AMGError, match=r"imagenet/2.*build the index again"):
        for_spec(replace(spec, preprocessing="square288-bilinear-imagenet/2"), path)
    with pytest.raises(AMGError, match="update the plugin"):
        for_spec(replace(spec, id="dino_v9"), path)
    for options in ({"side": 300}, {"scales": (17,)}, {"scales": ()}, {"colour": 1}):
        with pytest.raises(AMGError, match="cannot be made"):
            create("sscd", path, **options)


def test_pixel_with_one_scale():
    one = create("pixel", scales=(32,))
    assert one.spec.scales == (32,) and for_spec(one.spec).spec == one.spec
    assert create("pixel").spec.scales == (16, 32)


def test_embed_normalises_low_passes_and_scales(descriptor, state, classy):
    pictures = torch.rand(2, 3, 224, 224)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        expected = classy((pictures - mean) / std)
        torch.testing.assert_close(descriptor.embed(pictures, 224), expected, rtol=0, atol=1e-5)
        small = F.avg_pool2d(pictures, 14)  # 16 x 16
        torch.testing.assert_close(
            descriptor.embed(pictures, 16), descriptor.embed(small, 224), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(descriptor.embed(pictures, 64).norm(dim=1), torch.ones(2))
    for wrong, scale in ((pictures, 17), (pictures[0], 16), (pictures[:, :1], 16)):
        with pytest.raises(ValueError):
            descriptor.embed(wrong, scale)


def test_rows_are_independent(descriptor):
    pictures = torch.rand(3, 3, 80, 120)
    with torch.no_grad():
        together = descriptor.embed(pictures, 32)
        alone = torch.cat([descriptor.embed(p[None], 32) for p in pictures])
        turned = descriptor.embed(pictures.flip(0), 32).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, turned, rtol=0, atol=1e-5)
    pictures.requires_grad_()
    (gradient,) = torch.autograd.grad(descriptor.embed(pictures, 32)[1].sum(), pictures)
    assert gradient[0].eq(0).all() and gradient[2].eq(0).all() and gradient[1].abs().sum() > 0


def test_gradient_only_for_pictures(descriptor):
    assert not any(p.requires_grad for p in descriptor._network.parameters())
    assert not descriptor._network.training
    for scale in (16, 224):
        pictures = torch.rand(1, 3, 100, 90, requires_grad=True)
        (gradient,) = torch.autograd.grad(descriptor.embed(pictures, scale)[0, 0], pictures)
        assert gradient.shape == pictures.shape and gradient.isfinite().all() and gradient.any()


def test_float32_under_autocast_and_for_half_pictures(descriptor):
    pictures = torch.rand(1, 3, 64, 64).bfloat16()
    with torch.no_grad():
        expected = descriptor.embed(pictures.float(), 64)
        with torch.autocast("cpu", torch.bfloat16):
            got = descriptor.embed(pictures, 64)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_built_and_moved_inside_inference_mode(write):
    path = write("torchvision")
    with torch.inference_mode():
        descriptor = SSCDDescriptor.from_file(path).to("cpu")
        assert descriptor.embed(torch.rand(1, 3, 32, 32), 16).shape == (1, 512)
        with torch.inference_mode(False), torch.enable_grad():
            pictures = torch.rand(1, 3, 32, 32, requires_grad=True)
            (gradient,) = torch.autograd.grad(descriptor.embed(pictures, 16)[0, 0], pictures)
    assert gradient.abs().sum() > 0
    assert not any(t.is_inference() for t in descriptor._network.state_dict().values())
    assert not gradient.is_inference() and descriptor.spec.scales[-1] == 288


def test_no_draw_from_the_global_generator(state):
    before = torch.random.get_rng_state()
    SSCDDescriptor(state, "")
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- Meta's file, where there is one

real = pytest.mark.skipif(
    not os.environ.get("AMG_SSCD_WEIGHTS"), reason="AMG_SSCD_WEIGHTS does not name Meta's file"
)


@real
def test_real_weights_tell_copies_from_others():
    import numpy as np
    from PIL import Image

    folder = Path(__file__).parents[2] / "amg_demo" / "pictures"
    files = sorted(folder.glob("memorised-*"))[:12]
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    descriptor = SSCDDescriptor.from_file(Path(os.environ["AMG_SSCD_WEIGHTS"]))
    with torch.no_grad():
        rows = descriptor.embed(pictures, 288)
        copies = descriptor.embed(pictures[..., 8:-8, 8:-8].flip(-1), 288)
    similarity = copies @ rows.T
    assert similarity.diagonal().min() > 0.6
    assert similarity.fill_diagonal_(0).max() < 0.6
