"""ImageNet 256x256, class-conditional, DiT-XL/2 on latents (Peebles & Xie 2023, sections 4 and 5).

    jax-diffusion train --config=imagenet256_dit_xl2 --workdir=runs/dit --config.data.path=latents.npz

The paper reaches FID 9.62 without guidance and 2.27 with a scale of 1.5 after 7M steps (250 steps of DDPM sampling,
50,000 samples decoded), and 19.47 without guidance after 400k; 674.8M parameters, 119 billion
multiply-adds a forward pass.

The data are latents [N, 32, 32, 4] and labels [N] in one .npz, as `images` and `labels`: each picture cropped to its
central square and resized to 256, encoded by Stable Diffusion's autoencoder (the paper: ft-EMA), a draw from its
posterior times 0.18215, channels last. With diffusers and torch, for x [B, 3, 256, 256] in [-1, 1]:

    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema")
    z = 0.18215 * vae.encode(x).latent_dist.sample()
    images.append(z.permute(0, 2, 3, 1).numpy())            # np.savez(path, images=..., labels=...)

The original flips half of the pictures and draws from the posterior anew at every step: save the latents of both a
picture and its mirror image. All of ImageNet is 21 GB in memory. Decoded samples are vae.decode(z / 0.18215); the
pictures drawn while training show three of the four channels.

bfloat16 and several devices:  --config.model.dtype=bfloat16 --config.mesh.fsdp=8 --config.model.remat=dots
"""

from jax_diffusion import config


def get_config():
    c = config.default()
    c.data.update(source="numpy", holdout=0.005)
    c.process.schedule = config.named("linear")
    c.process.prediction = "epsilon"
    c.process.learn_variance = True
    c.model = config.network("dit", size="XL/2")
    c.optim.update(learning_rate=1e-4, schedule="constant", warmup=0, weight_decay=0.0, clip=0.0)
    c.ema.update(decay=0.9999, warmup=False)
    c.train.update(
        batch_size=256,
        steps=7_000_000,
        label_dropout=0.1,
        log_every=100,
        eval_every=25_000,
        sample_every=25_000,
        checkpoint_every=25_000,
    )
    c.sampling.update(solver="ddpm", steps=250, grid="linspace", guidance=1.5, clip=False, num=16, batch_size=16)
    return c
