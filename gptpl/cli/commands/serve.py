"""The command that serves models."""

import logging
import os
import signal
import threading
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING

from gptpl.cli.arguments import Arguments, configured
from gptpl.cli.console import collector_paused
from gptpl.cli.model_input import given_filter, given_model, settings_of

if TYPE_CHECKING:
    from gptpl.serving import Server

log = logging.getLogger(__name__)


@configured("serve")
def serve(given: Arguments) -> None:
    """Serve models: OpenAI's API, and a page to write, chat or classify with.

    examples:
      gptpl serve checkpoint=latest                                # then open http://127.0.0.1:8000 in a browser
      gptpl serve checkpoint=RUN also=[OTHER_RUN] port=8080        # several models, chosen by name
      gptpl serve checkpoint=RUN filter=personal_data              # e-mail addresses and others are marked
      gptpl serve checkpoint=RUN feedback=reports.jsonl            # buttons to report texts with
      GPTPL_API_KEY=... gptpl serve checkpoint=RUN host=0.0.0.0    # for other machines, with a key

    The API is at http://127.0.0.1:8000/v1 (completions, chat/completions, models), for the openai client and those
    that speak its language. Beside it: /classify, /health, /ready, /metrics for Prometheus, and /monitor, a page.
    Texts are neither stored nor logged without feedback= or log_texts=true. Ctrl-C or SIGTERM: what has begun is finished first; a second one: at once.
    """
    with collector_paused():
        from gptpl.runs.listing import find_run
        from gptpl.runs.loaded import load, load_language_model, names_classifier
        from gptpl.serving.server import API_KEY, Server, ServerSettings

    cfg = settings_of(given)
    made = {"filter": given_filter(cfg), "api_key": cfg["api_key"] or os.environ.get(API_KEY) or None}
    settings = ServerSettings(**{field.name: cfg[field.name] for field in fields(ServerSettings)} | made)
    first = given_model(cfg)
    more = [
        {"source": find_run(path, key="also"), "device": cfg["device"], "trust": cfg["trust"]}
        for path in cfg["also"]
    ]
    models = [
        load(**each)
        if names_classifier(each["source"])
        else load_language_model(**each, precision=cfg["precision"])
        for each in (first, *more)
    ]
    server = Server(models, settings, names=cfg["names"])
    server.start()
    log.info("models: %s", ", ".join(server.names))
    print(server.url, flush=True)
    log.info("API: %s/v1; what it does: %s/monitor; Ctrl-C stops it", server.url, server.url)
    _wait(server)


def _wait(server: "Server") -> None:
    """Wait until a signal has stopped the server; the second one ends the process as usual."""

    def stop(number: int, frame: object) -> None:
        handlers.close()
        log.info("stopping: requests that have begun are finished first")
        server.request_stop()

    with ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers.callback(signal.signal, number, signal.signal(number, stop))
        while not server.wait(0.5):
            pass
