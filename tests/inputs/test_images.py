"""Images that rows name: URLs, files, bytes; and what is none."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from batchrun.chat import Unusable
from batchrun.inputs.images import LIMIT_BYTES, image_urls

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
IMAGES = {
    "image/png": PNG,
    "image/jpeg": b"\xff\xd8\xff\xe0 and more",
    "image/gif": b"GIF89a and more",
    "image/webp": b"RIFF\x10\x20\x30\x40WEBPVP8 ",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_content_says_the_type_and_not_the_name(tmp_path: Path, kind: str) -> None:
    content = IMAGES[kind]
    (tmp_path / "photo.txt").write_bytes(content)
    url = image_urls(tmp_path)
    expected = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    cells: list[Any] = ["photo.txt", str(tmp_path / "photo.txt"), content]
    cells += [{"bytes": content, "path": "gone.png"}, {"bytes": None, "path": "photo.txt"}]
    for cell in cells:
        assert url(cell) == expected


@pytest.mark.parametrize("cell", ["https://example.org/a.png", "gs://b/a", "data:image/png;x"])
def test_a_url_stays_as_it_is(tmp_path: Path, cell: str) -> None:
    assert image_urls(tmp_path)(cell) == cell


def test_what_is_no_image_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "large.png").write_bytes(PNG)
    os.truncate(tmp_path / "large.png", LIMIT_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    cases: dict[Any, tuple[str, str]] = {
        "gone.png": ("no_image", "image gone.png: No such file"),
        "a\0b": ("no_image", "null"),
        "text.png": ("not_an_image", "neither PNG, JPEG, GIF nor WebP"),
        "large.png": ("image_too_large", "larger than 20.0 MB"),
        "pipe.png": ("no_image", "not a file"),
        "folder.png": ("no_image", ""),
        None: ("no_image", "no image"),
        "": ("no_image", "no image"),
        7: ("wrong_type", "a URL, a path or bytes"),
        b"\xff text": ("not_an_image", "the image"),
    }
    for cell, (code, words) in cases.items():
        with pytest.raises(Unusable) as failed:
            image_urls(tmp_path)(cell)
        assert failed.value.code == code
        assert words in str(failed.value)
