"""Replaces other implementations of bi-level routing attention by this package's modules ("ours").

Other projects hold changed copies of the original: some permute maps, take more inputs or apply dropout. So
the class of a module proves nothing, and a module is replaced only if a trial shows that ours computes the
same.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .arguments import flag
from .backend.select import check_name
from .equivalent import NotTheSameError, equivalent, reason_of
from .modules.base import Attention

_CALL_HOOKS = [name for name in vars(nn.Module()) if "forward" in name or "backward" in name]


@dataclass(frozen=True)
class Finding:
    """A module that looks like bi-level routing attention.

    Attributes:
        name: its qualified names in the model, joined by commas; empty for the model itself.
        original: its class.
        ours: the class that took its place; empty if it was not replaced.
        note: why it was not replaced; or which of its layers have hooks that are not called any more, if any.
    """

    name: str
    original: str
    ours: str = ""
    note: str = ""

    def __str__(self) -> str:
        arrow = f" -> {self.ours}" if self.ours else ""
        note = f": {self.note}" if self.note else ""
        return f"{self.name or '(the model)'}: {self.original}{arrow}{note}"


@dataclass(frozen=True)
class Report:
    """What `replace_attention` did; `str` of it has a line for every module.

    Attributes:
        model: the model; if it was itself an attention and was replaced, the module that took its place.
        replaced: the modules that were replaced.
        not_replaced: the modules that look like bi-level routing attention but were kept, with the reason.
    """

    model: nn.Module = field(repr=False)
    replaced: tuple[Finding, ...]
    not_replaced: tuple[Finding, ...]

    def __str__(self) -> str:
        titles = (f"replaced: {len(self.replaced)}", f"not replaced: {len(self.not_replaced)}")
        groups = zip(titles, (self.replaced, self.not_replaced), strict=True)
        return "\n".join("\n  ".join((title, *map(str, found))) for title, found in groups)


def replace_attention(model: nn.Module, backend: str = "auto", *, subclasses: bool = False) -> Report:
    """Replaces, in place, every bi-level routing attention of another implementation by this package's.

    A module is looked at if it has `n_win`, `topk`, and `qkv` or `qkv_linear`, whatever its class is called,
    or if the name of its class contains `BiLevelRoutingAttention`. It is replaced if ours gives the same
    outputs and gradients: copies of both are run on the CPU, on small maps, in float64, with random weights,
    in training and in eval. This takes as much memory as a training step of the original on two maps with
    about six tokens in each region. Modules that differ in their weights alone are tried once.

    Ours takes over the original's layers themselves, so parameters (also in an optimizer), dtypes, devices,
    `requires_grad` and `state_dict` are unchanged. It also takes over the training mode, the forward and
    backward hooks of the module, and the attributes that only the original has.

    Args:
        model: the model; if it is an attention itself, use `Report.model` in its place afterwards.
        backend: backend of the new modules: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.
        subclasses: also replace modules whose class overrides the `forward` of another class. Whatever such a
            `forward` does besides computing its result is lost.

    Returns:
        A frozen `Report`: the model, the modules that were replaced, and those that were not, with reasons.

    Raises:
        TypeError: if `model` is no `nn.Module`.
        ValueError: for an unknown `backend`, or a `subclasses` that is no bool.

    Example:
        >>> model = nn.Sequential(biformer.BiLevelRoutingAttention(dim=64, n_win=8))
        >>> print(replace_attention(model))
        replaced: 1
          0: biformer.BiLevelRoutingAttention -> bra_triton.modules.nhwc.BiLevelRoutingAttention
        not replaced: 0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    check_name(backend)
    subclasses = flag("subclasses", subclasses)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _looks_like_attention(module):
            places.setdefault(module, []).append(name)
    replacements: dict[nn.Module, nn.Module] = {}
    tried: dict[Any, Any] = {}
    replaced, not_replaced = [], []
    for original, names in places.items():
        found = (", ".join(names), _class_name(original))
        try:
            _check_not_compiled(original, names)
            ours, note = _replacement(original, backend, subclasses, tried)
        except Exception as error:  # a foreign forward may raise any error; the report gives it as the reason
            not_replaced.append(Finding(*found, note=reason_of(error)))
        else:
            replacements[original] = ours
            replaced.append(Finding(*found, _class_name(ours), note))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return Report(replacements.get(model, model), tuple(replaced), tuple(not_replaced))


def _class_name(module: nn.Module) -> str:
    """The qualified name of a module's class, with the Python module that defines it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, Attention):
        return False
    # Not hasattr: a wrapper, such as that of torch.compile, has the attributes of the module inside, too.
    own = vars(module).keys() | module._modules.keys()
    if {"n_win", "topk"} <= own and not own.isdisjoint({"qkv", "qkv_linear"}):
        return True
    # Other classes of this name cannot be replaced. They are looked at because the report should say why.
    is_named_so = "bilevelroutingattention" in type(module).__name__.lower().replace("_", "")
    _, *inner = module.modules()
    return is_named_so and not any(isinstance(x, Attention) or _looks_like_attention(x) for x in inner)


def _replacement(
    original: nn.Module, backend: str, subclasses: bool, tried: dict[Any, Any]
) -> tuple[nn.Module, str]:
    """Our module, ready to take the original's place, and a note on hooks that are not called any more."""
    _check_forward(original, subclasses)
    ours = equivalent(original, backend, tried)
    taken = vars(ours).keys() | ours._modules.keys() | {"forward"}
    for name, value in vars(original).items():
        is_free = name not in taken and not isinstance(getattr(type(ours), name, None), property)
        if is_free or name in _CALL_HOOKS:  # hooks: the same dictionary, so that handles can remove them
            vars(ours)[name] = value
    for name in ("router", "kv_down"):  # ours are new layers of the same names, so far without hooks
        if original._modules.get(name) is not None and name in ours._modules:
            hooks = vars(original._modules[name])
            vars(ours._modules[name]).update({kind: hooks[kind] for kind in _CALL_HOOKS})
    called = {*ours.modules(), *(original._modules.get(name) for name in ("router", "kv_down"))}
    hooked = [name for name, layer in original.named_modules() if _has_hooks(layer) and layer not in called]
    lost = ", ".join(name for name in hooked if name)
    return ours, f"hooks not called any more on {lost}" if lost else ""


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def _check_not_compiled(original: nn.Module, names: list[str]) -> None:
    """Raises NotTheSameError if a compiled function calls the original, which it would go on doing."""
    is_wrapped = any(name.rpartition(".")[2] == "_orig_mod" for name in names)  # by torch.compile(original)
    if is_wrapped or original._compiled_call_impl is not None:
        raise NotTheSameError("it is compiled by itself; call replace_attention before it is compiled")


def _check_forward(original: nn.Module, subclasses: bool) -> None:
    """Raises NotTheSameError if the original's `forward` takes more than ours, or may do more."""
    _, *extra = (name for name in inspect.signature(original.forward).parameters if name != "ret_attn_mask")
    if extra:
        raise NotTheSameError(f"its forward takes {', '.join(extra)}, which ours does not")
    bases = type(original).__mro__
    owners = [base for base in bases if "forward" in vars(base) and base is not nn.Module]
    if not subclasses and ("forward" in vars(original) or len(owners) > 1):
        raise NotTheSameError(
            f"it overrides the forward of {owners[-1].__qualname__}; subclasses=True replaces it if the "
            "result is the same"
        )
    if any(hooks for name, hooks in vars(original).items() if "state_dict" in name):
        raise NotTheSameError("it has hooks on its state_dict, which cannot be moved to another module")
