"""Models served: OpenAI's API, pages for people, monitoring."""

from gptpl.serving.monitoring import Drift
from gptpl.serving.server import Server, ServerSettings, client, serve

__all__ = ["Drift", "Server", "ServerSettings", "client", "serve"]
