"""Caching is what its papers say: diffusers' own networks, whose deep features hooks replace by kept ones, make the
same images in a DDIM loop on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers import compare, unet2d  # noqa: E402

from jax_diffusion import caching, models, process, schedules, solvers  # noqa: E402
from jax_diffusion.guidance import condition, model_denoiser  # noqa: E402
from jax_diffusion.interop import weights  # noqa: E402
from jax_diffusion.interop.diffusers import dit, unet  # noqa: E402

torch.set_num_threads(1)
STEPS, BATCH = 10, 3
CACHE = caching.Cache(refresh=(0, 1, 4, 8))  # and every kind of gap


class Kept:
    """What the hooks share. Whether this evaluation refreshes, and the feature."""

    refresh, feature = True, None

    def __call__(self, feature):
        if self.refresh:
            self.feature = feature
        return self.feature


def hook_unet(net, depth, kept):
    """DeepCache: the main branch that enters the skip branch of so many modules from the end is the kept one. The
    network runs whole; what it computes in vain is thrown away."""
    resnets = [resnet for block in net.up_blocks for resnet in block.resnets]
    before = [net.mid_block.resnets[-1], *resnets][len(resnets) - depth].out_channels

    def replace(module, args):
        return torch.cat([kept(args[0][:, :before]), args[0][:, before:]], 1), *args[1:]

    resnets[-depth].register_forward_pre_hook(replace)


def hook_dit(net, depth, kept):
    """What the blocks between add to the stream is the kept one."""
    entered = []

    def enter(module, args):
        entered[:] = args[:1]

    def leave(module, args):
        return entered[0] + kept(args[0] - entered[0]), *args[1:]

    net.transformer_blocks[depth].register_forward_pre_hook(enter)
    net.transformer_blocks[-depth].register_forward_pre_hook(leave)


def make_unet():
    net = unet2d.make.__wrapped__("ddpm")  # one of our own: it is hooked
    return net, unet.architecture(dict(net.config)), unet.entries, lambda x, t: net(x, t).sample


def make_dit():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=5, in_channels=3,
                                          sample_size=8, patch_size=2, num_embeds_ada_norm=4).eval()  # fmt: skip
    compare.randomize(net)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    labels = torch.tensor([0, 2, 3])
    return (
        net,
        dit.architecture(net.config),
        dit.entries,
        (lambda x, t: net(x, timestep=t.expand(len(x)), class_labels=labels).sample[:, :3]),
    )


@pytest.mark.parametrize(
    "make, hook, depth", [(make_unet, hook_unet, 1), (make_unet, hook_unet, 4), (make_dit, hook_dit, 1),
                          (make_dit, hook_dit, 2)]
)  # fmt: skip
def test_the_images_of_a_ddim_loop(make, hook, depth):
    net, a, entries, predict = make()
    abstract_options = {k: v for k, v in a.model.items() if k != "name"}
    network = models.make(
        a.model["name"], a.shape, num_classes=a.num_classes, learn_variance=a.learn_variance, **abstract_options
    )
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    params = weights.load(list(entries(a)), compare.tensors_of(compare.state_of(net)), abstract)
    x = np.random.default_rng(0).standard_normal((BATCH, *a.shape)).astype(np.float32)
    refreshes = CACHE.refreshes(STEPS)

    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True
    )
    scheduler.set_timesteps(STEPS)

    def loop(refreshes):
        images = torch.tensor(x.transpose(0, 3, 1, 2))
        with torch.no_grad():
            for t, kept.refresh in zip(scheduler.timesteps, refreshes, strict=True):
                images = scheduler.step(predict(images, t), t, images).prev_sample
        return images.numpy().transpose(0, 2, 3, 1)

    kept = Kept()
    hook(net, depth, kept)
    theirs, theirs_whole = loop(refreshes), loop(np.ones(STEPS, bool))

    schedule = schedules.make("linear")
    gaussian = process.make(schedule, "epsilon", learn_variance=a.learn_variance)
    table = solvers.make("ddim", schedule, STEPS, "leading")
    cond = {"label": jnp.asarray([0, 2, 3])} if a.num_classes else {}

    @jax.jit
    def ours(params, x, refreshes):
        def denoiser(apply):
            return condition(model_denoiser(gaussian, apply, params), cond)

        denoise = caching.remembering(network, denoiser, refreshes, depth)
        return solvers.sample(jax.random.key(0), denoise, table, a.shape, x=x)

    assert compare.relative(ours(params, x, refreshes), theirs) < 1e-5
    assert compare.relative(ours(params, x, np.ones(STEPS, bool)), theirs_whole) < 1e-5
    assert compare.relative(theirs, theirs_whole) > 1e-3
