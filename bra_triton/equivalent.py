"""Finds, by a trial, the module of this package that computes the same as another implementation's module.

Here "the original" is the other implementation's module, and "ours" the module of this package.
"""

import copy
import inspect
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from .modules.nchw import NCHWBiLevelRoutingAttention
from .modules.nhwc import BiLevelRoutingAttention
from .modules.permuted import PermutedBiLevelRoutingAttention

# Rounding errors here are about 1e-13 in float64, and 1e-7 if the original casts to float32 inside.
TOLERANCE = 1e-5
MOST_NAMES = 4
_OF_EVERY_MODULE = vars(nn.Module()).keys()


class NotTheSameError(Exception):
    """Ours does not compute the same as the original; the message says what ours lacks or does not do."""


def reason_of(error: Exception) -> str:
    """An error in one line, with its class unless it is a `NotTheSameError`."""
    kind = "" if isinstance(error, NotTheSameError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0].removesuffix(": ")


def equivalent(original: nn.Module, backend: str, tried: dict[Any, Any]) -> nn.Module:
    """Our module with the settings and the layers of the original; the two modules then share the layers.

    A trial on copies decides: in float64 on the CPU, with random weights, in training and in eval.

    Args:
        original: the other implementation's module.
        backend: backend of our module.
        tried: the outcomes of earlier trials, which serve modules that differ in their weights alone; the
            outcome of a new trial is added.

    Raises:
        NotTheSameError: if no module of ours computes the same; says why.
        Exception: any error that is raised while the original is read or copied.
    """
    _with_layers_of(original, _classes_for(original)[0], "auto")  # raises early if no class can fit
    kind = _like(original)
    if kind not in tried:
        tried[kind] = _trial(original)
    outcome = tried[kind]
    if isinstance(outcome, str):
        raise NotTheSameError(outcome)
    return _with_layers_of(original, outcome, backend)


def _with_layers_of(original: nn.Module, kind: type[nn.Module], backend: str) -> Any:
    """Ours with the original's settings and layers; raises NotTheSameError if they do not fit."""
    known = vars(original)
    if missing := [name for name in ("dim", "n_win", "topk") if name not in known]:
        raise NotTheSameError(f"it has no attribute {' and no '.join(missing)}, which ours needs")
    settings = {name: known[name] for name in inspect.signature(kind).parameters if name in known}
    settings.pop("attn_backend", None)
    settings |= {"backend": backend, "qk_scale": known.get("scale", settings.get("qk_scale"))}
    if kind is NCHWBiLevelRoutingAttention:  # some copies take maps with fewer tokens than `n_win`
        settings["auto_pad"] = True
    with torch.device("meta"):  # weights that will be replaced take no memory and no random numbers
        ours: Any = kind(**settings).train(original.training)
    layers = ["qkv_linear", "output_linear"]
    if issubclass(kind, BiLevelRoutingAttention):
        layers = [
            "qkv" if isinstance(original._modules.get("qkv"), nn.Linear) else "qkv.qkv",
            "wo",
            "router.emb",
        ]
    for path in layers:
        parent, _, name = path.rpartition(".")
        try:
            layer = original.get_submodule(path)
        except AttributeError as error:
            if path == "router.emb":  # some originals route without it; the trial compares results
                continue
            raise NotTheSameError(f"it has no layer {path}, which ours takes over") from error
        setattr(ours.get_submodule(parent), name, layer)
    ours.lepe = original._modules.get("lepe")
    for name in original._modules:  # an optimizer's state_dict numbers the parameters, so their order is kept
        if name in ours._modules:
            ours._modules[name] = ours._modules.pop(name)
    _check_names(original, ours)
    return ours


def _check_names(original: nn.Module, ours: nn.Module) -> None:
    """Raises NotTheSameError if names of parameters or buffers differ."""
    theirs, own = (
        dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
        for module in (original, ours)
    )
    if theirs - own:
        raise NotTheSameError(f"ours does not have its parameters or buffers {_listed(theirs - own)}")
    if own - theirs:
        raise NotTheSameError(f"it does not have our parameters or buffers {_listed(own - theirs)}")


