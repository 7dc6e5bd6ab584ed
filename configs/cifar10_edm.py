"""CIFAR-10, class-conditional, EDM's training (Karras et al. 2022, tables 1 and 7) on an ADM-style U-Net.

    jax-diffusion train --config=cifar10_edm --workdir=runs/edm --config.data.path=cifar10-train.tar.gz

The paper's DDPM++ network reaches FID 1.79 with 18 Heun steps (35 evaluations) after 200M images on 8 GPUs; this
U-Net has its preconditioning, noise distribution, weighting, batch and learning rate, without its augmentation
pipeline.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", flip=True)
    c.process.schedule = config.named("edm")
    c.process.prediction = "edm"
    c.process.weighting = config.named("edm")
    c.process.timesteps = config.named("log_normal", mean=-1.2, std=1.2)
    c.process.sigma_data = 0.5
    c.model.update(
        channels=128,
        multipliers=(2, 2, 2),
        blocks=4,
        attention_levels=(1,),
        heads=1,
        dropout=0.13,
        scale_shift=True,
        resblock_updown=True,
        norm_eps=1e-6,
    )
    # 10 Mimg of linear warm-up at 512 images a step.
    c.optim.update(learning_rate=1e-3, schedule="constant", warmup=19_531, clip=0.0)
    c.ema.decay = 0.9993  # a half-life of 0.5 Mimg
    c.train.update(
        batch_size=512,
        steps=390_625,
        label_dropout=0.1,
        log_every=100,
        eval_every=5000,
        sample_every=5000,
        checkpoint_every=5000,
    )
    c.sampling.update(solver="heun", steps=18, grid="karras")
    return c
