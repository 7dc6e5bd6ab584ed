"""The same network in JAX and in PyTorch, trained and sampled in turn on one device.

    cases.py        the networks, and what both frameworks are told of them;  settings.py  how long it may take
    worker.py       a framework in its own process, driven by lines of JSON
    jax_side.py     what is timed here: the trainer's step and the sampler's program
    torch_side.py   what it stands beside, in every form that may be the fastest
    measure.py      who runs when, and the statistics
    run.py          the whole comparison;  starts.py  the compile cache
    report.py       JSON and table;  plot.py  the picture

The parent process imports neither framework.
"""
