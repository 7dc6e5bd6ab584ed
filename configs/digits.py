"""scikit-learn's 1,797 handwritten digits, 8x8, class-conditional. The README's demo.

    jax-diffusion train --config=digits --workdir=runs/demo

No download. On two CPU cores: about three minutes.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.source = "digits"
    c.process.schedule = config.named("cosine")
    c.process.prediction = "v"
    c.process.timesteps = config.named("antithetic")
    c.model.update(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=4, norm_groups=8)
    c.optim.update(learning_rate=2e-3, schedule="cosine", warmup=100)
    c.ema.decay = 0.998
    c.train.update(
        batch_size=64,
        steps=2000,
        label_dropout=0.1,
        log_every=100,
        steps_per_dispatch=1,
        eval_every=500,
        sample_every=500,
        checkpoint_every=500,
    )
    c.sampling.update(solver="dpmpp_2m", steps=20, guidance=1.5, num=50)
    return c
