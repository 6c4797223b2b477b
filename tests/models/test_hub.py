"""A hub model: stage model records the commit, and every later stage reads exactly that commit."""

import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from stepquant.errors import MissingFile
from stepquant.models.hub import cached_snapshot, commit_of, is_hub_id
from stepquant.models.source import describe_source, resolve_source
from tests.models.test_source import finished  # noqa: F401 (a fixture)
from tests.wan import save_expert

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


class Hub:
    """What huggingface_hub.snapshot_download does, with a cache on disk and a main branch that can move."""

    def __init__(self, root, commits):
        self.root, self.commits, self.main, self.downloads = root, commits, OLD, []

    def folder(self, commit):
        return self.root / "models--owner--name/snapshots" / commit

    def snapshot_download(self, name, *, revision=None, ignore_patterns, local_files_only=False):
        assert name == "owner/name" and set(ignore_patterns) == {"*.bin", "*.pt", "*.pth", "*.ckpt"}
        commit = self.main if revision in (None, "main") else revision
        if not local_files_only:
            self.downloads.append(commit)
            shutil.copytree(self.commits[commit], self.folder(commit), dirs_exist_ok=True)
        if not self.folder(commit).is_dir():
            raise LocalEntryNotFoundError("not in the cache")
        return str(self.folder(commit))


@pytest.fixture
def hub(finished, tmp_path, monkeypatch):  # noqa: F811
    changed = shutil.copytree(finished, tmp_path / "changed")
    save_expert(changed / "transformer", torch.bfloat16, seed=7)
    made = Hub(tmp_path / "cache", {OLD: finished, NEW: changed})
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


@pytest.mark.parametrize("revision", [None, "main"])
def test_main_moves_between_two_stages(hub, revision):
    folder = resolve_source("owner/name", revision)
    manifest = describe_source(folder, "owner/name", revision)
    assert manifest.revision == OLD
    hub.main = NEW
    later = resolve_source(manifest.source, manifest.revision)
    assert later == hub.folder(OLD) and hub.downloads == [OLD]  # from the cache, without asking the hub
    assert describe_source(later, manifest.source, manifest.revision) == manifest
    again = describe_source(resolve_source("owner/name", revision), "owner/name", revision)
    assert again.revision == NEW and again.expert_digest("high_noise") != manifest.expert_digest("high_noise")


def test_a_commit_that_is_not_here_any_more_is_downloaded_again(hub):
    hub.main = NEW
    assert resolve_source("owner/name", OLD) == hub.folder(OLD) and hub.downloads == [OLD]


def test_a_half_filled_cache_is_completed(hub):
    """Another program fetched one component of this commit."""
    hub.folder(OLD).mkdir(parents=True)
    assert resolve_source("owner/name", OLD) == hub.folder(OLD)
    assert hub.downloads == [OLD] and (hub.folder(OLD) / "model_index.json").is_file()


def test_the_cache_is_looked_up_without_the_hub(hub):
    assert cached_snapshot("owner/name", None) is None
    resolve_source("owner/name", None)
    assert cached_snapshot("owner/name", "main") == hub.folder(OLD)
    assert hub.downloads == [OLD]


def test_the_revision_of_a_folder_that_is_no_snapshot_stays(tmp_path):
    assert commit_of(tmp_path, None) is None and commit_of(tmp_path, "main") == "main"
    assert commit_of(tmp_path / OLD, None) is None


def test_a_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert is_hub_id("owner/other") and not is_hub_id("owner/name") and not is_hub_id("a/b/c")


def test_a_hub_that_has_no_such_model(monkeypatch):
    def refuse(name, **options):
        raise LocalEntryNotFoundError("cannot\nfind it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        MissingFile, match="model.source: no folder owner/name, and the hub gave no such model: cannot "
    ):
        resolve_source("owner/name", OLD)
