"""Files and folders on storage that fails or whose power is lost; `python -m tests.robustness.storage` does the same to
training, preparation and sampling."""

import json
import subprocess
import sys
from pathlib import Path

from tests.robustness.faulty import Storage
from tests.small_run import ROOT, environment


def tried(part: str, folder: Path, *more: str) -> dict:
    """The report of trials of one part."""
    storage = Storage(folder / "storage")
    done = subprocess.run([sys.executable, "-m", "tests.robustness.storage", f"--parts={part}", "--tries=6",
                           f"--folder={folder / 'storage'}", f"--report={folder / 'report.json'}", *more], cwd=ROOT,
                          env=environment(**storage.environment), capture_output=True, text=True)
    assert (folder / "report.json").exists(), done.stderr
    return json.loads((folder / "report.json").read_text())


def test_a_file_is_the_old_one_or_whole_whatever_fails(tmp_path: Path) -> None:
    report = tried("files", tmp_path)
    assert report["tries"] == 6 * 6 and report["lost"] == [], report["lost"]


def test_pictures_are_whole_though_a_write_takes_less_than_it_is_given(tmp_path: Path) -> None:
    report = tried("pictures", tmp_path, "--kinds=SHORT_WRITE")
    assert report["tries"] == 6 and report["lost"] == [], report["lost"]


def test_the_trials_find_what_is_not_synced(tmp_path: Path) -> None:
    assert any("POWER" in lost and "left are" in lost for lost in tried("careless", tmp_path)["lost"])
