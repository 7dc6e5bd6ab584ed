"""Hugging Face diffusers: components, schedulers and pipelines, both ways, without torch.

A component is a module with

    architecture(config) -> Architecture          # UserError naming every field and block that has no equivalent
    config_of(architecture) -> dict               # the inverse; UserError where diffusers has no such network
    entries(architecture) -> list[Entry]          # weights.py
    rename(name) -> name                          # of tensors, from older diffusers
    ignore(name) -> bool                          # tensors that follow from the config

and one line in COMPONENTS.
"""

COMPONENTS = {  # diffusers' class -> module
    "UNet2DModel": "unet",
    "DiTTransformer2DModel": "dit",
    "Transformer2DModel": "dit",  # its older name, and that of others, which are refused
}
