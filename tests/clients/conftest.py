"""One server for all clients: a model that plays its part, one that thinks first, and the fake engine."""

import sys
from pathlib import Path

import pytest

# Tests run with --import-mode=importlib, which leaves sys.path alone.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cluster")]


@pytest.fixture(scope="session")
def actor():
    from actor import Actor

    return Actor()


@pytest.fixture(scope="session")
def server(actor):
    """URL of a server with the models `actor`, `thinker` (thinks before it answers) and `fake`, the last two also under
    the names that the documentation has for such models.
    """
    from actor import SPEECH, THOUGHTFUL_SPEECH, Actor
    from hosting import fake_engine, listening, service

    with fake_engine() as fake:
        services = [
            service("actor", actor, chat_template=SPEECH),
            service("thinker qwen3-0.6b", Actor(is_thoughtful=True), chat_template=THOUGHTFUL_SPEECH),
            service("fake all-minilm-l6-v2", fake),
        ]
        with listening(services) as url:
            yield url
