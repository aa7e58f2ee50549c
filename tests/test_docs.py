"""The Python examples of the documentation run, from top to bottom, as a reader would type them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# On the line above a block that needs what a test does not have, such as a real cluster.
NOT_RUN = "<!-- not run:"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)
EXAMPLES = [
    "README.md",
    "docs/clusters/address.md",
    "docs/clusters/local.md",
    "docs/data.md",
    "docs/es/guia.md",
    "docs/training.md",
]

# The blocks run in the `__main__` of a program without a file, like cells of a notebook. Padding
# keeps the line numbers of the page in tracebacks.
# Its clusters fork workers from a process that imports torch meanwhile, as other tests' do.
RUNNER = """
import json, multiprocessing.forkserver, sys
page, blocks, imported = json.load(sys.stdin)
multiprocessing.forkserver.set_forkserver_preload(imported)
multiprocessing.forkserver.ensure_running()
for line, source in blocks:
    exec(compile("\\n" * line + source, page, "exec"), globals())
"""


def python_blocks(page: str) -> list[tuple[int, str]]:
    """Return the blocks that are to run, each with the number of lines before its code."""
    text = (ROOT / page).read_text()
    blocks = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        if not above.startswith(NOT_RUN):
            blocks.append((text[: match.start(1)].count("\n"), match[1]))
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run(page, tmp_path, imported_by_workers):
    blocks = python_blocks(page)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([page, blocks, imported_by_workers]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "DASK_TEMPORARY_DIRECTORY": str(tmp_path),
            "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False",
            "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",
        },
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_page_links_to_files_that_exist(page):
    targets = LINK.findall((ROOT / page).read_text())
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in EXAMPLES])
def test_python_on_other_pages_is_at_least_valid(page):
    for _, source in python_blocks(page):
        compile(source, page, "exec")
