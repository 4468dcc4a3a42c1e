"""The front end in pyproject.toml is read by ComfyUI's registry. pip must not install it."""

from setuptools import Distribution, setup

FRONT_END = "comfyui-frontend-package"


class WithoutFrontEnd(Distribution):
    @property
    def install_requires(self) -> list[str]:
        return [each for each in self._listed if not each.startswith(FRONT_END)]

    @install_requires.setter
    def install_requires(self, listed) -> None:
        self._listed = list(listed or [])


setup(distclass=WithoutFrontEnd)
