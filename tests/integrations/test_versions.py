"""What is said of a transformers that cannot be used, before anything of it is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

from ssa_framework.errors import MissingExtraError
from ssa_framework.integrations.transformers.versions import OLDEST, usable_transformers


def message_of_the_import(preparation: str) -> str:
    code = (
        f"{preparation}\n"
        "from ssa_framework.errors import MissingExtraError\n"
        "try:\n    import ssa_framework.integrations.transformers\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


def test_missing() -> None:
    message = message_of_the_import("import sys; sys.modules['transformers'] = None")
    assert "pip install 'ssa-framework[transformers]'" in message


def test_a_name_is_gone() -> None:
    """As where a newer transformers has renamed something; the message also tells the way back."""
    message = message_of_the_import("import transformers.masking_utils as m; del m.packed_sequence_mask_function")
    assert f"got {transformers.__version__}, which does not fit (cannot import name" in message
    assert f"run: pip install 'transformers>={OLDEST},<" in message


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.4.0", f"{OLDEST}.0.dev0"])
def test_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    message = rf"needs transformers {OLDEST} or later, got {version}; run: pip install 'transformers>={OLDEST},<"
    with pytest.raises(MissingExtraError, match=message), usable_transformers():
        raise AssertionError("nothing is imported from it")


def test_other_import_errors_stay() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as raised, usable_transformers():
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(raised.value, MissingExtraError)


def test_same_bound_as_the_extras() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra in ("transformers", "test"):
        assert f"transformers>={OLDEST}" in project["optional-dependencies"][extra]
