"""Files and folders appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rledit_env.files import whole_folder, write_tensors, write_text


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_an_error_leaves_nothing_behind_and_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "b", overwrite=True) as work:
        (work / "new").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["old"]


def test_a_folder_with_something_in_it_is_overwritten_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(tmp_path / "b"):
        pass
    with whole_folder(tmp_path / "b", overwrite=True) as work:
        (work / "new").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


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
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]


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
