"""What a torch-rechub script can import and call, it can import from fastmtl and call alike; and it is documented."""

import functools
import importlib
import inspect
import pkgutil

import pytest

import fastmtl

#: Module under both packages -> the names that scripts import from it.
SURFACE = {
    "basic.features": ["DenseFeature", "SequenceFeature", "SparseFeature"],
    "basic.initializers": ["Pretrained", "RandomNormal", "RandomUniform", "XavierNormal", "XavierUniform"],
    "basic.layers": [
        "MLP", "AveragePooling", "ConcatPooling", "EmbeddingLayer", "InputMask", "PredictionLayer", "SumPooling",
    ],
    "basic.callback": ["EarlyStopper"],
    "basic.tracking": ["BaseLogger", "SwanLabLogger", "TensorBoardXLogger", "WandbLogger"],
    "basic.loss_func": ["RegularizationLoss"],
    "models.multi_task": ["AITM", "ESMM", "MMOE", "PLE", "SharedBottom"],
    "trainers": ["MTLTrainer"],
    "utils.data": [
        "DataGenerator", "PredictDataset", "TorchDataset", "df_to_dict", "get_auto_embedding_dim", "get_loss_func",
        "get_metric_func", "pad_sequences",
    ],
    "utils.mtl": ["MetaBalance", "gradnorm", "shared_task_layers"],
    "data.dataset": ["ParquetIterableDataset"],
}  # fmt: skip
NAMES = [(module, name) for module, names in SURFACE.items() for name in names]
#: The tutorial dialect: a star import must bring these.
TUTORIAL = {
    "models": ["AITM", "ESMM", "MMOE", "PLE", "MMoE", "SharedBottom"],
    "trainers": ["MTLTrainer", "evaluate_multi_task"],
    "utils": ["DataGenerator", "MetaBalance", "shared_task_layers"],
    "data": ["ParquetIterableDataset"],
}
#: MTLTrainer's keywords of the tutorial, and those of fastmtl alone.
TRAINER_KEYWORDS = {
    "n_epochs", "optimizer", "task_weights_strategy", "gradnorm_alpha", "task_weights", "task_specific_lr",
    "task_names", "amp", "progress", "embedding_update",
}  # fmt: skip

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parts(module, name):
    """``(our, their)`` callables behind a name: a function, or a class's constructor and its public methods."""
    ours = getattr(importlib.import_module(f"fastmtl.{module}"), name)
    theirs = getattr(importlib.import_module(f"torch_rechub.{module}"), name)
    yield "", ours, theirs
    if inspect.isclass(theirs):
        for method, function in vars(theirs).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f".{method}", getattr(ours, method), function


def _same(ours, theirs):
    """Equal defaults; objects without an equality of their own by their class and attributes."""
    if inspect.isclass(ours) or type(ours).__module__ == "builtins":
        return ours == theirs
    return type(ours).__name__ == type(theirs).__name__ and vars(ours) == vars(theirs)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_takes_every_argument_of_torch_rechub(module, name):
    for part, ours, theirs in _parts(module, name):
        have = list(inspect.signature(ours).parameters.values())
        for place, wanted in enumerate(inspect.signature(theirs).parameters.values()):
            where = f"{name}{part}, argument {place}: {wanted}"
            if wanted.kind is inspect.Parameter.VAR_KEYWORD:
                assert any(parameter.kind is wanted.kind for parameter in have), where
                continue
            own = have[place]
            assert (own.name, own.kind) == (wanted.name, wanted.kind), where
            if wanted.default is not inspect.Parameter.empty:
                assert _same(own.default, wanted.default), where
        for extra in have[len(inspect.signature(theirs).parameters) :]:
            assert extra.kind not in POSITIONAL or extra.default is not inspect.Parameter.empty, (
                f"{name}{part}: {extra}"
            )


def test_the_trainer_takes_the_tutorials_keywords_too():
    from fastmtl.trainers import MTLTrainer

    parameters = inspect.signature(MTLTrainer).parameters.values()
    assert {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} == TRAINER_KEYWORDS


@pytest.mark.parametrize("module", TUTORIAL)
def test_star_imports_of_the_tutorial(module):
    scope = {}
    exec(f"from fastmtl.{module} import *", scope)
    assert set(TUTORIAL[module]) <= set(scope)


def test_mmoe_is_one_class_under_two_names():
    from fastmtl.models import MMOE, MMoE

    assert MMOE is MMoE


def test_top_level_names():
    assert set(fastmtl.__all__) >= {"__version__", "from_pretrained", "use_backend"}
    for name in fastmtl.__all__:
        assert getattr(fastmtl, name) is not None


MODULES = [info.name for info in pkgutil.walk_packages(fastmtl.__path__, "fastmtl.") if "._" not in info.name]
DOCUMENTED = (property, functools.cached_property, classmethod, staticmethod)


def _undocumented(module):
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not thing.__doc__:
            yield name
        if inspect.isclass(thing):
            if not thing.__doc__:
                yield name
            for member, value in vars(thing).items():
                is_code = inspect.isfunction(value) or isinstance(value, DOCUMENTED)
                # a method may leave it to the one that it overrides
                if is_code and not member.startswith("_") and not inspect.getdoc(getattr(thing, member)):
                    yield f"{name}.{member}"


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    if name.startswith("fastmtl.backends.triton."):
        pytest.importorskip("triton", reason="the kernels' modules import triton, which is an extra")
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(_undocumented(module)) == []
