"""Neighbour captions: encoded where the text encoder rests, one row a sample."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

LONG = " ".join(["a very long caption about a fox"] * 20)  # more than 77 tokens


@pytest.fixture
def args(tiny, prompts, sample):
    """What a post-CFG hook is given in the middle of a run of three."""
    caught = []

    def catch(given):
        caught.append(given)
        return given["denoised"]

    model = tiny()
    model.set_model_sampler_post_cfg_function(catch)
    sample(model, batch=3)
    given = caught[1]
    model.pre_run()  # the host has cleaned up after the run: current_patcher is unset
    yield given
    model.cleanup()


def expected(args, clip, caption, row):
    """D_n of one sample by the host's plain means."""
    import comfy.sampler_helpers
    import comfy.samplers

    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        conds = comfy.sampler_helpers.convert_cond(cond)
        x, model = args["input"], args["model"]
        conds = comfy.samplers.encode_model_conds(model.extra_conds, conds, x, x.device, "positive")
        out = comfy.samplers.calc_cond_batch(
            model, [None, conds], x, args["sigma"], args["model_options"]
        )
    return out[1][row]


def test_same_encoding_as_the_host(amg, clip):
    for layer in (None, -2):
        other = clip.clone()
        other.clip_layer(layer)
        with torch.inference_mode():
            ((cond, more),) = other.encode_from_tokens_scheduled(other.tokenize("a blue (owl:1.2)"))
        ours = amg.conditioning.encode(other, "a blue (owl:1.2)")
        assert torch.equal(ours["cross_attn"], cond)
        assert torch.equal(ours["pooled_output"], more["pooled_output"])


def test_remembers_the_latest(amg, clip, monkeypatch):
    amg.conditioning._encoded.clear()
    monkeypatch.setattr(amg.conditioning, "REMEMBERED", 2)
    first = amg.conditioning.encode(clip, "one")
    assert amg.conditioning.encode(clip, "one") is first
    amg.conditioning.encode(clip, "two")
    amg.conditioning.encode(clip, "one")
    amg.conditioning.encode(clip, "three")
    assert amg.conditioning.encode(clip, "one") is first
    assert len(amg.conditioning._encoded[clip.cond_stage_model]) == 2


def test_each_sample_gets_its_caption(amg, clip, args):
    """Also where captions differ in length, and a sample without a caption gets D_u."""
    predictions = amg.conditioning.OtherTexts(clip, None, {}, args)
    captions = ["a green cat", LONG, ""]
    with torch.inference_mode():
        predicted = predictions.neighbor(captions)
    for row in (0, 1):
        wanted = expected(args, clip, captions[row], row)
        assert torch.allclose(predicted[row], wanted, atol=1e-5)
    assert torch.equal(predicted[2], args["uncond_denoised"][2])


def test_prompt_region_and_times_do_not_apply(amg, clip, args):
    """Strength, area, mask and timestep ranges belong to the prompt, not to the neighbour."""
    given = dict(args)
    marked = args["cond"][0] | {
        "strength": 0.3, "area": (4, 4, 0, 0), "timestep_start": 0.5, "timestep_end": 0.4,
    }  # fmt: skip
    given["cond"] = [marked]
    predictions = amg.conditioning.OtherTexts(clip, None, {}, args)
    with torch.inference_mode():
        plain = predictions.neighbor(["a", "b", "c"])
        other = amg.conditioning.OtherTexts(clip, None, {}, given)
        assert torch.equal(other.neighbor(["a", "b", "c"]), plain)


def first(counts, tokens):
    """The mask of the first tokens."""
    return torch.arange(tokens) < torch.tensor(counts)[:, None]


