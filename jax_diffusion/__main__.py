"""`python -m jax_diffusion`: the command jax-diffusion, where its script is not on the path."""

import sys

from jax_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
