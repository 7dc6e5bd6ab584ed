"""A run of ours, opened and sampled by diffusers' DDPMPipeline: the picture in the README.

    python docs/scripts/to_diffusers.py --workdir=runs/demo --out=docs/to_diffusers.png

Each class is exported (as `jax-diffusion convert --to=diffusers --label=L` does), opened by
DDPMPipeline.from_pretrained and sampled by it, in torch. Above its images are ours, from the same noise.
"""

import argparse
import tempfile

import diffusers
import jax
import numpy as np
import torch

import jax_diffusion as jd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a class-conditional run")
    parser.add_argument("--out", required=True, help="picture to write")
    parser.add_argument("--num", type=int, default=4, help="images of each class")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    model, pairs = jd.load(args.workdir), []
    for label in range(model.network.num_classes):
        with tempfile.TemporaryDirectory() as folder:
            jd.save_diffusers(model, f"{folder}/out", label=label)
            pipe = diffusers.DDPMPipeline.from_pretrained(f"{folder}/out")
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(label)
        theirs = pipe(args.num, generator=seeded, num_inference_steps=args.steps, output_type="np").images

        seeded = torch.Generator().manual_seed(label)
        noise = torch.randn(args.num, model.shape[2], *model.shape[:2], generator=seeded)
        scheduler = jd.interop.diffusers.scheduler.read(dict(pipe.scheduler.config))
        s = scheduler.sampling
        table = jd.solvers.make(s["solver"], model.process.schedule, args.steps, s["grid"], **s["options"])
        start = noise.numpy().transpose(0, 2, 3, 1)
        ours = model.sample(jax.random.key(0), table, args.num, labels=label, start=start, clip=s["clip"])
        pairs.append((ours, 2 * theirs.reshape(ours.shape) - 1))
    ours, theirs = (np.stack([p[i] for p in pairs]) for i in (0, 1))  # [classes, num, H, W, C]
    columns = np.concatenate([ours, theirs], axis=1).swapaxes(0, 1).reshape(-1, *model.shape)
    jd.io.save_grid(args.out, columns, columns=len(pairs))
    difference = np.abs(ours.clip(-1, 1) - theirs).max() / 2
    print(
        f"{type(pipe.scheduler).__name__}, {args.steps} steps: largest difference {difference:.1e} of pixels in [0, 1]"
    )


if __name__ == "__main__":
    main()
