"""ImageNet 64x64, class-conditional: EDM2's training, size S (Karras et al. 2024, table 6, "ImageNet-64").

    jax-diffusion train --config=imagenet64_edm2 --workdir=runs/edm2 --config.data.path=imagenet64
    jax-diffusion ema --workdir=runs/edm2 --std=0.075
    jax-diffusion sample --workdir=runs/edm2 --ema_std=0.075

The paper's run: FID 1.58 with an average of width 0.075 and 32 Heun steps (63 evaluations) after 1,074 M images, days
on 32 A100; M 1.43, L 1.33, XL 1.33. The other sizes differ in config.model.channels, optim.learning_rate and
model.dropout: XS 128, 0.012, 0; M 256, 0.009, 0.1; L 320, 0.008, 0.1; XL 384, 0.007, 0.1.

Data: a folder with one subfolder a class. For guidance train a small network without labels, or stop one early
(`--autoguide`): labels are never dropped here.
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="folder", size=(64, 64))
    c.process.schedule = config.named("edm")
    c.process.prediction = "edm"
    c.process.weighting = config.named("edm")
    c.process.timesteps = config.named("log_normal", mean=-0.8, std=1.6)
    c.process.sigma_data = 0.5
    c.model = config.network("edm2")
    c.model.update(channels=192, dropout=0.0, null_label=False, uncertainty=128, dtype="bfloat16")
    # 10 Mimg of linear warm-up at 2048 images a step; weights are normalised, so nothing is clipped or decayed.
    c.optim.update(
        learning_rate=0.0100, schedule="inverse_sqrt", warmup=4883, hold=35_000, b1=0.9, b2=0.99, eps=1e-8, clip=0.0
    )
    c.ema.update(decay=0.9999, profiles=(0.05, 0.10), snapshot_every=4096, snapshot_dtype="float16")  # 8 Mimg
    c.train.update(
        batch_size=2048,
        steps=524_288,
        label_dropout=0.0,
        log_every=100,
        eval_every=4096,
        sample_every=4096,
        checkpoint_every=4096,
    )
    c.sampling.update(solver="heun", steps=32, grid="karras")
    return c
