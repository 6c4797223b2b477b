"""The tree of errors that library users can catch."""

import pickle

import pytest

import stepquant
from stepquant import errors

BUILTINS = {
    "UserError": Exception,
    "InvalidInput": ValueError,
    "MissingFile": FileNotFoundError,
    "DamagedFile": Exception,
    "UnsupportedCheckpoint": Exception,
    "OutOfMemory": MemoryError,
}


def test_every_error_is_exported():
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == {"StepquantError", *BUILTINS} and defined < set(stepquant.__all__)
    assert all(getattr(stepquant, name) is getattr(errors, name) for name in defined)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_error_can_be_caught_by_kind(name, builtin):
    """As an error of stepquant, as one that a command reports, and as the builtin exception that fits."""
    kind = getattr(stepquant, name)
    assert issubclass(kind, stepquant.UserError) and issubclass(stepquant.UserError, stepquant.StepquantError)
    for caught in (kind, builtin):
        with pytest.raises(caught, match="^model.pt: no such file$"):
            raise kind("model.pt: no such file")


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_survives_pickling(name):
    """Workers send errors to the main process."""
    error = pickle.loads(pickle.dumps(getattr(errors, name)("rank: 0")))
    assert type(error) is getattr(errors, name) and str(error) == "rank: 0"


def test_everything_public_is_listed():
    assert set(stepquant.__all__) <= set(dir(stepquant))
    assert all(getattr(stepquant, name) is not None for name in stepquant.__all__)
