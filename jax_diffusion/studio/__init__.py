"""A page to play with a trained model, on this machine alone: `jax-diffusion studio`.

settings.py  what is drawn: solver, steps, labels, ...; checked, and as a command line
png.py       a picture with its settings inside, and back
drawing.py   a run: samples and fillings as pictures, frame by frame
page.py      the page (Gradio); canvas.* draws masks
server.py    127.0.0.1, and nothing beyond it
"""
