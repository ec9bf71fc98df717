"""The house rules: who imports whom, how large things are, what importing costs, how the command line fails."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mechinterp", "saes", "graphs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# A room may import its own floor's lower neighbours only. "core" modules stand below every room.
CORE = {"errors", "types", "storage", "progress", "lazy"}
FLOOR = {
    "data": 1,
    "pages": 1,
    "models": 2,
    "activations": 3,
    "interventions": 3,
    "explain": 3,
    "metrics": 4,
    "saes": 5,
    "graphs": 5,
    "audit": 6,
    "experiments": 6,
    "cli": 7,
}
ONLY_IN = {"sae_lens": "saes", "captum": "mechinterp/explain"}
UNPICKLER = "saes.layouts.convert"
"""The one file that opens a pickle. Nobody imports it: it is run as a process."""
SMALL_FILE, SMALL_FUNCTION = 400, 80


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "mechinterp" else (parts[1] if len(parts) > 1 else "")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports at run time, wherever in the file (type-checking-only imports left out)."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def broken_floors(module: str, imported: set[str]) -> list[str]:
    """Imports of a module that go up, or sideways between saes and graphs."""
    mine = room_of(module)
    bad = []
    for name in imported:
        if name.split(".")[0] not in PACKAGES:
            continue
        other = room_of(name)
        if other in CORE or other in ("", mine):
            continue
        if mine in CORE or FLOOR[other] > FLOOR[mine] or {mine, other} == {"saes", "graphs"}:
            bad.append(f"{module} imports {name}")
    return bad


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_import_floors():
    bad = [line for path in FILES for line in broken_floors(name_of(path), imports_of(path))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("mechinterp.data.folder", "mechinterp.models"),
        ("mechinterp.models.hooked", "saes"),
        ("saes.train", "graphs.nodes"),
        ("mechinterp.errors", "mechinterp.data"),
        ("mechinterp.metrics.iq", "mechinterp.audit"),
    ],
)
def test_floors_can_break(module, imported):
    assert broken_floors(module, {imported})


def test_heavy_libraries_have_one_door():
    for library, door in ONLY_IN.items():
        users = [str(p.relative_to(ROOT)) for p in FILES if any(m.split(".")[0] == library for m in imports_of(p))]
        assert all(user.startswith(door) for user in users), f"{library} imported in {users}"


def test_only_models_registers_hooks():
    users = [
        str(p.relative_to(ROOT))
        for p in FILES
        if any(word in p.read_text() for word in (".register_forward_", ".register_full_backward", ".register_hook("))
    ]
    assert users and all(user.startswith("mechinterp/models") for user in users), users


def test_no_pickle():
    for path in FILES:
        assert not imports_of(path) & {"pickle", "joblib", "dill", "cloudpickle", "shelve"}, path
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if name_of(path) == UNPICKLER:  # other people's checkpoints: tensors only, in a process of its own
            calls = [n for n in calls if "weights_only=True" not in ast.unparse(n)]
        assert not {"torch.load", "torch.save"} & {ast.unparse(n.func) for n in calls}, path
        assert UNPICKLER not in imports_of(path), path


def test_files_and_functions_hold_one_idea():
    large = []
    for path in FILES:
        text = path.read_text()
        lines = text.count("\n")
        if lines > SMALL_FILE:
            large.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > SMALL_FUNCTION:
                large.append(f"{path.relative_to(ROOT)}: {node.name}: {(node.end_lineno or 0) - node.lineno} lines")
    assert not large, "\n".join(large)


def _fastest(code: str, runs: int = 3) -> float:
    """CPU seconds of the fastest of some runs: other processes on the machine do not count."""
    measure = (
        "import time, runpy, sys; start = time.process_time()\n"
        f"{code}\n"
        "print(time.process_time() - start, file=sys.stderr)"
    )
    times = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True)
        times.append(float(done.stderr.split()[-1]))
    return min(times)


def test_import_does_no_work():
    assert _fastest("import mechinterp") < 0.5
    loaded = subprocess.run(
        [sys.executable, "-c", "import mechinterp, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "[]"


def test_help_is_quick():
    code = "from mechinterp.cli import build_parser; build_parser().format_help()"
    assert _fastest(code) < 1.0


def run_cli(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mechinterp.cli", *args], capture_output=True, text=True, cwd=cwd or ROOT, timeout=200
    )


@pytest.mark.parametrize(
    "args",
    [
        ["audit", "no-such-model"],
        ["verify", "no-such-folder"],
        ["data", "phantom", "--n", "0"],
        ["data", "phantom", "--associate", "portable:consolidation"],
        ["explain", "phantom-clip", "--image", "x.png", "--target", "a", "--method", "tea-leaves"],
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(args, tmp_path):
    done = run_cli(*args, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_has_help_with_an_example():
    from mechinterp.cli import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if hasattr(action, "choices") and action.choices)
    assert set(commands.choices) >= {"models", "data", "audit", "extract", "train", "ablate", "explain", "doctor"}  # type: ignore[arg-type]
    for name, sub in commands.choices.items():  # type: ignore[union-attr]
        text = sub.format_help()
        assert "example: mechinterp" in text and "--seed" in text and "--out" in text, name
