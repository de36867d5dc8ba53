"""Jobs side by side: done once, gone on with, stopped, and failing alone."""

import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from hf_intervene.training.studies import jobs as recipe
from hf_intervene.training.studies.jobs import Job, Processes, run_jobs


SCRIPT = """
import json, pathlib, sys
folder, value, fail = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(folder.parent / "calls", "a") as file:
    file.write(folder.name + "\\n")
if fail == "fail":
    sys.exit("error: no such luck.")
(folder / "metrics").mkdir()
(folder / "metrics" / "metrics.json").write_text(json.dumps({"value": value, "after": sys.argv[4:]}))
"""  # noqa: E501


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(recipe, "RECIPES", tmp_path)

    def make(name, value="1", fail="", after=()):
        folder = tmp_path / name
        return Job(
            folder,
            lambda: [
                ("script.py", str(folder), value, fail, *(str(a.metrics()["value"]) for a in after))
            ],
            after,
        )

    return make


def calls(tmp_path):
    return (tmp_path / "calls").read_text().split()


def test_a_job_waits_for_others_and_is_done_once(job, tmp_path):
    first = [job("a", "1"), job("b", "2")]
    jobs = [*first, job("c", after=tuple(first))]
    seen = []
    assert run_jobs(jobs, 3, lambda job, metrics: seen.append(metrics)) == {}
    assert (
        jobs[2].metrics()["after"] == ["1", "2"] and len(seen) == 3 and calls(tmp_path)[-1] == "c"
    )
    assert run_jobs(jobs, 1) == {} and len(calls(tmp_path)) == 3


def test_what_was_begun_is_run_again_and_other_settings_are_refused(job, tmp_path):
    run_jobs([job("a")], 1)
    (tmp_path / "a" / "metrics" / "metrics.json").unlink()
    (tmp_path / "a" / "metrics").rmdir()
    assert run_jobs([job("a")], 1) == {} and calls(tmp_path) == ["a", "a"]
    with pytest.raises(ValueError, match="other settings"):
        run_jobs([job("a", "7")], 1)


def test_a_failure_stops_only_what_waits_for_it(job, tmp_path):
    bad = job("bad", fail="fail")
    waiting, other = job("waiting", after=(bad,)), job("other")
    failed = run_jobs([bad, waiting, other], 1)
    assert failed == {bad: "no such luck.", waiting: f"not run, since {bad.folder} failed."}
    assert other.metrics() is not None and calls(tmp_path) == ["bad", "other"]


def test_moved_results_are_found_done(job, tmp_path, monkeypatch):
    run_jobs([job("a")], 1)
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    folder = moved / "a"
    assert run_jobs([Job(folder, lambda: [("script.py", str(folder), "1", "")])], 1) == {}


def test_sigterm_stops_the_processes_with_it(tmp_path, monkeypatch):
    (tmp_path / "sleep.py").write_text(
        "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(recipe, "RECIPES", tmp_path)
    begun = tmp_path / "begun"
    job = Job(tmp_path / "a", lambda: [("sleep.py", str(begun))])

    def kill():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], 1)
    assert signal.getsignal(signal.SIGTERM) is before and job.metrics() is None


def test_stopped_processes_start_no_more():
    processes = Processes()
    processes.stop()
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", ""], dict(os.environ))


def test_an_interrupted_run_interrupts_all():
    with pytest.raises(KeyboardInterrupt):
        Processes().run([sys.executable, "-c", "raise SystemExit(130)"], dict(os.environ))


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"])],
)
def test_gpus_are_those_that_one_was_given(monkeypatch, given, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert recipe.visible_gpus() == names


def test_job_json_is_what_was_told(job, tmp_path):
    run_jobs([job("a")], 1)
    assert json.loads((tmp_path / "a" / "job.json").read_text()) == [
        ["script.py", "{folder}", "1", ""]
    ]
