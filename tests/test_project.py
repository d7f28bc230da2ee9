"""The project as a whole: what is packaged, what its texts refer to, and rules that no single module can check."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dspark_export.cli import main as command_line
from dspark_export.cli.validate import FAILED as VALIDATION_FAILED
from dspark_runtime import errors
from dspark_runtime.backends import build_kernels
from tests import distributions

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = SETTINGS["project"]
RUNTIME: dict[str, Any] = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION: str = RUNTIME["version"]  # of both distributions
DEPENDENCIES: list[str] = SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
# Folders of one machine that must not get into the project. Written in pieces, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:" + "|".join(("tmp", "work", "root", "home")) + r")/\w")
LONG_MODULE = 500  # lines; the limits of functions, which matter more, are ruff's


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control that are there; skips where the sources are not a checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    return tuple(path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file())


def texts(suffix: str = "") -> dict[str, str]:
    """Tracked text files by their path in the repository."""
    found = {}
    for path in tracked():
        if path.name.endswith(suffix):
            try:
                found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return found


def pins() -> dict[str, str]:
    """Version by normalized name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if line.split("#")[0].strip()]
    return {normalized(name): version for name, version in pairs}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Rules over all files


def test_no_path_of_one_machine() -> None:
    found = {
        f"{name}:{number}": line.strip()
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert not found


def test_modules_are_named_for_their_job() -> None:
    assert not [name for name in texts(".py") if Path(name).stem in ("utils", "util", "helpers", "misc", "common")]


def test_long_modules_are_named() -> None:
    for name, text in texts(".py").items():
        if (lines := len(text.splitlines())) > LONG_MODULE:
            warnings.warn(f"{name} has {lines} lines: has it more than one job?", stacklevel=1)


def test_nothing_built_or_downloaded_is_tracked() -> None:
    shipped = ROOT / "samples" / "quickstart" / "drafter"  # trained here, at most 24 MB, see tests/real_model
    made = (".onnx", ".data", ".gguf", ".safetensors", ".pyc")
    others = [path for path in tracked() if path.parent != shipped]
    assert not [path for path in others if path.suffix in made]
    assert max(path.stat().st_size for path in others) < 1_000_000
    assert sum(path.stat().st_size for path in tracked() if path.parent == shipped) < 24_000_000


def test_no_unfinished_code() -> None:
    marks = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME")) + r")\b|raise Not" + r"ImplementedError")
    assert not [name for name, text in texts(".py").items() if marks.search(text)]


# Metadata


def test_the_version_is_the_same_everywhere() -> None:
    assert {metadata.version(name) for name in ("dspark-export", "dspark-runtime")} == {VERSION}
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_python_versions_agree() -> None:
    assert (PROJECT["requires-python"], PROJECT["classifiers"]) == (RUNTIME["requires-python"], RUNTIME["classifiers"])
    allowed = SpecifierSet(PROJECT["requires-python"])
    named = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named and all(version in allowed for version in named)
    assert "3.10" not in allowed
    oldest = min(named, key=lambda version: int(version.split(".")[1]))
    assert SETTINGS["tool"]["mypy"]["python_version"] == oldest
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


@pytest.mark.parametrize("extra", ["cpu", "serve", "dev"])
def test_constraints_pin_every_dependency_to_an_allowed_version(extra: str) -> None:
    optional = [*PROJECT["optional-dependencies"][extra], *RUNTIME["optional-dependencies"].get(extra, ())]
    wanted = [Requirement(r) for r in [*DEPENDENCIES, *RUNTIME["dependencies"], *optional]]
    known = pins()
    wrong = {
        r.name: known.get(normalized(r.name))
        for r in wanted
        if r.name != RUNTIME["name"] and known.get(normalized(r.name), "") not in r.specifier
    }
    assert not wrong


