"""The repository keeps what it promises to its readers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked() -> list[Path]:
    """The files git tracks; in an unpacked source archive, all text files of the packages."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing to list")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "securefl", "protocols", "attacks", "tests", "README.md", "LICENSE"]
)
def test_required_top_level_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(rb"(?<![\w.\"'/])/(?:work|root|home|Users|tmp)/\w")
    for path in tracked():
        if path.is_file() and path.suffix not in {".png", ".safetensors"}:
            found = pattern.search(path.read_bytes())
            assert not found, f"{path} names {found and found.group()!r}"


def test_nothing_unpickles_evaluates_or_runs_a_shell() -> None:
    pattern = re.compile(
        r"\bpickle\b|(?<![\w.])(?:eval|exec)\(|shell=True|os\.system|torch\.load\("
    )
    for package in ("protocols", "securefl", "attacks"):
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.split("#")[0]
                if '"""' in code or "pickled" in code:
                    continue
                assert not pattern.search(code), f"{path}:{number}: {line.strip()}"


def test_links_in_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "examples/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path} links to {target}"


def test_attacks_and_securefl_import_quickly_without_torch() -> None:
    """`securefl --help` and configuration need no torch."""
    code = "import sys; import securefl, securefl.config, attacks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_parquet_extra_may_be_absent() -> None:
    """Without pyarrow everything but Parquet works."""
    code = "import sys; sys.modules['pyarrow'] = None; import securefl.runs, securefl.data"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
