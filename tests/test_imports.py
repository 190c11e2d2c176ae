"""Data flows one way: who may import whom, held against the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "spl"
TYPES = {"types"}
MAY_IMPORT = {
    "types": set(),
    "results": TYPES | {"disk"},
    "intervals": set(),
    "runs": TYPES | {"disk"},
    "sweep": TYPES | {"disk", "results", "runs"},
    "programs": TYPES | {"secrets", "settings"},
    "secrets": set(),
    "settings": TYPES | {"secrets"},
    "objective": TYPES,
    "logprobs": TYPES,
    "metrics": TYPES,
    "sampling": TYPES,
    "trust": TYPES,
    "encoder": TYPES,
    "models": TYPES | {"trust"},
    "reward_models": TYPES | {"models"},
    "loading": TYPES,
    "disk": set(),
    "processes": set(),
    "checkpoints": TYPES | {"disk"},
    "resume": TYPES | {"checkpoints"},
    "data": TYPES | {"disk", "secrets"},
    "modules": TYPES
    | {"checkpoints", "disk", "models", "reward_models", "loading", "logprobs", "objective", "secrets", "trust"},
    "planning": TYPES | {"models", "data", "modules", "trust"},
    "callbacks": TYPES | {"checkpoints", "disk", "encoder", "metrics", "sampling", "secrets"},
    "evaluation": TYPES
    | {"models", "reward_models", "data", "disk", "encoder", "logprobs", "sampling", "metrics"}
    | {"results", "intervals", "trust"},
    "reporting": TYPES | {"disk", "results", "intervals"},
}
ANYTHING = {"cli", "commands", "paper", "plan", "quickstart", "__init__"}


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Packages of spl that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "spl" else [f"spl.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {parts[1] for name in names if (parts := name.split("."))[0] == "spl" and len(parts) > 1}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_what_its_package_may(path: Path) -> None:
    here = package(path)
    if here not in ANYTHING:
        assert imported(path) <= MAY_IMPORT[here] | {here}


def test_no_drawers() -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & {path.stem for path in ROOT.rglob("*.py")}
