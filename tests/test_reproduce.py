"""reproduce.py: the plan of a table, its figures in every form, and what is said about them; a
small table end to end.
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from hf_intervene import evaluation
from hf_intervene.data import quad
from hf_intervene.training import reproduce
from hf_intervene.training.reproduce import HEADED, SCALES, TABLES
from hf_intervene.training.studies import reproduced
from hf_intervene.training.studies.tuning import (
    GRID,
    TRIALS,
    TUNING_SEED,
    best_trial,
    choice_score,
)
from hf_intervene.training.studies.verdicts import compare_rows, holm, paired_p


def context(kind, value, bits=1.0, presence=None):
    found = {"kind": kind, "images": 64, "bits_per_pixel": bits}
    for name, shift, floor in (("independent", 0, 0.02), ("paper", 0.05, 0.08)):
        found[name] = {"distance": value + shift, "floor": floor}
    if presence is not None:
        sides = {"generated": presence, "real": 0.8}
        found["presence"] = {side: {"all_wanted": {"value": x}} for side, x in sides.items()}
    return found


def metrics(concept, composition=None, bits=1.0, other=None, presence=None):
    """What evaluate.py writes: a concept, and two pairs, one of them the paper's."""
    contexts = {"a": context("concept", concept, bits, presence)}
    if composition is not None:
        contexts["a+b"] = context("composition", composition, bits)
        contexts["b+c"] = context("composition", composition if other is None else other, bits)
    means = {}
    for kind in {row["kind"] for row in contexts.values()}:
        rows = [row for row in contexts.values() if row["kind"] == kind]
        means[kind] = {
            name: {
                "distance": np.mean([row[name]["distance"] for row in rows]),
                "floor": rows[0][name]["floor"],
                "ratio": 1.0,
            }
            for name in ("independent", "paper")
        }
    return {"contexts": contexts, "means": means}


def runs(*seeds, first=0):
    """Of a row: `run_of` by seed."""
    return {
        str(first + k): reproduced.run_of(metrics(*figures), ("a+b",))
        for k, figures in enumerate(seeds)
    }


@pytest.fixture
def results():
    return {
        HEADED: runs((0.10, 0.11, 1.02), (0.10, 0.12, 1.04)),
        "base pooled": runs((0.30, 0.30, 1.0), (0.30, 0.31, 1.0)),
        "frozen": runs((0.10, 0.40, 1.0), (0.11, 0.40, 1.0)),
    }


def a_plan(tmp_path, table="quad-dependent", scale="smoke"):
    return reproduce.Plan(TABLES[table], SCALES[scale], tmp_path, "bundled")


def plan(tmp_path, table="quad-dependent", rows=None, seeds=2):
    chosen = TABLES[table]
    made = a_plan(tmp_path, table)
    jobs = made.jobs(rows or [*chosen.rows, *chosen.baselines], seeds)
    for (row, _), job in jobs.items():
        if row.startswith("tuning"):
            measured(job, metrics(0.1))
    return jobs


def measured(job, found):
    (job.folder / "metrics").mkdir(parents=True)
    (job.folder / "metrics" / "metrics.json").write_text(json.dumps(found))


def option(words, name):
    """The last value of an option."""
    return words[len(words) - words[::-1].index(f"--{name}")]


def test_the_plan_has_every_row_and_seed_after_what_it_waits_for(tmp_path):
    jobs = plan(tmp_path)
    table = TABLES["quad-dependent"]
    assert {key for key in jobs if not key[0].startswith("tuning")} == {
        (row, seed) for row in (*table.rows, *table.baselines) for seed in range(2)
    }
    order = list(jobs.values())
    assert len({job.folder for job in order}) == len(order)
    for job in order:
        assert all(order.index(other) < order.index(job) for other in job.after)
    words = jobs["frozen", 1].commands()[0]
    assert words[words.index("--base") + 1] == str(jobs["base", 1].folder / "model" / "base")
    assert words[words.index("--seed") + 1] == words[words.index("--data_seed") + 1] == "1"


