"""The guiders of a ComfyUI core, as its nodes make them. Imports the host when they are made."""

from __future__ import annotations


def plain(model, positive, negative, cfg=4.0, kind=None):
    import comfy.samplers

    guider = (kind or comfy.samplers.CFGGuider)(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def basic(model, positive):
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    guider = Guider_Basic(model)
    guider.set_conds(positive)
    return guider


def dual(model, positive, middle, negative, cfg1=4.0, cfg2=4.0, nested=False):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    guider = Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(cfg1, cfg2, nested=nested)
    return guider


def perpneg(model, positive, negative, empty, cfg=4.0, scale=1.0):
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guider = Guider_PerpNeg(model)
    guider.set_conds(positive, negative, empty)
    guider.set_cfg(cfg, scale)
    return guider
