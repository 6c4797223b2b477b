import hashlib

import pytest

from stepquant.storage.code_version import code_digest, source_files

FILES = {
    "lib/fake/__init__.py": '"""A docstring only."""\n',
    "lib/fake/numbers.py": "import math\nfrom fake.deep import rounding\n",
    "lib/fake/deep/__init__.py": "from fake.deep.reexported import value\n",
    "lib/fake/deep/rounding.py": "def f():\n    from fake.lazy import late\n",
    "lib/fake/deep/reexported.py": "value = 1\n",
    "lib/fake/lazy.py": "import fake.numbers\nlate = 1\n",
    "lib/fake/unused.py": "",
    "lib/stepquant/errors.py": "import fake.unused\n",
    "lib/stepquant/compute/units.py": "import fake.unused\n",
    "lib/stepquant/params.py": "import fake.unused\n",
    "lib/stepquant/paramsets.py": "",
    "stages/__init__.py": "import fake.unused\n",
    "stages/_stage.py": "import fake.unused\n",
    "stages/run.py": "from fake.numbers import pi\nimport stepquant.paramsets\nfrom stepquant import params\n"
    "from stepquant.errors import UserError\nimport stepquant.compute.units\n"
    "from stages import _stage\nfrom stages._stage import x\n",
}


@pytest.fixture
def fake(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def found(folder, module="stages/run.py"):
    roots = {"fake": folder / "lib/fake", "stepquant": folder / "lib/stepquant", "stages": folder / "stages"}
    files = source_files(folder / module, roots)
    assert files == sorted(files)
    return {path.relative_to(folder).as_posix() for path in files}


def test_the_closure_follows_imports_and_leaves_plumbing_out(fake):
    """From run.py: numbers -> deep (its __init__ imports reexported) and deep.rounding -> lazy -> numbers again.

    Left out: packages whose __init__ is a docstring, plumbing and what only plumbing imports, and the standard library.
    `paramsets` only starts like the plumbing `params`.
    """
    assert found(fake) == {
        "stages/run.py",
        "lib/fake/numbers.py",
        "lib/fake/deep/__init__.py",
        "lib/fake/deep/rounding.py",
        "lib/fake/deep/reexported.py",
        "lib/fake/lazy.py",
        "lib/stepquant/paramsets.py",
    }


def test_a_module_without_imports_is_its_own_closure(fake):
    assert found(fake, "lib/fake/unused.py") == {"lib/fake/unused.py"}


def test_code_digest_follows_content_and_order(fake):
    one, two = fake / "lib/fake/numbers.py", fake / "lib/fake/lazy.py"
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in (one, two)]
    assert code_digest([one, two]) == hashlib.sha256(b"".join(hashes)).hexdigest()
    before = code_digest([one, two])
    assert before != code_digest([two, one])
    two.write_text("late = 2\n")
    assert before != code_digest([one, two])
