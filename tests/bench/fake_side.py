"""A framework without a framework: answers at once, and writes down what it was asked for. Runs in a worker.

FAKE is what goes wrong: "die:KEY" and "fail:KEY" when KEY is run, "differ" where outputs are compared, "hang" in the
second round.
"""

import json
import os
import sys
import time

import numpy as np

FAKE = os.environ.get("FAKE", "")
STEP_S = {"default": 0.01, "eager": 0.02, "compile": 0.015, "pipeline": 0.04, "loop": 0.03}


class Side:
    theirs = "eager compile"

    def __init__(self, threads, folder):
        self.folder, self.ours, self.warm = folder, False, set()

    def start(self, platform=None, compile_cache="off", onednn=True):
        self.ours = platform is None
        return {"platform": "cpu", "device": "fake", "memory": 0, "versions": {"fake": "1"}}

    def ceiling(self, size, dtype, seconds):
        return 1e12 if self.ours else 2e12

    def load(self, **work):
        self.work = work
        return {"parameters": 7}

    def export(self):
        pass

    def variants(self, mode):
        return ["default"] if self.ours else {"sample": ["pipeline", "loop"]}.get(mode, ["eager", "compile"])

    def check(self, batch, variant="default"):
        return self._save("check")

    def output(self, key, begin=""):
        return self._save("output")

    def _save(self, name):
        path = self.folder / f"{'ours' if self.ours else 'theirs'}_{name}.npz"
        value = 2.0 if FAKE == "differ" and not self.ours else 1.0
        np.savez(path, output=np.full((2, 3), value), loss=np.ones(2))
        return str(path)

    def prepare(self, key, mode, variant, batch, warmup):
        return {"compile_s": 1.5, "step_s": STEP_S[key], "per_call": 1} | ({"flops": 1e9} if self.ours else {})

    def run(self, key, steps):
        with open(self.folder / "order.txt", "a") as file:
            file.write(json.dumps([key, steps]) + "\n")
        if f"die:{key}" == FAKE:
            print("the fake ran out of everything", file=sys.stderr)
            os._exit(9)
        if f"fail:{key}" == FAKE:
            raise MemoryError("out of memory\nmore words")
        if FAKE == "hang" and len((self.folder / "order.txt").read_text().splitlines()) > 4:
            time.sleep(100)
        cold = key not in self.warm
        self.warm.add(key)
        return STEP_S[key] * steps * (10 if cold else 1)

    def restart_peak(self):
        pass

    def peak(self):
        return 1000

    def drop(self, key):
        pass
