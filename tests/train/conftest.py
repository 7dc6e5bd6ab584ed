"""What the tests of training share."""

import pytest

from jax_diffusion.train import program


@pytest.fixture
def wrap_step(monkeypatch):
    """wrap_step(wrap): the trainer runs wrap(run) in place of its compiled step `run(state, batch)`."""

    def patch(wrap):
        trace = program.Program.trace

        class Traced:
            def __init__(self, traced):
                self.traced, self.jaxpr = traced, traced.jaxpr

            def lower(self):
                return self

            def compile(self):
                return wrap(self.traced.lower().compile())

        monkeypatch.setattr(program.Program, "trace", lambda self, *a, **k: Traced(trace(self, *a, **k)))

    return patch
