"""A preload that takes longer than anybody wants to wait."""

import threading

threading.Event().wait(60)
