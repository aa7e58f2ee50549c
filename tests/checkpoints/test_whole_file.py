from __future__ import annotations

import os
from pathlib import Path

import pytest

from dask_nn.checkpoints.whole_file import whole_file


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_content_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_other_threads_keep_their_mode(tmp_path, monkeypatch):
    """The umask belongs to the whole process: changed for a moment, it is changed for all."""
    changed = []
    monkeypatch.setattr(os, "umask", lambda mask: changed.append(mask) or 0o022)
    with whole_file(tmp_path / "whole") as file:
        file.write(b"new")
    assert not changed


def test_it_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
