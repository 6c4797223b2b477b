import json
import os
import time

import pytest
from typer.testing import CliRunner

from stepquant import cli
from stepquant.compute.garbage import Garbage, collect
from stepquant.compute.process import exclusive
from stepquant.compute.units import MARKER, UnitStore, gather


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two stages. clip@x has a unit of its artifact and two others; capture@x has one of its own and two leftovers."""
    monkeypatch.chdir(tmp_path)
    clip, capture = UnitStore(tmp_path / ".units/clip@x"), UnitStore(tmp_path / ".units/capture@x")
    held = {}
    for store, key, size in ((clip, "held", 10), (clip, "old", 1000), (clip, "cached", 100_000), (capture, "held", 10)):
        held[store, key] = store.make(
            key, lambda path, size=size, key=key: (path / key).write_text("x" * size) and None
        )
        os.utime(store.root / key / MARKER, (time.time() - 30 * 24 * 3600,) * 2)
    for store, out in ((clip, "clip/x"), (capture, "activations/x.zarr")):
        unit = held[store, "held"]
        gather(
            {"block_00": unit},
            tmp_path / "artifacts" / out,
            {"manifest.json": json.dumps({"blocks": {"block_00": unit.digest}})},
        )
    os.link(clip.root / "cached" / "cached", tmp_path / "in the cache of DVC")
    (capture.root / ".half.partial").mkdir()
    (capture.root / ".half.partial" / "file").write_text("x" * 50)
    (capture.root / "broken").mkdir()
    return tmp_path


def kept(folder):
    return {str(path.relative_to(folder / ".units")) for path in folder.glob(".units/*/*")}


def young(folder, key):
    os.utime(folder / ".units/clip@x" / key / MARKER)


def test_what_no_artifact_holds_is_removed(folder):
    marker = (folder / ".units/clip@x/old" / MARKER).stat().st_size + (
        folder / ".units/clip@x/cached" / MARKER
    ).stat().st_size
    found = collect(folder / ".units", folder / "artifacts", keep_days=7, dry_run=False)
    assert found == Garbage(units=4, bytes=1000 + 50 + marker)  # a file that DVC's cache has too frees nothing
    assert kept(folder) == {"clip@x/held", "capture@x/held"}
    assert collect(folder / ".units", folder / "artifacts", keep_days=0, dry_run=False) == Garbage(0, 0)


def test_young_units_stay_until_told(folder):
    young(folder, "old")
    collect(folder / ".units", folder / "artifacts", keep_days=7, dry_run=False)
    assert kept(folder) == {"clip@x/held", "clip@x/old", "capture@x/held"}
    collect(folder / ".units", folder / "artifacts", keep_days=0, dry_run=False)
    assert kept(folder) == {"clip@x/held", "capture@x/held"}


def test_a_dry_run_counts_the_same_and_removes_nothing(folder):
    before = kept(folder)
    would = collect(folder / ".units", folder / "artifacts", keep_days=7, dry_run=True)
    assert kept(folder) == before
    assert collect(folder / ".units", folder / "artifacts", keep_days=7, dry_run=False) == would


def test_a_running_stage_is_left_alone_and_so_is_everything_else(folder):
    before = kept(folder)
    with exclusive(folder / ".units/clip@x.lock"):
        result = CliRunner().invoke(cli.app, ["gc"])
    assert result.exit_code == 2
    assert result.stderr.endswith("clip@x.lock: another process is running this stage; wait for it or stop it\n")
    assert kept(folder) == before


def test_the_command_says_what_it_did(folder):
    for arguments, said in (
        (["--dry-run"], "would remove 4 units, 0.0 MB\n"),
        ([], "removed 4 units, 0.0 MB\n"),
        ([], "removed 0 units, 0.0 MB\n"),
    ):
        assert CliRunner().invoke(cli.app, ["gc", *arguments]).stdout == said


def test_without_units_there_is_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["gc"]).stdout == "removed 0 units, 0.0 MB\n"
    assert list(tmp_path.iterdir()) == []
