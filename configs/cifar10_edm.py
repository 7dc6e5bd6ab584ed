"""CIFAR-10, class-conditional: EDM's training of the DDPM++ network (Karras et al. 2022, tables 1 and 7).

    jax-diffusion train --config=cifar10_edm --workdir=runs/edm --config.data.path=cifar10-train.tar.gz

The paper reaches FID 1.79 with 18 Heun steps (35 evaluations) after 200M images on 8 GPUs. This is its network (55.7M
parameters), preconditioning, noise distribution, weighting, batch, learning rate and average, without its augmentation
pipeline, and with dropped labels for classifier-free guidance, which it does without.
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
    c.model = config.network("song_unet")
    c.model.update(dropout=0.13, null_label=False)
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