def test_rows_that_need_the_base_bring_it(tmp_path):
    assert [key for key in plan(tmp_path / "a", rows=["frozen"], seeds=1)] == [
        ("tuning base", 0),
        ("base", 0),
        ("tuning frozen", 0),
        ("frozen", 0),
    ]
    assert list(plan(tmp_path / "b", rows=[HEADED], seeds=1)) == [
        (f"tuning {HEADED}", 0),
        (HEADED, 0),
    ]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_table_has_valid_settings(table, scale, tmp_path):
    from hf_intervene.trainer.parsing import parse_arguments

    chosen, made = TABLES[table], a_plan(tmp_path, table, scale)
    jobs = made.jobs(list(chosen.rows), 1)
    for (row, _), job in jobs.items():
        if row.startswith("tuning"):
            measured(job, metrics(0.1))
    for (row, number), job in jobs.items():
        script, *words = job.commands()[0]
        settings = parse_arguments(words).flat()
        assert script == "train.py" and settings["dataset"] == chosen.dataset
        assert settings["variant"] == chosen.variant
        row_of = row.removeprefix("tuning ")
        trial = made.trials(row_of)[number] if row != row_of else {}
        changed = chosen.rows[row_of] | trial
        changed = {name: value for name, value in changed.items() if name != "base"}
        assert {name: settings[name] for name in changed} == changed
        evaluation.make_parser().parse_args(job.commands()[1][1:])


# The protocol: what a choice may see, how many trials, which seeds


def test_all_methods_have_the_same_number_of_trials():
    methods = {
        row for table in TABLES.values() if table.tuned for row in (*table.rows, *table.baselines)
    }
    assert methods == set(GRID)
    for row, settings in GRID.items():
        assert len(settings) == TRIALS == len({json.dumps(x, sort_keys=True) for x in settings}), (
            row
        )


@pytest.mark.parametrize("table", [name for name, table in TABLES.items() if table.tuned])
def test_no_held_out_pair_is_seen_by_a_choice(table, tmp_path):
    """Trials have a seed of their own and measure single concepts alone; runs measure all."""
    chosen, made = TABLES[table], a_plan(tmp_path, table, "cpu")
    jobs = made.jobs([*chosen.rows, *chosen.baselines], 10)
    trials = {key: job for key, job in jobs.items() if key[0].startswith("tuning ")}
    assert len(trials) == TRIALS * (len(chosen.rows) + len(chosen.baselines))
    assert len(jobs) - len(trials) == 10 * (len(chosen.rows) + len(chosen.baselines))
    for job in trials.values():
        if not made._needs_base(job.folder.name.rpartition("-")[0]):
            measured(job, metrics(0.1))
    for (row, seed), job in jobs.items():
        is_trial = row.startswith("tuning ")
        if not is_trial and not all(other.metrics() for other in job.after):
            continue
        for script, *words in job.commands():
            if script != "train.py":
                assert ("--singles" in words) == is_trial, (row, words)
            if "--data_seed" in words:
                expected = TUNING_SEED if is_trial else seed
                assert option(words, "seed") == option(words, "data_seed") == str(expected)


def test_images_of_a_choice_are_of_single_concepts():
    arguments = ("quad", quad.CONCEPTS, 2, 0, 16, 3, "dependent")
    for found in evaluation.held_out_images(*arguments, singles=True):
        assert tuple(found) == quad.TRAIN_CONTEXTS
    every = evaluation.held_out_images(*arguments)[0]
    assert tuple(every) == quad.TRAIN_CONTEXTS + quad.HELD_OUT and len(quad.HELD_OUT) == 15


