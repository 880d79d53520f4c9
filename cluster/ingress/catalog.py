"""Catalog: the models behind one ingress, by the names that requests use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from octavo.cluster.ingress.service import MAX_NAME_CHARS, Service
from octavo.engine.errors import NotFoundError, RequestError


class Catalog:
    """Each model has one Service. Names are unique over all models."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = tuple(services)
        self._by_name = {name: service for service in services for name in service.settings.served_model_names}

    def __iter__(self) -> Iterator[Service]:
        return iter(self.services)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def find(self, name: str | None) -> Service:
        """The model that a request means; the only one need not be named. Raises NotFoundError, RequestError."""
        if name is None:
            if len(self.services) > 1:
                raise RequestError(f"model must be one of {self._listed()}.", "model")
            return self.services[0]
        service = self._by_name.get(name)
        if service is None:
            raise NotFoundError(
                f"The model {name[:MAX_NAME_CHARS]!r} is not served here; {self._listed()} "
                f"{'is' if len(self._by_name) == 1 else 'are'}.",
                "model",
            )
        return service

    def _listed(self) -> str:
        return ", ".join(repr(name) for name in self._by_name)
