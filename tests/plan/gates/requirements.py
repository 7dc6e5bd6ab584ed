"""Prints what `pip install --no-deps` needs to compile for TPU and NVIDIA with the installed jax: compilers alone, no
CUDA libraries. jax itself says which libtpu fits."""

import importlib.metadata
import re

jax = importlib.metadata.version("jax")
(libtpu,) = {found[1] for r in importlib.metadata.requires("jax") if (found := re.match(r"(libtpu==[\w.*]+)", r))}
print(libtpu, f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}")
