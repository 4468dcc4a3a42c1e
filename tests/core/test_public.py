"""The public benchmark without a model: readers of the published lists, lines, figures, costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from amg_core.errors import AMGError
from benchmarks.public import cost, figures, judges, methods, pictures, prompts, records, report

WEBSTER = [
    {
        "caption": "Foyer painted in KHAKI",
        "index": 683552591,
        "url": "https://a.example/k.jpeg?w=1",
    },
    {"caption": '"Watch: ""Lifted Up"""', "index": 567947515, "url": "http://b.example/l.png"},
]
NEMO = """;Caption;URL;type;mean_sscd;max_sscd;Index
0;Foyer painted in KHAKI;https://a.example/k.jpeg?w=1;TM;0.6020;0.6706;683552591
1;\"\"\"Watch: \"\"\"\"Lifted Up\"\"\"\"\"\"\";http://b.example/l.png;VM;0.8676;0.8728;567947515
2;Café;http://c.example/c.png;;;;7
"""
UNMEMORISED = ";Caption;URL;Index\n0;Soaring by Peter;https://d.example/s.jpg;7984\n"
MEMBENCH = """,prompt,urls
0,fire us army flag,['https://e.example/1.jpg?v=1']
1,"rug, navy","['https://e.example/2.jpg', 'https://e.example/3.jpg']"
"""
COCO = {
    "annotations": [
        {"image_id": 5, "id": 1, "caption": "A cat.\n"},
        {"image_id": 5, "id": 2, "caption": "The same cat."},
        {"image_id": 9, "id": 3, "caption": "Two sheep."},
    ]
}


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def test_webster_with_the_types_of_the_other_list(file):
    lines = "\n".join(json.dumps(line) for line in WEBSTER)
    found = prompts.read(file("sdv1_500_memorized.jsonl", lines))
    assert [(p.number, p.key) for p in found] == [(0, "683552591"), (1, "567947515")]
    assert found[1].text == '"Watch: ""Lifted Up"""' and found[0].urls == (WEBSTER[0]["url"],)
    labels = prompts.read(file("memorized_laion_prompts.csv", NEMO))
    assert [p.type for p in labels] == ["TM", "VM", ""] and labels[2].text == "Café"
    assert labels[1].published == 0.8728 and labels[2].published is None
    assert [p.type for p in prompts.labelled(found, labels)] == ["TM", "VM"]
    assert prompts.labelled(found, labels)[1].text == found[1].text


def test_the_other_lists(file):
    assert prompts.read(file("hard.csv", UNMEMORISED)) == [
        prompts.Prompt(0, "Soaring by Peter", "7984", "", ("https://d.example/s.jpg",))
    ]
    bench = prompts.read(file("SD1_final.csv", MEMBENCH))
    assert bench[1].text == "rug, navy" and len(bench[1].urls) == 2 and bench[1].key == ""
    coco = prompts.read(file("captions_val2017.json", json.dumps(COCO)))
    assert [(p.text, p.key) for p in coco] == [("A cat.", "5"), ("Two sheep.", "9")]
    plain = prompts.read(file("sd1_mem.txt", "one\n\ntwo \n"), limit=1)
    assert plain == [prompts.Prompt(0, "one")]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", "{"),
        ("a.jsonl", '{"url": "x"}'),
        ("a.json", "[]"),
        ("a.csv", "a,b\n1,2\n"),
        ("a.csv", ",prompt,urls\n0,x,__import__('os')\n"),
        ("a.txt", "\n"),
    ],
)
def test_other_files_are_refused_by_name(file, name, text):
    with pytest.raises(AMGError, match=rf"{name[0]}\.{name[2:]}"):
        prompts.read(file(name, text))


def test_missing_lists_say_so(tmp_path):
    with pytest.raises(AMGError, match=r"benchmark\.md"):
        prompts.read(tmp_path / "nothing.csv")


def picture(name, caption=""):
    return pictures.Picture(name, caption, np.zeros((4, 4, 3), np.uint8))


