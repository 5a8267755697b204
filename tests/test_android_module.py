"""The loader as a module of an Android app: what its Gradle files name is there, and what JNI looks up stays."""

from __future__ import annotations

import re
from importlib.metadata import version

from native import CPP
from test_android_arm import ABIS

LOADER = CPP.parent
BUILD = (LOADER / "build.gradle.kts").read_text()


def named(pattern: str) -> list[str]:
    """The strings between the brackets behind what matches."""
    (found,) = re.findall(rf"{pattern}\(([^()]*)\)", BUILD)
    return re.findall(r'"([^"]*)"', found)


def test_every_source_is_in_a_folder_that_is_compiled() -> None:
    folders = {"java": named(r"java\.setSrcDirs\(listOf"), "kt": named(r"kotlin\.setSrcDirs\(listOf")}
    for kind, names in folders.items():
        compiled = {path for name in names for path in (LOADER / name).rglob(f"*.{kind}")}
        assert compiled and compiled == set(LOADER.rglob(f"*.{kind}"))


def test_every_file_it_names_is_there() -> None:
    for pattern in ("path = file", r"manifest\.srcFile", "consumerProguardFiles"):
        (name,) = named(pattern)
        assert (LOADER / name).is_file(), name


def test_it_is_built_for_what_the_loader_compiles_for() -> None:
    assert named("abiFilters \\+= listOf") == list(ABIS)


def test_the_library_that_java_loads_is_the_target_that_is_built() -> None:
    (target,) = re.findall(r'targets \+= "(\w+)"', BUILD)
    assert f"add_library({target} SHARED" in (LOADER / "jni" / "CMakeLists.txt").read_text()
    assert f'System.loadLibrary("{target}")' in (LOADER / "java" / "dev" / "edgeexport" / "Native.java").read_text()


def test_what_is_looked_up_by_its_name_keeps_it() -> None:
    jni = "".join(path.read_text() for path in (LOADER / "jni").glob("*.cpp"))
    looked_up = set(re.findall(r'"dev/edgeexport/(\w+)"', jni))
    kept = dict(re.findall(r"^-keep class dev\.edgeexport\.(\w+) \{ (.*) \}$", (LOADER / "consumer-rules.pro").read_text(), re.M))  # fmt: skip  # noqa: E501
    assert looked_up == set(kept) == {"EdgeException", "Features", "Native"}
    assert "native <methods>;" in kept["Native"]
    assert "<init>(...);" in kept["EdgeException"]
    assert {"<init>(...);", "<fields>;"} <= set(kept["Features"].split())


def test_the_runtimes_are_those_that_bundles_are_proven_with() -> None:
    runtimes = dict(re.findall(r'runtimeOnly\("[\w.]+:([\w-]+):([\d.]+)"\)', BUILD))
    assert runtimes == {"onnxruntime-android": version("onnxruntime"), "litert": version("ai-edge-litert")}
