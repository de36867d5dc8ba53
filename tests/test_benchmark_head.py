"""The benchmarks of the head run, and compare what computes the same."""

import math

from hf_intervene.training.benchmarks import head as benchmark_head


def test_benchmarks_return_figures():
    found = benchmark_head.concepts(1, (2, 3), batch_size=4)
    for kind in ("full", "low_rank", "posterior"):
        assert math.isfinite(found[kind]["slope"]) and found[kind]["3 concepts"]["milliseconds"] > 0
    assert found["low_rank_over_full"]["2 concepts"]["ratio"] > 0
    found = benchmark_head.contexts(1, resolution=16)
    assert (
        found["head, 64 contexts"]["speedup"] > 1 and found["light VAE, 64 contexts"]["speedup"] > 1
    )
    found = benchmark_head.evaluation(1, 50, 5)
    assert (
        found["difference"] < 1e-5
        and found["difference_of_float64"] < 1e-6
        and found["over POT"]["rounds"] == 1
    )


def test_the_pipeline_in_the_package_is_timed():
    found = benchmark_head.few_steps(1, num_images=1, steps=4)
    assert found["as they come"]["seconds"] > 0 and found["guided over unguided"]["rounds"] == 1
    # 25 steps are made of 50, and 2 of 4.
    assert found["50 steps over these"]["ratio"] > 3
