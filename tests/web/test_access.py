"""The panels without a mouse, and for those who hear them: all has a name and is reached by keys."""

from __future__ import annotations

from tests.web.test_front import FIRST_LOOK, PROBE, SAMPLER
from tests.web.test_results import LIVE, executed, live, output, prompt, report, told  # noqa: F401

# [what has no name] of all that can be pressed, looked at or read in our panels.
NAMELESS = """
const all = "button, a[href], select, input, textarea, img, [role=img], [role=meter], [role=region]";
const shown = (e) => e.checkVisibility() && !e.closest("[aria-hidden=true]");
const name = (e) => e.getAttribute("aria-label") || e.getAttribute("alt") ||
  [...(e.labels ?? [])].map((label) => label.textContent).join("") || e.textContent;
const found = [...document.querySelectorAll(".amg-panel")]
  .flatMap((panel) => [panel, ...panel.querySelectorAll(all)]).filter(shown);
return [found.length, found.filter((e) => !name(e)?.trim()).map((e) => e.outerHTML.slice(0, 200))];
"""
FOCUSED = "document.activeElement"


def test_everything_has_a_name(front, mode, output, messages):  # noqa: F811
    front.load(FIRST_LOOK)
    front.send([executed(SAMPLER, output, prompt())])
    told(front)
    probed = next(
        data["output"]
        for kind, data in messages
        if kind == "executed" and "amg_probe" in (data.get("output") or {})
    )
    front.send([executed(PROBE, probed, prompt())])
    front.until(f"amgPanel({PROBE}, 'amg_probe')?.querySelector('[role=meter]')")
    front.rest()
    count, nameless = front.js(NAMELESS)
    assert count > 10 and nameless == []


def test_a_picture_of_the_batch_is_chosen_with_keys(front, mode, output):  # noqa: F811
    front.load(FIRST_LOOK)
    front.send([executed(SAMPLER, output, prompt())])
    told(front)
    front.js(f"{LIVE}.querySelector('.amg-chip').focus()")
    front.page.key("Tab", 9)
    assert front.js(f"return {FOCUSED}.closest('.amg-chips') && {FOCUSED}.textContent") == "2"
    assert front.js(f"return {FOCUSED}.getAttribute('aria-pressed')") == "false"
    front.page.key("Enter", 13, "\r")
    front.until(f"{LIVE}.querySelectorAll('.amg-chip')[1].getAttribute('aria-pressed') == 'true'")
    ring = front.js(f"return getComputedStyle({FOCUSED}).outlineStyle")
    assert ring != "none"  # who uses keys sees where they are
