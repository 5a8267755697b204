"""The shape of the house: who may import whom, what loads when, how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgeexport"
FILES = sorted(PACKAGE.rglob("*.py"))
BASE = {"core", "errors", "limits", "strict_json", "threads"}

MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"bundle", "pipeline"},
    "__main__": {"cli_edge"},
    "core": set(),
    "errors": {"core"},
    "limits": set(),
    "strict_json": {"limits"},
    "units": set(),
    "memory": set(),
    "paths": set(),
    "process": {"console"},
    "outputs": BASE,
    "threads": set(),
    "plainfile": set(),
    "supervise": set(),
    "packing": BASE | {"plainfile"},
    "tokenizer_json": set(),
    "text_tables": BASE | {"session.chat", "session.library", "tokenizer_json"},
    "console": BASE | {"units"},
    "checkpoint": BASE | {"packing", "paths"},
    "families": BASE | {"checkpoint", "session.image_contract", "session.images", "session.preprocess"},
    "families.autoglm_phone": {"checkpoint", "paths", "session.audio", "session.image_file"},
    "families.autoglm_phone.prompts": {"session.chat", "session.tokenizer"},
    "families.autoglm_phone.train": {"console", "quant"},
    "families.autoglm_phone.samples": {"console"},
    "families.autoglm_phone.evaluate": {"bundle", "console", "session"},
    "canonical": BASE,
    "quant": BASE | {"packing", "checkpoint.packed", "checkpoint.weights"},
    "backends": BASE | {"packing", "plainfile", "canonical.dialect", "session.runner", "tokenizer_json"},
    "backends.litert_cache": {"checkpoint.digest", "paths"},
    "session": BASE | {"plainfile"},
    "bundle": BASE | {"session", "backends", "parity.gates", "paths", "plainfile", "quant.schemes", "supervise"},
    "parity": BASE
    | {
        "memory",
        "units",
        "bundle.golden",
        "bundle.manifest",
        "canonical.dialect",
        "canonical.streaming",
        "canonical.trace",
        "families.decoder",
        "families.stages",
        "quant.stats",
        "session",
    },
    "targets": BASE | {"backends", "quant"},
    "plan": BASE | {"backends", "checkpoint", "families", "quant", "targets"},
    "samples": BASE | {"session"},
    "stored": BASE | {"backends", "bundle.manifest", "quant"},
    "borders": BASE | {"canonical.streaming", "quant.codes"},
    "calibrate": BASE | {"borders", "canonical", "memory", "quant"},
    "sensitivity": BASE | {"borders", "calibrate", "canonical", "quant"},
    "smooth": BASE | {"calibrate", "canonical", "quant"},
    "doctor": BASE | {"paths"},
    "bench": BASE | {"bundle", "session", "console", "units"},
}
"""Part of the house to the parts and single modules it may import, besides itself and what the part around it may.
quant reads the weights it quantises; bundle finds a backend's runner by name; a family states its pictures' contract
in the session's words, and parity proves the session's own way into the model. autoglm_phone is trained and judged
here, so its programs read towers, media and bundles. `pipeline` with its parts and the command line see all."""
SEES_ALL = {
    "pipeline",
    "steps",
    "choosing",
    "job",
    "shipping",
    "cli",
    "cli_edge",
    "cli_show",
    "cli_chat",
    "cli_gpu",
    "cli_import",
    "cli_options",
}

BUILD_ROOMS = {
    "backends.coreml_lowering",
    "backends.coreml_parts",
    "backends.litert_lowering",
    "backends.litert_nnapi_static",
    "backends.mnn_graph",
    "backends.mnn_lowering",
    "backends.onnxruntime_lowering",
    "backends.tensorrt_lowering",
    "canonical.passes",
    "canonical.store",
    "canonical.streaming",
    "canonical.trace",
    "canonical.weights",
    "families.autoglm_phone.features",
    "families.autoglm_phone.judging",
    "families.autoglm_phone.learning",
    "families.autoglm_phone.model",
    "families.autoglm_phone.prompts",
    "families.autoglm_phone.stages",
    "families.autoglm_phone.train",
    "families.configured",
    "families.glm4v_stages",
    "families.stages",
    "parity.evidence",
    "parity.ladder",
    "parity.reference",
}
"""Rooms that work on graphs or torch modules all through, and are imported by the step that needs them. Every other
module imports on a bare install."""

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf", "ml_dtypes")
LONGEST = 600
TABLES = {"errors.py"}
"""One row per thing, like the *_ops.py files: long because the world is, not because it is a room for everything."""


def module_of(path: Path) -> str:
    """`edgeexport/quant/__init__.py` is `quant`, `edgeexport/quant/plan.py` is `quant.plan`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Our modules that a file imports anywhere in it, without the leading `edgeexport.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "edgeexport":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif module.startswith("edgeexport."):
                yield module.removeprefix("edgeexport.")
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("edgeexport.") for alias in node.names if alias.name.startswith("edgeexport.")
            )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    names = module_of(path).split(".")
    if names[0] in SEES_ALL:
        return
    assert names[0] in MAY_IMPORT
    around = [".".join(names[: i + 1]) for i in range(len(names))]
    allowed = {names[0]}.union(*(MAY_IMPORT.get(name, set()) for name in around))
    wrong = {
        module
        for module in imports_of(path)
        if module.partition(".")[0] not in allowed and not any((module + ".").startswith(f"{a}.") for a in allowed)
    }
    assert wrong == set()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_file_is_a_room_with_a_purpose(path: Path) -> None:
    text = path.read_text()
    if not path.name.endswith("_ops.py") and path.name not in TABLES:
        assert len(text.splitlines()) <= LONGEST
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "the first docstring line says what the file is for"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "console.py"], ids=module_of)
def test_only_the_console_writes_to_the_terminal(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "input", "sys.stdout.write", "sys.stderr.write"}, f"line {node.lineno}"


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after this code."""
    script = f"{code}\nimport sys\nsys.stderr.write('\\n' + ' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import edgeexport",
        "from edgeexport.cli_edge import execute; assert execute(['--help']) == 0",
        "from edgeexport.cli_edge import execute; assert execute(['build', '--help']) == 0",
        "from edgeexport.cli_edge import execute; assert execute(['--version']) == 0",
    ],
    ids=["import", "help", "command-help", "version"],
)
def test_asking_for_help_loads_nothing_heavy(code: str) -> None:
    heavy = {*HEAVY, "numpy", "onnxruntime", "tokenizers"}
    assert loaded_by(code) & heavy == set()


@pytest.mark.parametrize("command", [["targets"], ["ops"]], ids=lambda command: command[0])
def test_lists_need_no_sdk(command: list[str]) -> None:
    code = f"from edgeexport.cli_edge import execute; assert execute({command}) == 0"
    assert loaded_by(code) & {*HEAVY, "onnxruntime"} == set()


def test_every_module_imports_on_a_bare_install() -> None:
    left_out = {"__init__", "__main__", *BUILD_ROOMS}
    modules = ["edgeexport." + module_of(path) for path in FILES if module_of(path) not in left_out]
    assert {module_of(path) for path in FILES} >= BUILD_ROOMS
    script = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_package_offers() -> None:
    code = "import edgeexport; assert edgeexport.open_bundle.__module__ == 'edgeexport.bundle.bundle'"
    assert loaded_by(code) & {"torch", "transformers"} == set()


def test_version_is_the_one_of_the_package() -> None:
    import tomllib

    import edgeexport

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert edgeexport.__version__ == project["version"]


def test_unknown_attribute_of_the_package() -> None:
    import edgeexport

    with pytest.raises(AttributeError, match="nothing"):
        _ = edgeexport.nothing
