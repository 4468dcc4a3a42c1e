"""Decoders: a smaller picture of the whole latent, the files of TAESD and TAEF2."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from amg_core import decoders
from amg_core.decoders import TAESD, TAESDDecoder, block_mean, halvings, load_taesd, reduced
from amg_core.descriptors.latent import LatentDescriptor, TAESDEncoder, load_taesd_encoder
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_demo.model import PICTURES

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"
real = pytest.mark.skipif(
    not (WEIGHTS / "taef2_decoder.pth").is_file(),
    reason=f"FLUX.2's tiny autoencoder is not in {WEIGHTS}",
)


def random_decoder(channels=4, normed=False):
    torch.manual_seed(5)
    return TAESDDecoder(channels, normed)


# ---------------------------------------------------------------- the network without enlargements


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("size", [(5, 7), (1, 3), (1, 1)])
def test_a_convolution_behind_an_enlargement_is_replaced_exactly(block, size):
    torch.manual_seed(0)
    conv, features = nn.Conv2d(6, 4, 3, padding=1).double(), torch.randn(2, 6, *size).double()
    with torch.no_grad():
        enlarged = F.interpolate(features, scale_factor=block, mode="nearest")
        wanted = F.avg_pool2d(conv(enlarged), block)
        found = F.conv2d(features, block_mean(conv.weight, block), conv.bias, padding=1)
    assert torch.allclose(found, wanted, atol=1e-12)


def test_without_rectifiers_two_enlargements_in_a_row_are_left_out_exactly_inside():
    """Of the borders only: a second convolution sees what the first one makes of the padding."""
    torch.manual_seed(1)
    grow = [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1, bias=False)]
    network = nn.Sequential(nn.Conv2d(4, 3, 1), *grow)
    with torch.no_grad():
        small = reduced(network, 1)
        latent = torch.randn(1, 4, 6, 6)
        assert torch.allclose(small(latent), F.avg_pool2d(network(latent), 2), atol=1e-6)
    assert small[0] is network[0] and small[1] is not network[2]  # shared; its own kernels


def test_a_flat_latent_keeps_its_colour():
    """Away from the border the features are constant: then leaving out is exact."""
    network = random_decoder()
    latent = torch.randn(1, 4, 1, 1).expand(1, 4, 40, 40)
    with torch.no_grad():
        full = network(latent)[..., 160, 160]
        for times in (1, 2, 3):
            middle = 160 // 2**times
            found = reduced(network, times)(latent)[..., middle, middle]
            assert torch.allclose(found, full, atol=1e-4)


# ---------------------------------------------------------------- how much is left out


@pytest.mark.parametrize(
    ("side", "at_least", "times"),
    [(512, 96, 2), (512, 128, 2), (512, 129, 1), (512, 256, 1), (512, 257, 0), (512, 9999, 0),
     (256, 16, 1), (255, 16, 0), (128, 16, 0), (64, 16, 0), (8, 1, 0), (1024, 16, 2),
     (1024, 288, 1), (1000, 250, 2), (1000, 251, 1)],
)  # fmt: skip
def test_the_picture_is_never_smaller_than_asked_for(side, at_least, times):
    assert halvings(side, at_least) == times


@pytest.mark.parametrize(
    ("cells", "at_least", "pixels"),
    [((16, 16), None, (128, 128)), ((16, 16), 16, (128, 128)), ((33, 35), 16, (132, 140)),
     ((32, 67), 100, (128, 268)), ((71, 64), 96, (142, 128)), ((64, 64), 200, (256, 256)),
     ((1, 3), 1, (8, 24)), ((32, 32), 500, (256, 256))],
)  # fmt: skip
def test_any_size_and_aspect(cells, at_least, pixels):
    decoder = TAESD("taesd", random_decoder())
    with torch.no_grad():
        picture = decoder(torch.randn(1, 4, *cells), at_least=at_least)
    assert picture.shape == (1, 3, *pixels) and picture.dtype == torch.float32


def test_without_at_least_it_is_the_network_itself():
    network = random_decoder()
    latent = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        assert torch.equal(TAESD("taesd", network)(latent), network(latent))


def test_other_decoders_decode_all_of_it():
    latent = torch.randn(1, 4, 40, 48)
    linear = decoders.LinearDecoder(torch.rand(4, 3))
    assert torch.equal(linear(latent, at_least=8), linear(latent))
    module = decoders.ModuleDecoder("vae", nn.Conv2d(4, 3, 1), 4)
    assert torch.equal(module(latent, at_least=8), module(latent))


@pytest.mark.parametrize("inference", [True, False])
def test_the_gradient_passes_whatever_mode_it_was_made_and_first_used_in(inference):
    with torch.inference_mode(inference):
        decoder = TAESD("taesd", random_decoder()).to("cpu")
        latent = torch.randn(1, 4, 32, 33)
        decoder(latent, at_least=64)
    with torch.inference_mode(False), torch.enable_grad():
        z = latent.clone().requires_grad_()
        picture = decoder(z, at_least=64)
        (gradient,) = torch.autograd.grad(picture.square().sum(), z)
    assert picture.shape == (1, 3, 128, 132)
    assert gradient.isfinite().all() and (gradient != 0).any(dim=1).all()  # of every cell


def test_moving_it_moves_the_reduced_network_too():
    decoder = TAESD("taesd", random_decoder())
    decoder(torch.randn(1, 4, 32, 32), at_least=64)
    decoder.to("meta")
    picture = decoder(torch.randn(1, 4, 32, 32, device="meta"), at_least=64)
    assert picture.is_meta and picture.shape == (1, 3, 128, 128)


def test_cells_of_two_by_two_are_unpacked():
    network = random_decoder(2)
    decoder = TAESD("taef2_decoder", network, channels=8)
    assert (decoder.channels, decoder.factor) == (8, 16)
    plain = torch.randn(1, 2, 32, 34)
    packed = F.pixel_unshuffle(plain, 2)
    with torch.no_grad():
        assert torch.equal(decoder(packed), network(plain))
        assert decoder(packed, at_least=64).shape == (1, 3, 128, 136)
    with pytest.raises(ValueError, match="2 channels, not 4"):
        TAESD("taesd", network, channels=4)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("channels", "normed"), [(4, False), (16, False), (32, True)])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_decoder_files(tmp_path, channels, normed, ending):
    from safetensors.torch import save_file

    network = random_decoder(channels, normed).half()
    path = tmp_path / f"taesd_decoder.{ending}"
    (torch.save if ending == "pth" else save_file)(network.state_dict(), path)
    decoder = load_taesd(path)
    assert (decoder.name, decoder.channels, decoder.factor) == ("taesd_decoder", channels, 8)
    latent = torch.randn(1, channels, 3, 4)
    with torch.no_grad():
        assert torch.equal(decoder(latent), network.float()(latent))
    assert load_taesd(path, 4 * channels).factor == 16


def test_damaged_decoder_files_are_named(tmp_path):
    path = tmp_path / "taef2_decoder.pth"
    state = random_decoder(32, True).state_dict()
    cut = {k: v for k, v in state.items() if k != "4.pool.0.weight"}
    for damaged in (b"", b"no weights", [1, 2], {"1.weight": torch.ones(1)}, cut):
        if isinstance(damaged, bytes):
            path.write_bytes(damaged)
        else:
            torch.save(damaged, path)
        with pytest.raises(AMGError, match=r"taef2_decoder\.pth is not a readable TAESD decoder"):
            load_taesd(path)
    torch.save(state, path)
    with pytest.raises(AMGError, match="32 channels, not 16"):
        load_taesd(path, 16)
    with pytest.raises(AMGError, match=r"absent\.pth"):
        load_taesd(tmp_path / "absent.pth")


def test_encoder_files_of_flux2(tmp_path):
    torch.manual_seed(7)
    network, path = TAESDEncoder(32, normed=True), tmp_path / "taef2_encoder.pth"
    torch.save(network.state_dict(), path)
    descriptor = LatentDescriptor.from_file(path, side=64, scales=(8,))
    assert descriptor.spec.id == "latent_flux2" and descriptor.channels == 32
    pictures = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(descriptor.encode(pictures), network(pictures))


# ---------------------------------------------------------------- a real autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    return load_taesd_encoder(WEIGHTS / "taef2_encoder.pth")[0], load_taesd(
        WEIGHTS / "taef2_decoder.pth"
    )


def picture(name, height, width):
    with Image.open(PICTURES / name) as image:
        return to_tensor(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def rms(a, b):
    return float((a - b).square().mean().sqrt())


def means(pictures, side):
    return F.adaptive_avg_pool2d(pictures, side)


@real
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (264, 392)])
@pytest.mark.parametrize("name", ["memorised-000.webp", "memorised-007.webp"])
@torch.no_grad()
def test_less_work_shows_the_same_picture(autoencoder, name, size):
    encode, decoder = autoencoder
    original = picture(name, *size)
    latent = encode(original)
    full, small = decoder(latent), decoder(latent, at_least=96)
    assert 128 <= min(small.shape[-2:]) < min(full.shape[-2:])
    for side in (16, 32, 48, 96):
        assert rms(means(small, side), means(full, side)) < 0.015
    assert rms(means(small, 16), means(original, 16)) < 0.03
    averaged = decoder(F.adaptive_avg_pool2d(latent, 16))  # what a guard must not look at
    assert rms(means(averaged, 16), means(full, 16)) > 3 * rms(means(small, 16), means(full, 16))


@real
def test_the_gradient_is_nearly_that_of_the_full_decode(autoencoder):
    encode, decoder = autoencoder
    latent = encode(picture("memorised-000.webp", 256, 256))
    wanted = means(picture("memorised-007.webp", 256, 256), 32)
    gradients = []
    for at_least in (None, 96):
        z = latent.clone().requires_grad_()
        seen = means(decoder(z, at_least=at_least), 32)
        gradients.append(torch.autograd.grad((seen * wanted).sum(), z)[0].flatten())
    assert float(F.cosine_similarity(*gradients, dim=0)) > 0.9
