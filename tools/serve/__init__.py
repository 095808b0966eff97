"""The OpenAI-compatible server: HTTP in front of one ``AsyncEngine``. Needs the extra ``serve``."""