def test_a_shorter_prompt(amg, args):
    """No word kept is no prompt, all kept the prompt itself; samples keep different numbers."""
    predictions = amg.conditioning.OtherTexts(None, None, {}, args)
    assert not predictions.separable
    tokens = args["cond"][0]["cross_attn"].shape[1]
    assert predictions.words.tolist() == [tokens] * 3
    with torch.inference_mode():
        none = predictions.reduced(first([0, 0, 0], tokens))
        mixed = predictions.reduced(first([0, 3, tokens], tokens))
        some = predictions.reduced(first([3, 3, 3], tokens))
    assert torch.allclose(none, args["uncond_denoised"], atol=1e-5)
    assert torch.allclose(mixed[0], args["uncond_denoised"][0], atol=1e-5)
    assert torch.allclose(mixed[2], args["cond_denoised"][2], atol=1e-5)
    assert torch.allclose(mixed[1], some[1], atol=1e-5)
    assert not torch.allclose(mixed[1], args["uncond_denoised"][1], atol=1e-6)
    assert not torch.allclose(mixed[1], args["cond_denoised"][1], atol=1e-6)


def test_with_a_clip_nothing_is_said_by_the_empty_text(amg, clip, args):
    predictions = amg.conditioning.OtherTexts(clip, None, {}, args)
    tokens = int(predictions.words[0])
    with torch.inference_mode():
        none = predictions.reduced(first([0, 0, 0], tokens))
    assert torch.allclose(none[1], expected(args, clip, "", 1), atol=1e-5)


