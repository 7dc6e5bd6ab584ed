"""What a training run would cost on accelerators that are not at hand: its programs compiled for them, and read.

targets.py      parse("v5e:4x4") -> Topology;  environment(name, base), of a process that compiles for it;
                devices(name) -> list of jax.Device, made for compiling and not for running: v4:XxYxZ, v5e:XxY,
                v5p:XxYxZ, v6e:XxY, a100:N, h100:N, h200:N, b200:N, cpu:N
cuda.py         devices(chip, count) -> NVIDIA GPUs
programs.py     train(config, shape, classes, mesh), sampler(...) -> traced;  compile(traced, target) -> Compiled
hlo.py          parse(text) -> Module;  executions(text) -> {computation: times};  cycles(text), TPU's estimate
collectives.py  collectives(text) -> {"all-gather": Collective(count, bytes, sent)} of a device, loops counted
work.py         flops(text), traffic(text): of a device, loops counted;  serial_seconds(text, peak, bandwidth)
cost.py         estimate(...) -> Estimate: memory, times, limit, images/s
search.py       largest(needed, capacity, unit, start) -> batch;  meshes(devices)
planner.py      Planner: all of it for one config and topology
launch.py       the same in a process of its own (worker.py), as `jax-diffusion plan` runs it
"""