def test_the_best_trial_by_presence_and_distance():
    far, near = metrics(0.2, presence=0.8), metrics(0.04, presence=0.8)
    assert choice_score(far) == pytest.approx((0.02 / 0.2 + 1) / 2)
    assert choice_score(metrics(0.04, presence=0.2)) == pytest.approx((0.5 + 0.25) / 2)
    assert choice_score(metrics(0.04, presence=1.0)) == choice_score(near)
    assert choice_score(metrics(0.04)) == pytest.approx(0.5)
    assert best_trial([far, near, near]) == 1
    assert best_trial([metrics(0.04, presence=0.1), metrics(0.06, presence=0.8)]) == 1
    with pytest.raises(ValueError, match="a\\+b was measured in a trial"):
        best_trial([near, metrics(0.04, 0.1)])
    with pytest.raises(ValueError, match="trial 1 has no metrics"):
        best_trial([near, None])


def test_runs_take_the_setting_that_won(tmp_path):
    made = a_plan(tmp_path, scale="cpu")
    for row in ("conditional-vae", HEADED):
        jobs = made.jobs([row], 2)
        for number, job in enumerate(jobs[row, 0].after):
            measured(job, metrics(0.1 if number == 3 else 0.2))
        for seed in range(2):
            words = jobs[row, seed].commands()[0]
            for key, value in GRID[row][3].items():
                assert option(words, key) == str(value)


def test_a_row_on_a_base_takes_the_best_one(tmp_path):
    made = a_plan(tmp_path, scale="cpu")
    jobs = made.jobs(["frozen"], 1)
    for number in range(TRIALS):
        measured(jobs["tuning base", number], metrics(0.1 if number == 5 else 0.2))
    words = jobs["tuning frozen", 0].commands()[0]
    assert option(words, "base") == str(tmp_path / "tuning" / "base-5" / "model" / "base")
    for number in range(TRIALS):
        measured(jobs["tuning frozen", number], metrics(0.1))
    assert option(jobs["frozen", 0].commands()[0], "base") == str(
        tmp_path / "base-seed0" / "model" / "base"
    )
    assert {jobs["tuning base", 5], jobs["base", 0]} <= set(
        jobs["frozen", 0].after + jobs["tuning frozen", 0].after
    )


# What is said of rows


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.001]) == pytest.approx([0.6, 0.002]) and holm([]) == []
    assert holm([0.9, 0.8]) == [1, 1]


def test_the_test_is_paired():
    """Seeds differ more than rows: only pairs show it; and by the textbook's formula."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=10)
    row, other = seeds + 0.1 + 0.01 * rng.normal(size=10), seeds
    differences = row - other
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(10))
    assert paired_p(row, other) == pytest.approx(2 * student.sf(abs(t), 9)) and t > 20
    assert paired_p([1, 2, 3], [1, 2, 3]) == 1 and paired_p([1, 2], [0, 1]) == 0


def test_verdicts_are_corrected_and_of_seeds_in_common():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4, 10))
    shifts = {HEADED: 0.0, "far": 1.0, "near": 0.02, "better": -1.0}
    results = {
        row: {seed: {"m": shift + 0.05 * x} for seed, x in enumerate(own)}
        for (row, shift), own in zip(shifts.items(), noise)
    }
    results["short"] = {0: {"m": 9.0}, 11: {"m": 9.0}, 12: {"m": 9.0}}
    found = {line["against"]: line for line in compare_rows(results, HEADED, {"m": -1})}
    verdicts = {row: line["verdict"] for row, line in found.items()}
    assert verdicts == {"far": "ahead", "near": "level", "better": "behind"}
    raw = paired_p(*([run["m"] for run in results[row].values()] for row in (HEADED, "far")))
    assert raw < found["far"]["p"] <= 3 * raw
    assert found["far"]["difference"] < 0 and found["far"]["seeds"] == 10
    by_more = compare_rows(results, HEADED, {"m": 1})
    assert {line["against"]: line["verdict"] for line in by_more}["far"] == "behind"


def test_chance_is_rarely_ahead():
    """Of 200 tables of nine rivals that are as good, at most a few call one ahead or behind."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        rows = {
            f"{row}": {seed: {"m": x} for seed, x in enumerate(rng.normal(size=10))}
            for row in range(10)
        }
        wrong += any(line["verdict"] != "level" for line in compare_rows(rows, "0", {"m": 1}))
    assert wrong <= 8  # 2 are expected


