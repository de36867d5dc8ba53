"""Pushing to the Hub: a head, model or pipeline and its card, in one commit."""

import json
import os
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status

from . import cards
from .bases.pipelines import PipelineBase
from .card_metrics import read_metrics
from .contexts import OBS
from .hub import clear_errors
from .origins import without_folders
from .yaml_files import SETTINGS_FILE


MOST_PAIRS = 6  # in the picture of samples
PARTS = ("adapter", "base", "head", "lora", *PipelineBase.companion_names)
# What a push replaces: files of an earlier push that the new one does not have are deleted, or its
# base would be taken for this one's.
MODEL_FILES = [
    "config.json",
    "model_index.json",
    "model*.safetensors",
    "model.safetensors.index*.json",
]
MODEL_FILES += [
    "checks.py",
    "configuration_intervention.py",
    "contexts.py",
    "hub.py",
    "modeling_intervention.py",
    "posterior.py",
]
MODEL_FILES += [
    "blocks.py",
    "files.py",
    "flow.py",
    "flow_head.py",
    "mechanisms.py",
    "mixtures.py",
    "structural.py",
]
MODEL_FILES += [f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "safetensors", "py")]
CARD_FILES = [cards.CARD_FILE, cards.SAMPLES_FILE, cards.FLOORS_FILE, SETTINGS_FILE]


class CardPushMixin:
    """What a model or pipeline is pushed to the Hub by."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        metrics: str | os.PathLike | None = None,
        license: str | None = None,
        dataset_id: str | None = None,
    ) -> CommitInfo:
        """Push to the Hub, with a model card, in one commit: what is there stays as it is until all
        of it has arrived. Where the folder that this was loaded from has a card that somebody
        edited and said so, that one is pushed.

        Args:
            repo_id: repository, `user/name` or `name`; it is made if there is none.
            commit_message, commit_description: of the commit.
            private: whether a new repository is private; `None`: as is usual for its owner.
            token: access token; `None`: the one of `hf auth login`.
            revision: branch to push to; it is made if there is none.
            create_pr: whether to open a pull request instead.
            metrics: `metrics.json` of `hf-intervene evaluate`, or its folder, to show on the card.
            license: licence of the weights, such as `"apache-2.0"`.
            dataset_id: data set on the Hub that it was trained on.

        Returns:
            The commit.

        Raises:
            OSError, ValueError: one sentence: no access, the Hub or the connection fails.
        """
        options = {"private": private, "token": token, "revision": revision}
        options |= {"create_pr": create_pr, "commit_message": commit_message}
        return push_with_card(
            self,
            repo_id,
            metrics,
            license,
            dataset_id,
            **options,
            commit_description=commit_description,
        )


def push_with_card(
    saved: Any,
    repo_id: str,
    metrics: str | os.PathLike | None = None,
    license: str | None = None,
    dataset_id: str | None = None,
    **options: Any,
) -> CommitInfo:
    """`CardPushMixin.push_to_hub` of a head, model or pipeline; `options` are those of
    `push_folder`."""
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        model = saved if hasattr(saved, "sample") else getattr(saved, "model", None)
        if model is not None:  # a head alone draws nothing
            draw_samples(model, Path(folder, cards.SAMPLES_FILE))
        draw_floors(metrics, folder)
        repo_id = full_name(repo_id, options.get("token"))
        own = _own_card(getattr(saved, "_loaded_from", None))
        if own is None:
            cards.write_card(folder, repo_id, metrics, license, dataset_id, head_only=model is None)
        else:
            Path(folder, cards.CARD_FILE).write_text(own, encoding="utf-8")
        return push_folder(folder, repo_id, **options)


def full_name(repo_id: str, token: str | bool | None = None) -> str:
    """`user/name` of a repository given as `name`."""
    if "/" in repo_id:
        return repo_id
    with clear_errors(f"cannot push {repo_id}", repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push the folder of a saved head, model or pipeline with its card: the files of ours in it and
    no others. See `push_to_hub`.

    A README.md on the Hub that was not generated, or that somebody has edited and said so, is kept,
    unless the folder's was too.

    Raises:
        OSError, ValueError: one sentence: no access, the Hub or the connection fails, a link out of
            the folder, metadata of the card that the Hub refuses. Nothing was made or pushed then.
    """
    folder, api = Path(folder), HfApi(token=token)
    root = folder.resolve()
    names = [
        file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    own = set(filter_repo_objects(names, allow_patterns=MODEL_FILES + CARD_FILES))
    if away := next(
        (name for name in sorted(own) if not (folder / name).resolve().is_relative_to(root)), None
    ):
        raise OSError(
            f"{folder / away} is a link to outside of the folder: put the file itself there."
        )
    with clear_errors(
        f"cannot push to {repo_id} (a commit arrives whole or not at all)", repo_id, revision
    ):
        if cards.CARD_FILE in own:
            _check_metadata(folder / cards.CARD_FILE)  # before there is a repository
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(
            filter_repo_objects(
                api.list_repo_files(repo_id, revision=revision),
                allow_patterns=MODEL_FILES + CARD_FILES,
            )
        )
        generated = cards.CARD_FILE in own and cards.is_generated(folder / cards.CARD_FILE)
        if (
            generated
            and cards.CARD_FILE in there
            and not _card_is_generated(repo_id, revision, token)
        ):
            own.discard(cards.CARD_FILE)
        # Not upload_folder: with Xet it commits a large folder in several steps, and a loader in
        # between would find half of it.
        return api.create_commit(
            repo_id,
            [CommitOperationDelete(name) for name in sorted(there - own - {cards.CARD_FILE})]
            + [CommitOperationAdd(name, _content(folder / name)) for name in sorted(own)],
            commit_message=commit_message or "Upload with hf-intervene",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _content(file: Path) -> Path | bytes:
    """A file to push, or what is to be pushed in its place: no path on this machine."""
    if file.suffix != ".json":
        return file
    text = file.read_text(encoding="utf-8")
    changed = without_folders(text)
    return file if changed == text else changed.encode()


def _own_card(folder: Path | None) -> str | None:
    """The card in a folder that somebody has edited and said so; `None` if there is none."""
    path = None if folder is None else folder / cards.CARD_FILE
    if path is None or not path.is_file() or cards.is_generated(path):
        return None
    return path.read_text(encoding="utf-8")


def _check_metadata(card: Path) -> None:
    """Raise a ValueError of one sentence if the Hub refuses the metadata at the top of a card."""
    text = card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
        # Not `ModelCard.validate`: before version 2 of its library it asks the public Hub, and
        # sends it the card, also where another one is pushed to.
        asked = {"repoType": "model", "content": text}
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked)
        if answer.status_code == 400:
            raise ValueError(answer.text)
        hf_raise_for_status(answer)
    except HfHubHTTPError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error)
        with suppress(ValueError, LookupError, TypeError):
            reason = "; ".join(item["message"] for item in json.loads(reason)["errors"])
        raise ValueError(
            f"the metadata at the top of {card.name} are refused:"
            f" {' '.join(reason.split()).rstrip('.')}; nothing was pushed."
        ) from error


