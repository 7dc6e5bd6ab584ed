"""Photographs of flowers, 64x64, five classes, rectified flow.

    jax-diffusion train --config=flowers64 --workdir=runs/flowers --config.data.path=flowers64.tar.gz

For any folder (or zip, tar) of images with one sub-folder a class. A single modern GPU needs about half a day.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", size=(64, 64), channels=3, flip=True)
    # The shift of Stable Diffusion 3 for a resolution above the 32x32 that a plain flow suits.
    c.process.schedule = config.named("flow", shift=2.0)
    c.process.prediction = "flow"
    c.process.timesteps = config.named("logit_normal")
    c.model.update(
        channels=128,
        multipliers=(1, 2, 3, 4),
        blocks=2,
        attention_levels=(2, 3),
        head_channels=64,
        dropout=0.1,
        scale_shift=True,
        resblock_updown=True,
    )
    c.optim.update(learning_rate=1e-4, schedule="constant", warmup=1000)
    c.ema.decay = 0.9999
    c.train.update(
        batch_size=128,
        steps=100_000,
        log_every=100,
        eval_every=2500,
        sample_every=2500,
        checkpoint_every=2500,
    )
    c.sampling.update(solver="heun", steps=25, guidance=2.0, num=50)
    return c
