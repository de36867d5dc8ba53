"""Read and check the columns of a data set with images, contexts and prompts."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, List
from datasets import Image as ImageFeature

from ..contexts import (
    OBS,
    context_name,
    named_concepts,
    parse_context,
    shown,
    validate_concepts,
)


logger = logging.getLogger(__name__)


def read_contexts(
    dataset: Dataset, concepts: Sequence[str] | None = None
) -> tuple[Dataset, list[str], tuple[str, ...]]:
    """Read the context of every image.

    Args:
        dataset: with the columns `image` and `context`; see `ContextImages.from_dataset`.
        concepts: the concepts. Images whose context names other concepts are left out, with a
            warning. `None` means all concepts that the contexts name, in alphabetical order.

    Returns:
        dataset: the rows that are used.
        names: the canonical name of the context of each row.
        concepts: the concepts.

    Raises:
        ValueError: a column is missing, an image has no context, no context names a concept, or a
            concept has no context.
    """
    for column in ("image", "context"):
        if column not in dataset.column_names:
            raise ValueError(
                f"the data set has no column {column!r}, only {', '.join(dataset.column_names)}:"
                " rename or add it."
            )
    contexts = [
        _as_context(row, value, dataset.features["context"])
        for row, value in enumerate(dataset["context"])
    ]
    listed = [named_concepts(context) for context in contexts]
    for context, found_in in zip(contexts, listed):
        if OBS in found_in and len(found_in) > 1:
            raise ValueError(
                f"the context {shown(context)} names {OBS!r} beside a concept: it stands for no"
                " intervention, and stands alone; rename that folder or cell."
            )
    named = [set(names) - {OBS} for names in listed]
    found = sorted(set().union(*named))
    if concepts is None and not found:
        raise ValueError(
            "the data set has no context but the observational one: nothing was intervened on,"
            " nothing can be learnt."
        )
    concepts = validate_concepts(found if concepts is None else concepts)
    _warn_of_alike(concepts)
    if missing := [name for name in concepts if name not in found]:
        raise ValueError(
            f"no context names the concept {missing[0]!r}; the concepts of the data set are"
            f" {', '.join(found)}."
        )
    kept = [row for row, names in enumerate(named) if names <= set(concepts)]
    if len(kept) < len(contexts):
        logger.warning(
            "%d of %d images are left out: their contexts name other concepts (%s) than %s.",
            len(contexts) - len(kept),
            len(contexts),
            ", ".join(sorted(set().union(*named) - set(concepts))),
            ", ".join(concepts),
        )
        dataset, contexts = dataset.select(kept), [contexts[row] for row in kept]
    known: dict[str, str] = {}  # parsing is slow, and there are few different contexts
    for context in contexts:
        key = repr(context)
        if key not in known:
            known[key] = context_name(context, concepts)
    names = [known[repr(context)] for context in contexts]
    _warn_of_joined(names, contexts)
    return dataset, names, concepts


def _warn_of_alike(concepts: Sequence[str]) -> None:
    """Warn of concepts whose names differ in nothing but capitals and spaces."""
    seen: dict[str, str] = {}
    for name in concepts:
        key = "".join(name.casefold().split())
        if key in seen:
            logger.warning(
                "the names of the concepts %r and %r are almost the same: rename a folder if one"
                " concept is meant.",
                seen[key],
                name,
            )
        seen.setdefault(key, name)


def _warn_of_joined(names: Iterable[str], contexts: Iterable[str | list[str]]) -> None:
    """Warn of contexts that are written in several ways, as two folders `hat` and ` hat ` are.

    Args:
        names: the canonical names.
        contexts: what they were read from. In a list the order means nothing.
    """
    ways: dict[str, set[str]] = {}
    for name, context in zip(names, contexts):
        if isinstance(context, str):
            ways.setdefault(name, set()).add(context)
    for name, texts in ways.items():
        if len(texts) > 1:
            logger.warning(
                "the contexts %s are taken as one, %r: rename a folder or cell if two are meant.",
                " and ".join(sorted(map(repr, texts))),
                name,
            )


def in_order(names: Iterable[str], concepts: Sequence[str]) -> list[str]:
    """Sort the different names of contexts: fewer concepts first, then in the order of concepts."""

    def key(name: str) -> tuple:
        strengths = parse_context(name, concepts)
        positions = [concepts.index(concept) for concept in strengths]
        return len(positions), positions, list(strengths.values())

    return sorted(set(names), key=key)


def undecoded(dataset: Dataset, clips: bool = False) -> Dataset:
    """Return the data set with an image column that holds bytes and paths, not decoded images; with
    `clips`, lists of those where a clip has several files.

    Raises:
        ValueError: the image column holds neither images nor paths, or lists where no clips are
            wanted.
    """
    if isinstance(getattr(dataset.features["image"], "feature", None), ImageFeature):
        if not clips:
            raise ValueError(
                "the image column holds lists of images: give frames, the number of frames of a"
                " clip."
            )
        return dataset.cast_column("image", List(ImageFeature(decode=False)))
    if not isinstance(dataset.features["image"], ImageFeature):
        try:
            dataset = dataset.cast_column("image", ImageFeature())
        except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow raises these
            raise ValueError(
                f"the image column holds {dataset.features['image']}, not images or paths of"
                " images."
            ) from error
    return dataset.cast_column("image", ImageFeature(decode=False))


def read_prompts(dataset: Dataset) -> tuple[list[str] | None, torch.Tensor | None]:
    """Read the prompts of a data set.

    Returns:
        The different prompts, and for each image the number of its prompt, int64 (N,). Both are
        `None` if there is no column `prompt`.

    Raises:
        ValueError: a prompt is not text.
    """
    if "prompt" not in dataset.column_names:
        return None, None
    texts = dataset["prompt"]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"the prompt of image {row} is {text!r}, which is not text: leave it empty, or"
                " write it as text."
            )
    texts = [text or "" for text in texts]
    prompts = sorted(set(texts))
    number = {text: n for n, text in enumerate(prompts)}
    return prompts, torch.tensor([number[text] for text in texts])


def _as_context(row: int, value: Any, feature: Any) -> str | list[str]:
    """Return a cell of the context column as a name or a list of names."""
    inner = getattr(feature, "feature", None)  # the feature of the entries of a list
    if isinstance(feature, ClassLabel) and value is not None and value >= 0:  # -1: no label
        value = feature.int2str(value)
    if isinstance(inner, ClassLabel) and value is not None:
        value = [inner.int2str(label) for label in value]
    # Systems write the same letters differently: macOS has accents as characters of their own.
    if isinstance(value, str) and value.strip():
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return [unicodedata.normalize("NFC", name) for name in value]
    # An empty cell does not count as observational: a gap in a table would silently mix images
    # with interventions into that context.
    missing = value is None or value == -1 or not str(value).strip()
    kind = "no context" if missing else f"the context {value!r}"
    read_so = "; words such as NA and null in a table are none" if value is None else ""
    raise ValueError(
        f"image {row} has {kind}: give a name ({OBS!r} for observational images), a list of names"
        f" or a class label{read_so}."
    )
