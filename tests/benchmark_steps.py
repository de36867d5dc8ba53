"""The steps that benchmarks measure, each on something tiny."""

from hf_intervene.training.benchmarks import bases as benchmark_bases


STEPS = [
    lambda: benchmark_bases.light_step(None, 4, {"sample_size": 16}),
    lambda: benchmark_bases.light_sampling("base", 4, {"sample_size": 16}),
    lambda: benchmark_bases.head_alone(4),
    *(
        lambda kind=kind: benchmark_bases.objective_step(kind, 8, {"sample_size": 16})
        for kind in benchmark_bases.TERMS
    ),
    *(lambda kind=kind: benchmark_bases.autoencoder_step(kind, 2, 16) for kind in ("head", "base")),
    *(
        lambda kind=kind: benchmark_bases.autoencoder_sampling(kind, 2, 16)
        for kind in ("head", "base")
    ),
    *(lambda kind=kind: benchmark_bases.unet_step(kind, 2, 16) for kind in ("head", "base")),
    *(lambda kind=kind: benchmark_bases.unet_sampling(kind, 2, 16) for kind in ("head", "base")),
]
