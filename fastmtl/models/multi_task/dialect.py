"""The tutorial's keywords, translated to the library's; and the checks of both.

The one place that knows that ``expert_units=[256, 128], num_experts=8`` is ``n_expert=8, expert_params={"dims": ...}``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ...basic.activation import activation_name
from ...errors import ConfigError

#: Hidden widths of the towers where the tutorial's call names none.
TOWER_UNITS = (64, 32)

Keywords = dict[str, Any]


def mlp_config(params: Keywords, name: str, may_be_empty: bool = False, output_layer: bool = False) -> Keywords:
    """A checked copy of ``{"dims": [...], "activation": ..., "dropout": ...}``.

    ``"output_layer"`` is accepted where it says what the model does anyway (torch-rechub's own scripts pass it).
    """
    unknown = set(params) - {"dims", "activation", "dropout", "output_layer"}
    if unknown:
        raise ConfigError(f"{name}: unknown key {sorted(unknown)[0]!r}; the keys are dims, activation, dropout")
    if params.get("output_layer", output_layer) != output_layer:
        raise ConfigError(f"{name}: output_layer is {output_layer} here and can't be changed")
    dims = [int(width) for width in params.get("dims") or ()]
    if any(width < 1 for width in dims) or not (dims or may_be_empty):
        raise ConfigError(f"{name}: dims must be one or more widths of at least 1, got {params.get('dims')!r}")
    config: Keywords = {"dims": dims}
    if "activation" in params:
        config["activation"] = activation_name(params["activation"])
    if "dropout" in params:
        config["dropout"] = float(params["dropout"])
        if not 0 <= config["dropout"] < 1:
            raise ConfigError(f"{name}: dropout must be at least 0 and below 1, got {params['dropout']!r}")
    return config


def check_tower_list(params_list: Sequence[Keywords], n_task: int) -> list[Keywords]:
    """Checked copies of the towers' parameters, one for each task."""
    if len(params_list) != n_task:
        raise ConfigError(f"tower_params_list has {len(params_list)} entries for {n_task} tasks; give one a task")
    return [
        mlp_config(params, f"tower_params_list[{task}]", may_be_empty=True, output_layer=True)
        for task, params in enumerate(params_list)
    ]


def check_count(value: int, name: str) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _task_types(given: Keywords) -> list[str]:
    types, count = given.pop("task_types", None), given.pop("num_tasks", None)
    if types is None:
        return ["classification"] * check_count(2 if count is None else count, "num_tasks")
    if count is not None and count != len(types):
        raise ConfigError(f"num_tasks is {count}, but task_types names {len(types)} tasks")
    return list(types)


def _mlp(given: Keywords, units: Sequence[int], activation: str | None = None) -> Keywords:
    params: Keywords = {"dims": list(units)}
    if activation:
        params["activation"] = activation
    if "dropout" in given:
        params["dropout"] = given["dropout"]
    return params


def _towers(given: Keywords, n_task: int) -> list[Keywords]:
    units = given.pop("task_hidden_units", None) or given.pop("tower_units", None) or TOWER_UNITS
    return [_mlp(given, units, given.get("activation")) for _ in range(n_task)]


def _shared_bottom(given: Keywords) -> Keywords:
    types = _task_types(given)
    return {
        "task_types": types,
        "tower_params_list": _towers(given, len(types)),
        "bottom_params": _mlp(given, given.pop("hidden_units"), given.pop("activation", None)),
    }


def _experts(given: Keywords) -> Keywords:
    activation = given.pop("expert_activation", None) or given.get("activation")
    gate = given.pop("gate_activation", "softmax")
    if gate != "softmax":
        raise ConfigError(f"gate_activation {gate!r} is not known; gates are 'softmax'")
    return _mlp(given, given.pop("expert_units"), activation)


def _mmoe(given: Keywords) -> Keywords:
    types = _task_types(given)
    return {
        "task_types": types,
        "n_expert": given.pop("num_experts"),
        "expert_params": _experts(given),
        "tower_params_list": _towers(given, len(types)),
    }


def _ple(given: Keywords) -> Keywords:
    types = _task_types(given)
    return {
        "task_types": types,
        "n_level": given.pop("num_layers"),
        "n_expert_specific": given.pop("num_experts"),
        "n_expert_shared": given.pop("num_shared_experts"),
        "expert_params": _experts(given),
        "tower_params_list": _towers(given, len(types)),
    }


def _esmm(given: Keywords) -> Keywords:
    units = [*given.pop("hidden_units"), *given.pop("tower_units", ())]
    params = _mlp(given, units, given.pop("activation", None))
    return {
        "user_features": given.pop("features"),
        "item_features": [],
        "cvr_params": params,
        "ctr_params": dict(params),
    }


def _aitm(given: Keywords) -> Keywords:
    n_task = len(_task_types(given))
    return {
        "n_task": n_task,
        "tower_params_list": _towers(given, n_task),
        "bottom_params": _mlp(given, given.pop("hidden_units"), given.pop("activation", None)),
    }


_TRANSLATIONS: dict[str, Callable[[Keywords], Keywords]] = {
    "SharedBottom": _shared_bottom,
    "MMOE": _mmoe,
    "PLE": _ple,
    "ESMM": _esmm,
    "AITM": _aitm,
}
#: The tutorial's keywords of each model, for messages.
_KEYWORDS = {
    "SharedBottom": "hidden_units, task_hidden_units, num_tasks, task_types",
    "MMOE": "expert_units, num_experts, num_tasks, task_types, expert_activation, gate_activation, tower_units",
    "PLE": "expert_units, num_experts, num_layers, num_shared_experts, num_tasks, task_types, tower_units",
    "ESMM": "features, hidden_units, tower_units",
    "AITM": "hidden_units, num_tasks, tower_units",
}


def translated(init: Callable[..., None]) -> Callable[..., None]:
    """Let a model's library-dialect ``__init__`` take the tutorial's keywords too."""
    model = init.__qualname__.split(".")[0]
    library = set(inspect.signature(init).parameters)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if set(kwargs) - library:
            given = dict(kwargs)
            try:
                kwargs = _TRANSLATIONS[model](given)
            except KeyError as missing:
                raise ConfigError(
                    f"{model}: the keyword {missing.args[0]!r} is missing; beside features, the tutorial's call takes "
                    f"{_KEYWORDS[model]}, the library's {', '.join(sorted(library - {'self', 'features'}))}"
                ) from None
            for name in ("dropout", "activation"):  # read by every part of a model that has one
                given.pop(name, None)
            kwargs |= {name: given.pop(name) for name in ("features", "embedding_dim") if name in given}
            if given:
                raise ConfigError(
                    f"{model}: unknown keyword {sorted(given)[0]!r}; beside features, dropout, activation and "
                    f"embedding_dim, the tutorial's call takes {_KEYWORDS[model]}"
                )
        init(self, *args, **kwargs)

    return wrapper
