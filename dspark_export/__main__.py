"""``python -m dspark_export``, for launchers that start modules, such as ``torchrun``."""

from dspark_export.cli.main import app

if __name__ == "__main__":
    app()
