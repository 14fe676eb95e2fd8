"""Launches that overlap: every kernel waits before it does anything, and only such launches may overlap."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest
from launch_log import FORMS, step

from bra_triton import kernels
from bra_triton.bench import stand_in
from bra_triton.kernels import calls
from bra_triton.kernels.lib import overlap
from bra_triton.kernels.plan import Plan

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
]
KERNELS = {
    name: kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if name.endswith("_kernel") and hasattr(kernel, "fn")
}


def test_there_are_kernels():
    assert len(KERNELS) > 15


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_waits_before_anything_else(name):
    """One that does not would read what the launch before it has yet to write, and break the chain."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(KERNELS[name].fn))).body
    docstring, first, *_ = function.body
    assert isinstance(docstring.value, ast.Constant)
    assert ast.unparse(first) == f"{overlap.wait_for_previous_launch.__name__}()"


@pytest.mark.compiled
@pytest.mark.parametrize(("arch", "overlaps"), [("sm_90", True), ("sm_80", False)])
@pytest.mark.parametrize("form", ["plain", "small map", "soft", "masked"])
def test_launches_overlap_where_kernels_wait(form, arch, overlaps, log, monkeypatch):
    """Not before compute capability 9.0, whose compiler knows no such instruction."""
    monkeypatch.setattr(stand_in, "ARCH", arch)
    plans, launch = [], Plan._launch

    def note(self, tensors):
        launch(self, tensors)
        plans.append(self)

    monkeypatch.setattr(Plan, "_launch", note)
    calls.forget_plans()
    step(FORMS[form]())
    calls.forget_plans()
    compiled = [each for plan in plans for each in plan._direct._compiled]
    assert len(compiled) >= 5
    for each in compiled:
        assert each.metadata.launch_pdl == overlaps
        assert ("griddepcontrol.wait" in each.asm["ttir"]) == overlaps
