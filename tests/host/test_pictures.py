"""An index built by the node holds what Load Image gives."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image


def test_an_index_knows_what_load_image_opens(amg, run_node, tmp_path):
    import folder_paths

    import nodes
    from tests.attacks.test_damaged_pictures import JPEG, PNG, SOUND

    files = {f"{name}.png": data for name, data in SOUND.items() if data[:4] == PNG[:4]}
    files |= {"cut.jpg": JPEG[:-2], "half.jpg": JPEG[: len(JPEG) // 2]}
    files["half.png"] = PNG[: len(PNG) // 2]
    for kind in ("tga", "ppm", "bmp"):
        held = BytesIO()
        Image.open(BytesIO(PNG)).save(held, kind)
        files[f"whole.{kind}"] = held.getvalue()
    decode = amg.module("amg_core.index.picture").decode
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, data in files.items():
        before, folder_paths.input_directory = folder_paths.input_directory, str(folder)
        try:
            image, _ = nodes.LoadImage().load_image(name)
        finally:
            folder_paths.input_directory = before
        shown = (image[0].numpy() * 255).round().astype(np.uint8)
        assert np.array_equal(decode(data, name).pixels, shown), name
    _, summary = run_node(
        "AMG_BuildIndex", folder=str(folder), name="cut-pictures", descriptor="pixel"
    )
    assert summary.startswith(f"{len(files)} pictures")
    assert "half.jpg: cut or damaged" in summary and "skipped" not in summary


def test_the_node_says_what_was_left_out_and_how_many_captions(run_node, tmp_path):
    for seed, name in enumerate(("a.png", "b", "c.jpg_large")):
        pixels = np.full((40, 40, 3), 60 * seed, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, "PNG")
    (tmp_path / "A.TXT").write_text("a fox")
    (tmp_path / "film.mp4").write_bytes(b"?")
    (tmp_path / "other.csv").write_text("words\nhello\n")
    _, summary = run_node("AMG_BuildIndex", folder=str(tmp_path), name="left", descriptor="pixel")
    assert summary.startswith("3 pictures") and "1 of 3 with a caption" in summary
    assert "1 file is left out, being no picture: 1 .mp4 (film.mp4)" in summary
    assert "no column that names pictures" in summary
