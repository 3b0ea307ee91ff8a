"""A virtual environment that holds only what a model's requirements.txt asks for, made in a second and offline.

Site-packages gets symlinks to the installed distributions in the closure of the requirements; the project itself, which
is installed beside them, is not among them.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Installed distributions that the requirements need, by normalised name.

    Raises:
        AssertionError: if one is installed in another version than is asked for.
    """
    found: dict[str, Distribution] = {}
    wanted = [Requirement(line) for line in requirements if line.strip()]
    done: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in done:
            continue
        done.add(key)
        installed = distribution(requirement.name)
        assert requirement.specifier.contains(installed.version, prereleases=True), (
            f"{requirement}, {installed.version}"
        )
        found[key[0]] = installed
        for line in installed.requires or []:
            needed = Requirement(line)
            if any(needed.marker is None or needed.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                wanted.append(needed)
    return found


def make(target: Path, requirements: Iterable[str]) -> Path:
    """Make the environment and return its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = target / "lib" / library / "site-packages"
    for installed in closure(requirements).values():
        source = Path(str(installed.locate_file("")))
        for name in {file.parts[0] for file in installed.files or []}:
            linked = packages / name
            if name in ("..", "__pycache__") or name.endswith(".pth") or linked.exists():
                continue
            linked.symlink_to(source / name)
    return target / "bin" / "python"
