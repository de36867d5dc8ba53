"""The parser of `hf-intervene`: words, help and examples. It imports nothing heavy: help and
mistakes are answered at once.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .errors import printable
from .options import add_reading_options, seed, whole_number


PIPELINE = (
    "folder or Hub name of a saved pipeline or model, or `avatars` or `quad`, which come with the"
    " package"
)
# Those of `demo.py`, whose imports take seconds.
DEMO_DATASETS = ("avatars", "quad")
SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = {
    None: """
  hf-intervene sample avatars --interventions glasses+hat --output pair.png
  hf-intervene app                                       a page to play with
  hf-intervene demo                                      train, measure and draw, in minutes
  hf-intervene check my-images && hf-intervene train --dataset my-images --output_dir outputs/mine
  hf-intervene COMMAND --help                            options and examples of a command

HF_INTERVENE_VERBOSITY=info (or debug, warning, error) prints more or less.""",
    "demo": """
  hf-intervene demo
  hf-intervene demo --dataset quad --output outputs/demo-quad
  hf-intervene demo --pretrained --output outputs/two-regimes""",
    "train": """
  hf-intervene train --config my.yaml --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine
  hf-intervene train --dataset my-images --resolution 64 --output_dir outputs/mine --resume auto""",
    "evaluate": """
  hf-intervene evaluate --model avatars --output outputs/avatars-metrics
  hf-intervene evaluate --model outputs/mine/model --output outputs/mine/metrics --edits""",
    "sample": """
  hf-intervene sample avatars --interventions glasses+hat --output pair.png
  hf-intervene sample quad --interventions size=0.5 --seed 3 --output half/
  hf-intervene sample user/name --interventions smile@0.9 --output smiles.png""",
    "edit": """
  hf-intervene edit avatars photo.png --resize --interventions glasses --output edited.png
  hf-intervene edit outputs/mine/model photo.png --interventions smile+hat --output edited/
  hf-intervene edit quad photo.png --reference quad1=other.png --output edited.png""",
    "concepts": """
  hf-intervene concepts avatars
  hf-intervene concepts outputs/mine/model --json""",
    "check": """
  hf-intervene check my-images --resolution 64
  hf-intervene check my-data --image-column picture --context-column group --split test
  hf-intervene check avatars --json > report.json""",
    "support": """
  hf-intervene support black-forest-labs/FLUX.1-schnell
  hf-intervene support path/to/pipeline --size 512 --json""",
    "card": """
  hf-intervene card outputs/mine/model --metrics outputs/mine/metrics
  hf-intervene card outputs/mine/model --license apache-2.0 --push user/name""",
    "app": """
  hf-intervene app
  hf-intervene app outputs/demo/pipeline --port 8000
  hf-intervene app user/name --export my-space""",
    "completion": """
  hf-intervene completion bash > ~/.local/share/bash-completion/completions/hf-intervene
  hf-intervene completion zsh > ~/.zfunc/_hf-intervene""",
}


class Parser(argparse.ArgumentParser):
    """A parser that proposes the nearest word where one is unknown."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            known = re.findall(r"[\w.-]+", found[2])
            near = difflib.get_close_matches(found[1], known, n=1)
            if near:
                message += f". Did you mean {near[0]!r}?"
        super().error(printable(message))


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reference",
        metavar="CONCEPT=IMAGE",
        action="append",
        default=[],
        help="gives a concept the value that it has in an image; may be repeated",
    )
    command.add_argument(
        "--reference-context", help="context the reference images came from (default obs)"
    )
    command.add_argument(
        "--num-inference-steps",
        type=whole_number(1, 10**6),
        default=50,
        help="steps of a diffusion model (default 50)",
    )
    command.add_argument(
        "--guidance-scale",
        type=float,
        help="diffusion models: above 1, a stronger effect (default: the model's own for samples, 1"
        " for edits)",
    )
    command.add_argument(
        "--resize", action="store_true", help="crop and resize given images to the model's size"
    )


def _path(text: str) -> str:
    if not text.strip():  # it would be the folder one is in
        raise argparse.ArgumentTypeError(
            "an empty text is no name of a file or folder ('.' is the folder you are in)"
        )
    return text


