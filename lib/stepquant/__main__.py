"""The `stepquant` command, which needs the extra `pipeline`: `stepquant` or `python -m stepquant`."""

import sys


def main() -> None:
    """Run the command. Without the extra, print how to install it and exit with code 2."""
    try:
        from stepquant.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "stepquant":
            raise
        message = f"the stepquant command needs the package {error.name}; run: pip install 'stepquant[pipeline]'"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
