"""What pyproject.toml cannot say: an editable installation that type checkers and editors can read.

kernels/ and scheduler/ lie beside offload_triforce/ and are installed inside of it. Left alone, setuptools makes an
editable installation of such a layout import through a finder, which mypy, pyright and editors do not follow: they know
what folders hold, not what code would find. So the layout is made real, by links that git ignores, and one of the
links is what gets on the path. Where no links can be made, the finder serves as before.
"""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

SHOWN = ".editable"  # the folder on the path: it holds the package and nothing else, above all no top-level "kernels"


def make_links(package_dir: dict[str, str]) -> None:
    """Make ``package_dir``, the folders of the packages that lie apart, true below ``SHOWN``, in the present folder.

    Raises:
        OSError: something else is in the way, or the file system has no links.
    """
    for package in sorted(package_dir):  # a package before those inside of it
        link, folder = Path(SHOWN, *package.split(".")), Path(package_dir[package])
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and not link.exists():
            link.unlink()  # the folder has been moved
        if not link.exists():
            link.symlink_to(os.path.relpath(folder.resolve(), link.parent.resolve()), target_is_directory=True)
        if not link.samefile(folder):
            raise FileExistsError(f"{link} is not {folder}")


class LinkedEditable(editable_wheel):
    """``pip install -e``, over links."""

    def finalize_options(self) -> None:
        """Before setuptools decides how the packages are to be found."""
        try:
            make_links(self.distribution.package_dir)
        except OSError as error:
            self.warn(f"type checkers will not find the package: {error}")
        else:
            self.distribution.package_dir = {"": SHOWN}
        super().finalize_options()


if __name__ == "__main__":
    setup(cmdclass={"editable_wheel": LinkedEditable})
