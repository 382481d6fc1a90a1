"""The command `tide`, also as `python -m tide`: signals are armed first, then the command line is loaded and run."""

from .shared.stop_signals import StopAsked, end_on_signals


def main() -> None:
    """Run the command line (cli.py). A stop that is asked for while it loads has its exit code, too."""
    try:
        with end_on_signals():
            from .cli import main as run

            run()
    except StopAsked as stop:
        raise SystemExit(stop.exit_code) from None


if __name__ == "__main__":
    main()
