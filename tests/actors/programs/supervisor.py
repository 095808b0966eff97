"""A real supervisor whose wardens are the test wardens beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

from chipbus.actors.supervise import main

if __name__ == "__main__":
    main((sys.executable, "-P", str(Path(__file__).with_name("warden.py"))))
