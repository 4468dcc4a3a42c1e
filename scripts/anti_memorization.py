"""Anti-Memorization Guidance in Automatic1111 and Forge: the script. All it does is in `amg_webui`."""

import gradio as gr
from modules import script_callbacks, scripts
from modules.ui_components import InputAccordion

from amg_webui import a1111, entry, tab

TITLE = "Anti-Memorization Guidance"


class AntiMemorization(scripts.Script):
    """Watches every step and steers away only while the picture comes too close to one in the index."""

    def title(self):
        return TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        entry.add_axes(scripts)  # without its page the host asks for this before `on_before_ui`
        tab = "img2img" if is_img2img else "txt2img"
        with InputAccordion(False, label=TITLE, elem_id=f"{tab}_amg") as enabled:
            widgets = [enabled, *entry.widgets(gr, tab)]
        self.infotext_fields = entry.paste_fields(widgets)
        self.paste_field_names = [label for _, label in self.infotext_fields]
        return widgets

    def process(self, p, *args):
        entry.begin(p, args)

    def process_before_every_sampling(self, p, *args, **kwargs):
        entry.before_pass(p)

    def postprocess_image(self, p, pp, *args):
        entry.decoded(p)

    def postprocess_image_after_composite(self, p, pp, *args):
        entry.finished(p, pp)

    def postprocess(self, p, processed, *args):
        entry.end(p)


script_callbacks.on_cfg_denoiser(a1111.on_cfg_denoiser)
script_callbacks.on_cfg_denoised(a1111.on_cfg_denoised)
script_callbacks.on_cfg_after_cfg(a1111.on_cfg_after_cfg)
script_callbacks.on_before_image_saved(entry.before_saved)
script_callbacks.on_before_ui(lambda: entry.add_axes(scripts))
script_callbacks.on_ui_tabs(lambda: tab.create(gr))
