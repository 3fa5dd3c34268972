"""Sdist, wheel and editable install carry the whole library, and NumPy and ml_dtypes are enough to use it.

Everything is built from clean copies of the repository, without build isolation and without an index, so that
nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# folder in the repository -> folder in the wheel
ROOMS = {"cuflash": "cuflash", "cuda_src": "cuflash/cuda_src", "adapters": "cuflash/adapters"}
# what building and testing leave in an unpacked sdist, which has no .gitignore rules to ask git for
LEFT_BEHIND = re.compile(
    r"(^|/)(__pycache__|[^/]+\.egg-info|\.venv|\.\w+_cache|\.hypothesis)/|^(build|dist|cuflash_demo)/|^PKG-INFO$|^setup\.cfg$"
)

IMPORT_REPORT = """
import json, sys, time
import numpy, ml_dtypes
start = time.process_time()
import cuflash
seconds = time.process_time() - start
frameworks = [name for name in ("torch", "jax", "cupy", "rich", "matplotlib") if name in sys.modules]
print(json.dumps({"seconds": seconds, "frameworks": frameworks}))
"""

# Runs without the site module: of all that is installed it sees the folders named on its command line.
INSTALLATION_REPORT = """
import importlib.metadata, json, site, sys
for folder in sys.argv[1:]:
    site.addsitedir(folder)
from importlib.resources import files
import numpy as np
import cuflash

def texts(folder, prefix=""):
    found = {}
    for item in folder.iterdir():
        if item.is_dir() and item.name != "__pycache__":
            found |= texts(item, f"{prefix}{item.name}/")
        elif item.is_file():
            found[prefix + item.name] = item.read_text(encoding="utf-8")
    return found

ones = np.ones((1, 3, 2, 8), np.float32)
distribution = importlib.metadata.distribution("cuflash")
(command,) = distribution.entry_points.select(group="console_scripts")
print(json.dumps({
    "file": cuflash.__file__,
    "versions": [cuflash.__version__, distribution.version],
    "cuda_src": texts(files("cuflash.cuda_src")),
    "adapters": texts(files("cuflash.adapters")),
    "attention": cuflash.flash_attention(ones, ones, ones, causal=True).tolist(),
    "command": [command.name, callable(command.load())],
}))
"""


def repository_files() -> list[str]:
    """The files that a commit of the working tree would hold, as paths relative to the repository."""
    if (REPOSITORY / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
        return sorted(name for name in listed.split("\0") if name and (REPOSITORY / name).is_file())
    paths = (path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.rglob("*") if path.is_file())
    return sorted(name for name in paths if not LEFT_BEHIND.search(name))


def room_files(room: str) -> dict[str, str]:
    """The files of one folder of the repository: path relative to the folder -> text."""
    names = (name.removeprefix(f"{room}/") for name in repository_files() if name.startswith(f"{room}/"))
    return {name: (REPOSITORY / room / name).read_text(encoding="utf-8") for name in names}


def run(*command: object, cwd: Path) -> str:
    """Runs a command to its end and gives its standard output; a failure shows everything it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_repository(target: Path) -> Path:
    for name in repository_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, target / name)
    return target


def build(source: Path, output: Path, *options: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", output, source, cwd=source)
    return output


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


@pytest.fixture(scope="module")
def from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that was built from it."""
    work = tmp_path_factory.mktemp("sdist")
    return build(copy_repository(work / "source"), work / "dist")


@pytest.fixture(scope="module")
def from_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel built from the repository itself."""
    work = tmp_path_factory.mktemp("wheel")
    return build(copy_repository(work / "source"), work / "dist", "--wheel")


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which NumPy and ml_dtypes can be imported, and nothing else that is installed here."""
    folder = tmp_path_factory.mktemp("dependencies")
    for name in ("numpy", "ml_dtypes"):
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file.parts[0]) for file in distribution.files or () if len(file.parts) > 1}:
            if top.name not in ("..", "__pycache__"):
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def install(target: Path, *what: object) -> Path:
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--target", target, *what),
        cwd=target.parent,
    )
    return target


@pytest.fixture(scope="module", params=["wheel", "wheel from the sdist", "editable"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """How cuflash was installed, and the folder it was installed to."""
    work = tmp_path_factory.mktemp("installation")
    if request.param == "editable":
        what: tuple[object, ...] = ("-e", copy_repository(work / "source"))
    else:
        folder = request.getfixturevalue("from_tree" if request.param == "wheel" else "from_sdist")
        what = (only(folder, "*.whl"),)
    return request.param, install(work / "site-packages", *what)


def test_sdist_holds_the_repository(from_sdist: Path) -> None:
    with tarfile.open(only(from_sdist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(repository_files()) <= names


@pytest.mark.parametrize("built", ["from_tree", "from_sdist"])
def test_wheel_holds_the_library_and_no_more(built: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(only(request.getfixturevalue(built), "*.whl")) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"{inside}/{name}" for room, inside in ROOMS.items() for name in room_files(room)}


def test_wheel_depends_on_numpy_and_ml_dtypes_only(from_tree: Path) -> None:
    requirements = wheel_metadata(only(from_tree, "*.whl")).get_all("Requires-Dist") or []
    always = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements if "extra ==" not in requirement}
    assert {name.replace("-", "_") for name in always} == {"numpy", "ml_dtypes"}


def test_readme_names_extras_that_exist(from_tree: Path) -> None:
    metadata = wheel_metadata(only(from_tree, "*.whl"))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"""(?:cuflash|["']\.)\[([\w,]+)\]""", readme) for extra in group.split(",")}
    assert (
        {"cuda12", "cuda13", "torch", "jax", "demo", "test"} <= named <= set(metadata.get_all("Provides-Extra") or [])
    )


def test_installation_is_whole_and_works(installation: tuple[str, Path], dependencies: Path, tmp_path: Path) -> None:
    kind, site_packages = installation
    report: dict[str, Any] = json.loads(
        run(
            *(sys.executable, "-I", "-S", "-W", "error", "-c", INSTALLATION_REPORT, site_packages, dependencies),
            cwd=tmp_path,
        )
    )
    home = site_packages.parent / "source" if kind == "editable" else site_packages
    assert Path(report["file"]).parent == home / "cuflash"
    assert len(set(report["versions"])) == 1
    assert report["cuda_src"] == room_files("cuda_src")
    assert report["adapters"] == room_files("adapters")
    assert report["attention"] == [[[[1.0] * 8] * 2] * 3]
    assert report["command"] == ["cuflash", True]


def test_import_is_quick_and_brings_in_no_framework() -> None:
    """In this environment, with whatever frameworks it has; the time is the processor's, beyond NumPy's own."""
    report = json.loads(run(sys.executable, "-W", "error", "-c", IMPORT_REPORT, cwd=REPOSITORY))
    assert report["frameworks"] == []
    assert report["seconds"] < 0.5