def test_the_extras_the_readme_and_doctor_name_exist() -> None:
    extras = {project["name"]: set(project["optional-dependencies"]) for project in (PROJECT, RUNTIME)}
    both = {"cpu", "gpu", "rtx", "serve"}
    assert extras == {"dspark-export": both | {"dev"}, "dspark-runtime": both}
    found = {m for text in texts().values() for m in re.findall(r"(dspark-(?:export|runtime))\[([\w,]+)\]", text)}
    assert len(found) > 3
    assert not [(name, extra) for name, group in found for extra in group.split(",") if extra not in extras[name]]


# What is packaged


@dataclass(frozen=True)
class Built:
    """A wheel and an sdist: their files (those of the sdist without its folder), and what the wheel requires."""

    sdist: Path
    wheel: list[str]
    source: list[str]
    requires: list[Requirement]


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Built]:
    """Builds the distribution of a folder's pyproject.toml, once."""

    @cache
    def build(folder: Path) -> Built:
        made = tmp_path_factory.mktemp("dist")
        distributions.build(folder, made)
        (wheel,), (source,) = made.glob("*.whl"), made.glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive, tarfile.open(source) as tar:
            names = [name.split("/", 1)[1] for name in tar.getnames() if "/" in name]
            return Built(source, archive.namelist(), names, requirements(wheel))

    return build


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return [Requirement(r) for r in message_from_bytes(archive.read(name)).get_all("Requires-Dist") or ()]


def names_the_runtime(found: list[Requirement]) -> str:
    """How ``found`` asks for the runtime where no extra is wanted."""
    (wanted,) = (r for r in found if r.name == RUNTIME["name"] and not r.marker)
    return wanted.url or str(wanted.specifier)