def test_figures_of_every_context_and_seed():
    run = reproduced.run_of(metrics(0.1, 0.2, 1.5, other=0.4, presence=0.6), ("a+b",))
    assert run["contexts"]["a"]["distance, independent"] == 0.1
    assert run["contexts"]["b+c"]["distance, paper"] == pytest.approx(0.45)
    assert run["contexts"]["a"]["presence"] == 0.6 and run["images"] == 64
    found = run["measures"]
    assert found["composition distance, independent"] == pytest.approx(0.3)
    assert found["paper's pairs distance, independent"] == 0.2
    assert found["paper's pairs ratio, independent"] == pytest.approx(10)
    assert found["concept presence"] == 0.6 and found["concept bits per pixel"] == 1.5
    every = reproduced.run_of(metrics(0.1, 0.2, other=0.4))["measures"]
    assert every["paper's pairs distance, independent"] == pytest.approx(0.3)


def write(results, out, published=None, notes=(), recipe=None, lacking=()):
    return reproduced.write("t", results, published or {}, list(notes), out, recipe or {}, lacking)


def test_figures_in_every_form(results, tmp_path):
    published = {HEADED: (0.116, 0.127, 0.828), "base pooled": (0.167, None, 0.746)}
    text = write(results, tmp_path, published, ["a note."])
    assert text == (tmp_path / "t.md").read_text() and "- a note." in text
    # Two values 0.01 apart: the t-interval's half width is 12.706 * 0.00707 / sqrt(2).
    assert "| end-to-end | 0.100 ± 0.000 | 5.0 | 0.115 ± 0.064 | 5.8 | 0.115 ± 0.064 |" in text
    assert (
        "| 0.116 / 0.127 / 0.828 |" in text
        and "| 0.167 / 0.746 |" in text
        and "| floor | 0.020 |" in text
    )
    assert "paper's Bernoulli, which is not normalised" in text
    table = pd.read_csv(tmp_path / "t.csv").set_index(["row", "measure"])
    row = table.loc[HEADED, "paper's pairs distance, paper"]
    assert row["mean"] == pytest.approx(0.165) and row["published"] == 0.127 and row["seeds"] == 2
    assert row["high"] - row["low"] == pytest.approx(2 * 0.0635, rel=1e-2)
    tex = (tmp_path / "t.tex").read_text()
    assert (
        tex.count("\\\\") == 6 - 1
        and "\\toprule" in tex
        and "0.115 $\\pm$ 0.064" in tex
        and "±" not in tex
    )
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["results"][HEADED]["1"]["contexts"]["a+b"]["distance, independent"] == 0.12


def test_what_the_figures_say():
    rng = np.random.default_rng(3)
    seeds = 0.1 + 0.01 * rng.normal(size=10)
    found = {
        HEADED: runs(*((x, 2 * x) for x in seeds)),
        "frozen": runs(*((x + 0.001 * y, 3 * x) for x, y in zip(seeds, rng.normal(size=10)))),
    }
    concept, composition, how = reproduced.reading(found)
    assert concept == f"By concept distance, independent, {HEADED} is level with frozen."
    assert composition.endswith("is ahead of frozen.") and "Holm" in how
    few = {row: dict(list(seeds.items())[:2]) for row, seeds in found.items()}
    assert reproduced.reading(few) == []  # too few seeds to say


def test_a_caption_says_what_is_missing(results, tmp_path):
    results["frozen"].pop("0")
    lacking = reproduced.missing(results, [*results, "tvae"], 3)
    assert lacking == [
        "Not run: tvae.",
        f"{HEADED}: without seeds 2 of 3.",
        "base pooled: without seeds 2 of 3.",
        "frozen: without seeds 0, 2 of 3.",
    ]
    text = write(results, tmp_path, lacking=lacking)
    under = text.split("\n\n")[1]
    assert under.startswith("Not run: tvae. end-to-end: without") and "1 or 2 seeds" in under
    assert json.loads((tmp_path / "t.json").read_text())["caption"] == under
    assert reproduced.missing({"a": runs((0.1,))}, ["a"], 1) == []


