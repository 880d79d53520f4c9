"""What ended replicas: kept in order, once each, and not for ever."""

import pytest

from octavo.cluster import failures
from octavo.cluster.failures import Failure


class Store:
    """Ray's internal key-value store, as far as it is used."""

    def __init__(self) -> None:
        self.values: dict[bytes, str] = {}

    def _internal_kv_list(self, prefix, namespace):
        assert namespace == b"octavo"
        return [key for key in self.values if key.startswith(prefix)]

    def _internal_kv_put(self, key, value, namespace):
        self.values[key] = value

    def _internal_kv_get(self, key, namespace):
        return self.values.get(key)

    def _internal_kv_del(self, key, namespace):
        del self.values[key]


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(failures, "kv", made)
    return made


def failure(number: int, why: str = "Rank 1 was killed.") -> Failure:
    return Failure(1e9 + number, f"replica-{number}", "10.0.0.1", why)


def test_the_newest_come_first_and_the_oldest_go(store):
    for number in range(failures.KEEP + 10):
        assert failures.record(failure(number))
    kept = failures.recent()
    assert kept == [failure(number) for number in reversed(range(10, failures.KEEP + 10))]
    assert failures.recent(2) == kept[:2]
    assert len(store.values) == failures.KEEP


def test_the_first_word_about_a_replica_counts(store):
    failures.record(failure(1))
    failures.record(Failure(2e9, "replica-1", "10.0.0.1", "its channel broke."))
    failures.record(failure(11))
    assert failures.recent() == [failure(11), failure(1)]


def test_a_failure_is_one_line():
    line = str(failure(7, "Rank 3 on 10.0.0.3 (pid 17) was killed by signal 9."))
    assert line.endswith("replica replica-7 on 10.0.0.1: Rank 3 on 10.0.0.3 (pid 17) was killed by signal 9.")
    assert "\n" not in line


def test_a_store_that_is_gone_fails_nobody(monkeypatch):
    class Gone(Store):
        def _internal_kv_list(self, prefix, namespace):
            raise ConnectionError("the GCS is gone")

    monkeypatch.setattr(failures, "kv", Gone())
    assert not failures.record(failure(1))
