"""Which decoder is chosen, and that gradients pass where the host forbids them."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def latent_format(amg):
    import comfy.latent_formats

    return comfy.latent_formats.SD15()


@pytest.fixture
def vae(amg):
    """The host's own VAE class around a small random autoencoder, loaded as a node loads it."""
    import comfy.ldm.models.autoencoder as autoencoder
    import comfy.sd

    config = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        made = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        model = autoencoder.AutoencoderKL(ddconfig=config, embed_dim=4).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        made.first_stage_model, made.latent_channels = model, 4
    return made


def slope(decoder):
    """Gradient of a decoded latent, taken inside inference mode as in the host's loop."""
    with torch.inference_mode():
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode(False), torch.enable_grad():
            latent = latent.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(decoder(latent).sum(), latent)
    return gradient


def test_previews_come_before_the_vae(amg, latent_format, vae):
    """A VAE decode at every step takes longer than the step."""
    assert amg.decoding.choose(latent_format, "auto", vae).name == "linear"
    decoder = amg.decoding.choose(latent_format)
    assert decoder.name == "linear"
    assert slope(decoder).abs().sum() > 0


def test_vae_agrees_with_the_host(amg, latent_format, vae):
    decoder = amg.decoding.choose(latent_format, "vae", vae)
    assert decoder.name == "vae"
    assert slope(decoder).abs().sum() > 0
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wanted = vae.process_output(vae.first_stage_model.decode(latent_format.process_out(latent)))
        assert torch.allclose(decoder(latent).clamp(0, 1), wanted, atol=1e-5)


def test_vae_copy_leaves_the_encoder_and_dies_with_the_vae(amg, latent_format, vae):
    decoder = amg.decoding.choose(latent_format, "vae", vae)
    assert amg.decoding.choose(latent_format, "vae", vae) is decoder
    names = [name for name, _ in decoder.network.named_parameters()]
    assert names
    assert not [name for name in names if "encoder" in name or ".quant_conv" in name]
    assert "encoder" in vae.first_stage_model._modules
    watch = weakref.ref(vae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amg.decoding, "_of_vae", weakref.WeakKeyDictionary())
        other = SimpleNamespaceVAE(vae)
        watch = weakref.ref(other)
        amg.decoding.choose(latent_format, "vae", other)
        del other
        gc.collect()
        assert watch() is None


class SimpleNamespaceVAE(SimpleNamespace):
    """A VAE that nothing else holds."""

    __hash__ = object.__hash__

    def __init__(self, vae):
        super().__init__(
            first_stage_model=vae.first_stage_model,
            latent_dim=2,
            output_channels=3,
            process_output=vae.process_output,
        )


def test_taesd_comes_first(amg, latent_format, vae):
    from pathlib import Path

    import folder_paths
    from safetensors.torch import save_file

    decoders = amg.module("amg_core.decoders")
    folder = Path(folder_paths.get_folder_paths("vae_approx")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "taesd_decoder.safetensors"
    folder_paths.filename_list_cache.pop("vae_approx", None)
    try:
        save_file(decoders.TAESDDecoder().state_dict(), path)
        decoder = amg.decoding.choose(latent_format, "auto", vae)
        assert decoder.name == "taesd_decoder"
        assert slope(decoder).abs().sum() > 0
        assert amg.decoding.choose(latent_format, "linear", vae).name == "linear"
    finally:
        path.unlink(missing_ok=True)
        folder_paths.filename_list_cache.pop("vae_approx", None)


def test_nothing_to_see_through(amg):
    import comfy.latent_formats

    bare = comfy.latent_formats.LatentFormat()
    with pytest.raises(amg.AMGError, match="Connect the vae input"):
        amg.decoding.choose(bare)
    bare.taesd_decoder_name = "taesd_decoder"
    with pytest.raises(amg.AMGError, match=r"taesd_decoder.safetensors.*vae_approx"):
        amg.decoding.choose(bare)
    with pytest.raises(amg.AMGError, match="vae_approx"):
        amg.decoding.choose(bare, "taesd")
    with pytest.raises(amg.AMGError, match="Connect the vae"):
        amg.decoding.choose(bare, "vae")
    with pytest.raises(amg.AMGError, match="preview colours"):
        amg.decoding.choose(bare, "linear")


@pytest.mark.parametrize(
    "name, why",
    [("Wan21", "time axis.*single picture.*Qwen-Image"), ("StableAudio1", "no pictures.*audio")],
)
def test_what_the_guard_cannot_read_is_refused_for_what_it_is(amg, name, why):
    import comfy.latent_formats

    with pytest.raises(amg.AMGError, match=why):
        amg.decoding.choose(getattr(comfy.latent_formats, name)())


def test_guard_refuses_before_it_draws(amg, run_node, demo, prompts):
    import comfy.latent_formats

    model = demo["model"].clone()
    model.add_object_patch("latent_format", comfy.latent_formats.Wan21())
    with pytest.raises(amg.AMGError, match="time axis"):
        run_node(
            "AMG_Guard", model=model, seed=1, steps=2, cfg=4.0, sampler_name="euler",
            scheduler="normal", positive=prompts[0], negative=prompts[1], denoise=1.0,
            latent_image={"samples": torch.zeros(1, 16, 1, 16, 16)}, detect="draw twice",
        )  # fmt: skip
