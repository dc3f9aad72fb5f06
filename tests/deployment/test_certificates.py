"""What an expired certificate does to those who start something with it."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

pytest.importorskip("nvflare", reason="the extra flare is not installed")

from securefl.deployment.authority import Consortium


def test_an_expired_certificate_is_told_before_anything_starts(tmp_path) -> None:
    past = datetime.now(UTC) - timedelta(days=400)
    consortium = Consortium.new(tmp_path / "old", "localhost:1", ("a", "b", "c"), now=past)
    for arguments in (
        ("server", "start", str(consortium.kit("server"))),
        ("site", "start", str(consortium.kit("a"))),
        ("submit", "x.toml", "--kit", str(consortium.kit("administrator"))),
    ):
        command = [sys.executable, "-P", "-m", "securefl.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "expired" in done.stderr
        assert "consortium renew" in done.stderr
        assert done.stderr.count("\n") == 1
