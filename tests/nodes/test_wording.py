"""The texts that a prompt may have been encoded from, read from the graph."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def wording(pack):
    return pack.module("nodes.wording")


def step(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def encoder(text):
    return step("CLIPTextEncode", text=text, clip=["loader", 1])


@pytest.fixture(scope="module")
def written(wording):
    """The texts of a graph that are for all encoders."""

    def texts(graph):
        found = wording.written(graph)
        assert all(text.node == "" for text in found)
        return [text for (text,) in (each.texts for each in found)]

    return texts


def graph_of(**nodes):
    loader = step("CheckpointLoaderSimple", ckpt_name="model.safetensors")
    return {"loader": loader, "encoder": encoder(["made", 0])} | nodes


@pytest.mark.parametrize(
    "made, expected",
    [
        (
            step("StringConcatenate", string_a="a fox", string_b="in snow", delimiter=", "),
            "a fox, in snow",
        ),
        (step("StringReplace", string="a fox", find="fox", replace="owl"), "a owl"),
        (step("StringSubstring", string="a fox in snow", start=2, end=5), "fox"),
        (step("StringTrim", string=" a fox ", mode="Left"), "a fox "),
        (step("CaseConverter", string="a Fox", mode="lowercase"), "a fox"),
    ],
)
def test_texts_that_nodes_make_are_made_again(written, made, expected):
    assert written(graph_of(made=made)) == [expected]


def test_through_nodes_that_hand_a_text_on(written):
    """A text may come through any number of nodes, known or not."""
    graph = graph_of(
        made=step("StringConcatenate", string_a=["shown", 0], string_b=["trimmed", 0], delimiter=" "),
        shown=step("ShowText|pysssh", text=["typed", 0], font=12),
        typed=step("PrimitiveStringMultiline", value="a fox"),
        trimmed=step("StringTrim", string=["typed", 0], mode="Both"),
    )  # fmt: skip
    assert written(graph) == ["a fox a fox"]


def test_each_text_that_an_unknown_node_may_hand_on_is_tried(written):
    graph = graph_of(
        made=step("StringConcatenate", string_a=["lots", 0], string_b="in snow", delimiter=" "),
        lots=step("ImpactWildcardProcessor", wildcard_text="a {fox|owl}", populated_text="a fox"),
    )
    assert written(graph) == ["a {fox|owl} in snow", "a fox in snow"]


def test_names_and_choices_come_last(written):
    graph = {
        "lora": step("LoraLoader", lora_name="style.safetensors", clip=["loader", 1]),
        "guard": step("AMG_Sampler", sampler_name="euler", clip=["lora", 1]),
        "one": encoder("an owl"),
    }
    assert written(graph) == ["an owl", "style.safetensors", "euler"]


def test_a_graph_that_nobody_could_run_is_read_all_the_same(written):
    """Loops, links to nowhere, inputs of other kinds, other packs' nodes of the same name."""
    graph = graph_of(
        made=step("StringConcatenate", string_a=["made", 0], string_b="x", delimiter=""),
        loop=encoder(["loop", 0]),
        nowhere=encoder(["gone", 0]),
        odd=encoder([]),
        replace=encoder(["other", 0]),
        other=step("StringReplace", text="a fox", old="x"),
        trim=encoder(["way", 0]),
        way=step("StringTrim", string="a fox", mode="Middle"),
        number=encoder(5),
        bare={"class_type": "Note"},
        blank=encoder(" "),
    )
    assert written(graph) == []


def test_many_ways_to_a_text_are_cut_short(wording, written):
    """Each node may make the square of what the one before it may: 2 to the power of 32 texts."""
    graph = graph_of(n0=step("Any", one="a", other="b"))
    for i in range(5):
        before = [f"n{i}", 0]
        graph[f"n{i + 1}"] = step(
            "StringConcatenate", string_a=before, string_b=before, delimiter=""
        )
    graph["made"] = step("Any", text=["n5", 0])
    texts = written(graph)
    assert len(texts) == wording.MOST and {len(text) for text in texts} == {32}


def test_the_first_text_that_is_encoded_to_the_same_counts(wording):
    """And those after it are not encoded: a large text encoder takes seconds for each."""
    asked = []

    def encode(text):
        asked.append(text)
        return {"cross_attn": torch.full((1, 3, 4), float(len(text)))}

    texts = wording.Wording(lambda: ["a", "four", "three", "longest"], encode)
    entry = {"uuid": 1, "cross_attn": torch.tensor([4.0, 5.0, 9.0]).view(3, 1, 1).expand(3, 3, 4)}
    assert texts.of(entry) == ["four", "three", None]
    assert texts.of(entry) == ["four", "three", None] and len(asked) == 4
    entry = {"uuid": 2, "cross_attn": entry["cross_attn"][:1]}
    assert texts.of(entry) == ["four"] and asked[4:] == ["a", "four"]


def test_what_only_the_pooled_output_shows_counts_as_well(wording):
    """Flux sees the text of one of its encoders only there."""

    def encode(text):
        same, pooled = torch.ones(1, 3, 4), torch.full((1, 2), float(len(text)))
        return {"cross_attn": same, "pooled_output": pooled}

    texts = wording.Wording(lambda: ["a", "four"], encode)
    entry = {"uuid": 1, "cross_attn": torch.ones(1, 3, 4), "pooled_output": torch.full((1, 2), 4.0)}
    assert texts.of(entry) == ["four"]
    without = {"uuid": 2, "cross_attn": entry["cross_attn"], "pooled_output": None}
    assert texts.of(without) == ["a"]


# ------------------------------------------------------------------ a text for each encoder


def test_texts_for_each_encoder_are_read_together(wording):
    """In the order of the table, whatever that of the node; made by other nodes, or empty."""
    graph = graph_of(
        encoder=step("CLIPTextEncodeSDXL", text_l="photo", text_g=["made", 0], width=1024,
                     clip=["loader", 1]),
        made=step("StringConcatenate", string_a="a", string_b="fox", delimiter=" "),
        sd3=step("CLIPTextEncodeSD3", clip_l="", clip_g="", t5xxl="an owl", empty_padding="none",
                 clip=["loader", 1]),
        flux=step("CLIPTextEncodeFlux", clip_l=" ", t5xxl="", guidance=3.5, clip=["loader", 1]),
        odd=step("CLIPTextEncodeFlux", clip_l="a", guidance=3.5, clip=["loader", 1]),
    )  # fmt: skip
    sdxl, sd3 = wording.written(graph)
    assert sdxl == (("a fox", "photo"), "CLIPTextEncodeSDXL", False)
    assert sdxl.encoders == ("g", "l")
    assert sd3 == (("", "", "an owl"), "CLIPTextEncodeSD3", True)
    assert sd3.encoders == ("g", "l", "t5xxl")
