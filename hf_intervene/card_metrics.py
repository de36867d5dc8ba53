"""What a model card shows of `metrics.json`."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult


TASK = "unconditional-image-generation"
# in metrics, and what it is called
LOSSES = {
    "bits_per_pixel": "bits per pixel",
    "denoising_loss": "denoising loss per entry",
}


def code(text: str) -> str:
    """Text as code in Markdown, in a table too: nothing in it is taken for Markdown or HTML."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " * (text.startswith("`") or text.endswith("`"))
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", r"\|").replace("\n", " ")


def head_mark(folder: str | os.PathLike) -> str | None:
    """The hash of the weights of the head in a saved model's folder, by which measurements know
    their model; `None` if there is no head.
    """
    import torch  # here, so that names and words come at once
    from safetensors import safe_open

    place = Path(folder, "head" if Path(folder, "model_index.json").exists() else "")
    digest, found = hashlib.sha256(), False
    for file in sorted(place.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in sorted(weights.keys()):
                value, found = weights.get_tensor(name).contiguous(), True
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32] if found else None


def read_metrics(source: str | os.PathLike | None) -> dict | None:
    """What `hf-intervene evaluate` wrote to metrics.json, given by its path or its folder; `None`
    if none is given.

    Raises:
        ValueError: it holds no metrics.
    """
    if source is None:
        return None
    path = Path(source)
    path = path / "metrics.json" if path.is_dir() else path
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        # they have all that is shown of them
        (
            table_of(metrics),
            presence_of(metrics),
            codes_of(metrics),
            results_of(metrics),
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} holds no metrics: give the metrics.json that `hf-intervene evaluate` writes,"
            " or its folder."
        ) from error
    return metrics


def loss_in(row: Mapping) -> str:
    """Which of `LOSSES` a row of metrics has."""
    return next(name for name in LOSSES if name in row)


def shown_protocol(metrics: Mapping) -> str:
    """The protocol shown: distinct images on both sides, where it was measured."""
    first = next(iter(metrics["contexts"].values()))
    return next(name for name in ("independent", "paper") if name in first)


def _data_name(metrics: dict) -> str:
    """The data set measured on; of a path on somebody's machine the last part."""
    settings = metrics.get("settings", {})
    name = Path(settings.get("dataset", "held-out images")).name
    return f"{name} ({settings['variant']})" if name in ("quad", "ident3d") else name


def table_of(metrics: dict) -> dict:
    protocol = shown_protocol(metrics)
    rows = [(code(name), row) for name, row in metrics["contexts"].items()]
    rows += [
        (f"**mean {kind}** ({int(row['contexts'])})", row) for kind, row in metrics["means"].items()
    ]
    images = int(next(iter(metrics["contexts"].values()))["images"])
    loss = loss_in(rows[0][1])
    meaning = {
        "bits_per_pixel": (
            "Bits per pixel: the negative ELBO of images of bytes, a code length."
            if metrics.get("code_length")
            else "Bits per pixel: the negative ELBO."
        ),
        "denoising_loss": (
            "Denoising loss: ten times the squared error, and the KL, per entry of what is"
            " denoised."
        ),
    }
    return {
        "loss": LOSSES[loss],
        "what": (
            "Sliced 2-Wasserstein distance between generated and held-out real images of"
            f" {_data_name(metrics)}, {images} a side, {protocol} protocol. The *floor* is the same"
            " distance between two sets of real images; *composition*: contexts with several"
            f" concepts. {meaning[loss]}"
        ),
        "rows": [
            {"name": name, "loss": float(row[loss]), **_numbers(row[protocol])}
            for name, row in rows
        ],
    }


def _numbers(row: dict) -> dict:
    lower, upper = row["interval"]
    found = {name: float(row[name]) for name in ("distance", "floor")} | {
        "interval": [float(lower), float(upper)]
    }
    return found | {"ratio": "" if row["ratio"] is None else f"{row['ratio']:.1f}"}


def presence_of(metrics: dict) -> dict | None:
    """What a card says of the presence of concepts; `None` if it was not measured."""
    rows = {name: row["presence"] for name, row in metrics["contexts"].items() if "presence" in row}
    shown = [
        {
            "name": code(name),
            "generated": float(row["generated"]["all_wanted"]["value"]),
            "interval": [float(end) for end in row["generated"]["all_wanted"]["interval"]],
            "real": float(row["real"]["all_wanted"]["value"]),
            "nothing": float(row["nothing"]["all_wanted"]["value"]),
        }
        for name, row in rows.items()
        if row["generated"]["all_wanted"] is not None
    ]
    verdicts = [
        {"name": code(name), "words": str(words)}
        for name, words in metrics.get("verdicts", {}).items()
    ]
    kind = metrics.get("detector", {}).get("kind")
    trained = {
        "attributes": "trained on the true attributes of real images",
        "contexts": (
            "trained to tell each concept's context from observational images, so concepts that"
            " those have count as errors"
        ),
    }
    return {"verdicts": verdicts, "rows": shown, "trained": trained[kind]} if verdicts else None


def codes_of(metrics: dict) -> list[dict]:
    """What a card says of the codes: each shown score, an untrained model's, and its floor; empty
    if they were not measured.
    """
    scores = metrics.get("codes", {}).get("c", {})
    shown = {
        "own_block": "a concept's true value and its prediction from its own block, correlation",
        "other_block": "the same from the best other block",
        "mcc": "mean correlation of blocks and true factors, matched one to one",
    }
    return [
        {"name": name}
        | {part: float(scores[measure][part]) for part in ("value", "untrained", "floor")}
        for measure, name in shown.items()
        if measure in scores
    ]


def results_of(metrics: dict) -> list[EvalResult]:
    protocol, name = shown_protocol(metrics), _data_name(metrics)
    results = []
    for kind, row in metrics["means"].items():
        seen = row.get("presence", {})
        for metric, title, value in (
            (
                "presence",
                "share of samples with all concepts that were asked for",
                seen.get("generated"),
            ),
            ("presence-real", "the same share of real images", seen.get("real")),
            ("sliced-wasserstein-2", "sliced 2-Wasserstein distance", row[protocol]["distance"]),
            ("sliced-wasserstein-2-floor", "its floor between real images", row[protocol]["floor"]),
            ("sliced-wasserstein-2-ratio", "its ratio to the floor", row[protocol]["ratio"]),
            (loss_in(row).replace("_", "-"), LOSSES[loss_in(row)], row[loss_in(row)]),
        ):
            if value is None:
                continue
            results.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=name.split(" ")[0],
                    dataset_name=name,
                    metric_type=metric,
                    metric_name=f"{title}, {kind}",
                    metric_value=round(value, 4),
                )
            )
    return results
