"""Changes of files and values for `test_fuzz.py`, and bounds of memory and time."""

import contextlib
import io
import json
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st


OURS = (OSError, ValueError, TypeError, FloatingPointError)  # the documented errors
MEMORY, SECONDS = 4 << 30, 60  # bounds of one example


class Hang(BaseException):
    """The time is up. It is not an `Exception`, so that nothing catches it."""


@contextmanager
def bounds(memory=MEMORY, seconds=SECONDS):
    """Limit the additional memory, in bytes, and the time of the body."""

    def stop(*_):
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def only_ours(function, *arguments, errors=OURS):
    """Return the result of a call, or `None` after a documented error with one sentence."""
    with bounds():
        try:
            return function(*arguments)
        except errors as error:
            text = str(error)
            assert text and "\n" not in text and "Traceback" not in text, (
                f"not one sentence: {text!r}"
            )
            return None


def fuzz(strategy, check, examples, seed):
    """Run a check on random examples, which depend only on the seed."""

    @with_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def run(example):
        check(example)

    run()


def fuzz_for(strategy, check, seconds, first_seed, examples):
    """Run rounds of examples until the time is up. Return their number."""
    start, tried, seed = time.monotonic(), 0, first_seed

    def checked(example):
        nonlocal tried
        tried += 1
        check(example)

    while tried == 0 or time.monotonic() - start < seconds:
        fuzz(strategy, checked, examples, seed)
        seed += 1
    return tried


def spoken(command, *arguments, statuses=(0, 1), silent=False):
    """Run a command, whose errors must be one line; its exit status.

    `silent`: whether it may end with 1 and no error.
    """
    errors = io.StringIO()
    with bounds(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = command(list(arguments))
        except SystemExit as ended:  # argparse
            status = ended.code
    AcceleratorState._reset_state(reset_partial_state=True)
    text = errors.getvalue()
    said = [line for line in text.splitlines() if re.match(r"([\w. -]+: )?error: ", line)]
    assert status in statuses, (arguments, status, text)
    if silent and status == 1 and not said:
        return status
    assert len(said) == (status != 0), (arguments, status, text)
    assert status == 0 or text.rstrip().endswith(said[0].rstrip()), (arguments, text)
    return status


# Values

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**20, 2**20 + 1, 2**31, 2**63, 2**70, -(2**70), 10**400]),
    st.floats(),
)
words = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "..",
            "../../x",
            "/etc/passwd",
            "a\x00b",
            "{{7*7}}",
            "<script>",
            "`|`",
            "os.system",
            "None",
            "true",
            "1e-3",
        ]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


def places(value, at=()):
    """Yield the paths to all parts of a JSON value."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(value, at, change, new):
    """Return a JSON value with a part replaced, removed or added at a path."""
    if not at:
        return new
    key, *rest = at
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = changed(copy[key], rest, change, new)
    elif change == "remove":
        del copy[key]
    elif change == "add":
        copy.update({str(new)[:20]: new}) if isinstance(copy, dict) else copy.append(new)
    else:
        copy[key] = new
    return copy


# Files

changes = st.tuples(
    st.sampled_from(["replace", "replace", "remove", "add"]), st.floats(0, 1), values
)
flips = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)
mutations = st.one_of(
    st.tuples(st.just("json"), st.lists(changes, min_size=1, max_size=3)),
    st.tuples(st.just("json"), st.lists(changes, min_size=1, max_size=3)),
    st.tuples(st.just("flip"), flips),
    st.tuples(st.just("flip head"), flips),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("bytes"), st.binary(max_size=64)),
    st.tuples(
        st.just("text"),
        st.sampled_from(
            ["", "{", "[]", "null", "0", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 50_000]
        ),
    ),
    st.tuples(st.just("gone"), st.none()),
    st.tuples(st.just("twice"), st.floats(0, 1)),
)


def mutate(file, mutation):
    """Damage a file."""
    kind, how = mutation
    whole = file.read_bytes()
    if kind == "json" and file.suffix == ".json":
        value = json.loads(whole)
        for change, which, new in how:
            paths = list(places(value))
            value = changed(value, paths[min(int(which * len(paths)), len(paths) - 1)], change, new)
        file.write_text(json.dumps(value))
    elif kind in ("flip", "flip head", "json"):
        data = bytearray(whole)
        for where, byte in how if kind != "json" else ():
            reach = min(len(data), 2000) if kind == "flip head" else len(data)
            data[min(int(where * reach), reach - 1)] = byte
        file.write_bytes(data)
    elif kind == "cut":
        file.write_bytes(whole[: int(how * len(whole))])
    elif kind == "bytes":
        file.write_bytes(how)
    elif kind == "text":
        file.write_text(how)
    elif kind == "gone":
        file.unlink()
    elif kind == "twice":
        file.write_bytes(whole + whole[: int(how * len(whole))])


def harmed(source, target, harm, pattern="*"):
    """Return a copy of a folder with one damaged file.

    `harm` is the position of the file, as a share of all files, and a mutation.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    files = sorted(
        path for path in Path(target).rglob(pattern) if path.is_file() and path.suffix != ".py"
    )
    which, mutation = harm
    mutate(files[min(int(which * len(files)), len(files) - 1)], mutation)
    return target
