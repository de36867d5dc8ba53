"""The command `hf-intervene`. Every sub-command calls what Python users call, and imports it only
when it runs. Names and words are checked before torch is imported, which takes seconds.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from .cli_images import edit, sample, show
from .cli_parser import make_parser as _make_parser
from .errors import spoken
from .logging import bars_on_terminals_only, disable_progress_bars
from .options import READING, READING_DEFAULTS
from .pretrained import concepts_of, located
from .sources import check_source


def demonstrate(arguments: argparse.Namespace) -> int:
    """Train, save, measure, draw; see `demo.py`."""
    from . import demo

    bars_on_terminals_only()
    default = "outputs/demo-pretrained" if arguments.pretrained else "outputs/demo"
    run = demo.run_pretrained if arguments.pretrained else demo.run
    return run(Path(arguments.output or default), arguments.dataset)


def concepts(arguments: argparse.Namespace) -> int:
    """Print what a saved pipeline or model can be intervened on."""
    names = list(concepts_of(arguments.pipeline))
    from .contexts import OBS

    result = {"concepts": names, "contexts": [OBS, *names]}
    words = f"--interventions {quote('+'.join(names[:2]))} --output pair.png"
    command = f"hf-intervene sample {quote(arguments.pipeline)} {words}"
    return show(arguments, result, "\n".join(names), [command])


def support(arguments: argparse.Namespace) -> int:
    """Print where a head enters a pipeline of diffusers, how its denoiser is called, and what that
    keeps.
    """
    from dataclasses import asdict

    from . import hub

    index = hub.folder(located(arguments.pipeline), ["model_index.json"]) / "model_index.json"
    if index.is_file() and hub.read_json(index).get("_class_name") == "InterventionPipeline":
        raise ValueError(
            f"{arguments.pipeline} is an intervention pipeline, and has its head already: see"
            f" hf-intervene concepts {quote(arguments.pipeline)}."
        )
    from .bases.pretrained import load_pipeline
    from .pipeline_support import support as found_support

    disable_progress_bars()
    pipe = load_pipeline(arguments.pipeline, f"the pipeline {arguments.pipeline!r}")
    found = found_support(pipe, arguments.prompt, arguments.size)
    return show(arguments, asdict(found), found)


def card(arguments: argparse.Namespace) -> int:
    """Write the model card and its pictures of a saved model, and push all of it when asked."""
    from .cards import CARD_FILE

    if (arguments.private or arguments.revision) and not arguments.push:
        raise ValueError("--private and --revision need --push.")
    folder = str(located(arguments.model))
    own = Path(folder, CARD_FILE)
    shipped = folder != arguments.model
    if shipped and not arguments.push:
        if arguments.metrics or arguments.license or arguments.dataset_id:
            raise ValueError(
                f"{arguments.model} comes with the package, and its card is not written anew: leave"
                " --metrics, --license and --dataset-id out, or save it in a folder of your own"
                " first."
            )
        return show(arguments, {"card": str(own)}, own)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}.")
    from .cards import SAMPLES_FILE, card_path, is_generated, new_pictures, write_card
    from .pipeline import load_model
    from .push import draw_floors, draw_samples, full_name, push_folder

    disable_progress_bars()
    model = load_model(folder)
    edited = bool(arguments.push) and own.is_file() and not own.is_symlink()
    edited = edited and not is_generated(own)
    path = own if edited else card_path(folder)
    name = full_name(arguments.push) if arguments.push else None
    if edited and (arguments.metrics or arguments.license or arguments.dataset_id):
        warnings.warn(
            f"{own} was edited by hand and is pushed as it is: --metrics, --license and"
            " --dataset-id are not used.",
            stacklevel=2,
        )
    if not edited:  # or it stays as it is, with its pictures
        measured = path.is_file() and "## Measured" in path.read_text(encoding="utf-8")
        if measured and not arguments.metrics:
            warnings.warn(
                "the card showed measurements, and the new one has none: --metrics adds them.",
                stacklevel=2,
            )
        with new_pictures(path.parent):
            draw_samples(model, path.with_name(SAMPLES_FILE))
            draw_floors(arguments.metrics, path.parent)
            write_card(folder, name, arguments.metrics, arguments.license, arguments.dataset_id)
    result = {"card": str(path)}
    if name:
        commit = push_folder(folder, name, private=arguments.private, revision=arguments.revision)
        result["commit"] = commit.commit_url
    share = [] if name else [f"hf-intervene card {quote(arguments.model)} --push USER/NAME"]
    return show(arguments, result, "\n".join(result.values()), share)


def check(arguments: argparse.Namespace) -> int:
    """Say whether a data set's contexts can identify its concepts. Returns 1 if an assumption
    fails, or training would refuse the data.
    """
    if find_spec("sklearn") is None:  # said before images are read, which may take minutes
        raise ImportError(
            "the check needs scikit-learn, which is not installed: pip install"
            ' "hf-intervene[eval]".'
        )
    if "/" in arguments.dataset or Path(arguments.dataset).exists():
        check_source(arguments.dataset)  # before anything large is imported
    if not arguments.json:
        print(f"reading the images of {arguments.dataset} ...", file=sys.stderr, flush=True)
    from .data import ContextImages, load_contexts
    from .data.images import MIN_IMAGES
    from .metrics import identifiability
    from .trainer.building import reason_against
    from .trainer.settings import TrainArguments, check_reading
    from .trainer.simulated import SIMULATED

    bars_on_terminals_only()
    reading = {name: getattr(arguments, name) for name in READING}
    if arguments.dataset in SIMULATED:
        check_reading(arguments.dataset, reading)
        simulated = SIMULATED[arguments.dataset](arguments.resolution, 3)
        drawn = max(arguments.images, MIN_IMAGES)  # more than that are not tested
        images, _ = simulated.training(drawn, 1, 0.1, arguments.seed)
        data = ContextImages.from_arrays(images, simulated.concepts)
    else:
        data = ContextImages.from_dataset(
            load_contexts(arguments.dataset, **reading), None, arguments.resolution, complete=False
        )
        images = data.by_context()
    settings = {"dataset": arguments.dataset, "resolution": arguments.resolution, **reading}
    lacking = reason_against(TrainArguments(**settings), data)
    if not arguments.json:
        count = sum(map(len, images.values()))
        print(f"testing {count:,} images of {len(images)} contexts ...", file=sys.stderr)
    result = identifiability.check(images, max_images=arguments.images, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        print(result)
    if lacking and not arguments.json:
        print(f"It cannot be trained on as it is: {lacking}")
    elif not arguments.json:
        held = (
            "The data can be trained on."
            if result.passed
            else "You can train all the same; a concept that fails may not be learnt."
        )
        words = f"--dataset {quote(arguments.dataset)} --resolution {arguments.resolution}"
        for name, value in reading.items():
            if value not in (None, READING_DEFAULTS[name]):
                words += f" --{name} {quote(value)}"
        print(f"{held}\ntry next:\n  hf-intervene train {words} --output_dir outputs/mine")
    return 0 if result.passed and not lacking else 1


def app(arguments: argparse.Namespace) -> int:
    """Serve the page of a pipeline, or export it."""
    if find_spec("gradio") is not None:  # which comes first if it is not there
        concepts_of(arguments.pipeline)  # a wrong name costs no large import
    if arguments.export is None:
        from .app import launch

        launch(arguments.pipeline, arguments.host, arguments.port)
        return 0
    from .space import export

    disable_progress_bars()
    folder = export(arguments.pipeline, arguments.export)
    print(
        f"{folder}   (a Space: push it to the Hub as it is; here: pip install -r requirements.txt"
        " && python app.py)"
    )
    return 0


def completion(arguments: argparse.Namespace) -> int:
    """Print the script that completes commands and options in a shell."""
    import shtab

    recipes = {name: _recipe_parser(name) for name in ("train", "evaluate")}
    print(shtab.complete(make_parser(recipes), arguments.shell))
    return 0


def make_parser(recipes: dict[str, argparse.ArgumentParser] | None = None) -> Any:
    """The parser of all commands; see `cli_parser.make_parser`."""
    from . import __version__

    runs = {
        "demo": demonstrate,
        "sample": sample,
        "edit": edit,
        "concepts": concepts,
        "check": check,
        "support": support,
        "card": card,
        "app": app,
        "completion": completion,
    }
    return _make_parser(runs, __version__, recipes or {})


def _recipe_parser(name: str) -> argparse.ArgumentParser:
    from .evaluation.command import make_parser as evaluation_parser
    from .trainer.parsing import make_parser as training_parser

    if name == "evaluate":
        return evaluation_parser()
    parser = training_parser()
    # These two are read before the others.
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, for machines"
    )
    return parser


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # The source line is for who wrote it.
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"warning: {message}\n"
    )
    # train and evaluate have option parsers of their own.
    if argv[:1] == ["train"]:
        from .trainer import command as training

        return training.main(argv[1:])
    if argv[:1] == ["evaluate"]:
        from .evaluation import command as evaluation

        return evaluation.main(argv[1:])
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