def test_results_of_different_recipes_are_not_mixed(results, tmp_path):
    write(results, tmp_path, recipe={"sha256": "a", "images": 4}, notes=["frozen: tuned.", "x: y."])
    path = tmp_path / "t.json"
    kept = reproduced.earlier_table(path, ["frozen", "tvae"], {"sha256": "a", "images": 4})
    assert kept == {"results": {"frozen": results["frozen"]}, "notes": ["frozen: tuned."]}
    with pytest.raises(ValueError, match=r"another recipe \(its sha256 differ\).*not mixed"):
        reproduced.earlier_table(path, ["frozen"], {"sha256": "b", "images": 4})


def test_a_recipe_is_its_file_too(tmp_path, monkeypatch):
    made = a_plan(tmp_path)
    first = reproduce.recipe_of(made, "quad-dependent")
    folder = tmp_path / "recipes"
    path = folder / "configs" / "reproduce" / "quad.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("data:\n  dataset: quad\n")
    monkeypatch.setattr(reproduce, "RECIPES", folder)
    second = reproduce.recipe_of(a_plan(tmp_path), "quad-dependent")
    assert {key for key in first if first[key] != second[key]} == {"sha256"}


def test_a_table_without_pairs_or_with_a_single_seed(tmp_path):
    text = write({HEADED: runs((0.1,))}, tmp_path)
    assert "| end-to-end | 0.100 | 5.0 | 1.000 |" in text and "all pairs" not in text
    assert np.isnan(pd.read_csv(tmp_path / "t.csv")["low"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "nothing"], "has no row nothing: its rows are end-to-end"),
        (["--seeds", "0"], "must be at least 1"),
        (["--jobs", "0"], "must be at least 1"),
    ],
)
def test_bad_requests_are_said_in_a_sentence(options, message, tmp_path, capsys):
    assert reproduce.main(["--table", "quad-dependent", "--output", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("*-cpu"))


def test_missing_digits_are_said_before_anything_is_trained(tmp_path, capsys):
    argv = [
        "--table",
        "mnist",
        "--scale",
        "smoke",
        "--rows",
        HEADED,
        "--mnist_digits",
        str(tmp_path / "none"),
    ]
    assert reproduce.main([*argv, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "a folder with MNIST's four files" in error
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and not list((tmp_path / "out").glob("mnist*"))
    )


@pytest.mark.parametrize(
    "rows",
    [
        [HEADED, "conditional-vae"],
        pytest.param(
            [*reproduce.REGIMES, "conditional-vae", "ada-gvae", "tvae"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_small_table_end_to_end_and_again(rows, tmp_path, capsys):
    argv = [
        "--table",
        "mnist",
        "--scale",
        "smoke",
        "--mnist_digits",
        "bundled",
        "--output",
        str(tmp_path),
        "--seeds",
        "1",
    ]
    assert reproduce.main([*argv, "--rows", *rows]) == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "mnist-smoke.json").read_text())
    assert list(first["results"]) == rows and all(
        len(seeds) == 1 for seeds in first["results"].values()
    )
    assert "64 images a side" in first["caption"] and f"Not run: {rows[-1]}" not in first["caption"]
    run = first["results"][HEADED]["0"]
    assert run["contexts"]["scale"]["distance, independent"] > 0 and first["recipe"]["images"] == 64
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    assert reproduce.main([*argv, "--rows", *rows]) == 0
    assert json.loads((tmp_path / "mnist-smoke.json").read_text()) == first
    assert reproduce.main([*argv, "--rows", HEADED]) == 0
    # a row that is not asked for stays
    assert json.loads((tmp_path / "mnist-smoke.json").read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} == written
    (tmp_path / "mnist-smoke.json").write_text('{"rows": 1}')
    assert reproduce.main([*argv, "--rows", HEADED]) == 1
    assert "mnist-smoke.json is no table that this command wrote" in capsys.readouterr().err
