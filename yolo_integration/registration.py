"""Registers this package's blocks, yaml files and checkpoints in Ultralytics.

Ultralytics has no plug-in interface, so the few functions with which it builds models are replaced by
wrappers. Rows, yamls and models without this package's blocks pass through the wrappers unchanged.
"""

import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from ultralytics import nn as ultralytics_nn
from ultralytics.data import utils as data_utils
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.utils import DATASETS_DIR, LOGGER, callbacks, torch_utils

from bra_triton.checkpoint_keys import take_names

from . import flops, pretrained
from .modules import has_attention
from .yaml_rows import YAML_MODULES, blocks_parsed_as_csp, errors_name_the_row, expand_rows

PACKAGED_YAMLS = Path(__file__).parent / "yamls"
PHOTOS = "photos.yaml"

_parse_lock = threading.RLock()


def register() -> None:
    """Registers blocks and yamls in Ultralytics; importing `bra_triton.yolo_integration` does it already.

    Afterwards

    - yaml rows may name `BiLevelRoutingAttention`, `nchwBRA` (or `NCHWBiLevelRoutingAttention`),
      `BiFormerBlock`, `C2BRA` and `C3k2BRA`, which replace others of the same names, with a warning;
    - Ultralytics finds the packaged yamls by name, in every scale, and the photographs of `photo_dataset` as
      `data="photos.yaml"`;
    - weights are also transferred between models with different rows, and under other implementations' names;
    - training, which builds a model anew, warns of settings of the attention that it loses;
    - the model summary counts the attention's multiply-adds;
    - an export to a format that cannot hold the attention is refused;
    - restricted loading (`ULTRALYTICS_SAFE_LOAD`) accepts the blocks;
    - the child processes of multi-GPU training register the blocks, too.

    Further calls change nothing.

    Example:
        >>> register()
        >>> tasks.C2BRA
        <class 'bra_triton.yolo_integration.modules.C2BRA'>
    """
    for name, block in YAML_MODULES.items():
        theirs = getattr(tasks, name, block)
        if theirs is not block:
            LOGGER.warning(
                f"yaml rows named {name} build {block} from now on, no longer {theirs}, which "
                "ultralytics.nn.tasks had under this name; to use both, put that one there under another name"
            )
        setattr(tasks, name, block)
    for module in (tasks, ultralytics_nn):
        _wrap_once(module, "parse_model", _parse_with_expanded_rows)
    for kind in (tasks.DetectionModel, tasks.SemanticSegmentationModel):  # the others run no trial
        _wrap_once(kind, "__init__", _build_naming_rows)
    _wrap_once(tasks, "check_yaml", _find_packaged_yaml)
    _wrap_once(data_utils, "check_file", _find_photographs)
    _wrap_once(tasks.BaseModel, "load", _load_by_structure)
    torch.serialization.add_safe_globals([*_package_classes()])
    for event, callback in (
        ("on_pretrain_routine_start", register_in_child_process),
        ("on_export_start", refuse_export),
    ):
        if callback not in callbacks.default_callbacks[event]:
            callbacks.default_callbacks[event].append(callback)
    _wrap_once(Model, "export", _with_refusal)
    _wrap_once(Model, "train", _warn_and_train)
    flops.register_rule()
    _wrap_once(tasks, "intersect_dicts", _by_our_names)
    _wrap_once(torch_utils, "get_flops", flops.at_real_size)


def register_in_child_process(trainer: Any) -> None:
    """Does nothing itself: to unpickle this callback, a child process must import this package.

    The import registers the blocks. Multi-GPU training sends its child processes the trainer's class,
    arguments and callbacks; of a model that is built from a yaml it sends only the yaml's name.
    """


def refuse_export(exporter: Any) -> None:
    """Raises ValueError if the model has this package's attention and the export's format cannot hold it."""
    if exporter.args.format == "ncnn" and has_attention(exporter.model):
        raise ValueError(
            "format='ncnn' cannot hold bi-level routing attention: NCNN has no operator that chooses regions "
            "(topk) or gathers them; use 'onnx', 'openvino', 'torchscript' or 'executorch'"
        )


def _with_refusal(original: Callable[..., Any], yolo: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Wraps `Model.export`: adds `refuse_export` if the model lacks it.

    A model copies the default callbacks before it loads its checkpoint. If it is the checkpoint that
    registers this package, the model has no callback of ours.
    """
    callbacks_of_export = yolo.callbacks["on_export_start"]
    if refuse_export not in callbacks_of_export:
        callbacks_of_export.append(refuse_export)
    return original(yolo, *args, **kwargs)  # `kwargs` may have a `model`: the command line passes its name


def _wrap_once(place: ModuleType | type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(place, name)
    if hasattr(original, "_bra_triton_wraps"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:  # not a partial: only a function becomes a method
        return wrapper(original, *args, **kwargs)

    wrapped._bra_triton_wraps = original  # type: ignore[attr-defined]
    setattr(place, name, wrapped)


def _parse_with_expanded_rows(
    original: Callable[..., Any], d: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    expanded = expand_rows(d)
    with _parse_lock, errors_name_the_row(lambda: d), blocks_parsed_as_csp(expanded):
        built = original(expanded, *args, **kwargs)
    pretrained.keep_settings(built[0])
    return built


def _warn_and_train(original: Callable[..., Any], yolo: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Wraps `Model.train`, which loads a checkpoint's model into the new one; that warns by itself."""
    if isinstance(yolo.model, nn.Module) and not yolo.ckpt:
        pretrained.report_lost_settings(yolo.model)
    return original(yolo, *args, **kwargs)


def _build_naming_rows(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps a model's constructor, which runs the model once, on a small image, to find its strides."""
    with errors_name_the_row(lambda: model.yaml):
        original(model, *args, **kwargs)


def _find_packaged_yaml(original: Callable[..., Any], file: str | Path, *args: Any, **kwargs: Any) -> Any:
    name = str(file)
    if name == Path(name).name and not os.path.exists(name) and (PACKAGED_YAMLS / name).is_file():
        return str(PACKAGED_YAMLS / name)
    return original(file, *args, **kwargs)


def _by_our_names(
    original: Callable[..., Any], given: dict[str, Any], own: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Wraps `intersect_dicts`, which selects a checkpoint's tensors by name: renames the tensors first."""
    renamed = dict(given)
    take_names(renamed, own)
    return original(renamed, own, *args, **kwargs)


def _find_photographs(original: Callable[..., Any], file: str | Path, *args: Any, **kwargs: Any) -> Any:
    """For `photos.yaml`: writes the photographs to Ultralytics' folder of data sets; returns the path."""
    if str(file) == PHOTOS and not os.path.exists(PHOTOS):
        # Not imported at the top: `python -m` would warn that the module to run has been imported already.
        from .photo_dataset import write_photo_dataset

        return str(write_photo_dataset(DATASETS_DIR / "photos"))
    return original(file, *args, **kwargs)


def _load_by_structure(original: Callable[..., Any], model: Any, weights: Any, verbose: bool = True) -> Any:
    source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
    rows = getattr(source, "model", None)
    if not has_attention(model) or not isinstance(rows, nn.Sequential):
        return original(model, weights, verbose)
    source = pretrained.with_rows_of(source, model)
    result = original(model, source, verbose)
    if verbose:
        pretrained.report(source, model)
        pretrained.report_settings(source, model)
    return result


def _package_classes() -> list[type]:
    """The `nn.Module`s and dataclasses of this package: a model in a checkpoint may contain any of them."""
    package = __name__.partition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == package]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    return [value for value in classes if issubclass(value, nn.Module) or dataclasses.is_dataclass(value)]
