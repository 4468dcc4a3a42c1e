"""The functions that the script file calls: widgets, infotext, X/Y/Z axes, begin and end of a generation.

Before a generation is guarded, this imports only torch, which every host has loaded.
"""

from __future__ import annotations

import logging

from . import lookup
from .options import LABELS, OFF, POLICIES, PRESETS, TELLS, THRESHOLDS, Options

KEY = "amg_report"  # name of the PNG's text chunk
log = logging.getLogger(__name__)


def widgets(gr, tab: str) -> list:
    """The accordion's widgets after its own checkbox, in the order of `Options`."""
    from modules.ui_common import create_refresh_button

    def choice(name: str, choices, info: str, **more):
        return gr.Dropdown(choices, value=choices[0], label=_words(name), info=info, **more)

    def slider(name: str, value: float, most: float, step: float, info: str):
        return gr.Slider(0, most, value, step=step, label=_words(name), info=info)

    with gr.Row():
        index = choice(
            "index",
            lookup.index_names(),
            "The pictures to stay away from, in models/amg_indexes. The guard protects only from "
            "these.",
            elem_id=f"{tab}_amg_index",
        )
        create_refresh_button(
            index, lambda: None, lambda: {"choices": lookup.index_names()}, f"{tab}_amg_refresh"
        )
        preset = choice(
            "preset",
            list(PRESETS),
            "main: recommended. strong: acts earlier and harder. gentle: acts later and softer.",
        )
    despecification = slider(
        "despecification", 1.0, 3.0, 0.05,
        "If a prompt draws a stored picture, the guard finds the words that lead to it, and draws "
        "with two reduced prompts in turn, which lack different ones of them. paper and reference "
        "need CFG above 1. 0 = off, 1 = the preset; above 2 pictures may lose the prompt.",
    )  # fmt: skip
    deduplication = slider(
        "deduplication", 1.0, 3.0, 0.05,
        "Steers away from what the caption of the nearest picture would draw. Needs captions in "
        "the index. 0 = off, 1 = the preset.",
    )  # fmt: skip
    dissimilarity = slider(
        "dissimilarity", 1.0, 3.0, 0.05,
        "Changes the picture itself until it no longer resembles the nearest one of the index. 0 "
        "= off, 1 = the preset; above 2 pictures may show stains.",
    )  # fmt: skip
    with gr.Row():
        thresholds = choice(
            "thresholds",
            list(THRESHOLDS),
            "preset: the preset says how alike is too alike. custom: the two sliders say it.",
        )
        start = slider(
            "threshold_start",
            0.2,
            1.0,
            0.01,
            "In the first step. The guard acts above it. 0 = "
            "as alike as pictures that are not in the index, 1 = the same picture.",
        )
        end = slider("threshold_end", 0.4, 1.0, 0.01, "In the last step, on the same scale.")
    with gr.Row():
        still = choice(
            "if_still_copied",
            list(POLICIES),
            "What happens to a picture that is still a copy. say so: you get it, and its "
            "infotext warns you. blank: you get an empty picture in its place. A picture that is only "
            "close to a stored one (cannot tell) comes out in any case.",
        )
        retries = slider(
            "retries", 0, 10, 1,
            "How often a batch with a copy in it is drawn again, with more strength each time. 0 "
            "= only measure and report.",
        )  # fmt: skip
    report = choice(
        "report_in_picture",
        list(TELLS),
        "What a PNG carries of the report. anonymous: measurements, the hash of the index, "
        "numbers of its pictures. full: also names and captions of its pictures. off: nothing.",
    )
    return [
        preset, despecification, deduplication, dissimilarity, index, thresholds, start, end, still,
        retries, report,
    ]  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def paste_fields(components: list) -> list[tuple]:
    """(widget, label in the infotext) for all widgets. The checkbox is on if a picture was guarded."""
    enabled, *others = components
    return [(enabled, was_guarded), *zip(others, LABELS.values(), strict=True)]


