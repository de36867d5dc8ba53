"""Can these contexts identify the concepts? What can be seen of it before training (METHOD section
6; Markham et al., arXiv:2507.04754).

The concepts are identifiable if there is an observational context and, for EVERY concept, one in
which it alone was intervened on, if the interventions change something that images show, and if the
concepts are linearly independent. `check` says of each of these, in words, whether the images
contradict it, and what to do. It cannot prove them: that images determine the concepts (an
injective decoder) is not to be seen in images. `hf_intervene.metrics.recovery` shows on simulated
data what is recovered when they hold, and what when they do not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
from tqdm.auto import tqdm

from ..contexts import OBS, context_name, named_concepts, parse_context, validate_concepts
from .disentanglement import MIN_SAMPLES, TwoSampleTest, principal_components, two_sample_test


HOLDS, WEAK, FAILS = "holds", "weak", "FAILS"
FEW = 1000  # images of a context; with fewer, recovery drops on simulated data (README)
_MOMENTS = 8  # principal components whose means and covariances are compared
_PERMUTATIONS = 50
_DEPENDENT = 0.5  # smallest singular value of shifts of length 1: two of them are 41 degrees apart
_FINE = (
    "is it a fine detail, or a change of more than means and covariances? More images, or a higher"
    " resolution, may show it."
)
_RISK = 0.05  # of passing a single test by chance, over all tests of one kind


@dataclass
class Finding:
    """
    Args:
        assumption: which one, in two or three words.
        status: `HOLDS` (nothing speaks against it), `WEAK` (too little to tell, or barely) or
            `FAILS`.
        message: what was found.
        advice: what to do; empty if it holds.
    """

    assumption: str
    status: str
    message: str
    advice: str = ""


@dataclass
class CheckResult:
    """
    Args:
        findings: one for each thing that was checked, at least.
        images: number of distinct images of each context.
        from_obs: two-sample test of each concept's context against `obs`.
        pairs: the same of each two concepts' contexts, by "a / b".
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
        """As JSON holds it, and whether it `passed`."""
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
    """Say in words whether contexts can identify their concepts, as far as images show it.

    Args:
        images: of each context, by name, all of one shape, uint8 or float, (n, ...). Contexts of
            several concepts are not tested.
        concepts: the concepts; `None`: all that the contexts name.
        max_images: of a context that are tested; those beyond are only counted.
        seed: of all that is random.

    Raises:
        ValueError: no images or concept, a context that is named twice or unknown, images of
            several shapes, NaN or infinity.
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
    # One space for all tests, of all contexts alike: it knows nothing of which image came from
    # where.
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


def shift_spectrum(obs: np.ndarray, contexts: Mapping[str, np.ndarray], seed: int = 0) -> dict:
    """Do the contexts move the data in linearly independent ways? Each one's shift is the change of
    mean and covariance from `obs`, where `obs` has mean 0 and covariance I; d shifts are the rows
    of a matrix, and a combination of them that cancels is a small singular value.

    `noise` is how long that combination is by chance alone, when samples are shuffled over the
    contexts (95 % quantile): one that cancels in truth is seldom seen to be longer.

    Args:
        obs: (n, k).
        contexts: of each concept, (n_j, k).
        seed: of the permutations.

    Returns:
        `hidden`: contexts whose shift is not twice as long as what chance gives; they are left out
        of the rest. `singular_values` of the others' shifts, each divided by its length; `noise`;
        `closest`: the contexts that make up the combination of the smallest.
    """
    names = list(contexts)
    pooled = np.concatenate([obs, *contexts.values()])
    edges = np.cumsum([len(obs), *map(len, contexts.values())])[:-1]
    shifts = _shifts(np.split(pooled, edges))
    rng = np.random.default_rng(seed)
    chance = np.stack(
        [_shifts(np.split(rng.permutation(pooled), edges)) for _ in range(_PERMUTATIONS)]
    )
    lengths = np.linalg.norm(shifts, axis=1)
    seen = np.flatnonzero(lengths > 2 * np.quantile(np.linalg.norm(chance, axis=2), 0.95, axis=0))
    result = {
        "hidden": [name for k, name in enumerate(names) if k not in seen],
        "singular_values": [],
        "noise": 0.0,
        "closest": [],
    }
    if len(seen):
        left, values, _ = np.linalg.svd(shifts[seen] / lengths[seen, None])
        weights = left[:, -1]
        cancelled = np.linalg.norm(
            np.einsum("k,pkm->pm", weights / lengths[seen], chance[:, seen]), axis=1
        )
        result["singular_values"], result["noise"] = (
            values.tolist(),
            float(np.quantile(cancelled, 0.95)),
        )
        result["closest"] = [
            names[k]
            for k, weight in zip(seen, np.abs(weights))
            if weight > np.abs(weights).max() / 3
        ]
    return result


def _shifts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Change of mean and covariance from the first part to each other one, (parts - 1, k + k (k +
    1) / 2).
    """
    obs, *others = parts
    covariance = np.cov(obs.T).reshape(obs.shape[1], -1)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(np.maximum(values, 1e-6 * max(values[-1], 1e-12)))
    upper = np.triu_indices(obs.shape[1])
    # In a symmetric matrix entries off the diagonal stand twice; halved, because a covariance is of
    # second order.
    weights = np.where(upper[0] == upper[1], 0.5, np.sqrt(0.5))
    rows = []
    for part in others:
        z = (part - obs.mean(0)) @ whiten
        change = np.cov(z.T).reshape(len(values), -1) - np.eye(len(values))
        rows.append(np.concatenate([z.mean(0), weights * change[upper]]))
    return np.stack(rows)


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
        if array.ndim < 2:
            raise ValueError(
                f"images of context {name!r} must be an array (n, ...), not of the shape"
                f" {array.shape}."
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
    """Without copies, which would be known again in the held-out half of a test."""
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
