"""ImageNet 64x64, class-conditional, ADM's hyper-parameters (Dhariwal & Nichol 2021, table 11).

    jax-diffusion train --config=imagenet64_adm --workdir=runs/adm --config.data.path=imagenet/train

296M parameters, 540,000 steps of 2,048 images. The paper's network reaches FID 2.07 in 250 steps without guidance
(table 5). As there the variance is learned (Nichol & Dhariwal 2021, eq. 15) and no label is ever dropped: guidance is
by a classifier of noisy images, models/encoder.py. Further ahead is a start from OpenAI's own weights:

    jax-diffusion convert 64x64_diffusion.pt --workdir=runs/adm

For classifier-free guidance: --config.model.null_label=true --config.train.label_dropout=0.1.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", size=(64, 64), channels=3, flip=True)
    c.process.schedule = config.named("cosine")
    c.process.prediction = "epsilon"
    c.process.learn_variance = True
    c.model.update(
        channels=192,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention_levels=(1, 2, 3),
        head_channels=64,
        dropout=0.1,
        scale_shift=True,
        resblock_updown=True,
        norm_groups=32,
        null_label=False,
        dtype="bfloat16",
        remat=True,
    )
    # Without warm-up, clipping or weight decay, as there.
    c.optim.update(learning_rate=3e-4, schedule="constant", warmup=0, clip=0.0)
    c.ema.decay = 0.9999
    c.train.update(
        batch_size=2048,
        steps=540_000,
        label_dropout=0.0,
        log_every=100,
        eval_every=5000,
        sample_every=5000,
        checkpoint_every=5000,
    )
    c.sampling.update(solver="ddpm", steps=250, grid="linspace")
    return c