def was_guarded(written: dict) -> bool:
    """Whether a pasted infotext is of a guarded picture.

    Both tabs use the same function, by which the host finds the checkbox when it sends a picture with its
    settings from one tab to the other.
    """
    return LABELS["preset"] in written


def add_axes(scripts) -> None:
    """Add the axes of the X/Y/Z plot, once."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ in ("scripts.xyz_grid", "xyz_grid.py"):
            break
    else:
        return
    grid = data.module
    if any(option.label.startswith("[AMG]") for option in grid.axis_options):
        return

    def apply(name: str):
        return lambda p, value, _values: setattr(p, f"amg_{name}", value)

    numbers = (
        "despecification",
        "deduplication",
        "dissimilarity",
        "threshold_start",
        "threshold_end",
    )
    axes = [("preset", str, lambda: list(PRESETS)), ("index", str, lookup.index_names)]
    axes += [(name, float, None) for name in numbers]
    for name, kind, choices in axes:
        label = "[AMG] " + _words(name)
        more = {} if choices is None else {"choices": choices}
        grid.axis_options.append(grid.AxisOption(label, kind, apply(name), **more))


def begin(p, args: tuple) -> None:
    """A generation begins. If it cannot be guarded, drawing fails later with the reason.

    The host ignores exceptions of a script here, and would continue without the guard.
    """
    end(p)
    try:
        options = Options.read(p, args)
        if not options.enabled:
            return
        from .shared import Guard

        p.amg_guard = Guard(p, options, _host(p))
        guarded = p.amg_guard.sample
    except Exception as error:
        reason = error

        def guarded(_draw):
            raise reason

    own, before = "sample" in vars(p), p.sample

    def sample(*args, **kwargs):
        if not sample.live:  # another extension has wrapped this one and still uses it
            return before(*args, **kwargs)
        return guarded(lambda: before(*args, **kwargs))

    sample.live, sample.replaced = True, before if own else None
    p.sample = p.amg_sample = sample


def end(p) -> None:
    """Restore `p`, because another script may use it for the next generation."""
    sample, p.amg_sample, p.amg_guard = getattr(p, "amg_sample", None), None, None
    if sample is None:
        return
    sample.live = False
    if vars(p).get("sample") is sample:
        if sample.replaced is None:
            del p.sample
        else:
            p.sample = sample.replaced


def _host(p):
    if hasattr(p.sd_model, "forge_objects"):
        from .forge import Forge

        return Forge
    from .a1111 import A1111

    return A1111


def before_pass(p) -> None:
    """Called before each sampling pass, for which Forge makes a new patcher."""
    guard = getattr(p, "amg_guard", None)
    if guard is None or not hasattr(guard.host, "hook"):
        return
    try:
        guard.host.hook()
    except Exception as error:  # the host would ignore it, and draw without the guard
        log.exception("AMG")
        guard.error = error


def decoded(p) -> None:
    """A picture comes from the VAE. If the host saves it before it is checked, it has no verdict."""
    guard = getattr(p, "amg_guard", None)
    if guard is not None:
        guard.forget()


def finished(p, pp) -> None:
    """Check a finished picture."""
    guard = getattr(p, "amg_guard", None)
    if guard is not None:
        guard.judge(pp)
        if guard.judged is pp.image and _writes(guard):
            pp.image.info[KEY] = guard.travelling()  # for the gallery's file and the API's response


def _writes(guard) -> bool:
    """Whether the report is to be written into pictures, by the options of guard and host."""
    from modules import shared

    return bool(shared.opts.enable_pnginfo) and guard.options.report_in_picture != OFF


def before_saved(params) -> None:
    """Write the report into the PNG of the picture that was checked last, but not into grids or masks."""
    guard = getattr(params.p, "amg_guard", None)
    if guard is None or guard.options.report_in_picture == OFF:
        return
    if guard.reports and params.image is guard.judged:
        params.pnginfo[KEY] = guard.travelling()
