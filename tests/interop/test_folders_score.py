"""ScoreSdeVePipeline of diffusers: a score model of images in [0, 1], with sigma as its time."""

import diffusers
import jax
import numpy as np
import pytest
import torch

import jax_diffusion as jd
from jax_diffusion.errors import UserError


def test_the_same_denoiser_and_back(tmp_path):
    """E[x_0 | x_t] by Tweedie's formula from their score, in their range, and by our process in ours; then back."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), norm_num_groups=8, norm_eps=1e-6,
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), mid_block_scale_factor=2**0.5,
        center_input_sample=True, attention_head_dim=8,
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.1 * torch.randn_like(p)
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0, num_train_timesteps=20)
    diffusers.ScoreSdeVePipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="ScoreSdeVeScheduler is needed"):
        jd.load(tmp_path / "theirs" / "unet")
    model = jd.load(tmp_path / "theirs")
    assert model.config.sampling.solver == "predictor_corrector" and model.config.sampling.steps == 20

    rng, sigma = np.random.default_rng(0), np.array([0.02, 1.0, 40.0], np.float32)
    x = rng.uniform(0, 1, (3, 8, 8, 3)) + sigma[:, None, None, None] * rng.standard_normal((3, 8, 8, 3))
    x = x.astype(np.float32)
    with torch.no_grad():
        score = unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(sigma)).sample.numpy().transpose(0, 2, 3, 1)
    theirs = 2 * (x + sigma[:, None, None, None] ** 2 * score) - 1

    def denoised(params, x, t):
        inputs, c_noise = model.process.network_inputs(x, t)
        return model.process.denoised(model.network.apply(params, inputs, c_noise), x, t)

    t = np.asarray(model.process.schedule.inverse(-2 * np.log(2 * sigma.astype(np.float64))), np.float32)
    ours = jax.jit(denoised)(model.params, 2 * x - 1, t)
    # float32 times: sigma is exponential in t, and its relative error some 1e-6.
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(theirs).max() > 1

    jd.save_diffusers(model, tmp_path / "back")
    again = diffusers.ScoreSdeVePipeline.from_pretrained(tmp_path / "back")
    before, after = unet.state_dict(), again.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert dict(again.scheduler.config)["sigma_max"] == 50.0
    reread = jd.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, model.params, reread.params)
    assert reread.config.process.to_dict() == model.config.process.to_dict()
