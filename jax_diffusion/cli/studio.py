"""Play with a trained model in the browser: sample, watch, fill in.

examples:
  jax-diffusion studio --workdir=runs/demo --open
  jax-diffusion studio --workdir=runs/mnist --port=8000
  ssh -L 7860:127.0.0.1:7860 HOST jax-diffusion studio --workdir=runs/mnist     (of a remote run, in your browser)

The page is served on 127.0.0.1 alone and fetches nothing from anywhere else. A saved picture carries its settings, and
the page takes them back from it. Ctrl-C ends it. It needs Gradio: pip install "jax_diffusion[studio]".
"""

import argparse
import os
import sys
import webbrowser

from jax_diffusion.errors import UserError

PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", metavar="DIR", required=True, help="of a training run on images")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    add("--port", type=int, default=PORT, metavar="P", help="0 is any free one (default: %(default)s)")
    add("--open", action="store_true", help="show the page in the browser")


def run(options: argparse.Namespace) -> None:
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError as e:
        raise UserError(f'the studio needs Gradio: pip install "jax_diffusion[studio]" ({e})') from None
    from jax_diffusion.studio import page, server
    from jax_diffusion.studio.drawing import Studio

    with server.listen(options.port) as listening:  # before the model is read: a port that is taken is said at once
        studio = Studio(options.workdir, options.checkpoint)
        app = page.application(studio)
        url = f"http://{server.HOST}:{listening.getsockname()[1]}"

        def ready() -> None:
            print(f"studio of {options.workdir} at step {studio.model.step:,}: {url} (Ctrl-C ends it)", flush=True)
            if options.open and not webbrowser.open(url):
                print(f"no browser here: open {url} yourself", file=sys.stderr)

        server.serve(app, listening, ready)
