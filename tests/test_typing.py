"""A user's script is checked by ``mypy --strict`` against an editable installation, which is what the README makes."""

import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch
from transformers import AutoModelForCausalLM

from offload_triforce import (
    Generation, InputError, Session, Settings, StorageError, TextStream, TriForce, TriForceError, triforce_generate
)


def answer(engine: TriForce, question: str) -> Generation:
    return engine.generate([{"role": "user", "content": question}], max_new_tokens=5, temperature=0.7, stop=["."])


def pieces(engine: TriForce) -> list[str]:
    stream: TextStream = engine.stream([1, 2, 3], max_new_tokens=5)
    return [piece.upper() for piece in stream]


def main() -> None:
    settings = Settings(budget=2048, gamma=8)
    with TriForce.load("model.gguf", settings=settings) as engine:
        result = answer(engine, "Who is the narrator?")
        why: str | None = result.finish_reason
        ids: list[int] = result.token_ids
        print(result.text + "!", why, ids[0] + 1, result.stats.tokens_per_pass + 0.5, result.sequences.shape)
        engine.generate(torch.tensor([1, 2]))
        session: Session = engine.session()
        try:
            print(session.save("kept").written + 1, session.tokens.tolist())
        except StorageError as error:
            print(error)
    model = AutoModelForCausalLM.from_pretrained("model")
    try:
        print(model.generate(torch.tensor([[1]]), custom_generate=triforce_generate, triforce_settings=settings))
    except InputError as error:
        print(error)
    except TriForceError:
        raise
"""
WRONG = """
from offload_triforce import Settings, TriForce, Trifroce
engine = TriForce.load(3)
engine.generate("a", seed="x")
print(engine.generate("a").txt)
Settings(bugdet=5)
"""
# What is wrong, line by line: error codes of mypy.
MISTAKES = {2: "attr-defined", 3: "arg-type", 4: "arg-type", 5: "attr-defined", 6: "call-arg"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what an installation needs."""
    folder = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "kernels", "scheduler")
    shutil.copytree(ROOT / "offload_triforce", folder / "offload_triforce", ignore=skip)
    for name in ("kernels", "scheduler"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def python(checkout, tmp_path_factory):
    """The interpreter of an environment in which the copy is installed as ``pip install -e`` would."""
    folder = tmp_path_factory.mktemp("environment")
    build = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (wheel,) = checkout.glob("wheels/*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(shared))
    return folder / "bin" / "python"


def test_a_script_under_strict_mypy(python, tmp_path):
    """The right one passes; the wrong one fails where it is wrong: nothing of ours is taken for ``Any``."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    # Following torch and transformers takes a minute and changes nothing here.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    options = ["--strict", "--cache-dir", "cache", "--python-executable", python, "--no-error-summary"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True
    )
    errors = [line for line in found.stdout.splitlines() if "error:" in line]
    assert found.stderr == ""
    assert {(line.split(":")[0], int(line.split(":")[1]), line.split("[")[-1].rstrip("]")) for line in errors} == {
        ("wrong.py", number, code) for number, code in MISTAKES.items()
    }


def test_the_installation_works_and_shows_the_package_alone(python, checkout, tmp_path):
    code = """
import importlib.util, json, offload_triforce, offload_triforce.kernels.types, offload_triforce.scheduler.plan
specs = [importlib.util.find_spec(name) for name in ("kernels", "scheduler", "setup", "offload_triforce")]
print(json.dumps([dir(offload_triforce), [spec.origin for spec in specs if spec]]))
"""
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    names, origins = json.loads(found.stdout)
    assert {"Generation", "Settings", "TextStream", "TriForce", "__version__", "triforce_generate"} <= set(names)
    assert not [name for name in names if name.startswith("_") and name != "__version__"]
    ours = [origin for origin in origins if Path(origin).resolve().is_relative_to(checkout)]
    assert len(ours) == 1, "transformers would take our kernels for another package of that name"
    assert ours[0].endswith("offload_triforce/__init__.py")


def test_what_is_in_the_way_of_a_link_stays(tmp_path, monkeypatch):
    """Made twice, the links are the same; a folder in their place is refused, and setuptools' own way remains."""
    make_links = runpy.run_path(str(ROOT / "setup.py"))["make_links"]
    monkeypatch.chdir(tmp_path)
    for name in ("package", "kernels"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        make_links({"package": "package", "package.kernels": "kernels"})
        assert (tmp_path / ".editable" / "package" / "kernels").samefile(tmp_path / "kernels")
    (tmp_path / "package" / "kernels").unlink()
    (tmp_path / "package" / "kernels").mkdir()
    with pytest.raises(OSError, match="is not kernels"):
        make_links({"package": "package", "package.kernels": "kernels"})
