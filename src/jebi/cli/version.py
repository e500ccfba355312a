"""``jebi version``: what is installed, for a bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version

import typer


def command() -> None:
    """Print the versions of jebi and of what it stands on."""
    typer.echo(f"jebi {version('jebi')}")
    typer.echo(f"python {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "gguf"):
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} not installed")
