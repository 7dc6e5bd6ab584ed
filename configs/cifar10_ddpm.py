"""CIFAR-10, unconditional, DDPM's own hyper-parameters (Ho et al. 2020, appendix B).

    jax-diffusion train --config=cifar10_ddpm --workdir=runs/cifar10 --config.data.path=cifar10-train.tar.gz

35.7M parameters, 800,000 steps of 128 images. The paper reaches FID 3.17 and IS 9.46 with 1,000-step ancestral
sampling (`sample --solver=ddpm --steps=1000 --set variance=fixed_large`). Not a run for a CPU: reduce it with
--config.model.channels=32 to try it.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", labels=False, flip=True)
    c.process.schedule = config.named("linear", start=1e-4, end=0.02)
    c.process.prediction = "epsilon"
    c.model.update(
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention_levels=(1,),
        heads=1,
        dropout=0.1,
        norm_eps=1e-6,
    )
    c.optim.update(learning_rate=2e-4, schedule="constant", warmup=5000, clip=1.0)
    c.ema.decay = 0.9999
    c.train.update(
        batch_size=128,
        steps=800_000,
        label_dropout=0.0,
        log_every=100,
        eval_every=10_000,
        sample_every=10_000,
        checkpoint_every=10_000,
    )
    c.sampling.update(solver="ddim", steps=100)
    return c
