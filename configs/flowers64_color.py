"""Colourisation of photographs of flowers, 64x64, from their luma: Palette's way (Saharia et al. 2022).

    jax-diffusion train --config=flowers64_color --workdir=runs/color --config.data.path=flowers64.tar.gz
    jax-diffusion colorize --workdir=runs/color --from_data=8 --variants=3 --out=coloured.png

On two CPU cores: 12 minutes at the 45 images/s that they reach alone. Samples keep the luma (PSNR 38.6 dB on held-out
images) and are nearly as colourful as the originals (0.23 of 0.25, standard deviation about grey). The colours are
drawn, not recovered: petals come out yellow in one sample and white in another.

The size is flowers64_sr's, and grows on an accelerator as that says.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", size=(64, 64), channels=3, flip=True, labels=False)
    c.condition = config.named("gray")
    c.process.schedule = config.named("cosine")
    c.process.prediction = "x0"
    c.process.timesteps = config.named("antithetic")
    c.model.update(patch=2, channels=32, multipliers=(1, 2, 2), blocks=1, attention_levels=(), heads=4)
    c.optim.update(learning_rate=1e-3, schedule="cosine", warmup=100)
    c.ema.decay = 0.998
    c.train.update(batch_size=16, steps=2000, log_every=50, eval_every=500, sample_every=500, checkpoint_every=500)
    c.sampling.update(solver="dpmpp_2m", steps=20, num=12)
    return c
