"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rledit_env.files import (
    FIGURES,
    MARKER,
    Marker,
    check_growing,
    mark,
    read_marker,
    whole_folder,
    write_bytes,
    write_tensors,
    write_text,
)
from rledit_env.reporting import Report


def write_folder(folder: Path, *names: str, overwrite: bool = False) -> None:
    with whole_folder(folder, overwrite, "edited model", "rledit edit") as work:
        for name in names:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(name)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_an_error_leaves_nothing_behind_and_what_was_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "b", overwrite=True) as work:
        (work / "new").touch()
        raise KeyboardInterrupt
    assert names_in(tmp_path) == {"b", "b/old", f"b/{MARKER}"}


def test_a_folder_with_something_in_it_is_overwritten_only_when_asked(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", "old")
    with pytest.raises(FileExistsError, match=r"not empty.*'rledit edit'.*--overwrite"):
        write_folder(tmp_path / "b", "new")
    write_folder(tmp_path / "b", "new", "deep/new", overwrite=True)
    assert names_in(tmp_path) == {"b", "b/new", "b/deep", "b/deep/new", f"b/{MARKER}"}


def test_the_marker_says_what_a_folder_is_who_wrote_it_and_what_belongs_to_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", "file", "deep/file")
    content = json.loads((tmp_path / "b" / MARKER).read_text(encoding="utf-8"))
    assert content["format"] == "rledit-folder-1" and content["version"]
    assert read_marker(tmp_path / "b") == Marker("edited model", "rledit edit", True, ("deep/", "deep/file", "file"))
    mark(tmp_path / "b", "agent", files=["more"])
    assert read_marker(tmp_path / "b") == Marker(
        "edited model", "rledit edit", True, ("deep/", "deep/file", "file", "more")
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "rledit-folder-1"}', '{"format": "x", "files": []}'])
def test_a_folder_whose_marker_is_none_is_not_replaced(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path / "b", "file")
    (tmp_path / "b" / MARKER).write_text(content)
    with pytest.raises(FileExistsError, match=r"has no \.rledit\.json.*delete it yourself"):
        write_folder(tmp_path / "b", "new", overwrite=True)
    assert names_in(tmp_path / "b") == {"file", MARKER}


@pytest.mark.parametrize("foreign", ["notes.txt", "deep/notes.txt", "own/", "deep/own/", "link", "x.json", "x.html"])
def test_a_folder_that_holds_something_else_as_well_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    folder = tmp_path / "b"
    write_folder(folder, "file", "deep/file")
    if foreign.endswith("/"):
        (folder / foreign).mkdir()
    elif foreign == "link":
        (folder / foreign).symlink_to(folder / "deep", target_is_directory=True)
    else:
        (folder / foreign).write_text('{"format": "mine"}')
    before = names_in(folder)
    with pytest.raises(FileExistsError, match=f"it holds {foreign.rstrip('/')}, which is no part of the edited model"):
        write_folder(folder, "new", overwrite=True)
    assert names_in(folder) == before


def test_results_pages_and_pictures_that_rledit_added_are_replaced_with_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write_folder(folder, "file")
    (folder / "result.json").write_text('{"format": "rledit-result-1"}')
    Report("A run").write(folder / "report.html")
    (folder / ".DS_Store").touch()
    (folder / FIGURES).mkdir()
    mark(folder / FIGURES, FIGURES, whole=True, files=["scores.png"])
    (folder / FIGURES / "scores.png").touch()
    write_folder(folder, "new", overwrite=True)
    assert names_in(folder) == {"new", MARKER}
    (folder / FIGURES).mkdir()
    mark(folder / FIGURES, FIGURES, whole=True, files=["scores.png"])
    (folder / FIGURES / "mine.png").touch()
    with pytest.raises(FileExistsError, match="it holds figures, which is no part"):
        write_folder(folder, "newer", overwrite=True)


def test_folders_that_grow_and_folders_in_a_folder_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run", "training run", command="rledit train", files=["best/agent.json"])
    with pytest.raises(FileExistsError, match="a training run, written by 'rledit train', which is never replaced"):
        write_folder(tmp_path / "run", "new", overwrite=True)
    write_folder(tmp_path / "b", "file")
    write_folder(tmp_path / "b" / "second", "file")
    with pytest.raises(FileExistsError, match="it holds second, which is no part"):
        write_folder(tmp_path / "b", "new", overwrite=True)


def test_what_is_put_into_a_folder_while_it_is_written_is_not_lost(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", "old")
    with pytest.raises(FileExistsError, match=r"notes\.txt"), whole_folder(tmp_path / "b", overwrite=True) as work:
        (work / "new").touch()
        (tmp_path / "b" / "notes.txt").touch()
    assert names_in(tmp_path) == {"b", "b/old", "b/notes.txt", f"b/{MARKER}"}


def test_a_link_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write_folder(tmp_path / "link", "old")
    write_folder(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink() and names_in(tmp_path / "real") == {"new", MARKER}
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "b.txt").read_text() == "x"


def test_the_current_folder_and_those_that_hold_it_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder, what in ((".", "is"), ("..", "holds"), ("../../a", "holds"), (tmp_path / "a" / "b", "is")):
        with pytest.raises(FileExistsError, match=f"{what} the current folder"):
            write_folder(Path(folder), "new")
    write_folder(Path("inside"), "new")
    shutil.rmtree(tmp_path / "a")  # a current folder that is gone is nobody's
    write_folder(tmp_path / "c", "new")


def test_a_disk_that_is_full_is_named_with_the_mend(tmp_path: Path, file_size_limit: Callable[[int], None]) -> None:
    write_folder(tmp_path / "b", "old")
    for write in (lambda path: path.write_bytes(bytes(100_000)),
                  lambda path: save_file({"x": torch.zeros(25_000)}, path),
                  lambda path: write_bytes(path, bytes(100_000))):
        expected = r"b cannot be written \(.*large.*\); free some space or name another folder"
        with pytest.raises(OSError, match=expected), whole_folder(tmp_path / "b", overwrite=True) as work:
            file_size_limit(50_000)
            write(work / "new")
    assert names_in(tmp_path) == {"b", "b/old", f"b/{MARKER}"}


def test_a_growing_folder_is_begun_gone_on_with_and_never_begun_in_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_growing(folder, "training run")
    folder.mkdir()
    check_growing(folder, "training run")
    (folder / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which rledit did not write.*into its \.rledit\.json"):
        check_growing(folder, "training run")
    mark(folder, "training run", command="rledit train")
    check_growing(folder, "training run")
    with pytest.raises(FileExistsError, match="holds a training run, written by 'rledit train', no comparison"):
        check_growing(folder, "comparison")


def test_what_a_killed_process_left_stops_no_later_one_with_its_id(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from pathlib import Path
        from rledit_env.files import whole_folder
        os.getpid = lambda: 7  # as in a container, where a program's process has the same number at every start
        for end in sys.argv[2:]:
            process = os.fork()
            if process == 0:
                with whole_folder(Path(sys.argv[1])) as work:
                    (work / "file").touch()
                    if end == "killed":
                        os._exit(9)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    """
    command = [sys.executable, "-c", code, str(tmp_path / "b"), "killed", "killed", "whole"]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split() == ["9", "9", "0"]
    assert names_in(tmp_path / "b") == {"file", MARKER}


def test_a_file_is_no_folder_even_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    with pytest.raises(FileExistsError, match="is a file"), whole_folder(tmp_path / "b", overwrite=True):
        pass


def test_a_text_file_is_written_with_its_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "ü")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "ü"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_private_files_in_a_folder_become_as_readable_as_the_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "b") as work:
        (work / "private").touch(mode=0o600)
    assert (tmp_path / "b" / "private").stat().st_mode & 0o777 == (tmp_path / "b").stat().st_mode & 0o666


def test_tensors_replace_a_file_whole_or_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(6.0).view(2, 3).T})
    assert torch.equal(load_file(path)["x"], torch.arange(6.0).view(2, 3).T)
    with pytest.raises(TypeError):
        write_tensors(path, {"x": torch.zeros(2), "y": torch.ones(1)}, {"a": 1})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == [path]
    assert set(load_file(path)) == {"x"}
