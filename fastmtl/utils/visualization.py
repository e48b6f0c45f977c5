"""A picture of a model's graph."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingExtraError, NotBuiltError, require
from ..models.multi_task import MTLModel
from .dummy import dummy_columns


def visualize_model(
    model: MTLModel,
    input_data: Mapping[str, Tensor] | None = None,
    batch_size: int = 2,
    seq_length: int = 10,
    depth: int = 3,
    show_shapes: bool = True,
    expand_nested: bool = True,
    save_path: str | None = None,
    graph_name: str = "model",
    device: str = "cpu",
    dpi: int = 300,
    **kwargs: Any,
) -> Any:
    """Draw the model's graph with torchview (extra ``visualization``, and Graphviz's ``dot``).

    Args:
        model: a built model, which is not changed.
        input_data: example columns; None: made up.
        batch_size, seq_length: size of the made-up columns.
        depth: how deep modules are opened; -1 for all.
        show_shapes: write tensor shapes.
        expand_nested: draw nested modules as boxes.
        save_path: a .pdf, .svg or .png file; None: shown in a notebook, otherwise only returned.
        graph_name: title of the graph.
        device: where the model runs while it is traced.
        dpi: dots per inch of a picture.
        **kwargs: passed on to ``torchview.draw_graph``.

    Returns:
        torchview's graph; its ``visual_graph`` is a ``graphviz.Digraph``.

    Raises:
        MissingExtraError: without the extra, or without Graphviz.
    """
    torchview = require("torchview", "visualization", "visualization")
    graphviz = require("graphviz", "visualization", "visualization")
    if not model.is_built:
        raise NotBuiltError(f"{type(model).__name__}: visualization before the model is built; fit it first")
    columns = dummy_columns(model.features, batch_size, seq_length, device) if input_data is None else dict(input_data)
    graph = torchview.draw_graph(
        copy.deepcopy(model).eval(),
        input_data=({name: column.to(device) for name, column in columns.items()},),  # a bare dict would be unpacked
        graph_name=graph_name,
        depth=sys.maxsize if depth == -1 else depth,
        device=device,
        expand_nested=expand_nested,
        show_shapes=show_shapes,
        save_graph=False,
        **kwargs,
    )
    graph.visual_graph.graph_attr["dpi"] = str(dpi)
    if save_path is not None:
        path = Path(save_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            graph.visual_graph.render(
                filename=path.stem,
                directory=path.parent,
                format=path.suffix.lstrip(".") or "pdf",
                cleanup=True,
                quiet=True,
            )
        except graphviz.ExecutableNotFound as error:
            raise MissingExtraError(
                "visualization: Graphviz's program 'dot' is not on the PATH; install your system's package graphviz"
            ) from error
    elif "IPython" in sys.modules:
        from IPython.display import display

        display(graph.visual_graph)
    return graph
