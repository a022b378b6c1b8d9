"""Which versions of transformers serve, and what is said of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ssa_framework.errors import MissingExtraError

OLDEST = "5.5"
"""As in pyproject.toml: the oldest version that passes the tests."""

TRIED = f"transformers>={OLDEST},<5.25"
"""Where the versions lie that were tried; a newer one is used as long as it has what is imported."""


@contextmanager
def usable_transformers() -> Iterator[None]:
    """Around whatever imports names of transformers for the first time.

    Raises:
        MissingExtraError: transformers is not installed or cannot be imported, is too old, or has not one of the names.
    """
    needs = f"ssa_framework.integrations.transformers needs transformers {OLDEST} or later"
    try:
        import transformers
        from packaging.version import Version  # transformers needs it
    except ImportError as error:
        raise MissingExtraError(
            f"{needs}, which cannot be imported ({error}); run: pip install 'ssa-framework[transformers]'"
        ) from error
    found = transformers.__version__
    if Version(found) < Version(OLDEST):
        raise MissingExtraError(f"{needs}, got {found}; run: pip install '{TRIED}'")
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        what = f"got {found}, which does not fit ({error})"
        raise MissingExtraError(f"{needs}, {what}; run: pip install '{TRIED}'") from error
