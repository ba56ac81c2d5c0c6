"""Every path that is to be written is tried first: what is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rledit_env import outputs
from rledit_env.files import mark, whole_folder
from rledit_env.outputs import Input, Output, PathError, added, growing, page, result, try_or_exit, try_outputs, whole
from rledit_env.reporting import Report

LONG = "x" * 300


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def folder_at(path: Path | str) -> Output:
    return whole("--out", Path(path))


def file_at(path: Path | str) -> Output:
    return result("--json", Path(path), "rledit-result-1")


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "own.json").write_text('{"format": "rledit-result-1"}')
    before, times = tree(tmp_path), (tmp_path / "own.json").stat().st_mtime_ns
    folders = folder_at(tmp_path / "a" / "b" / "c"), folder_at(tmp_path / "there")
    run = growing("--run", tmp_path / "f", "training run", ("best/",))
    try_outputs([*folders, run, file_at(tmp_path / "d" / "e.json"), file_at(tmp_path / "own.json")])
    assert tree(tmp_path) == before and (tmp_path / "own.json").stat().st_mtime_ns == times


@pytest.mark.parametrize("output", [folder_at, file_at])
@pytest.mark.parametrize(
    "name, message",
    [
        ("/sys/x", "); name a place on a disk that can be written"),
        ("/sys/deep/x", "); name a place on a disk that can be written"),
        ("/proc/x", "cannot be written (No such file or directory); name a place on a disk"),
        (LONG, "cannot be written (File name too long); give a shorter name"),
        (f"{LONG}/x", "cannot be written (File name too long); give a shorter name"),
        ("new/" * 1100, "cannot be written (File name too long); give a shorter name"),
        ("x" * 250, "cannot be written (File name too long); give a shorter name"),  # the name beside it is too long
        ("file/x", "is a file, which holds nothing. Name another folder"),
        ("file/deep/x", "is a file, which holds nothing. Name another folder"),
        ("dangling", "is a symbolic link that leads nowhere (to nowhere). Remove it, or name another path"),
        ("dangling/x", "is a symbolic link that leads nowhere (to nowhere). Remove it, or name another path"),
        ("loop", "is a symbolic link that leads nowhere (to loop). Remove it, or name another path"),
        ("loop/x", "is a symbolic link that leads nowhere (to loop). Remove it, or name another path"),
        ("a\0b", "is no path; give another name"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_named_with_the_reason_and_the_mend(
    output: Callable[[Path], Output], name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = tree(tmp_path)
    with pytest.raises(PathError) as caught:
        try_outputs([output(tmp_path / name)])
    said = str(caught.value)
    assert message in said and "\n" not in said
    assert said.startswith(("--out ", "--json ")) and name[:100].rstrip("/") in said.replace("\\x00", "\0")
    assert tree(tmp_path) == before


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match="file is a file; name a folder"):
        try_outputs([folder_at(tmp_path / "file")])
    with pytest.raises(PathError, match="is a folder; name a file in it"):
        try_outputs([file_at(tmp_path)])
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run", "training run")
    (tmp_path / "run" / "best").touch()
    with pytest.raises(PathError, match="best is a file; name a folder"):
        try_outputs([growing("--out", tmp_path / "run", "training run", ("best/",))])


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(PathError, match="device or a pipe"):
            try_outputs([file_at(path)])


def test_what_is_printed_into_is_not_replaced(tmp_path: Path) -> None:
    code = f"""if True:
        from pathlib import Path
        from rledit_env.outputs import result, try_or_exit
        try_or_exit([result("--json", Path({str(tmp_path / "log")!r}), "x")])
    """
    with (tmp_path / "log").open("w") as log:
        ended = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and "log is what this process prints into, and would be replaced" in ended.stderr


def test_an_output_is_not_put_where_something_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "facts.jsonl").touch()
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    facts = Input("the facts (--facts mine/facts.jsonl)", Path("mine/facts.jsonl"))
    model = Input("the model (--model mine)", tmp_path / "mine")
    for name in ("mine", "link", "mine/../mine", "new/../mine", str(tmp_path / "link")):
        with pytest.raises(PathError, match=r"holds the facts \(--facts mine/facts.jsonl\); name a folder of its own"):
            try_outputs([folder_at(name)], [facts])
        with pytest.raises(PathError, match="is the model"):
            try_outputs([folder_at(name)], [model])
        with pytest.raises(PathError, match="lies inside the model"):
            try_outputs([folder_at(f"{name}/new/deep")], [model])
    for path in ("mine/facts.jsonl", "link/facts.jsonl"):
        with pytest.raises(PathError, match="is the facts .*; name another file"):
            try_outputs([file_at(path)], [facts])
    beside = file_at("mine/result.json"), added("--ledger", "mine/ledger"), folder_at("mine2")
    try_outputs(beside, [facts, model])


def test_two_outputs_have_two_places(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(PathError, match=r"--ledger .*new and --out .*new are the same place; give each its own"):
        try_outputs([added("--ledger", new), folder_at(new)])
    with pytest.raises(PathError, match=r"--ledger .*ledger lies inside --out .*new; give each a place of its own"):
        try_outputs([folder_at(new), added("--ledger", new / "ledger")])
    with pytest.raises(PathError, match=r"--out .*ledger lies inside --ledger"):
        try_outputs([folder_at(new / "ledger"), added("--ledger", new)])
    try_outputs([folder_at(new), added("--ledger", tmp_path / "newer")])


def test_names_that_differ_in_case_are_one_place_where_the_disk_takes_them_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [folder_at(tmp_path / "new"), added("--ledger", tmp_path / "NEW" / "ledger")]
    if not outputs._ignores_case(tmp_path):
        try_outputs(places)
    monkeypatch.setattr(outputs, "_ignores_case", lambda folder: True)
    with pytest.raises(PathError, match="lies inside"):
        try_outputs(places)


def test_whether_a_disk_ignores_case_is_asked_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    assert not outputs._ignores_case(tmp_path / "name") or (tmp_path / "NAME").exists()
    (tmp_path / "NAME").symlink_to(tmp_path / "name")  # as a disk that ignores case shows it
    assert outputs._ignores_case(tmp_path / "name")


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    for content in ("[1]", '{"format": 1}', '{"metrics": {}}', '{"format": "rledit-edit-report-1"}', "thesis"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(FileExistsError, match="is no result that rledit wrote .*: it is not overwritten"):
            try_outputs([file_at(tmp_path / "a.json")])
        with pytest.raises(FileExistsError, match="is no page that rledit wrote"):
            try_outputs([page("--out", tmp_path / "a.json")])
    (tmp_path / "result").write_text('{"format": "rledit-result-1"}')
    Report("A run").write(tmp_path / "page.html")
    (tmp_path / "empty").touch()
    try_outputs([file_at(tmp_path / "result"), page("--out", tmp_path / "page.html"), file_at(tmp_path / "empty")])


def test_a_script_ends_with_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with whole_folder(tmp_path / "a", what="edited model"):
        pass
    with pytest.raises(SystemExit) as stop:
        try_or_exit([folder_at(tmp_path / "a")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: the folder") and said.count("\n") == 1
    try_or_exit([whole("--out", tmp_path / "a", overwrite=True)])