def test_what_is_said_of_the_whole_prompt_is_mixed_by_the_share(amg, args):
    caught = []
    whole = [conds[0] | {"pooled_output": torch.full((1, 5), v)} for conds, v in (
        (args["cond"], 2.0), (args["uncond"], 0.0))]  # fmt: skip
    words = args["cond"][0]["cross_attn"].shape[1]
    given = args | {"cond": whole[:1], "uncond": whole[1:]}
    predictions = amg.conditioning.OtherTexts(None, None, {}, given)
    predictions._evaluate = caught.append
    predictions.reduced(first([0, words, words // 2], words))
    pooled = caught[0][0]["pooled_output"]
    assert torch.allclose(pooled[:, 0], torch.tensor([0.0, 2.0, 2.0 * (words // 2) / words]))


# ------------------------------------------------------------------ single words


def entry_of(clip, text, **more):
    """A prompt's entry as the guider has it."""
    import comfy.sampler_helpers

    with torch.inference_mode():
        (entry,) = comfy.sampler_helpers.convert_cond(
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
        )
    return entry | more


def with_texts(amg, clip, args, *entries, candidates=()):
    given = args | {"cond": list(entries)}
    text = amg.module("nodes.wording").PromptText
    found = [text((each,)) if isinstance(each, str) else each for each in candidates]
    wording = amg.conditioning.wording_of(clip, lambda: found)
    return amg.conditioning.OtherTexts(clip, wording, {}, given)


@pytest.mark.parametrize("text", ["frog (face:1.2) on red", LONG])
def test_single_words_are_left_out_of_the_text(amg, clip, args, text):
    """The text is found among others, and what is left of it encoded anew, each sample for itself."""
    predictions = with_texts(
        amg, clip, args, entry_of(clip, text), candidates=["frog face on red", text, "other"]
    )
    assert predictions.separable
    parts = amg.module("amg_core.prompt").split(text)
    count = len(parts.parts)
    assert predictions.words.tolist() == [count] * 3
    kept = torch.ones(3, count, dtype=torch.bool)
    kept[1, 0], kept[2] = False, False
    with torch.inference_mode():
        drawn = predictions.reduced(kept)
    for row, left in enumerate([text, parts.keep([False, *[True] * (count - 1)]), ""]):
        assert torch.allclose(drawn[row], expected(args, clip, left, row), atol=1e-5)


def test_a_large_text_encoder_is_asked_for_fewer_texts(amg, clip, args, monkeypatch):
    text = "one two three four five six seven eight nine ten"
    predictions = with_texts(amg, clip, args, entry_of(clip, text), candidates=[text])
    assert predictions.words.tolist() == [10] * 3
    monkeypatch.setattr(amg.conditioning, "LARGE", 10)
    assert predictions.words.tolist() == [6] * 3
    with torch.inference_mode():
        drawn = predictions.reduced(torch.tensor([[True] * 5 + [False]] * 3))
    left = "one two three four five six seven eight"
    assert torch.allclose(drawn[1], expected(args, clip, left, 1), atol=1e-5)


def test_a_text_that_is_not_the_prompts_is_not_used(amg, clip, args):
    """It differs in a word, in a weight, or another CLIP has encoded it."""
    entry = entry_of(clip, "frog face on red")
    for candidates in ([], ["frog face on blue", "(frog:1.1) face on red", "frog face"]):
        assert not with_texts(amg, clip, args, entry, candidates=candidates).separable
    skipping = clip.clone()
    skipping.clip_layer(-2)
    assert not with_texts(amg, skipping, args, entry, candidates=["frog face on red"]).separable


def test_all_entries_of_a_prompt_are_reduced_in_their_places(amg, clip, args):
    """Words are counted through; areas and strengths stay as they are."""
    import comfy.samplers

    one = entry_of(clip, "red frog", area=(4, 8, 0, 0), strength=0.7)
    two = entry_of(clip, "blue owl sky")
    texts = ["blue owl sky", "red frog"]
    predictions = with_texts(amg, clip, args, one, two, candidates=texts)
    assert predictions.words.tolist() == [5] * 3
    kept = torch.tensor([[False, True, True, False, True]] * 3)
    with torch.inference_mode():
        drawn = predictions.reduced(kept)
        x, model = args["input"], args["model"]
        conds = comfy.samplers.encode_model_conds(
            model.extra_conds,
            [entry_of(clip, "frog", area=(4, 8, 0, 0), strength=0.7), entry_of(clip, "blue sky")],
            x, x.device, "positive",
        )  # fmt: skip
        wanted = comfy.samplers.calc_cond_batch(
            model, [None, conds], x, args["sigma"], args["model_options"]
        )[1]
    assert torch.allclose(drawn, wanted, atol=1e-5)
    assert not with_texts(amg, clip, args, one, two, candidates=texts[:1]).separable


def test_without_texts_all_entries_keep_their_first_tokens(amg, clip, args):
    one, two = entry_of(clip, "red frog"), entry_of(clip, "blue owl")
    predictions = with_texts(amg, clip, args, one, two)
    tokens = int(predictions.words[0])
    whole = with_texts(amg, clip, args, one, two, candidates=["red frog", "blue owl"])
    with torch.inference_mode():
        everything = predictions.reduced(torch.ones(3, tokens, dtype=torch.bool))
        assert torch.allclose(everything, whole.reduced(torch.ones(3, 4).bool()), atol=1e-5)
        none = predictions.reduced(torch.zeros(3, tokens, dtype=torch.bool))
        assert torch.allclose(none, whole.reduced(torch.zeros(3, 4).bool()), atol=1e-5)


def test_texts_are_read_from_the_graph(amg):
    """Of nodes with a CLIP, and of those that give them their text, however far."""
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "model.safetensors"}},
        "2": {"class_type": "Reroute", "inputs": {"": ["3", 0], "note": "a fox"}},
        "3": {"class_type": "PrimitiveString", "inputs": {"value": "in snow"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["2", 0], "clip": ["1", 1]}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "an owl", "clip": ["1", 1]}},
        "6": {"class_type": "SaveImage", "inputs": {"filename_prefix": "out", "images": ["9", 0]}},
        "7": {"class_type": "Loop", "inputs": {"clip": ["1", 1], "text": ["7", 0], "other": " "}},
    }  # fmt: skip
    wording = amg.module("nodes.wording")
    texts = [text for (text,) in (found.texts for found in wording.written(graph))]
    assert texts == ["in snow", "a fox", "an owl"]
    assert wording.written({}) == [] and wording.running() == {}


def test_texts_are_made_as_the_nodes_of_the_host_make_them(amg):
    """Each function of `MAKERS` against the node itself, with the node's own choices."""
    import comfy_extras.nodes_string as host

    given = {"string": " a Fox ", "string_a": "a", "string_b": "b", "delimiter": ", ", "find": "o",
             "replace": "i", "start": 2, "end": -2}  # fmt: skip
    for name, make in amg.module("nodes.wording").MAKERS.items():
        node = getattr(host, name)
        inputs = {each.id: each for each in node.define_schema().inputs}
        for mode in getattr(inputs.get("mode"), "options", [None]):
            chosen = {key: mode if key == "mode" else given[key] for key in inputs}
            assert make(**chosen) == node.execute(**chosen).args[0]


# ------------------------------------------------------------------ a text for each encoder


class TextTokens:
    """In place of a CLIP: its tokens show the text, 5 letters in each chunk of every encoder."""

    def tokenize(self, text):
        chunks = [text[i : i + 5] for i in range(0, max(1, len(text)), 5)]
        return {name: list(chunks) for name in ("g", "l", "t5xxl", "hydit_clip", "mt5xl", "llama")}

    def encode_from_tokens_scheduled(self, tokens, add_dict=None):
        return tokens


@pytest.mark.parametrize("lengths", [(2, 3, 1, 4), (12, 3, 0, 7), (0, 11, 5, 0), (0, 4, 0, 1)])
def test_tokens_of_several_texts_are_those_of_the_nodes(amg, lengths):
    from comfy_extras import nodes_clip_sdxl, nodes_flux, nodes_hidream, nodes_hunyuan, nodes_sd3

    wording = amg.module("nodes.wording")
    modules = nodes_clip_sdxl, nodes_flux, nodes_hidream, nodes_hunyuan, nodes_sd3
    nodes = {name: node for module in modules for name, node in vars(module).items()}
    clip = TextTokens()
    for name, inputs in wording.SEVERAL.items():
        texts = {each: letter * count
                 for each, letter, count in zip(inputs, "abcd", lengths, strict=False)}  # fmt: skip
        choices = ({"empty_padding": way} for way in ("none", "empty_prompt"))
        for more in choices if name == "CLIPTextEncodeSD3" else [{}]:
            node = nodes[name]
            if name == "CLIPTextEncodeHunyuanDiT":
                (wanted,) = node().encode(clip, **texts)
            else:
                rest = {each.id: 1 for each in node.define_schema().inputs if each.id != "clip"}
                (wanted,) = node.execute(clip, **rest | texts | more).args
            graph = {"1": {"class_type": name, "inputs": texts | more | {"clip": ["0", 1]}}}
            (text,) = wording.written(graph)
            assert wording.tokens(clip.tokenize, text) == wanted


@pytest.fixture(scope="module")
def double(amg):
    """The host's CLIP for SDXL around two small random text encoders, together 64 values a token."""
    import comfy.sd
    import comfy.sdxl_clip

    from .conftest import fill

    target = SimpleNamespace(
        params={}, clip=comfy.sdxl_clip.SDXLClipModel, tokenizer=comfy.sdxl_clip.SDXLTokenizer
    )
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32,
    }  # fmt: skip
    options = {f"clip_{name}_model_config": shape for name in "lg"}
    made = comfy.sd.CLIP(target, model_options=options)
    fill(made.cond_stage_model)
    return made


def of_sdxl(double, text_g, text_l, width=512):
    """The entry that the host's own node makes."""
    import comfy.sampler_helpers
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    sizes = dict.fromkeys(("height", "crop_w", "crop_h", "target_width", "target_height"), 64)
    with torch.inference_mode():
        (made,) = CLIPTextEncodeSDXL.execute(
            double, width=width, text_g=text_g, text_l=text_l, **sizes
        ).args
    (entry,) = comfy.sampler_helpers.convert_cond(made)
    return entry


@pytest.mark.parametrize("other", ["photo of a fox", LONG])
def test_words_are_left_out_of_all_texts_of_a_prompt(amg, double, args, other):
    """Encoded anew as the node does it, with the same sizes; a common word goes from both texts."""
    text = amg.module("nodes.wording").PromptText(("red fox in snow", other), "CLIPTextEncodeSDXL")
    candidates = ["red fox in snow", other, text._replace(texts=text.texts[::-1]), text]
    entry = of_sdxl(double, *text.texts)
    predictions = with_texts(amg, double, args, entry, candidates=candidates)
    assert predictions.separable
    parts = amg.module("amg_core.prompt").split_together(text.texts)
    count, fox = len(parts.words), ["fox" in words.split() for words in parts.words].index(True)
    assert predictions.words.tolist() == [count] * 3
    seen = []
    predictions._evaluate = lambda entries: seen.append(entries) or args["denoised"]
    kept = torch.ones(3, count, dtype=torch.bool)
    kept[1, fox], kept[2] = False, False
    with torch.inference_mode():
        predictions.reduced(kept)
    assert predictions.left_out(kept) == ["", parts.words[fox], " ".join(parts.words)]
    wanted = [of_sdxl(double, *parts.keep(row)) for row in kept.tolist()]
    assert "fox" not in parts.keep(kept[1].tolist())[0]
    found = {
        row: entries[0] for entries in seen for row in range(3)
        if entries[0]["cross_attn"].shape[1:] == wanted[row]["cross_attn"].shape[1:]
    }  # fmt: skip
    for row, own in enumerate(wanted):
        assert torch.allclose(found[row]["cross_attn"][row], own["cross_attn"][0], atol=1e-5)
        assert torch.allclose(found[row]["pooled_output"][row], own["pooled_output"][0], atol=1e-5)
        assert found[row]["width"] == 512 and found[row]["crop_h"] == 64


def test_a_clip_without_that_encoder_knows_no_such_text(amg, clip, args):
    text = amg.module("nodes.wording").PromptText(("a", "a"), "CLIPTextEncodeSDXL")
    predictions = with_texts(amg, clip, args, entry_of(clip, "a"), candidates=[text])
    assert not predictions.separable


@pytest.mark.parametrize("length", [1, 77, 154, 200])
def test_prompts_of_other_lengths(amg, length):
    prompt, nothing = torch.ones(1, 154, 4), torch.zeros(1, length, 4)
    fitted = amg.conditioning._fit(nothing, prompt)
    assert fitted.shape == prompt.shape and not fitted.any()


def test_control_and_guidance_are_kept(amg, args):
    control, hooks = object(), object()
    conds = [args["cond"][0] | {"control": control, "guidance": 3.5, "hooks": hooks, "mask": 1}]
    template = amg.conditioning._template(conds, args["sigma"])
    assert template["control"] is control
    assert template["hooks"] is hooks
    assert template["guidance"] == 3.5
    assert "mask" not in template
    fresh = amg.conditioning._fresh(template)
    assert fresh["uuid"] != conds[0]["uuid"]
    assert fresh["model_conds"] is not conds[0]["model_conds"]


def test_the_part_that_acts_now_is_the_template(amg):
    early = {"timestep_start": 99.0, "timestep_end": 5.0, "name": "early"}
    late = {"timestep_start": 5.0, "timestep_end": 0.0, "name": "late"}
    everywhere = {"name": "everywhere"}
    region = {"area": (1, 1, 0, 0), "name": "region"}
    pick = amg.conditioning._template
    assert pick([early, late], torch.tensor([1.0]))["name"] == "late"
    assert pick([early, late], torch.tensor([10.0]))["name"] == "early"
    assert pick([region, everywhere], torch.tensor([1.0]))["name"] == "everywhere"


def test_wrong_clip(amg, clip, args, monkeypatch):
    wide = SimpleNamespace(
        patcher=clip.patcher,
        layer_idx=None,
        tokenize=clip.tokenize,
        cond_stage_model=torch.nn.Module(),
    )
    wide.cond_stage_model.reset_clip_options = lambda: None
    wide.cond_stage_model.encode_token_weights = lambda _: (torch.zeros(1, 77, 99), None)
    predictions = amg.conditioning.OtherTexts(wide, None, {}, args)
    with pytest.raises(amg.AMGError, match="clip: this text encoder gives 99"):
        predictions.neighbor(["a", "b", "c"])
