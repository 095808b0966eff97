"""A preload that makes forking unsafe."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