def _listed(names: Set[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + rest


def _classes_for(original: nn.Module) -> tuple[type[nn.Module], ...]:
    if "qkv_linear" in original._modules:
        return (NCHWBiLevelRoutingAttention,)
    return BiLevelRoutingAttention, PermutedBiLevelRoutingAttention


def _like(original: nn.Module) -> tuple[Any, ...]:
    """What the outcome of a trial depends on: all of the module and its layers except for the weights.

    Attributes that are neither numbers nor strings stand for themselves: they are equal only if they are the
    same object.
    """
    parts = []
    for name, part in original.named_modules():
        attributes = [(key, value) for key, value in vars(part).items() if key not in _OF_EVERY_MODULE]
        buffers = [(key, id(buffer)) for key, buffer in part._buffers.items()]
        shapes = [(key, value if value is None else value.shape) for key, value in part._parameters.items()]
        plain = [(key, repr(value) if _is_plain(value) else id(value)) for key, value in attributes]
        parts.append((name, type(part), *plain, *buffers, *shapes, *part._modules))
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _trial(original: nn.Module) -> type[nn.Module] | str:
    """Our class that computes the same as the original, or why there is none."""
    failures = []
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
    ):
        trial = _trial_copy(original)
        for kind in _classes_for(original):
            differs = _difference(trial, _with_layers_of(trial, kind, "torch"))
            if differs is None:
                return kind
            failures.append(f"compared with {kind.__name__} {differs}")
    return f"no module of ours computes the same: {'; '.join(failures)}"


def _trial_copy(original: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks, and with random weights: zeros would hide differences."""
    memo: dict[int, Any] = {
        id(hooks): type(hooks)()
        for module in original.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks")
    }
    trial = copy.deepcopy(original, memo).to("cpu", torch.float64)
    torch.manual_seed(0)
    for parameter in trial.parameters():
        parameter.requires_grad_().data.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return trial


def _difference(trial: nn.Module, ours: Any) -> str | None:
    """Compares the trial copy with ours; returns what differs and on which map, or None.

    Ours must also compute the same on the maps that the original need not take, but does.
    """
    for index, shape in enumerate(_map_shapes(ours)):
        if index > 0 and not _takes(trial, shape):
            continue
        if index > 0 and not ours.auto_pad:
            return f"on a map {shape}, it raises no error, although it has no auto_pad=True"
        try:
            differs = _difference_on(shape, trial, ours)
        except Exception as error:  # usually because the map has the wrong layout
            differs = reason_of(error)
        if differs is not None:
            return f"on a map {shape}, {differs}"
    return None


def _difference_on(shape: tuple[int, ...], trial: nn.Module, ours: nn.Module) -> str | None:
    """Compares outputs and all gradients, in training and in eval; returns what differs, or None."""
    parameters = dict(trial.named_parameters())
    names = ("the output", "the gradient of the map", *(f"the gradient of {name}" for name in parameters))
    for training in (True, False):
        outcomes = [
            _outcome(module.train(training), shape, list(parameters.values())) for module in (trial, ours)
        ]
        for name, expected, actual in zip(names, *outcomes, strict=True):
            if actual.shape != expected.shape:
                return f"{name} has shape {tuple(expected.shape)}, ours {tuple(actual.shape)}"
            error = torch.linalg.vector_norm(actual - expected)
            if not error <= TOLERANCE * (1 + torch.linalg.vector_norm(expected)):
                return f"{name} differs in {'training' if training else 'eval'}"
    return None


def _takes(module: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        module(torch.randn(shape, dtype=torch.float64))
    except Exception:  # usually an assertion of the original
        return False
    return True


def _map_shapes(ours: Any) -> list[tuple[int, ...]]:
    """Shapes of maps for a trial. The first can be cut into whole regions.

    The second needs padding, and the third has fewer tokens along its sides than `n_win`. Height and width of
    the first two differ, so that no layout can be mistaken for another.
    """
    side = getattr(ours._modules.get("kv_down"), "ratio", 2)  # a region must hold a pooling window
    (rows, columns), dim = ours.spec.windows, ours.spec.dim
    height, width = rows * side, columns * (side + 1)
    sizes = [(height, width)]
    if (rows, columns) != (1, 1):  # one region holds any map
        # The NHWC form pads to multiples of `n_win`, this map to the size of the first.
        less = (0, 0) if isinstance(ours, NCHWBiLevelRoutingAttention) else (rows, columns)
        sizes += [(height - less[0] + 1, width - less[1] + 1), (max(rows - 1, 1), max(columns - 1, 1))]
    return [(2, *size, dim) if type(ours) is BiLevelRoutingAttention else (2, dim, *size) for size in sizes]


def _outcome(module: nn.Module, shape: tuple[int, ...], parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Output for a random map, gradient of the map, and gradients of the parameters (zeros if unused)."""
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    out = module(x)
    if not torch.equal(torch.get_rng_state(), state):  # it may have dropped nothing this time
        raise NotTheSameError("its forward draws random numbers, as dropout does")
    if not isinstance(out, Tensor):
        raise TypeError(f"its forward returns a {type(out).__name__}, ours a tensor")
    torch.manual_seed(2)
    grad_out = torch.randn(out.shape, dtype=out.dtype)  # randn_like draws in the order of memory
    inputs = (x, *parameters)
    return out, *torch.autograd.grad(out, inputs, grad_out, allow_unused=True, materialize_grads=True)
