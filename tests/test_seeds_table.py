"""The table over seeds: means, intervals, and runs that do not belong together."""

import json

import pytest

from hf_intervene.training.studies import seeds_table


def run(value, extra=None):
    presence = {
        side: {"all_wanted": {"value": v}, "unwanted": None}
        for side, v in (("generated", value), ("real", 1.0))
    }
    contexts = {"hat": {"presence": presence, "independent": {"distance": 0.1, "floor": 0.05}}}
    return {"contexts": contexts | (extra or {})}


def test_means_and_half_intervals():
    combined = seeds_table.combine([run(0.8), run(0.9), run(1.0)])
    assert (
        combined["hat"]["all there"] == [0.8, 0.9, 1.0] and "something else" not in combined["hat"]
    )
    # t(0.975, 2) = 4.303, times 0.1 over the root of 3
    assert "| `hat` | 0.900 ± 0.248 | 1.000 | 0.100 | 0.050 |" in seeds_table.table(combined)


def test_runs_of_other_contexts_are_refused():
    with pytest.raises(ValueError, match="run 2 has other contexts"):
        seeds_table.combine([run(0.8), run(0.9, {"obs": {}})])
    with pytest.raises(ValueError, match="at least two runs"):
        seeds_table.combine([run(0.8)])


def test_runs_of_different_recipes_are_refused():
    """Places and seeds may differ; nothing else, of training or measuring."""
    told = [
        {"settings": {"model": name, "output": name, "seed": seed, "images": 700}}
        | {"recipe": {"max_steps": 3000}}
        for seed, name in enumerate(("a", "b"))
    ]
    runs = [run(value) | settings for value, settings in zip((0.8, 0.9), told)]
    assert seeds_table.combine(runs)["hat"]["all there"] == [0.8, 0.9]
    with pytest.raises(
        ValueError, match="run 2 is of another recipe.*max_steps is 100 and not 3000"
    ):
        seeds_table.combine([runs[0], runs[1] | {"recipe": {"max_steps": 100}}])
    with pytest.raises(ValueError, match="images is 70 and not 700"):
        seeds_table.combine([runs[0], runs[1] | {"settings": {"images": 70, "seed": 1}}])


def test_files(tmp_path, capsys):
    for name, value in (("a", 0.8), ("b", 0.9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(run(value)))
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert seeds_table.main([*folders, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["hat"]["real"] == [1.0, 1.0]
    assert (tmp_path / "out.md").read_text() == capsys.readouterr().out
    assert (
        seeds_table.main([*folders, str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 1
    )
    assert "none" in capsys.readouterr().err
