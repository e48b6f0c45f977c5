"""ONNX export, for serving outside of Python."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..basic.features import Feature, SequenceFeature
from ..errors import ConfigError, NotBuiltError, require
from ..models.multi_task import MTLModel
from .dummy import dummy_columns

#: Arguments of torch.onnx.export that this function sets itself.
_OWN = ("f", "input_names", "output_names", "opset_version", "dynamic_shapes", "dynamic_axes", "verbose")
#: The exporter's graphs start at this opset; an older one is asked of the legacy exporter.
_DYNAMO_OPSET = 18


class _Columns(nn.Module):
    """The model with its columns as positional inputs."""

    def __init__(self, model: MTLModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *columns: Tensor) -> Tensor:
        return self.model(dict(zip(self.names, columns, strict=True)))


def export_onnx(
    model: MTLModel,
    output_path: str | Path,
    dummy_input: Mapping[str, Tensor] | None = None,
    batch_size: int = 2,
    seq_length: int = 10,
    opset_version: int = 14,
    dynamic_batch: bool = True,
    device: str = "cpu",
    verbose: bool = False,
    onnx_export_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as ONNX: one input a feature, one output ``output [B, T]``. Ids are not checked in the graph.

    Args:
        model: a built model; neither it nor its mode is changed.
        output_path: the file; its folder is made if missing.
        dummy_input: example columns; None: made up.
        batch_size, seq_length: size of the made-up columns.
        opset_version: ONNX opset.
        dynamic_batch: leave the number of rows (and the lengths of pooled sequences) open.
        device: where the model runs while it is exported.
        verbose: print the exporter's progress.
        onnx_export_kwargs: passed on to ``torch.onnx.export``; ``{"dynamo": False}`` asks for the legacy exporter.

    Raises:
        MissingExtraError: without the extra ``onnx``.
        ConfigError: keywords that this function sets itself.
        RuntimeError: the exporter failed.
    """
    require("onnx", "onnx", "ONNX export")
    require("onnxscript", "onnx", "ONNX export")
    if not model.is_built:
        raise NotBuiltError(f"{type(model).__name__}: export_onnx before the model is built; fit it first")
    extra = dict(onnx_export_kwargs or {})
    for name in _OWN:
        if name in extra:
            raise ConfigError(f"export_onnx: {name!r} is set by export_onnx itself; use its own arguments")
    features = list({feature.name: feature for feature in model.features}.values())
    names = [feature.name for feature in features]
    columns = dummy_columns(features, max(batch_size, 2), seq_length, device) if dummy_input is None else dummy_input
    wrapper = _Columns(copy.deepcopy(model).to(device).eval().requires_grad_(False), names)
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_dynamo = extra.get("dynamo", True)
    axes = [_open_axes(feature) if dynamic_batch else {} for feature in features]
    dims = {name: torch.export.Dim(name) for open_axes in axes for name in open_axes.values()}
    if is_dynamo:
        extra["dynamic_shapes"] = (tuple({axis: dims[name] for axis, name in open_axes.items()} for open_axes in axes),)
    else:
        extra["dynamic_axes"] = dict(zip(names, axes, strict=True)) | (
            {"output": {0: "batch_size"}} if dynamic_batch else {}
        )
    arguments = tuple(columns[name].to(device) for name in names)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            wrapper,
            arguments,
            path,
            input_names=names,
            output_names=["output"],
            opset_version=max(opset_version, _DYNAMO_OPSET) if is_dynamo else opset_version,
            verbose=verbose,
            **extra,
        )


def _open_axes(feature: Feature) -> dict[int, str]:
    """Axes of a feature's column whose length is left open, by name."""
    if isinstance(feature, SequenceFeature) and feature.pooling != "concat":
        return {0: "batch_size", 1: f"length_of_{''.join(c if c.isalnum() else '_' for c in feature.name)}"}
    return {0: "batch_size"}
