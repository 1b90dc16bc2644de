"""The package works from a wheel and from an editable install, with Hugging Face's `kernels` present and absent."""

import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from runs import ROOT

PROBE = """
import kimi_rl, kimi_rl.rewards, kimi_rl.kernels.kda_chunk, kimi_rl.recipe, kimi_rl.report
from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer
import importlib.util
spec = importlib.util.find_spec("kernels")
print("KERNELS", spec.origin if spec else None)
print("CHUNK", kimi_rl.kernels.kda_chunk.__file__)
print("REWARDS", kimi_rl.rewards.__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked source: building must not touch the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("kimi_rl", "rewards", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    return folder


def test_every_package_folder_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"kimi_rl.kernels"}  # without `__init__.py` on purpose
    for top, name in (("kimi_rl", "kimi_rl"), ("rewards", "kimi_rl.rewards"), ("kernels", "kimi_rl.kernels")):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / top).parts]))
    assert listed == found


def pip(*args):
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def imported_from(site: Path, cwd: Path, hf_kernels: bool, editable: bool) -> dict[str, str]:
    """Run the probe with `site` first on the path, and a stand-in for Hugging Face's `kernels` if asked for.

    The stand-in has the version and the names that transformers looks for, so its import path is really taken.
    """
    if hf_kernels:
        (site / "kernels").mkdir(exist_ok=True)
        (site / "kernels" / "__init__.py").write_text(
            textwrap.dedent(
                """
                __version__ = "0.19.0"
                class _Any:
                    def __init__(self, *a, **k): pass
                    def __class_getitem__(cls, item): return cls
                def __getattr__(name):
                    if name.startswith("__"):
                        raise AttributeError(name)
                    return type(name, (_Any,), {})
                """
            )
        )
        info = site / "kernels-0.19.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.19.0\n")
        (info / "RECORD").write_text("kernels/__init__.py,,\n")
    code = f"import site; site.addsitedir({str(site)!r})\n" + PROBE if editable else PROBE
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(cwd), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ", 1)[0].isupper())


@pytest.mark.parametrize("hf_kernels", [False, True])
def test_wheel(source, tmp_path, hf_kernels):
    pip("wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(("kernels/", "rewards/", "tests/"))], "would shadow other packages"
    site = tmp_path / "site"
    pip("install", wheel, "--no-deps", "--target", site)
    found = imported_from(site, tmp_path, hf_kernels, editable=False)
    assert found["CHUNK"].startswith(str(site / "kimi_rl" / "kernels"))
    assert found["REWARDS"].startswith(str(site / "kimi_rl" / "rewards"))
    assert found["KERNELS"] == (str(site / "kernels" / "__init__.py") if hf_kernels else "None")


@pytest.mark.parametrize("hf_kernels", [False, True])
def test_editable_install_from_its_own_folder(source, tmp_path, hf_kernels):
    site = tmp_path / "site"
    pip("install", "-e", source, "--no-deps", "--no-build-isolation", "--target", site)
    # The working directory is the checkout, whose `kernels/` folder comes before any installed `kernels`.
    found = imported_from(site, source, hf_kernels, editable=True)
    assert found["CHUNK"].startswith(str(source / "kernels"))
    assert found["REWARDS"].startswith(str(source / "rewards"))
    assert found["KERNELS"] == (str(site / "kernels" / "__init__.py") if hf_kernels else "None")
