"""The jax-diffusion command: one file a subcommand."""
