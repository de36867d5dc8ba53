"""Code that the measures share: results as JSON, and the check for scikit-learn."""

from dataclasses import asdict


class Result:
    """Base class of the results of measures, which are dataclasses."""

    def to_dict(self) -> dict:
        """Return the fields as JSON has them."""
        return asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses


def check_installed() -> None:
    """Raise an ImportError that names the extra if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'this measure needs scikit-learn: pip install "hf-intervene[eval]".'
        ) from error
