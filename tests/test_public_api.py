"""The names that scripts rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import effseg

PACKAGE = Path(effseg.__file__).parent


def test_all_names_are_there_and_sorted() -> None:
    assert sorted(effseg.__all__) == effseg.__all__
    for name in effseg.__all__:
        assert getattr(effseg, name) is not None
    assert dir(effseg) == effseg.__all__


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    code = (
        "import effseg, effseg.planner, effseg.evaluation, effseg.inference, effseg.training\n"
        "assert callable(effseg.plan) and callable(effseg.train)\n"
        "assert callable(effseg.predict) and callable(effseg.evaluate)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_brings_in_nothing_heavy() -> None:
    code = (
        "import effseg, sys\n"
        "heavy = {'torch', 'numpy', 'monai', 'lightning', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_one_module_imports_each_of_the_libraries_that_are_kept_apart() -> None:
    homes = {
        "monai": "augment",
        "nibabel": "io",
        "pydicom": "io",
        "zarr": "io",
        "cc3d": "postprocess",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                library = name.split(".")[0]
                home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
                assert homes.get(library, home) == home, f"{path} imports {library}"


def test_no_code_is_run_from_files() -> None:
    forbidden = {"eval", "exec", "pickle", "extractall", "yaml"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None)
                assert name not in {"eval", "exec"}, f"{path}: {name}"
                owner = getattr(node.func, "value", None)
                called = f"{getattr(owner, 'id', '')}.{getattr(node.func, 'attr', '')}"
                assert called != "torch.load", f"{path}: {called}"
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name for alias in node.names}, path


def test_the_package_reads_no_environment_and_prints_nothing() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "os.environ" not in source, path
        assert "getenv" not in source, path
