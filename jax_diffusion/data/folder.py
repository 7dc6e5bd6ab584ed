"""Folders of images, or archives of one.

What is understood, below any number of single outer folders:

    a.jpg b.png ...                      no labels
    cat/a.jpg dog/b.png ...              the first folder is the class
    train/... test/... (or val/...)      the splits, each laid out as above
"""

from collections.abc import Mapping
from typing import Any

from jax_diffusion.data.encoded import open_encoded
from jax_diffusion.data.reader import Subset
from jax_diffusion.data.shards import EVAL
from jax_diffusion.data.source import Once, Source, split_indices
from jax_diffusion.data.trees import Tree, open_tree
from jax_diffusion.errors import UserError


class Files:
    """The images of a tree, with the label of each (None: none)."""

    def __init__(self, tree: Tree, names: list[str], labels: list[int | None]):
        self.tree, self.names, self.labels = tree, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> tuple[bytes, int | None]:
        return self.tree.read(self.names[i]), self.labels[i]


def load(cfg: Any, split: str, once: Once) -> Source:
    """The images below cfg.path; the eval set is cfg.eval_path, test/ or val/, or the held-out share."""
    tree, eval_path = once(open_tree, cfg.path, cfg.max_bytes), getattr(cfg, "eval_path", "")
    names = _strip(dict.fromkeys(tree.names))  # name within the layout -> name in the tree
    if not names:
        raise UserError(f"config.data.path={cfg.path!r} holds no images")
    train, test = _splits(names)
    classes = _classes(train, cfg)
    if eval_path:
        held_out = False
        if split == "eval":
            tree = once(open_tree, eval_path, cfg.max_bytes)
            test = _strip(dict.fromkeys(tree.names), keep=set(classes))
            if not test:
                raise UserError(f"config.data.eval_path={eval_path!r} holds no images")
    else:
        held_out = not test
    chosen = test if split == "eval" and not held_out else train
    files: Files | Subset = Files(tree, list(chosen.values()), [_label(n, classes, cfg) for n in chosen])
    if held_out:
        files = Subset(files, split_indices(len(files), cfg.holdout, split, cfg.path))
    path = eval_path if split == "eval" and eval_path else cfg.path
    return open_encoded(files, cfg, name=path, class_names=classes)


def _strip(names: Mapping[str, str | None], keep: frozenset | set = frozenset()) -> dict[str, str]:
    """Drops outer folders that hold everything, unless such a folder is a class in `keep`."""
    out = {name: tree_name or name for name, tree_name in names.items()}
    while out:
        tops = {name.split("/")[0] if "/" in name else "" for name in out}
        if len(tops) > 1 or tops == {""} or tops & set(keep):
            return out
        out = {name.split("/", 1)[1]: tree_name for name, tree_name in out.items()}
    return out


def _splits(names: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(train, test); test is empty where the layout has none."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    test = next((f for f in EVAL if f in tops), None)
    if "train" not in tops or test is None:
        return names, {}

    def below(folder: str) -> dict[str, str]:
        return {n.split("/", 1)[1]: t for n, t in names.items() if n.startswith(folder + "/")}

    train = _strip(below("train"))
    return train, _strip(below(test), keep={n.split("/")[0] for n in train if "/" in n})


def _classes(names: dict[str, str], cfg: Any) -> tuple[str, ...]:
    """Class names in order of label; () where the images lie in no folders or labels are not wanted."""
    if not cfg.labels:
        return ()
    loose = [name for name in names if "/" not in name]
    if not loose:
        return tuple(sorted({name.split("/")[0] for name in names}))
    if len(loose) < len(names):
        raise UserError(
            f"config.data.path={cfg.path!r}: {len(loose)} images (the first is {loose[0]}) lie beside the "
            "class folders; move them, or set --config.data.labels=False"
        )
    return ()


def _label(name: str, classes: tuple[str, ...], cfg: Any) -> int | None:
    if not classes:
        return None
    top = name.split("/")[0] if "/" in name else ""
    if top not in classes:
        raise UserError(
            f"config.data.path={cfg.path!r}: the eval image {name!r} is in no class of the training set "
            f"({', '.join(classes[:8])}); rename its folder, or set --config.data.labels=False"
        )
    return classes.index(top)
