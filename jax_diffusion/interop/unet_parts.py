"""The modules of `unet` in order, for the tables that say what other libraries call them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax_diffusion.models.network import defaults
from jax_diffusion.models.resnet import level_widths


class Part(NamedTuple):
    """A residual block with or without attention, or a change of size."""

    ours: str  # of its parameters: "down/3"
    way: str  # "down", "shrink" (a change of size), "middle", "up", "grow" (a change of size)
    level: int  # 0 is full resolution
    index: int  # type: ignore[assignment]  # of the residual block in its level
    cin: int
    cout: int
    attends: bool = False

    @property
    def shortcut(self) -> bool:
        return self.cin != self.cout


def options(network, model: Mapping[str, Any]) -> dict[str, Any]:
    """A network's options, those that `model` leaves out at their defaults."""
    return {name: model.get(name, default) for name, default in defaults(network).items()}


def down(o: Mapping[str, Any]) -> Iterator[Part]:
    """The way down of `unet` and `encoder`. o: all their options."""
    widths, width = level_widths(o["channels"], o["multipliers"]), o["stem_channels"] or o["channels"]
    count = 0
    for level, cout in enumerate(widths):
        for i in range(o["blocks"]):
            yield Part(f"down/{count}", "down", level, i, width, cout, level in o["attention_levels"])
            width, count = cout, count + 1
        if level < len(widths) - 1:
            yield Part(f"down/{count}", "shrink", level, 0, width, width)
            count += 1


def middle(o: Mapping[str, Any]) -> Iterator[Part]:
    width, level = level_widths(o["channels"], o["multipliers"])[-1], len(o["multipliers"]) - 1
    if o["middle"] != "none":
        yield Part("middle/0", "middle", level, 0, width, width, o["middle"] == "attention")
        yield Part("middle/1", "middle", level, 1, width, width)


def up(o: Mapping[str, Any]) -> Iterator[Part]:
    """The way up of `unet`."""
    widths = level_widths(o["channels"], o["multipliers"])
    skips = [o["stem_channels"] or o["channels"], *(part.cout for part in down(o))]
    width, count = widths[-1], 0
    for level in reversed(range(len(widths))):
        for i in range(o["blocks"] + 1):
            attends = level in o["attention_levels"]
            yield Part(f"up/{count}", "up", level, i, width + skips.pop(), widths[level], attends)
            width, count = widths[level], count + 1
        if level:
            yield Part(f"grow/{len(widths) - 1 - level}", "grow", level, 0, width, width)


def parts(o: Mapping[str, Any]) -> list[Part]:
    """All of `unet`."""
    return [*down(o), *middle(o), *up(o)]
