"""The commands in `training/`, but for the trainer's and the one that measures."""

from hf_intervene.training import pretrain, reproduce
from hf_intervene.training.benchmarks import benchmark
from hf_intervene.training.studies import (
    ablation,
    autoencoder,
    baselines,
    denoiser_alone,
    effects,
    head_identifiability,
    identifiability,
    protocol,
    seeds_table,
)


RECIPES = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (
        ablation,
        autoencoder,
        baselines,
        benchmark,
        denoiser_alone,
        effects,
        head_identifiability,
        identifiability,
        pretrain,
        protocol,
        reproduce,
        seeds_table,
    )
}
