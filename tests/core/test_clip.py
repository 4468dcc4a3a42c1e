"""CLIP with random weights: both namings give transformers' own embedding of its own preprocessing."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from amg_core.descriptors import create, for_spec
from amg_core.descriptors.clip import _renamed, centre
from amg_core.errors import AMGError

SMALL = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 64, "patch_size": 16, "projection_dim": 24,
}  # fmt: skip


def open_clip_names(state):
    """transformers' names -> OpenAI's, written independently of the reader."""
    made = {"logit_scale": torch.tensor(4.6), "token_embedding.weight": torch.ones(3, 3)}
    for name, tensor in state.items():
        parts = name.split(".")
        if name == "visual_projection.weight":
            made["visual.proj"] = tensor.T.contiguous()
        elif parts[1] == "embeddings":
            to = {"class_embedding": "class_embedding", "patch_embedding": "conv1.weight",
                  "position_embedding": "positional_embedding"}[parts[2]]  # fmt: skip
            made[f"visual.{to}"] = tensor
        elif parts[1] in ("pre_layrnorm", "post_layernorm"):
            made[f"visual.ln_{'pre' if parts[1][1] == 'r' else 'post'}.{parts[2]}"] = tensor
        elif "q_proj" in name:
            three = [state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            at = f"visual.transformer.resblocks.{parts[3]}.attn.in_proj_{parts[-1]}"
            made[at] = torch.cat(three)
        elif "k_proj" not in name and "v_proj" not in name:
            to = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                  "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}[".".join(parts[4:-1])]  # fmt: skip
            made[f"visual.transformer.resblocks.{parts[3]}.{to}.{parts[-1]}"] = tensor
    return made


def network(activation="quick_gelu", **sizes):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**(SMALL | sizes), hidden_act=activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = transformers.CLIPVisionModelWithProjection(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # transformers' own start is too near to zero
                parameter.add_(0.08 * torch.randn_like(parameter))
    return model


def write(path, state):
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def theirs():
    return network()


@pytest.fixture
def file(tmp_path, theirs):
    return write(tmp_path / "clip.safetensors", theirs.state_dict())


def test_both_namings_are_transformers_own(tmp_path, theirs):
    transformers = pytest.importorskip("transformers")
    state = theirs.state_dict()
    hf = create("clip", write(tmp_path / "hf.safetensors", state), heads=3)
    oa = create("clip", write(tmp_path / "oa.safetensors", open_clip_names(state)), heads=3)
    assert hf.spec == oa.spec
    assert hf.spec.id == "clip_vit_48_16" and hf.spec.metric == "cosine" and hf.spec.scales == (64,)
    assert hf.spec.preprocessing == "crop64-bicubic-clip-quick_gelu-heads3/1"
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    draw = np.random.default_rng(0)
    similar = []
    for height, width in ((64, 64), (128, 128), (200, 120), (96, 160), (40, 50)):
        coarse = torch.from_numpy(draw.random((1, 3, 9, 9), np.float32))
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
        pixels = (smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            ready = processor(images=pixels, return_tensors="pt")["pixel_values"].float()
            expected = F.normalize(theirs(pixel_values=ready).image_embeds)
            ours, other = hf.embed(picture, 64), oa.embed(picture, 64)
        assert torch.equal(ours, other)
        assert F.cosine_similarity(ours, expected).item() > 0.9995
        assert ours.norm().item() == pytest.approx(1, abs=1e-5)
        similar.append(ours)
    rows = torch.cat(similar)
    assert (rows @ rows.T - torch.eye(5)).max() < 0.99, (
        "the random network must tell pictures apart"
    )


def test_the_networks_agree_without_preprocessing(theirs, file):
    utils = pytest.importorskip("transformers.image_utils")
    seen = torch.rand(2, 3, 64, 64)
    descriptor = create("clip", file, heads=3)
    mean, std = torch.tensor([utils.OPENAI_CLIP_MEAN, utils.OPENAI_CLIP_STD]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = F.normalize(theirs(pixel_values=(seen - mean) / std).image_embeds)
        torch.testing.assert_close(descriptor.embed(seen, 64), expected, rtol=0, atol=1e-5)


def test_crop_is_the_middle_and_keeps_the_aspect():
    picture = torch.zeros(1, 3, 64, 192)
    picture[..., 64:128] = 1
    assert centre(picture, 64).eq(1).all()
    assert centre(picture.transpose(2, 3), 64).eq(1).all()
    assert centre(torch.rand(1, 3, 30, 41), 64).shape == (1, 3, 64, 64)


def test_differentiable_and_rows_independent(file):
    descriptor = create("clip", file, heads=3)
    before = torch.random.get_rng_state()
    pictures = torch.rand(3, 3, 80, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = descriptor.embed(pictures, 64)
        alone = torch.cat([descriptor.embed(p[None], 64) for p in pictures])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    pictures.requires_grad_()
    (gradient,) = torch.autograd.grad(descriptor.embed(pictures, 64)[1, 0], pictures)
    assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad for p in descriptor._network.parameters())


def test_activation_from_config_option_or_rule(tmp_path, theirs):
    state = theirs.state_dict()
    folder = tmp_path / "model"
    write(folder / "model.safetensors", state)
    assert "quick_gelu-heads1/" in create("clip", folder).spec.preprocessing  # 48 // 64
    assert "-gelu-heads3/" in create("clip", folder, activation="gelu", heads=3).spec.preprocessing
    config = {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    gelu = create("clip", folder)
    assert "-gelu-heads3/" in gelu.spec.preprocessing
    quick = create("clip", write(tmp_path / "a.safetensors", state), heads=3)
    picture = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(gelu.embed(picture, 64), quick.embed(picture, 64), atol=1e-4)
    for made, path in ((gelu, tmp_path / "a.safetensors"), (quick, tmp_path / "a.safetensors")):
        assert for_spec(made.spec, path).spec == made.spec
    (folder / "config.json").write_text("{")
    with pytest.raises(AMGError, match=r"config\.json cannot be read"):
        create("clip", folder)


def test_known_sizes_have_known_names():
    pytest.importorskip("transformers")
    from amg_core.descriptors.clip import CLIPDescriptor

    sizes = {"num_hidden_layers": 1, "intermediate_size": 8, "image_size": 28, "patch_size": 14}
    for width, name, activation in ((768, "b", "quick_gelu"), (1280, "h", "gelu")):
        state = network(hidden_size=width, **sizes, num_attention_heads=4).state_dict()
        made = CLIPDescriptor(state, activation, 16 if width > 768 else 12)
        assert made.spec.id == f"clip_vit_{name}_14"


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_built_inside_inference_mode(tmp_path, theirs, kind):
    state = {name: tensor.to(kind) for name, tensor in theirs.state_dict().items()}
    file = write(tmp_path / "clip.safetensors", state)
    with torch.inference_mode():
        descriptor = create("clip", file, heads=3).to("cpu")
        with torch.inference_mode(False), torch.enable_grad():
            picture = torch.rand(1, 3, 64, 64, requires_grad=True)
            (gradient,) = torch.autograd.grad(descriptor.embed(picture, 64)[0, 0], picture)
    assert gradient.abs().sum() > 0


def test_wrong_files_are_named(tmp_path, theirs):
    state = dict(theirs.state_dict())
    with pytest.raises(AMGError, match="clip needs weights"):
        create("clip")
    with pytest.raises(AMGError, match=r"nothing\.safetensors does not exist"):
        create("clip", tmp_path / "nothing.safetensors")
    with pytest.raises(AMGError, match="holds no CLIP weights"):
        create("clip", tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(AMGError, match=r"bad\.safetensors holds no CLIP"):
        create("clip", bad)
    del state["visual_projection.weight"]
    with pytest.raises(AMGError, match=r"visual_projection.weight is missing"):
        create("clip", write(bad, state))
    short = dict(theirs.state_dict())
    del short["vision_model.encoder.layers.1.mlp.fc1.weight"]
    with pytest.raises(AMGError, match="give another file"):
        create("clip", write(bad, short), heads=3)
    with pytest.raises(AMGError, match="relu"):
        create("clip", write(bad, theirs.state_dict()), activation="relu")
    changed = {k: v + 1e-3 for k, v in theirs.state_dict().items()}
    spec = create("clip", bad, heads=3).spec
    with pytest.raises(AMGError, match="other weights"):
        for_spec(spec, write(tmp_path / "other.safetensors", changed))


def test_renaming_is_complete():
    """Without transformers too: the names of one block, from OpenAI's to transformers'."""
    tensors = {
        "visual.transformer.resblocks.7.attn.in_proj_weight": torch.arange(12.0).reshape(6, 2),
        "visual.transformer.resblocks.7.mlp.c_fc.bias": torch.ones(2),
        "visual.ln_pre.weight": torch.ones(2),
        "visual.proj": torch.ones(2, 5),
        "transformer.resblocks.0.ln_1.weight": torch.ones(2),
    }
    state = _renamed(tensors)
    at = "vision_model.encoder.layers.7"
    assert set(state) == {
        f"{at}.self_attn.q_proj.weight", f"{at}.self_attn.k_proj.weight",
        f"{at}.self_attn.v_proj.weight", f"{at}.mlp.fc1.bias", "vision_model.pre_layrnorm.weight",
        "visual_projection.weight",
    }  # fmt: skip
    assert state[f"{at}.self_attn.k_proj.weight"].tolist() == [[4, 5], [6, 7]]
    assert state["visual_projection.weight"].shape == (5, 2)
