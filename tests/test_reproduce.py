"""reproduce.py: the plan of a table, its figures in every form, and what is said about them; a
small table end to end.
"""

import json

import numpy as np
import pandas as pd
import pytest

from hf_intervene.training import reproduce
from hf_intervene.training.reproduce import HEADED, SCALES, TABLES
from hf_intervene.training.studies import reproduced
from hf_intervene.training.studies.baselines import GRID


def metrics(concept, composition=None, bits=1.0):
    kinds = {"concept": concept} | ({} if composition is None else {"composition": composition})
    protocols = {
        name: (shift, floor)
        for name, shift, floor in (("independent", 0, 0.02), ("paper", 0.05, 0.08))
    }
    return {
        "means": {
            kind: {
                "bits_per_pixel": bits,
                **{
                    name: {
                        "distance": value + shift,
                        "floor": floor,
                        "ratio": (value + shift) / floor,
                    }
                    for name, (shift, floor) in protocols.items()
                },
            }
            for kind, value in kinds.items()
        }
    }


@pytest.fixture
def results():
    rows = {
        HEADED: [(0.10, 0.11, 1.02), (0.10, 0.12, 1.04)],
        "base pooled": [(0.30, 0.30, 1.0), (0.30, 0.31, 1.0)],
        "frozen": [(0.10, 0.40, 1.0), (0.11, 0.40, 1.0)],
    }
    return {
        row: [reproduced.measures(metrics(*seed)) for seed in seeds] for row, seeds in rows.items()
    }


def plan(tmp_path, table="quad-dependent", rows=None, seeds=2):
    table = TABLES[table]
    return reproduce.plan(
        table, rows or [*table.rows, *table.baselines], SCALES["smoke"], seeds, tmp_path, "bundled"
    )


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
    assert list(plan(tmp_path, rows=["frozen"], seeds=1)) == [("base", 0), ("frozen", 0)]
    assert list(plan(tmp_path, rows=[HEADED], seeds=1)) == [(HEADED, 0)]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_table_has_valid_settings(table, scale, tmp_path):
    from hf_intervene.trainer.parsing import parse_arguments

    chosen = TABLES[table]
    for (row, _), job in reproduce.plan(
        chosen, list(chosen.rows), SCALES[scale], 1, tmp_path, "bundled"
    ).items():
        script, *words = job.commands()[0]
        settings = parse_arguments(words).flat()
        assert script == "train.py" and settings["dataset"] == chosen.dataset
        assert settings["variant"] == chosen.variant
        changed = {name: value for name, value in chosen.rows[row].items() if name != "base"}
        assert {name: settings[name] for name in changed} == changed


def test_baselines_take_their_best_setting(tmp_path):
    table, scale = TABLES["quad-dependent"], SCALES["cpu"]
    name = table.baselines[0]
    jobs = reproduce.plan(table, [name], scale, 1, tmp_path, "bundled")
    tried = jobs[name, 0].after
    assert len(tried) == len(GRID[name])
    for number, job in enumerate(tried):
        words = job.commands()[0]
        assert words[words.index("--seed") + 1] == str(reproduce.TUNING_SEED)
        (job.folder / "metrics").mkdir(parents=True)
        (job.folder / "metrics" / "metrics.json").write_text(
            json.dumps(metrics(0.1 if number == 1 else 0.2))
        )
    words = jobs[name, 0].commands()[0]
    for key, value in GRID[name][1].items():
        assert words[len(words) - 1 - words[::-1].index(f"--{key}") + 1] == str(value)


def test_figures_in_every_form(results, tmp_path):
    published = {HEADED: (0.116, 0.127, 0.828), "base pooled": (0.167, None, 0.746)}
    text = reproduced.write("t", results, published, ["a note."], tmp_path)
    assert text == (tmp_path / "t.md").read_text() and "- a note." in text
    # Two values 0.01 apart: the t-interval's half width is 12.706 * 0.00707 / sqrt(2).
    assert "| end-to-end | 0.100 ± 0.000 | 5.0 | 0.115 ± 0.064 | 5.8 | 1.030 ± 0.127 |" in text
    assert (
        "| 0.116 / 0.127 / 0.828 |" in text
        and "| 0.167 / 0.746 |" in text
        and "| floor | 0.020 |" in text
    )
    table = pd.read_csv(tmp_path / "t.csv").set_index(["row", "measure"])
    row = table.loc[HEADED, "composition distance, paper"]
    assert row["mean"] == pytest.approx(0.165) and row["published"] == 0.127 and row["seeds"] == 2
    assert row["high"] - row["low"] == pytest.approx(2 * 0.0635, rel=1e-2)
    tex = (tmp_path / "t.tex").read_text()
    assert (
        tex.count("\\\\") == 6 - 1
        and "\\toprule" in tex
        and "0.115 $\\pm$ 0.064" in tex
        and "±" not in tex
    )


def test_what_the_figures_say(results):
    concept, composition, pairs, bits = reproduced.reading(results)
    assert "lower than base pooled; not told apart from frozen; higher than none" in concept
    assert "lower than base pooled, frozen;" in composition
    assert "1.15 ± " in pairs and "1.030 ± 0.127" in bits
    assert reproduced.reading({HEADED: results[HEADED][:1]}) == []  # one seed has no interval


def test_a_table_without_pairs_or_with_a_single_seed(tmp_path):
    text = reproduced.write("t", {HEADED: [reproduced.measures(metrics(0.1))]}, {}, [], tmp_path)
    assert (
        "| end-to-end | 0.100 | 5.0 |" in text
        and np.isnan(pd.read_csv(tmp_path / "t.csv")["low"]).all()
    )


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
    assert "64 images a side" in first["notes"][0]
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
