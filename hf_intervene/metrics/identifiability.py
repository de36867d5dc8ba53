"""Check before training whether contexts can identify their concepts.

See METHOD section 6 and Markham et al., arXiv:2507.04754. The concepts are identifiable if there is
an observational context and, for every concept, a context in which only this concept was intervened
on; if the interventions change something that images show; and if the concepts are linearly
independent. For each of these assumptions `check` describes whether the images contradict it, and
what to do. It cannot prove them: images do not show whether they determine the concepts (an
injective decoder). `hf_intervene.metrics.recovery` shows on simulated data what is recovered if the
assumptions hold, and if they do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
from tqdm.auto import tqdm

from ..contexts import OBS, context_name, named_concepts, parse_context, validate_concepts
from .disentanglement import MIN_SAMPLES, principal_components
from .shifts import shift_spectrum
from .two_sample import TwoSampleTest, two_sample_test


HOLDS, WEAK, FAILS = "holds", "weak", "FAILS"
FEW = 1000  # images of a context; with fewer, recovery on simulated data is worse (README)
_MOMENTS = 8  # principal components whose means and covariances are compared
_DEPENDENT = 0.5  # smallest singular value of shifts of length 1: two shifts at 41 degrees have it
_FINE = (
    "is it a fine detail, or a change of more than means and covariances? More images, or a higher"
    " resolution, may show it."
)
_RISK = 0.05  # probability that at least one test of a kind passes by chance


@dataclass
class Finding:
    """Result of the check of one assumption.

    Args:
        assumption: the assumption in two or three words.
        status: `HOLDS` (the images do not contradict it), `WEAK` (the evidence is too weak) or
            `FAILS`.
        message: what was found.
        advice: what to do; empty if the assumption holds.
    """

    assumption: str
    status: str
    message: str
    advice: str = ""


@dataclass
class CheckResult:
    """Result of `check`.

    Args:
        findings: at least one for each assumption.
        images: number of distinct images of each context.
        from_obs: two-sample test of each concept's context against `obs`.
        pairs: two-sample test of the contexts of each two concepts, by "a / b".
        shifts: see `shift_spectrum`.
    """

    findings: list[Finding]
    images: dict[str, int]
    from_obs: dict[str, TwoSampleTest] = field(default_factory=dict)
    pairs: dict[str, TwoSampleTest] = field(default_factory=dict)
    shifts: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing fails."""
        return all(finding.status != FAILS for finding in self.findings)

    def to_dict(self) -> dict:
        """Return the fields and `passed` as JSON has them."""
        tests = {
            name: {key: test.to_dict() for key, test in getattr(self, name).items()}
            for name in ("from_obs", "pairs")
        }
        return {"passed": self.passed, **asdict(self), **tests}

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:6}{finding.assumption}: {finding.message}")
            lines += [f"      -> {finding.advice}"] if finding.advice else []
        failing = sum(finding.status == FAILS for finding in self.findings)
        lines.append(
            f"What fails above, {failing} of {len(self.findings)} findings, speaks against"
            " identifying the concepts."
            if failing
            else "Nothing speaks against identifying the concepts from these contexts."
        )
        return "\n".join(lines)


