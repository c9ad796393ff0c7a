"""Workers exchange their hosts through the server that horovodrun starts."""

import threading

import pytest

from hvd_slowmo.comm.rendezvous import hosts_by_rendezvous


@pytest.fixture
def environment():
    http_server = pytest.importorskip("horovod.runner.http.http_server")
    server = http_server.RendezvousServer()
    address = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.start())}
    yield {**address, "HOROVOD_SIZE": "3", "HOROVOD_GLOO_TIMEOUT_SECONDS": "1"}
    server.stop()
    server._httpd.server_close()


def test_all_workers_learn_all_hosts_in_any_order(environment):
    found = {}

    def work(rank):
        found[rank] = hosts_by_rendezvous("abb"[rank], {**environment, "HOROVOD_RANK": str(rank)})

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {rank: ["a", "b", "b"] for rank in range(3)}


@pytest.mark.slow
def test_a_worker_that_does_not_come_is_named(environment):
    with pytest.raises(TimeoutError, match="rank 1 has not called init\\(\\) within 1 s"):
        hosts_by_rendezvous("a", {**environment, "HOROVOD_RANK": "0"})


@pytest.mark.parametrize("change", [{"HOROVOD_RANK": None}, {"HOROVOD_RANK": "0", "HOROVOD_ELASTIC": "1"}])
def test_elsewhere_there_is_no_such_server(environment, change):
    changed = {key: value for key, value in {**environment, **change}.items() if value is not None}
    assert hosts_by_rendezvous("a", changed) is None
