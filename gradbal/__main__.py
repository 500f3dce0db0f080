"""``python -m gradbal`` is the command ``gradbal``."""

from gradbal.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
