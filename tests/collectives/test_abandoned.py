from __future__ import annotations

from pathlib import Path

from dask_nn.collectives import shared_file


def test_files_of_gangs_that_never_formed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_file, "FAST_FOLDER", str(tmp_path))
    for name in ("dask-nn-abc-0-x1", "dask-nn-abc-12-x2", "dask-nn-abd-0-x3"):
        Path(tmp_path, name).touch()
    shared_file.remove_abandoned("abc")
    assert [path.name for path in tmp_path.iterdir()] == ["dask-nn-abd-0-x3"]
