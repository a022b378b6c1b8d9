"""The kernels run in Triton's interpreter, on CPU tensors; the switch must be set before they are imported."""

import os
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _functions_are_prepared_once_a_launch() -> Iterator[None]:
    """The interpreter replaces the names of ``triton.language`` by its own, anew for each call of a device function.

    That takes a third of the time of these tests and changes nothing: names stay replaced until the launch ends.
    """
    from triton.runtime import interpreter

    prepared: set[Callable[..., object]] = set()
    prepare = interpreter._patch_lang

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            prepared.clear()

    def prepare_once(function: Callable[..., object]) -> interpreter._LangPatchScope:
        if function in prepared:
            return Scope()
        scope = prepare(function)
        prepared.add(function)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_LangPatchScope", Scope)
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        yield