def make_parser(
    runs: Mapping[str, Callable[[argparse.Namespace], int]],
    version: str,
    recipes: Mapping[str, argparse.ArgumentParser] = {},
) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        runs: what a command does, by its name; `train` and `evaluate` parse their own options.
        version: of the package.
        recipes: parsers of `train` and `evaluate`, for the completion of words.
    """
    plain: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    description = "Intervene on concepts of generative models, one at a time or together."
    parser = Parser(
        "hf-intervene", description=description, epilog=f"examples:{EXAMPLES[None]}", **plain
    )
    parser.add_argument("--version", action="version", version=f"hf-intervene {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(
        name: str,
        help: str,
        json: bool = False,
        **options: Any,
    ) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}."
        command = commands.add_parser(
            name,
            help=help,
            description=text,
            epilog=f"examples:{EXAMPLES[name]}",
            **plain,
            **options,
        )
        command.set_defaults(run=runs.get(name))
        if json:
            command.add_argument(
                "--json", action="store_true", help="print the result as JSON, for machines"
            )
        return command

    command = add("demo", "train, measure and draw, in minutes and without network")
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="heads on a pretrained autoencoder, frozen and with LoRA",
    )
    command.add_argument(
        "--dataset",
        choices=DEMO_DATASETS,
        default=DEMO_DATASETS[0],
        help="avatars: faces (default); quad: the paper's coloured shapes",
    )
    command.add_argument(
        "--output",
        type=_path,
        help="folder for everything (default outputs/demo or outputs/demo-pretrained)",
    )

    for name, help in (
        ("train", "train a head on images from several contexts"),
        ("evaluate", "measure a model"),
    ):
        parents: dict[str, Any] = {}
        if name in recipes:
            parents = {"parents": [recipes[name]], "add_help": False}
        add(name, help, **parents)

    command = add("sample", "sample images under interventions", json=True)
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument(
        "--interventions",
        default="obs",
        help=(
            "one concept (hat), several joined with + (glasses+hat), with a strength (hat=0.5), at"
            " a quantile of its learnt range (hat@0.9), or obs: nothing (default obs)"
        ),
    )
    command.add_argument(
        "--num-images", type=whole_number(1, 10**9), default=8, help="how many (default 8)"
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="another one draws other images (default 0)"
    )
    _add_options(command)
    command.add_argument(
        "--output",
        type=_path,
        required=True,
        help="a picture (a labelled grid, enlarged) or a folder (one plain file per image)",
    )

    command = add("edit", "edit an image by interventions", json=True)
    command.add_argument("pipeline", help=PIPELINE)
    command.add_argument("image", help="the image, of the model's size unless --resize is given")
    command.add_argument("--interventions", help="as for sample, such as glasses+hat")
    command.add_argument(
        "--context", default="obs", help="context that the image came from (default obs)"
    )
    _add_options(command)
    command.add_argument("--output", type=_path, required=True, help="as for sample")

    command = add("concepts", "print what a pipeline can be intervened on", json=True)
    command.add_argument("pipeline", help=PIPELINE)

    command = add(
        "check",
        "say whether a data set's contexts can identify its concepts, before training",
        json=True,
    )
    command.add_argument(
        "dataset",
        help=(
            "quad, ident3d, avatars, mnist (--resolution 28), an image folder, a saved data set "
            "or a Hub name"
        ),
    )
    add_reading_options(command)
    command.add_argument(
        "--resolution",
        type=whole_number(1, 2**14),
        default=32,
        help="images are cropped and resized to this (default 32)",
    )
    command.add_argument(
        "--images",
        type=whole_number(1),
        default=2000,
        help="images of a context that are tested, at most (default 2000)",
    )
    command.add_argument("--seed", type=seed, default=0, help="of the test's split (default 0)")

    command = add(
        "support",
        "print how a head enters a pipeline of diffusers, and what it keeps",
        json=True,
    )
    command.add_argument("pipeline", help="folder or Hub name of a pipeline of diffusers")
    command.add_argument(
        "--prompt", default="", help="the prompt to record it with (default: the empty one)"
    )
    command.add_argument(
        "--size", type=int, help="side of the images in pixels (default: the pipeline's own)"
    )

    command = add(
        "card",
        "write a saved model's card and its pictures, and push it to the Hub",
        json=True,
    )
    command.add_argument(
        "model", type=_path, help="folder of a saved model or pipeline, or avatars or quad"
    )
    command.add_argument(
        "--metrics", help="metrics.json of `hf-intervene evaluate`, or its folder, to show"
    )
    command.add_argument("--license", help="of the weights, such as apache-2.0")
    command.add_argument("--dataset-id", help="data set on the Hub that it was trained on")
    command.add_argument(
        "--push", metavar="USER/NAME", help="push the folder to this repository on the Hub"
    )
    command.add_argument(
        "--private", action="store_true", default=None, help="a new repository is private"
    )
    command.add_argument("--revision", help="branch to push to (default: main)")

    command = add("app", "serve a page to play with: sample, edit, compose (needs the extra `app`)")
    command.add_argument(
        "pipeline", nargs="?", default="avatars", help=f"{PIPELINE} (default avatars)"
    )
    command.add_argument(
        "--host", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    command.add_argument(
        "--port",
        type=whole_number(0, 2**16 - 1),
        help="port to listen at (default: the first free one from 7860 on)",
    )
    command.add_argument(
        "--export",
        type=_path,
        metavar="DIR",
        help="write the page as a Hugging Face Space instead of serving it",
    )

    command = add("completion", "print the script that completes commands and options in a shell")
    command.add_argument("shell", choices=SHELLS)
    return parser
