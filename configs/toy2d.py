"""Two interleaved half-moons in the plane, an MLP, samples drawn as points.

    jax-diffusion train --config=toy2d --workdir=runs/toy
    jax-diffusion train --config=toy2d --workdir=runs/rolls --config.data.name=swissroll

About half a minute on two CPU cores. Also: checkerboard, rings.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="toy2d", name="moons")
    c.process.schedule = config.named("cosine")
    c.process.prediction = "v"
    c.model = config.network("mlp")
    c.optim.update(learning_rate=1e-3, schedule="cosine", warmup=100)
    c.ema.decay = 0.998
    c.train.update(
        batch_size=1024,
        steps=3000,
        steps_per_dispatch=20,
        log_every=500,
        eval_every=1000,
        sample_every=1000,
        checkpoint_every=1000,
    )
    c.sampling.update(solver="dpmpp_2m", steps=25, clip=False, num=4000, batch_size=4000)
    return c