def _card_is_generated(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    try:
        return cards.is_generated(
            hf_hub_download(repo_id, cards.CARD_FILE, revision=revision, token=token)
        )
    except EntryNotFoundError:
        return True


def draw_samples(model: Any, path: str | os.PathLike, images: int = 8) -> None:
    """A picture of samples of an `InterventionModel`: a row for each context and up to six pairs,
    the same noise down each column.
    """
    from .pixels import to_uint8
    from .plots import save, strips  # here, or every import of the package would load Matplotlib

    pairs = ["+".join(pair) for pair in combinations(model.concepts, 2)]
    shown = pairs[:: -(-len(pairs) // MOST_PAIRS)] if pairs else []
    contexts = [OBS, *model.concepts, *shown]
    noise = torch.randn(images, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    modes = {module: module.training for module in model.modules()}
    model.eval()  # or batch norms would learn from it
    samples = {name: model.sample(name, noise=noise, output_type="np") for name in contexts}
    for module, training in modes.items():
        module.training = training
    if len(model.base.image_shape) == 4:  # of a clip the middle frame
        samples = {name: clips[:, clips.shape[1] // 2] for name, clips in samples.items()}
    save(strips({name: to_uint8(array) for name, array in samples.items()}), path, dpi=100)


def draw_floors(metrics: str | os.PathLike | None, folder: str | os.PathLike) -> None:
    """The picture of measured distances and their floors for a card, where `write_card` finds it;
    none without metrics.
    """
    from .plots import floor_chart, save

    path = Path(folder, cards.FLOORS_FILE)
    measured = read_metrics(metrics)
    if measured is not None:
        save(floor_chart(measured), path)


__all__ = ["CardPushMixin", "push_folder", "push_with_card"]
