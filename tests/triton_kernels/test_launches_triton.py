"""Kernels are launched on the device of their tensors, whichever is current."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import ssa_framework
from ssa_framework.ops.triton_runtime import launches

OPS = Path(ssa_framework.__file__).parent / "ops"
ENTRIES = [*OPS.glob("*/triton_cuda.py"), *OPS.glob("*/triton_few_call.py")]
INSIDE = {"neighbor_attention/triton_few_call.py"}
"""Called by another one that is marked."""


def launching(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions of a module that launch something, or call one of its functions or classes that does."""
    named = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = {
        name
        for name, node in named.items()
        if any(isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) for call in ast.walk(node))
    }
    while True:
        calling = {
            name
            for name, node in named.items()
            if any(isinstance(word, ast.Name) and word.id in found for word in ast.walk(node))
        }
        if calling <= found:
            return {name: node for name, node in named.items() if name in found and isinstance(node, ast.FunctionDef)}
        found |= calling


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_entry_is_marked(path: Path) -> None:
    if f"{path.parent.name}/{path.name}" in INSIDE:
        return
    entries = {name: node for name, node in launching(ast.parse(path.read_text())).items() if name[0] != "_"}
    assert entries
    for name, node in entries.items():
        marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
        assert "launches" in marks, f"{path}: {name} launches kernels on whichever device is current"


def test_the_device_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def entering(device: torch.device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entering)
    call = launches(lambda number, where, other: (number, where, other))
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    assert call(3, here, there) == (3, here, there)
    assert call(3, torch.ones(1), there)[2] == there
    assert call(3, torch.device("cuda"), there)[2] == there
    assert not entered
    assert call(3, there, here) == (3, there, here)
    assert entered == [there]
