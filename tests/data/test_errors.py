"""The errors are of the builtin kinds that callers already catch."""

import pytest

from fastmtl import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.BadIdError, IndexError),
        (errors.BadDataError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.BackendError, RuntimeError),
        (errors.NotBuiltError, RuntimeError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error, builtin):
    assert issubclass(error, errors.FastMTLError)
    assert issubclass(error, builtin)
    assert str(error("what")) == "what"


def test_require_names_the_extra():
    assert errors.require("json.decoder", "x", "Reading").JSONDecoder
    with pytest.raises(errors.MissingExtraError) as error:
        errors.require("no_such_module.part", "plots", "Drawing curves")
    assert str(error.value).startswith("Drawing curves needs no_such_module, which cannot be imported here")
    assert str(error.value).endswith("pip install 'fastmtl[plots]'")
