"""The script file itself, as a host loads it; what importing it costs; the installer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from amg_core import presets
from amg_core.run import SamplingRun
from amg_webui import a1111, entry, options
from tests.index.helpers import run

ROOT = Path(__file__).parents[2]


class Component:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.value = args, kwargs, kwargs.get("value")
        if self.value is None and args:
            self.value = args[2] if len(args) > 2 else args[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """(script class, callbacks, axes): scripts/anti_memorization.py run with stand-ins for the host."""
    callbacks: dict[str, list] = {}

    class Callbacks(ModuleType):
        def __getattr__(self, name):
            return lambda function: callbacks.setdefault(name, []).append(function)

    grid = SimpleNamespace(
        axis_options=[],
        AxisOption=lambda *args, **more: SimpleNamespace(label=args[0], args=args, **more),
    )
    kind = type("Script", (), {})
    kind.__module__ = "xyz_grid.py"
    scripts = SimpleNamespace(
        Script=object, AlwaysVisible=object(),
        scripts_data=[SimpleNamespace(script_class=kind, module=grid)],
    )  # fmt: skip
    modules = ModuleType("modules")
    modules.script_callbacks, modules.scripts = Callbacks("modules.script_callbacks"), scripts
    names = {
        "modules": modules,
        "modules.ui_components": SimpleNamespace(InputAccordion=Component),
        "modules.ui_common": SimpleNamespace(create_refresh_button=lambda *_: None),
        "modules.paths_internal": SimpleNamespace(models_path=str(tmp_path)),
        "gradio": SimpleNamespace(Row=Component, Dropdown=Component, Slider=Component),
    }
    modules.paths_internal = names["modules.paths_internal"]
    modules.shared = SimpleNamespace(opts=SimpleNamespace(localization="None"))
    for name, value in names.items():
        monkeypatch.setitem(sys.modules, name, value)
    path = ROOT / "scripts" / "anti_memorization.py"
    spec = importlib.util.spec_from_file_location("anti_memorization.py", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.AntiMemorization, callbacks, grid


def test_widgets_are_the_options_in_their_order(loaded):
    script, _, _ = loaded
    one = script()
    widgets = one.ui(False)
    assert script.show(one, False) is sys.modules["modules"].scripts.AlwaysVisible
    values = [widget.value for widget in widgets]
    assert options.Options(*values) == options.Options(index="(no index yet)")
    labels = [widget.kwargs["label"].lower().replace(" ", "_") for widget in widgets[1:]]
    assert labels == list(vars(options.Options()))[1:]
    assert all(len(widget.kwargs["info"]) > 20 for widget in widgets[1:])
    assert len(one.infotext_fields) == len(widgets)
    other = script()
    other.ui(True)
    # Sent from txt2img to img2img, the host finds each widget by its name: the checkbox too.
    assert one.paste_field_names == other.paste_field_names and len(widgets) == 12
    assert [name for _, name in other.infotext_fields] == other.paste_field_names


def test_presets_are_those_of_the_core():
    assert set(options.PRESETS) == set(presets.PRESETS) and options.PRESETS[0] == presets.PRESETS[0]


def test_callbacks_are_registered_once_and_sleep(loaded):
    _, callbacks, _ = loaded
    assert callbacks["on_cfg_denoiser"] == [a1111.on_cfg_denoiser]
    assert callbacks["on_cfg_after_cfg"] == [a1111.on_cfg_after_cfg]
    untouched = SimpleNamespace(x=object(), denoiser=object())
    before = untouched.x
    for name in ("on_cfg_denoiser", "on_cfg_denoised", "on_cfg_after_cfg"):
        for callback in callbacks[name]:
            callback(untouched)
    assert untouched.x is before


def test_axes_of_the_xyz_plot(loaded):
    script, callbacks, grid = loaded
    script().ui(False)  # first where the host has an API and no page
    assert len(grid.axis_options) == 7
    for _ in range(2):  # the page may be built anew
        callbacks["on_before_ui"][0]()
    labels = [axis.label for axis in grid.axis_options]
    assert len(labels) == len(set(labels)) == 7 and "[AMG] Threshold end" in labels
    p = SimpleNamespace()
    for axis in grid.axis_options:
        axis.args[2](p, axis.args[1]("0.5"), [])
    chosen = options.Options.read(p, (True,))
    assert (chosen.preset, chosen.deduplication, chosen.thresholds) == ("0.5", 0.5, "custom")


def test_the_tab_builds_and_searches(loaded, tmp_path):
    from PIL import Image

    from amg_webui import tab

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    report = []
    said = tab.build(str(folder), "three", "pixel", lambda share, words: report.append(share))
    assert "3 pictures" in said and report[-1] == 1.0
    with Image.open(folder / "1.png") as picture:
        words, shown = tab.find(picture, "three")
    assert words.startswith("A copy of 1.png: both checks agree · likeness ")
    assert shown[0][1] == "number 1"
    sys.modules["modules"].shared.opts.localization = "ja_JP"
    assert tab.find(shown[0][0], "three")[0].startswith("1.png のコピーです")
    assert "cannot be the name" in tab.build(str(folder), "../x", "pixel", lambda *_: None)
    assert "no index named" in tab.find(shown[0][0], "gone")[0]
    assert "Give a folder" in tab.build(" ", "three", "pixel", lambda *_: None)


def test_a_build_stops_and_goes_on(loaded, tmp_path):
    from PIL import Image

    from amg_webui import tab

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.effect_noise((32, 32), 90).convert("RGB").save(folder / f"{i}.png")
    stopped = tab.build(str(folder), "many", "pixel", lambda *_: tab.stopping.set())
    assert (
        stopped.startswith("Stopped")
        and "no index named" in tab.find(Image.new("RGB", (9, 9)), "many")[0]
    )
    assert "40 pictures" in tab.build(str(folder), "many", "pixel", lambda *_: None)


def test_the_tab_is_made(loaded, monkeypatch):
    from amg_webui import tab

    _, callbacks, _ = loaded
    made, clicked = [], []
    monkeypatch.setattr(tab, "stopping", threading.Event())

    class Any(Component):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def click(self, fn, inputs, outputs):
            clicked.append((fn, inputs, outputs))

    monkeypatch.setattr(sys.modules["gradio"], "update", lambda **new: new, raising=False)
    for name in ("Blocks", "Tab", "Textbox", "Dropdown", "Button", "Image", "Gallery"):
        monkeypatch.setattr(sys.modules["gradio"], name, Any, raising=False)
    monkeypatch.setattr(
        sys.modules["gradio"], "Progress", lambda: lambda *_, **__: None, raising=False
    )
    ((page, title, _),) = callbacks["on_ui_tabs"][0]()
    assert isinstance(page, Any) and title == "AMG Index"
    (build, inputs, outputs), (stop, _, _), (_, _, found) = clicked
    report, listed = build("", "x", "pixel")
    assert "Give a folder" in report and listed == {"choices": ["(no index yet)"]}
    assert len(inputs) == 3 and len(outputs) == len(found) == 2
    assert not tab.stopping.is_set() and stop() is None and tab.stopping.is_set()


def test_another_use_of_p_finds_it_as_it_was(loaded):
    class P:
        def sample(self):
            return 1

    for own in (False, True):
        p = P()
        p.sd_model = None
        if own:
            p.sample = hijacked = lambda: 2
        for _ in range(2):
            entry.begin(p, ({"enabled": True, "index": "gone"},))
            with pytest.raises(Exception, match="gone"):
                p.sample()
        entry.end(p)
        assert (p.sample is hijacked) if own else ("sample" not in vars(p))


def test_another_extension_that_wraps_the_guard_outlives_it(loaded):
    class P:
        sd_model = None

        def sample(self):
            return 1

    p = P()
    entry.begin(p, ({"enabled": True, "index": "gone"},))
    ours = p.sample
    p.sample = lambda: ours() + 1
    entry.end(p)
    assert p.sample() == 2


def test_importing_costs_nothing_worth_naming():
    """Next to torch, which every host has loaded: nothing of others, and hardly any of the core."""
    told = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import amg_webui.entry, amg_webui.a1111\n"
        "print(*set(sys.modules) - before)\n"
    )
    known = {*sys.stdlib_module_names, "amg_webui"}
    ours = {name for name in told.split() if name.partition(".")[0] not in known}
    assert ours == {"amg_core", "amg_core.errors", "amg_core.hosts"}


def test_the_installer_is_quiet_under_a_launcher(tmp_path):
    """Run by path, with the host's own `modules` and `launch` first on PYTHONPATH."""
    for name in ("launch.py", "modules.py"):
        (tmp_path / name).write_text("raise RuntimeError('not for an installer')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "install.py")], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("[AMG]") and not done.stderr


def test_the_session_has_what_the_adapters_pass():
    import inspect

    wanted = {
        "cond",
        "uncond",
        "cfg_scale",
        "sigma",
        "t",
        "texts",
        "composite",
    }
    assert wanted <= set(inspect.signature(SamplingRun.step).parameters)
