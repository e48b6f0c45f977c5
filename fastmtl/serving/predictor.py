"""A model packed for serving, on the CPU or a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, BadDataError, ConfigError, NotBuiltError
from ..models.multi_task import MTLModel
from ..models.multi_task.packed import Packed, make_pack, why_not

PRECISIONS = ("fp32", "bf16")


class Predictor:
    """The predictions that a model makes in evaluation mode, whatever mode it is in.

    Batch normalisation is folded into the linear layers and their weights are packed once; a call then goes through
    each tile of rows once, from the lookup to the predictions. A row's predictions do not depend on the batch it is in
    nor on the number of threads (on an NVIDIA GPU of the Hopper generation their last bits may differ between batches
    of few rows and of many). Any number of threads may call one predictor at once. The tables are read where the model
    has them; when another parameter has changed, the next call packs anew. (Changes that autograd does not see either,
    through ``parameter.data`` or a NumPy view, need :meth:`refresh`.)

    Args:
        model: a built model of float32 parameters, on the CPU or an NVIDIA GPU; columns are given on its device.
        precision: ``"fp32"``, or ``"bf16"``: weights and activations rounded to bfloat16, sums in float32.

    Raises:
        ConfigError: another precision.
        NotBuiltError: a model that has not seen data yet.
        BackendError: a model that can't be packed, with the reason; call the model itself.
    """

    def __init__(self, model: MTLModel, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"Predictor: no precision {precision!r}; the precisions are {', '.join(PRECISIONS)}")
        if not model.is_built:
            raise NotBuiltError("Predictor: the model has no parameters yet; fit it, or call model.build first")
        self.model = model
        self.precision = precision
        self._guard = threading.Lock()
        self._pack: Packed | None = None
        self._current()

    def _current(self) -> Packed:
        pack = self._pack
        if pack is None or pack.embedding is not self.model.embedding or not pack.is_current():
            with self._guard:
                if self._pack is not pack and self._pack is not None:  # another thread was here first
                    return self._pack
                pack = self._pack = self._new_pack()
        return pack

    def _new_pack(self) -> Packed:
        reason = why_not(self.model)
        if reason is None:
            try:
                return make_pack(self.model, self.precision == "bf16")
            except ConfigError as error:
                reason = str(error)
        raise BackendError(
            f"Predictor: {type(self.model).__name__} can't be packed: {reason}; call the model itself in evaluation "
            f"mode under torch.no_grad()"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def refresh(self) -> None:
        """Pack anew, after a change that went past autograd."""
        with self._guard:
            self._pack = self._new_pack()

    @property
    def id_columns(self) -> list[str]:
        """The features with ids, in the order of :meth:`run`'s first argument."""
        return list(self._current().id_names)

    @property
    def dense_columns(self) -> list[str]:
        """The dense features, in the order of :meth:`run`'s second argument."""
        return list(self._current().dense_names)

    def __call__(self, x: Mapping[str, Tensor]) -> Tensor:
        """Predict a batch.

        Args:
            x: as for the model: ``{feature: column}``; ids ``[B]``, sequences ``[B, L]``, dense ``[B]`` or ``[B, D]``.

        Returns:
            ``[B, T]`` float32: probabilities for classification, values for regression.

        Raises:
            BadIdError, BadDataError: as the model does.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._current()(x)
        return self._current()(x)

    def run(self, ids: Tensor | None, dense: Tensor | None = None) -> Tensor:
        """Predict from prepared matrices, which costs least where batches are small.

        Args:
            ids: ``[B, F]`` integers, one column for each of :attr:`id_columns`; None where there are none.
            dense: ``[B, D]`` floats, the columns of :attr:`dense_columns` side by side; None where there are none.

        Returns:
            As :meth:`__call__`.

        Raises:
            ConfigError: a model with sequences, which have more columns than features.
            BadIdError, BadDataError: as the model does; matrices of another width.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(ids, dense)
        pack = self._current()
        if pack.is_plain:
            try:
                return pack.run([] if ids is None else [ids], [] if dense is None else [dense])
            except RuntimeError:
                pass  # told by the ordinary way, column by column
        return pack(self._columns(pack, ids, dense))

    def _columns(self, pack: Packed, ids: Tensor | None, dense: Tensor | None) -> dict[str, Tensor]:
        if not pack.is_plain:
            raise ConfigError("Predictor.run: the model has sequence features; call the predictor with {name: column}")
        widths = pack.dense_widths
        for name, matrix, width in (("ids", ids, len(pack.id_names)), ("dense", dense, sum(widths))):
            got = 0 if matrix is None else matrix.shape[1] if matrix.ndim == 2 else None
            if got != width:
                shape = "None" if matrix is None else list(matrix.shape)
                raise BadDataError(f"Predictor.run: {name} must be [B, {width}], got {shape}")
        columns = {} if ids is None else {name: ids[:, i] for i, name in enumerate(pack.id_names)}
        if dense is not None:
            columns |= dict(zip(pack.dense_names, dense.split(widths, dim=1), strict=True))
        return columns