def check(
    images: Mapping[str, np.ndarray],
    concepts: Sequence[str] | None = None,
    max_images: int = 2000,
    seed: int = 0,
) -> CheckResult:
    """Check whether images contradict that their contexts identify the concepts.

    Args:
        images: images of each context, by name, uint8 or float, (n, ...), all of one shape.
            Contexts of several concepts are not tested.
        concepts: the concepts; `None` means all that the contexts name.
        max_images: the largest number of images of a context that are tested. Others are only
            counted.
        seed: seed of everything that is random.

    Raises:
        ValueError: there are no images or concepts, a context is unknown or named twice, images
            have several shapes, or a value is NaN or infinite.
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    arrays, concepts = _read(images, concepts)
    if max_images < MIN_SAMPLES:
        raise ValueError(
            f"at least {MIN_SAMPLES} images of a context are needed for a test, not {max_images}."
        )
    distinct = {name: _distinct(array) for name, array in arrays.items()}
    rng = np.random.default_rng(seed)
    result = CheckResult([], {name: len(array) for name, array in distinct.items()})
    own = [name for name in concepts if name in arrays]
    result.findings += _contexts(arrays, concepts) + _sizes(arrays, result.images, [OBS, *own])
    tested = {
        name: distinct[name][np.sort(rng.permutation(len(distinct[name]))[:max_images])]
        for name in (OBS, *own)
        if len(distinct.get(name, ())) >= MIN_SAMPLES
    }
    own = [name for name in own if name in tested]
    if not tested:
        return result
    # All tests use the same space. It is computed from all contexts together, without their names.
    space = principal_components(
        np.concatenate([x.reshape(len(x), -1) for x in tested.values()]), 32, seed
    )
    parts = np.split(space, np.cumsum([len(x) for x in tested.values()])[:-1])
    spaces = dict(zip(tested, parts))
    bar = partial(tqdm, desc="telling contexts apart", disable=None, delay=2)
    if OBS in tested:
        level = 1 - _RISK / max(1, len(own))
        result.from_obs = {
            name: two_sample_test(spaces[OBS], spaces[name], level, seed) for name in bar(own)
        }
        result.findings += [_told_from_obs(name, test) for name, test in result.from_obs.items()]
    pairs = list(combinations(own, 2))
    level = 1 - _RISK / max(1, len(pairs))
    result.pairs = {
        f"{a} / {b}": two_sample_test(spaces[a], spaces[b], level, seed) for a, b in bar(pairs)
    }
    result.findings += _told_apart(result.pairs)
    if OBS in tested and len(own) > 1:
        result.shifts = shift_spectrum(
            spaces[OBS][:, :_MOMENTS], {name: spaces[name][:, :_MOMENTS] for name in own}, seed
        )
        result.findings.append(_independent(result.shifts))
    return result


def _read(
    images: Mapping[str, np.ndarray], concepts: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if not isinstance(images, Mapping) or not images:
        raise ValueError(
            "there are no images: give a dict from the name of each context to its images."
        )
    if concepts is None:
        concepts = sorted({name for context in images for name in named_concepts(context)} - {OBS})
        if not concepts:
            raise ValueError(
                "there is no context but the observational one: nothing was intervened on."
            )
    concepts = validate_concepts(concepts)
    arrays: dict[str, np.ndarray] = {}
    for context, array in images.items():
        name, array = context_name(context, concepts), np.asarray(array)
        if name in arrays:
            raise ValueError(f"context {name!r} is given twice: join its images.")
        if array.ndim < 2 or 0 in array.shape[1:] or array.dtype.kind not in "buif":
            raise ValueError(
                f"images of context {name!r} must be an array of numbers (n, ...), not"
                f" {array.dtype} of the shape {array.shape}."
            )
        first = next(iter(arrays), name)
        if array.shape[1:] != arrays.get(first, array).shape[1:]:
            raise ValueError(
                f"images of context {name!r} have the shape {array.shape[1:]}, those of {first!r}"
                f" {arrays[first].shape[1:]}."
            )
        if not np.isfinite(array).all():
            raise ValueError(
                f"images of context {name!r} must be finite; some are NaN or infinite."
            )
        arrays[name] = array
    return arrays, concepts


def _distinct(images: np.ndarray) -> np.ndarray:
    """Remove copies: a classifier would recognise them in the held-out half of a test."""
    rows = {image.tobytes(): row for row, image in enumerate(images)}
    return images[sorted(rows.values())]


def _contexts(arrays: Mapping[str, np.ndarray], concepts: Sequence[str]) -> list[Finding]:
    assumption, findings = "a context for each concept", []
    if OBS not in arrays:
        found = f"there are no observational images (the contexts are {', '.join(arrays)})."
        findings.append(
            Finding(
                assumption,
                FAILS,
                found,
                f"add images in which nothing was changed, as context {OBS!r}.",
            )
        )
    for concept in concepts:
        if concept not in arrays:
            others = [name for name in arrays if concept in parse_context(name, concepts)]
            found = f"{concept!r} has no context in which it alone was intervened on"
            found += f", only {', '.join(others)}." if others else "."
            findings.append(
                Finding(
                    assumption,
                    FAILS,
                    found,
                    f"add images with {concept!r} alone changed, or leave it out.",
                )
            )
    return findings or [
        Finding(assumption, HOLDS, f"{OBS} and each of {', '.join(concepts)} alone.")
    ]


def _sizes(
    arrays: Mapping[str, np.ndarray], distinct: Mapping[str, int], names: Sequence[str]
) -> list[Finding]:
    assumption, findings = "enough images", []
    sizes = {name: distinct[name] for name in names if name in arrays}
    copies = [
        f"{name} ({len(arrays[name]) - size})"
        for name, size in sizes.items()
        if size < len(arrays[name])
    ]
    if copies:
        found = f"some images are copies of others of their context: {', '.join(copies)}."
        findings.append(
            Finding(
                assumption, WEAK, found, "copies teach nothing and were not counted; remove them."
            )
        )
    for few, status, advice in (
        (
            {k: n for k, n in sizes.items() if n < MIN_SAMPLES},
            FAILS,
            f"add some: with fewer than {MIN_SAMPLES} nothing can be tested.",
        ),
        (
            {k: n for k, n in sizes.items() if MIN_SAMPLES <= n < FEW},
            WEAK,
            f"add some: below {FEW} simulated concepts are found less well.",
        ),
    ):
        if few:
            found = (
                "few images: " + ", ".join(f"{name} ({size})" for name, size in few.items()) + "."
            )
            findings.append(Finding(assumption, status, found, advice))
    smallest = min(sizes, key=lambda name: sizes[name], default=None)
    if findings or smallest is None:
        return findings
    return [Finding(assumption, HOLDS, f"{sizes[smallest]} in the smallest context, {smallest!r}.")]


def _told_from_obs(name: str, test: TwoSampleTest) -> Finding:
    assumption = f"{name!r} differs from {OBS!r}"
    if test.told_apart:
        return Finding(assumption, HOLDS, f"told apart with an accuracy of {_accuracy(test)}.")
    found = (
        f"the classifier tells them apart with an accuracy of {_accuracy(test)}; guessing has 0.5."
    )
    advice = (
        "did the intervention change what images show? If so, it is too little for this many"
        " images, or this resolution: add some, or intervene more strongly. Else leave the concept"
        " out."
    )
    return Finding(assumption, FAILS, found, advice)


def _told_apart(pairs: Mapping[str, TwoSampleTest]) -> list[Finding]:
    assumption = "contexts differ from one another"
    findings = [
        Finding(
            assumption,
            FAILS,
            f"{name} are told apart with an accuracy of {_accuracy(test)}; guessing has 0.5.",
            "are they one concept under two names? Then make them one. Else more images, or"
            " stronger interventions.",
        )
        for name, test in pairs.items()
        if not test.told_apart
    ]
    if findings or not pairs:
        return findings
    closest = min(pairs, key=lambda name: pairs[name].accuracy)
    return [
        Finding(
            assumption,
            HOLDS,
            f"the closest two, {closest}, are told apart with {_accuracy(pairs[closest])}.",
        )
    ]


def _independent(shifts: dict) -> Finding:
    assumption, values, noise, hidden = (
        "independent directions",
        shifts["singular_values"],
        shifts["noise"],
        shifts["hidden"],
    )
    if len(values) < 2:
        return Finding(
            assumption,
            WEAK,
            "the contexts hardly move the data's means and covariances: nothing to compare.",
            _FINE,
        )
    numbers = (
        f"the shifts of {len(values)} contexts have singular values from {values[0]:.2f} to"
        f" {values[-1]:.2f}"
    )
    closest = ", ".join(shifts["closest"])
    if values[-1] + noise < _DEPENDENT:
        found = f"{numbers}: {closest} move the data alike."
        return Finding(
            assumption,
            FAILS,
            found,
            "do they change the same thing, to different values? Then make them one concept.",
        )
    if values[-1] < noise:
        found = (
            f"{numbers}, {noise:.2f} by chance alone: too few images to tell whether {closest} are"
            " independent."
        )
        return Finding(assumption, WEAK, found, "add images, or intervene more strongly.")
    if hidden:
        return Finding(
            assumption,
            WEAK,
            f"{numbers}; those of {', '.join(hidden)} are too small to compare.",
            _FINE,
        )
    return Finding(assumption, HOLDS, f"{numbers}, {noise:.2f} by chance alone.")


def _accuracy(test: TwoSampleTest) -> str:
    return f"{test.accuracy:.3f} [{test.interval[0]:.3f}, {test.interval[1]:.3f}]"