@pytest.mark.parametrize(
    ("folder", "packages"), [("", ["dspark_export"]), ("runtime", ["dspark_runtime", "dspark_serve"])]
)
def test_a_wheel_holds_its_packages_and_nothing_else(
    distribution: Callable[[Path], Built], folder: str, packages: list[str]
) -> None:
    built = distribution(ROOT / folder)
    start = f"{folder}/" if folder else ""
    for package in packages:
        wanted = {name.removeprefix(start) for name in texts() if name.startswith(f"{start}{package}/")}
        assert wanted and wanted <= set(built.wheel)
    assert {name.split("/")[0] for name in built.wheel} == {*packages, f"{packages[0]}-{VERSION}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in built.wheel)
    assert any(name.endswith("entry_points.txt") for name in built.wheel)
    assert ("dspark_runtime/py.typed" if folder else "dspark_export/prompts/repeat.jsonl") in built.wheel


KERNELS = "dspark_runtime/lib/libdspark_cpu.so"


def test_the_runtimes_wheel_has_the_kernels_where_they_can_be_compiled(
    distribution: Callable[[Path], Built], tmp_path: Path
) -> None:
    if (compiler := build_kernels.compiler()) is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, on Linux")
    built = distribution(ROOT / "runtime")
    assert KERNELS in built.wheel, compiler
    (wheel,) = built.sdist.parent.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(KERNELS, tmp_path)
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).dspark_cpu_sets; f.restype = ctypes.c_char_p; print(f())"
    command = [sys.executable, "-c", code, str(tmp_path / KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "portable" in done.stdout


def test_without_a_compiler_the_wheel_is_for_every_machine_and_says_so(tmp_path: Path) -> None:
    said = distributions.build(ROOT / "runtime", tmp_path, "wheel", CXX="/bin/false")
    assert "built WITHOUT its sequence kernels" in said and build_kernels.COMMAND in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert KERNELS not in names
    folder = ROOT / "plugins" / "cpu"
    sources = {path.relative_to(folder).as_posix() for path in tracked() if path.is_relative_to(folder)}
    assert "choose.cpp" in sources and {f"dspark_runtime/cpu/{name}" for name in sources} <= set(names)


def test_a_release_without_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CMake configuration failed"):
        distributions.build(ROOT / "runtime", tmp_path, "wheel", CXX="/bin/false", DSPARK_REQUIRE_KERNELS="1")


@pytest.mark.parametrize(("folder", "package"), [("", "dspark_export"), ("runtime", "dspark_runtime")])
def test_a_source_distribution_has_no_environment_or_bundle(
    distribution: Callable[[Path], Built], folder: str, package: str
) -> None:
    source = distribution(ROOT / folder).source
    assert {"pyproject.toml", "LICENSE", "README.md", f"{package}/__init__.py"} <= set(source)
    assert not [n for n in source if n.split("/")[0] in (".venv", ".cache", "bundles", ".git", "runtime")]
    assert not [name for name in source if name.endswith((".onnx", ".data", ".gguf"))]
    assert ("cpu/CMakeLists.txt" in source) == (package == "dspark_runtime")  # the kernels' sources


def test_the_runtime_does_not_require_what_builds_bundles(distribution: Callable[[Path], Built]) -> None:
    names = {r.name for r in distribution(ROOT / "runtime").requires} - {"typer"}  # both have a command line
    assert not names & {*(Requirement(d).name for d in DEPENDENCIES), PROJECT["name"]}


def test_both_distributions_have_one_licence() -> None:
    assert (ROOT / "LICENSE").read_text() == (ROOT / "runtime" / "LICENSE").read_text()


def test_what_is_published_requires_the_runtime_of_the_same_version(
    distribution: Callable[[Path], Built], tmp_path: Path
) -> None:
    assert names_the_runtime(distribution(ROOT).requires) == f"=={VERSION}"
    with tarfile.open(distribution(ROOT).sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (wheel,) = distributions.pep517_wheels(tmp_path / f"dspark_export-{VERSION}", tmp_path)
    assert names_the_runtime(requirements(wheel)) == f"=={VERSION}"


def test_a_wheel_made_in_a_checkout_takes_the_runtime_beside_it(tmp_path: Path) -> None:
    (wheel,) = distributions.pep517_wheels(ROOT, tmp_path)
    assert names_the_runtime(requirements(wheel)) == (ROOT / "runtime").as_uri()


# What the texts refer to


def test_links_of_the_texts_lead_somewhere() -> None:
    broken = []
    for name, text in texts(".md").items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if (
                "://" not in link
                and not link.startswith("#")
                and not ((ROOT / name).parent / link.split("#")[0]).exists()
            ):
                broken.append(f"{name}: {link}")
    assert not broken


def verbs() -> dict[str, set[str]]:
    """Options of every command of the command line."""
    group: Any = typer.main.get_command(command_line.app)
    return {
        name: {"--help", "-h"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in group.commands.items()
    }


def test_commands_in_the_texts_exist() -> None:
    known, wrong = verbs(), []
    for name, text in texts(".md").items():
        for verb, rest in re.findall(
            r"^\s*(?:\$ )?dspark-export +(?:--debug +)?([a-z][a-z-]*)\b([^\n#|`]*)", text, re.MULTILINE
        ):
            if verb not in known:
                wrong.append(f"{name}: {verb}")
                continue
            unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) - known[verb]
            wrong += [f"{name}: {verb} {option}" for option in unknown]
    assert not wrong


def test_scripts_in_the_texts_exist_and_can_run() -> None:
    found = {
        p
        for text in texts(".md").values()
        for p in re.findall(r"\b((?:samples|scripts|benchmarks)/[\w/]+\.(?:sh|py))", text)
    }
    assert {"samples/quickstart/run.sh", "scripts/test.sh"} <= found
    assert not [path for path in found if not (ROOT / path).is_file()]
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    modes = {line.split("\t")[1]: line.split(" ")[0] for line in listed.splitlines()}
    assert {modes.get(p) for p in [*(p for p in found if p.endswith(".sh")), ".ci/run"]} == {"100755"}


def test_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+)", command_line.__doc__ or "", re.MULTILINE)}
    types = [t for t in vars(errors).values() if isinstance(t, type) and issubclass(t, errors.DsparkError)]
    assert {t.exit_code for t in types} == documented - {0, VALIDATION_FAILED, 70, 130}


def test_every_error_says_what_it_is_for() -> None:
    types = [t for t in vars(errors).values() if isinstance(t, type) and issubclass(t, errors.DsparkError)]
    assert len(types) > 8
    assert all(t.__doc__ for t in types)