def test_pictures_belong_by_caption_key_or_number():
    some = [prompts.Prompt(0, "a cat", "77"), prompts.Prompt(1, "a dog", "78")]
    names = [picture("77.jpg"), picture("78/0.png"), picture("x/1.png"), picture("z.png", "a cat")]
    assert pictures.own(some, names).tolist() == [
        [True, False, False, True],
        [False, True, False, False],
    ]
    numbered = [
        picture("0001.jpg"),
        picture("img_000000/2.png"),
        picture("0000_03.png"),
        picture("1.png"),
    ]
    assert pictures.own(some, numbered).tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]


def test_pictures_are_read(tmp_path):
    Image.new("RGB", (5, 4), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    (one,) = pictures.read(tmp_path)
    assert one.caption == "red" and one.pixels.shape == (4, 5, 3)
    with pytest.raises(AMGError):
        pictures.read(tmp_path / "a.txt")


# ---------------------------------------------------------------- lines


def line(number, seed=0, method="plain", kind="VM", own=0.6, **more):
    base = {
        "method": method, "list": "memorised", "number": number, "seed": seed, "prompt": "p", "type": kind,
        "sha256": f"{number} {seed}", "seconds": 2.0, "rows": 100, "peak": None, "acted": False,
        "outcome": "no_copy", "sscd": {"meta": {"any": 0.9, "own": own}},
    }  # fmt: skip
    return base | more


def test_an_unfinished_line_is_drawn_again(tmp_path):
    path = records.file_of(tmp_path, 1, 2)
    records.append(path, [line(0), line(0, 1)])
    with path.open("a") as file:
        file.write('{"method": "pla')
    assert records.done(records.read(tmp_path)) == {("plain", "memorised", 0)}
    records.append(path, [line(1)])
    records.append(records.file_of(tmp_path, 2, 2), [line(2), line(1, sha256="other")])
    found = records.read(tmp_path)
    assert [one["number"] for one in found] == [0, 0, 1, 2] and found[2]["sha256"] == "1 0"


def test_shards_share_everything_out():
    parts = [records.mine(range(10), i, 3) for i in (1, 2, 3)]
    assert sorted(n for part in parts for n in part) == list(range(10)) and records.shard(
        "2/4"
    ) == (2, 4)
    for wrong in ("0/2", "3/2", "x"):
        with pytest.raises(ValueError):
            records.shard(wrong)


def test_other_settings_are_refused(tmp_path):
    records.agree(tmp_path, {"steps": 50, "size": None})
    records.agree(tmp_path, {"steps": 50, "size": None})
    with pytest.raises(AMGError, match="steps was 50"):
        records.agree(tmp_path, {"steps": 20, "size": None})
    assert records.settings(tmp_path)["steps"] == 50


# ---------------------------------------------------------------- figures


def test_figures_by_hand():
    own = [0.1, 0.45, 0.6, 0.8]
    lines = [line(n, s, own=own[2 * n + s]) for n in range(2) for s in range(2)]
    row = figures.copied(lines, "meta", "own")
    assert row["pictures"][0] == 4 and row["mean"][0] == pytest.approx(np.mean(own))
    assert row["95th percentile"][0] == pytest.approx(np.percentile(own, 95))
    assert row["top 1"] == (0.8, None, None)
    assert row["% > 0.5"][0] == 50 and row["% > 0.4"][0] == 75
    assert row["% > 0.5"][1:] == (0.0, 100.0), "both pictures of a prompt go together"
    assert figures.copied(lines, "wen", "own")["mean"] is None


def test_shares_of_nothing_have_an_interval_of_prompts():
    lines = [line(n, s, own=0.1) for n in range(10) for s in range(4)]
    value, low, high = figures.copied(lines, "meta", "own")["% > 0.5"]
    assert (value, low) == (0, 0) and high == pytest.approx(27.75, abs=0.01)  # Wilson, 0 of 10


def test_groups_methods_and_equal_pictures():
    lines = [
        line(0), line(1, kind="TM", own=None), line(0, method="main", sha256="changed", acted=True),
        line(1, method="main", kind="TM", own=None, outcome="copy"),
    ]  # fmt: skip
    made = figures.tables(lines)
    assert set(made) == {
        "memorised, VM", "memorised, TM", "memorised", "memorised, VM: SSCD (meta), own picture",
        "memorised, VM: SSCD (meta), any picture", "memorised, TM: SSCD (meta), any picture",
        "memorised: SSCD (meta), own picture", "memorised: SSCD (meta), any picture",
    }  # fmt: skip
    assert made["memorised"]["main"]["bit-identical %"][0] == 50
    assert made["memorised"]["main"]["own checks: copies %"][0] == 50
    assert made["memorised"]["plain"]["CLIP score"] is None
    text = report.markdown(made, ["FID: --inception FILE"])
    assert "### memorised, VM" in text and "not measured" in text and "FID: --inception" in text


def test_uneven_numbers_of_pictures_count_each_picture():
    groups = [np.array([1.0, 1.0, 1.0]), np.array([0.0])]
    value, low, high = figures.mean(groups)
    assert value == 0.75 and (low, high) == (0.0, 1.0)


# ---------------------------------------------------------------- SSCD, costs


def test_what_the_networks_read():
    wide = torch.rand(1, 3, 300, 600)
    short = judges.cropped(wide, 256, 224)
    whole = F.interpolate(wide, size=(256, 512), mode="bilinear", antialias=True)
    assert torch.allclose(short, whole[..., 16:240, 144:368])
    assert judges.cropped(wide.mT, 256, 224).shape == (1, 3, 224, 224)
    assert judges.in_meta(wide).shape == (1, 3, 320, 320)
    assert float(judges.in_wen(torch.ones(1, 3, 256, 256)).mean()) == 1
    assert torch.equal(
        judges.PROTOCOLS[2].prepare(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 224, 224)
    )


def test_likeness_to_any_and_to_ones_own():
    embed = {"meta": lambda p: F.normalize(p.flatten(1))}
    one, two = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    one[:, 0] = 1
    known = judges.References.of([one, two], embed)
    found = known.likeness(two, torch.tensor([True, False]), embed)["meta"]
    assert found["any"] == pytest.approx(1) and found["own"] == pytest.approx(3**-0.5)
    assert known.likeness(two, torch.zeros(2).bool(), embed)["meta"]["own"] is None


def test_protocols_without_their_file_are_named(tmp_path):
    assert len(judges.missing(None, None)) == 3
    assert judges.missing(tmp_path, None) == [
        "SSCD as measured by Wen et al., SAIL, anisotropy, MemBench, GUARD: "
        "--sscd-large sscd_disc_large.torchscript.pt"
    ]
    assert judges.embeddings(None, None) == {}
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(AMGError, match=r"x\.pt"):
        judges.embeddings(None, tmp_path / "x.pt")


def test_costs_by_hand():
    plain, main = methods.METHODS["plain"], methods.METHODS["main"]
    assert cost.of(plain, 500, 4, 50, 2) == (2000, 200_000, 200_000)
    least, most = main.rows(50, 2, 4)
    assert least == 100 and most == 3 * (100 + 3 * 50 + 4 * 4 * 16)
    guard, wen = methods.METHODS["guard"], methods.METHODS["Wen"]
    assert wen.rows(50, 2, 4) == (100, 100 + 2 * 11)
    assert cost.of(guard, 3, 4, 10, 2).least == 3 * 2 * 20 + 12 * 20
    text = cost.table([plain], {"memorised": 500}, 4, 50, 7.5, True, rate=50.0, shards=2)
    assert "200,000" in text and "8,000" in text and "0.56" in text  # 200,000 / 50 / 3600 / 2
    assert "1.00" not in cost.table([plain], {"x": 1}, 1, 50, 1.0, False)


def test_methods_by_name():
    assert [one.name for one in methods.chosen(["main", "RT"])] == ["plain", "RT", "main"]
    assert set(methods.USUAL) >= {
        "GNI",
        "RT",
        "CWR",
        "RNA",
        "main",
        "strong",
        "gentle",
        "paper",
        "reference",
    }
    with pytest.raises(AMGError, match="nothing"):
        methods.chosen(["nothing"])
