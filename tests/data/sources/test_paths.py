"""Media stay inside the folder of their source, and paths are the same on every machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from qvl_pipeline.data.rejection import RejectedRowError, quote
from qvl_pipeline.data.sources import paths
from qvl_pipeline.data.sources.paths import LocalFolder, RemoteFolder, media_folder, project_path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root with `data/media/a.png`, and `secret.png` outside of `data`."""
    root = tmp_path / "project"
    (root / "data/media").mkdir(parents=True)
    (root / "data/media/a.png").touch()
    (root / "secret.png").touch()
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize(
    "reference",
    ["media/a.png", "./media//a.png", "media/../media/a.png", "file://media/a.png", "{root}/data/media/a.png"],
)
def test_paths_are_relative_to_the_project(project: Path, reference: str) -> None:
    for folder in ("data", str(project / "data")):
        assert LocalFolder(Path(folder)).locate(reference.format(root=project)) == "data/media/a.png"


def test_folder_outside_of_the_project_gives_absolute_paths(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "project2"  # a name that begins like the project's
    assert LocalFolder(elsewhere).locate("a.png") == f"{tmp_path}/project2/a.png"
    assert project_path(elsewhere) == f"{tmp_path}/project2"


def test_missing_file_has_a_path_all_the_same(project: Path) -> None:
    assert LocalFolder(Path("data")).locate("media/nothing.png") == "data/media/nothing.png"


def test_folder_reached_by_a_link_holds_its_media(project: Path, tmp_path: Path) -> None:
    big_disk = tmp_path / "disk"
    (project / "data").rename(big_disk)
    (project / "data").symlink_to(big_disk)
    assert LocalFolder(Path("data")).locate("media/a.png") == "data/media/a.png"


def _leave(project: Path, name: str) -> str:
    folder = project / "data/media"
    if name == "linked file":
        (folder / "link.png").symlink_to("../../secret.png")
        return "media/link.png"
    if name == "linked folder":
        (folder / "link").symlink_to(project)
        return "media/link/secret.png"
    return {"parent": "../secret.png", "absolute": str(project / "secret.png"), "neighbour": "../data2/a.png"}[name]


@pytest.mark.parametrize("way", ["parent", "absolute", "neighbour", "linked file", "linked folder"])
def test_leaving_the_folder_is_refused(project: Path, way: str) -> None:
    reference = _leave(project, way)
    with pytest.raises(RejectedRowError) as caught:
        LocalFolder(Path("data")).locate(reference)
    assert (caught.value.rule, caught.value.detail) == (
        "path_outside_data_folder",
        f"{quote(reference)} is outside of 'data'",
    )


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("http://example.org/a.png", "a URL"),
        ("HTTPS://example.org/a.png", "a URL"),
        ("s3://bucket/a.png", "a URL"),
        ("s3://bucket/" + "A" * 500, "a URL"),
    ],
)
def test_urls_are_refused(project: Path, reference: str, kind: str) -> None:
    with pytest.raises(RejectedRowError) as caught:
        LocalFolder(Path("data")).locate(reference)
    assert caught.value.rule == "url_not_allowed"
    assert f"is {kind}: save it as a file" in caught.value.detail
    assert len(caught.value.detail) < 400


def test_circle_of_links_is_left_to_validation(project: Path) -> None:
    (project / "data/media/circle.png").symlink_to("circle.png")
    assert LocalFolder(Path("data")).locate("media/circle.png") == "data/media/circle.png"


@pytest.mark.parametrize(("reference", "reason"), [("a\0.png", "holds a NUL"), ("A" * 5000, "File name too long")])
def test_what_is_no_path_is_refused(project: Path, reference: str, reason: str) -> None:
    with pytest.raises(RejectedRowError) as caught:
        LocalFolder(Path("data")).locate(reference)
    assert caught.value.rule == "unknown_format"
    assert reason in caught.value.detail
    assert len(caught.value.detail) < 400


@pytest.mark.parametrize("reference", ["x/a.png", "./x//a.png", "../media/x/a.png", "s3://b/media/x/a.png"])
def test_paths_in_a_remote_folder_are_urls(reference: str) -> None:
    for folder in ("s3://b/media", "s3://b/media/"):
        assert media_folder(folder).locate(reference) == "s3://b/media/x/a.png"
    assert media_folder("s3://b").locate("a.png") == "s3://b/a.png"


@pytest.mark.parametrize(
    ("reference", "rule"),
    [
        ("../secret.png", "path_outside_data_folder"),
        ("/etc/passwd", "path_outside_data_folder"),
        ("s3://b/media2/a.png", "path_outside_data_folder"),
        ("s3://b/media/../secret.png", "path_outside_data_folder"),
        ("https://example.org/media/a.png", "path_outside_data_folder"),
        ("gs://b/media/a.png", "path_outside_data_folder"),
        ("file:///etc/passwd", "path_outside_data_folder"),
        (".", "path_outside_data_folder"),
        ("a\0.png", "unknown_format"),
    ],
)
def test_leaving_a_remote_folder_is_refused(reference: str, rule: str) -> None:
    with pytest.raises(RejectedRowError) as caught:
        RemoteFolder("s3://b/media").locate(reference)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("reference", "secret"),
    [("https://b/media/a.png?part=1&X-Amz-Signature=hunter2", "a signature"), ("https://me:hunter2@b/a", "a password")],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(reference: str, secret: str) -> None:
    for folder, rule in (("https://b/media", "url_with_secret"), ("data", "url_not_allowed")):
        with pytest.raises(RejectedRowError) as caught:
            media_folder(folder).locate(reference)
        assert caught.value.rule == rule
        assert "hunter2" not in caught.value.detail
        assert (f"holds {secret}" in caught.value.detail) == (rule == "url_with_secret")
    assert media_folder("https://b/media").locate("https://b/media/a.png?part=1") == "https://b/media/a.png?part=1"


def test_an_absolute_path_that_starts_at_the_folder_is_told_so(project: Path) -> None:
    with pytest.raises(RejectedRowError, match="outside") as caught:
        LocalFolder(Path("data")).locate("/media/a.png")
    assert "is outside of 'data', but 'media/a.png' is there: paths without / in front" in caught.value.detail
    with pytest.raises(RejectedRowError, match="outside") as caught:
        LocalFolder(Path("data")).locate("/media/b.png")
    assert caught.value.detail == "'/media/b.png' is outside of 'data'"


def test_threads_may_look_at_a_new_folder_at_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daft's runner on Ray reads rows in several threads of one process."""
    listing, both_asked = paths._links, Barrier(2)

    def slow_listing(folder: str) -> set[str] | None:
        both_asked.wait(timeout=30)  # neither thread has the answer before the other one asked too
        return listing(folder)

    monkeypatch.setattr(paths, "_links", slow_listing)
    folder = LocalFolder(Path("data"))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(folder.locate, ["media/a.png"] * 2)) == ["data/media/a.png"] * 2
