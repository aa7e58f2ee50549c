from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dask_nn.errors import DataError
from dask_nn.examples.mnist.idx import read_images, read_labels, write_idx

IMAGES = (np.arange(3 * 28 * 28) % 256).astype(np.uint8).reshape(3, 28, 28)
LABELS = np.array([7, 0, 9], np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_come_back_as_rows_of_784_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"images{suffix}"
    write_idx(path, IMAGES)
    read = read_images(path)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, IMAGES.reshape(3, 784))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_labels_come_back_as_int64(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"labels{suffix}"
    write_idx(path, LABELS)
    read = read_labels(path)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, LABELS)


def test_a_gz_file_without_its_suffix_is_read_too(tmp_path: Path) -> None:
    write_idx(tmp_path / "labels.gz", LABELS)
    plain = (tmp_path / "labels.gz").rename(tmp_path / "labels")
    np.testing.assert_array_equal(read_labels(plain), LABELS)


def test_the_header_is_that_of_the_published_files(tmp_path: Path) -> None:
    write_idx(tmp_path / "images", IMAGES)
    header = np.frombuffer((tmp_path / "images").read_bytes()[:16], ">u4")
    assert header.tolist() == [2051, 3, 28, 28]


def refusal(path: Path, content: bytes, *, images: bool = True) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        (read_images if images else read_labels)(path)
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    write_idx(tmp_path / "good", IMAGES)
    return (tmp_path / "good").read_bytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such file, expected an IDX file"):
        read_images(tmp_path / "absent")


def test_a_truncated_file_tells_how_many_bytes_were_expected(
    tmp_path: Path, content: bytes
) -> None:
    message = refusal(tmp_path / "cut", content[:-1])
    assert "truncated, its header announces 3x28x28 images" in message
    assert "expected 2368 bytes, got 2367" in message


def test_a_file_with_too_much_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "expected 2368 bytes, got 2369" in refusal(tmp_path / "long", content + b"\0")


@pytest.mark.parametrize("length", [0, 3, 15])
def test_a_truncated_header_is_refused(tmp_path: Path, content: bytes, length: int) -> None:
    message = refusal(tmp_path / "cut", content[:length])
    assert f"expected a header of 16 bytes, got {length}" in message


def test_labels_in_the_place_of_images_are_refused(tmp_path: Path, content: bytes) -> None:
    message = refusal(tmp_path / "swapped", content, images=False)
    assert "expected an IDX file of labels (magic number 2049), got magic number 2051" in message


def test_a_corrupt_magic_number_is_refused(tmp_path: Path, content: bytes) -> None:
    message = refusal(tmp_path / "odd", b"\x01" + content[1:])
    assert "magic number 2051), got magic number 16779267" in message


def test_a_truncated_gz_file_is_refused(tmp_path: Path, content: bytes) -> None:
    message = refusal(tmp_path / "cut.gz", gzip.compress(content)[:-9])
    assert "truncated, expected a whole gzip file" in message


def test_a_corrupt_gz_file_is_refused(tmp_path: Path, content: bytes) -> None:
    packed = bytearray(gzip.compress(content))
    packed[-5] ^= 0xFF
    assert "corrupt, expected a valid gzip file" in refusal(tmp_path / "odd.gz", bytes(packed))


def test_a_gz_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "expected a gzip file" in refusal(tmp_path / "page.gz", b"<html>not found</html>")


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "small", IMAGES[:, :8, :8])
    with pytest.raises(DataError, match="expected images of 28x28 pixels, got 8x8"):
        read_images(tmp_path / "small")


def test_no_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "empty", IMAGES[:0])
    with pytest.raises(DataError, match="expected at least one of its images"):
        read_images(tmp_path / "empty")


def test_a_label_above_nine_is_refused_with_its_row(tmp_path: Path) -> None:
    write_idx(tmp_path / "labels", np.array([1, 10, 3], np.uint8))
    with pytest.raises(DataError, match="expected labels of 0 to 9, got 10 in row 1"):
        read_labels(tmp_path / "labels")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path)
