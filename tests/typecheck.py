"""Runs mypy on the package as it is installed, and makes sure that mypy checks calls between folders.

The folders at the top level are installed inside `bra_triton`. In the checkout mypy does not find them there,
and everything from `bra_triton.kernels` would be `Any`. So this script copies each folder to the place where
pyproject.toml installs it, inside a temporary folder, and runs mypy there.

For every pair of folders of which one imports from the other, it adds a module with a wrong call. mypy must
report each of these calls; a call that it does not report is an error, like any other finding.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bra_triton"

# (folder that calls, folder that is called): an import and a call with an argument of a wrong type.
WRONG_CALLS = {
    ("bra_triton", "kernels"): (
        "from .kernels.grid import RegionGrid",
        "RegionGrid.of_windows(20, 20, '4')",
    ),
    ("bench", "bra_triton"): ("from bra_triton import nchwBRA", "nchwBRA(dim='64')"),
    ("bench", "kernels"): ("from bra_triton.kernels.tiles import Tile", "Tile('64', 64, 4, 2)"),
    ("bench", "yolo_integration"): (
        "from bra_triton.yolo_integration import default_num_heads",
        "default_num_heads('64')",
    ),
    ("yolo_integration", "bra_triton"): ("from bra_triton import nchwBRA", "nchwBRA(dim='64')"),
    ("yolo_integration", "kernels"): (
        "from bra_triton.kernels.grid import RegionGrid",
        "RegionGrid.of_windows(20, 20, '4')",
    ),
}
_MESSAGE = re.compile(r"(?P<file>[^:\n]+):(?P<line>\d+): (?P<text>.*)")
_CALL_LINE = 3


def package_folders(root: Path) -> dict[str, str]:
    """Folder of every package in the tree under `root`, relative to it, as pyproject.toml has them."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    return folders


def lay_out(root: Path, target: Path) -> dict[Path, Path]:
    """Copies every package in `root` to the place in `target` where an installation would put it.

    Returns:
        For each folder in `target` the folder in `root` that it was copied from, both as relative paths.
    """
    folders = {Path(*name.split(".")): Path(folder) for name, folder in package_folders(root).items()}
    for installed, folder in folders.items():
        (target / installed).mkdir(parents=True, exist_ok=True)
        for pattern in ("*.py", "*.pyi", "py.typed"):
            for file in (root / folder).glob(pattern):
                shutil.copy2(file, target / installed)  # keeps the file's time, which mypy's cache compares
    return folders


def add_wrong_calls(
    target: Path, folders: Mapping[Path, Path], wrong_calls: Mapping[tuple[str, str], tuple[str, str]]
) -> dict[Path, tuple[str, str]]:
    """Writes a module for every wrong call; returns (caller, called) by the module's path in `target`."""
    installed = {folder.as_posix(): place for place, folder in folders.items()}
    modules = {}
    for (caller, called), (import_line, call) in wrong_calls.items():
        module = installed[caller] / f"wrong_call_of_{called}.py"
        (target / module).write_text(f"# mypy must report the call.\n{import_line}\n{call}\n")
        modules[module] = (caller, called)
    return modules


def findings(
    output: str, folders: Mapping[Path, Path], modules: Mapping[Path, tuple[str, str]]
) -> Iterator[str]:
    """Yields what mypy found, with the checkout's file names, and wrong calls that it did not report."""
    unreported = dict(modules)
    for line in output.splitlines():
        match = _MESSAGE.fullmatch(line)
        if match is None:
            yield line
            continue
        file = Path(match["file"])
        is_wrong_call = file in modules and int(match["line"]) == _CALL_LINE
        if is_wrong_call and re.search(r"\[(call-arg|arg-type)\]$", match["text"]):
            unreported.pop(file, None)
        elif not is_wrong_call:
            place = folders.get(file.parent)
            name = file if place is None else place / file.name
            yield f"{name.as_posix()}:{match['line']}: {match['text']}"
    for module, (caller, called) in unreported.items():
        yield f"{caller} -> {called}: mypy does not report the wrong call in {module.name}"


def check(root: Path, package: str, wrong_calls: Mapping[tuple[str, str], tuple[str, str]]) -> list[str]:
    """All findings in the tree under `root`, with the settings of its pyproject.toml."""
    command = [sys.executable, "-m", "mypy", "--package", package, "--no-error-summary", "--no-pretty"]
    settings = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        folders = lay_out(root, target)
        modules = add_wrong_calls(target, folders, wrong_calls)
        # Paths in mypy's cache are relative to this folder, so the next run can use them.
        done = subprocess.run([*command, *settings], cwd=target, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode > 1:  # a syntax error or wrong settings, so nothing was checked
        return [*findings(output, folders, {}), f"mypy stopped with exit status {done.returncode}"]
    return list(findings(output, folders, modules))


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    found = check(ROOT, PACKAGE, WRONG_CALLS)
    print(*found or ["mypy found nothing, and sees every seam between the folders"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
