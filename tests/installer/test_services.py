"""Horovod's services with the repair "signed services": of the Horovod that is installed here."""

import base64
import logging
import os
import pickle
import socket
import subprocess
import textwrap
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hvd_slowmo.installer import check, signature_source
from support.elastic import hvd_slowmo_run
from support.installation import ROOT
from support.strangers import Creates, status

http_server = pytest.importorskip("horovod.runner.http.http_server")


@pytest.fixture(autouse=True)
def own_secret(monkeypatch):
    """Restore the environment: a server leaves the job's secret there for its workers."""
    monkeypatch.setenv(signature_source.SECRET, "5" * 64)


@pytest.fixture
def server():
    server = http_server.RendezvousServer()
    port = server.start()
    yield server, port
    server.stop()
    server._httpd.server_close()


def test_a_stranger_is_refused_before_the_body_is_read_and_it_is_logged(server, caplog):
    server, port = server
    server._httpd.cache["scope"] = {"key": b"value"}
    with (
        caplog.at_level(logging.WARNING),
        closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as stranger,
    ):
        stranger.sendall(b"PUT /scope/key HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")  # and no body
        assert stranger.recv(100).startswith(b"HTTP/1.0 403 ")
        for method in ("GET", "DELETE", "HEAD"):
            assert status(port, method, "/scope/key") == 403
        assert status(port, "GET", "/scope/key", **{"X-Horovod-Signature": "0" * 64 + ":" + "0" * 64}) == 403
    assert server._httpd.cache == {"scope": {"key": b"value"}}
    first, *others = [record.getMessage() for record in caplog.records]
    assert "without the signature of this job: 'PUT' of '/scope/key' from 127.0.0.1" in first
    assert len(others) == 4


def test_a_signature_holds_for_its_body_alone(server):
    from horovod.runner.common.util import secret

    server, port = server
    signature = {secret.SIGNATURE_HEADER: secret.sign("PUT", "/scope/key", b"body")}
    assert status(port, "PUT", "/scope/key", b"else", **signature) == 403
    assert server._httpd.cache == {}
    assert status(port, "PUT", "/scope/key", b"body", **signature) == 200
    assert server._httpd.cache == {"scope": {"key": b"body"}}


def test_workers_exchange_objects_through_the_store(server):
    from horovod.runner.http import http_client

    http_client.put_data_into_kvstore("127.0.0.1", server[1], "scope", "key", {"a": [1, 2]})
    assert http_client.read_data_from_kvstore("127.0.0.1", server[1], "scope", "key") == {"a": [1, 2]}


def test_an_unsigned_response_is_not_unpickled(tmp_path):
    from horovod.runner.http import http_client

    body = base64.b64encode(pickle.dumps(Creates(tmp_path / "created")))

    class Impostor(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Impostor) as impostor:
        thread = threading.Thread(target=impostor.handle_request)
        thread.start()
        with pytest.raises(RuntimeError, match="no signature of this job"):
            http_client.read_data_from_kvstore("127.0.0.1", impostor.server_port, "scope", "key")
        thread.join()
    assert not (tmp_path / "created").exists()


@pytest.mark.slow
def test_the_servers_listen_where_the_job_is(server):
    from horovod.runner.common.util.network import BasicService

    assert server[0]._httpd.server_address[0] == "127.0.0.1"
    functions = http_server.KVStoreServer(verbose=False)
    functions.start_server()
    assert functions.httpd.server_address[0] == "127.0.0.1"
    functions.shutdown_server()
    for interface, address in ((["lo"], "127.0.0.1"), (None, "0.0.0.0")):
        service = BasicService("test", b"key", interface)
        assert service._server.server_address[0] == address
        service.shutdown()


@pytest.mark.slow
def test_the_driver_finds_the_interfaces_and_its_secret_stays_out_of_command_lines(monkeypatch):
    from horovod.runner.common.util import secret
    from horovod.runner.common.util.settings import Settings
    from horovod.runner.common.util.timeout import Timeout
    from horovod.runner.driver import driver_service

    commands = []
    execute = driver_service.safe_shell_exec.execute

    def recorded(command, **options):
        commands.append(command)
        return execute(command, **options)

    monkeypatch.setattr(driver_service.safe_shell_exec, "execute", recorded)
    names = ["localhost", "127.0.0.1"]
    settings = Settings(verbose=0, key=secret.job_key(), start_timeout=Timeout(60, "no {activity}"), nics=["lo"])
    assert driver_service._driver_fn(names, names, settings, fn_cache=None) == {"lo"}
    assert settings.key == secret.job_key()
    assert len(commands) == 2
    for command in commands:
        decoded = [base64.b64decode(word) for word in command.split()[-4:]]
        assert b"start_timeout" in decoded[-1]
        assert not any(settings.key in text for text in (command.encode(), *decoded))


def test_the_secret_reaches_a_remote_worker_and_no_command_line(tmp_path, monkeypatch):
    from horovod.runner.util.remote import get_remote_command

    ssh = tmp_path / "ssh"
    ssh.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        echo "ssh $*" >> {tmp_path}/seen
        while [ "$1" != host ]; do shift; done
        shift
        unset {signature_source.SECRET}
        exec sh -c "$*"
        """)
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # As the launcher quotes a worker's command, and as it gives a service's.
    for command in ("'cd / > /dev/null 2>&1 ; env A=1 printenv'", f"printenv {signature_source.SECRET}"):
        line = get_remote_command(command, host="host")
        result = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert "5" * 64 in result.stdout
        assert "5" * 64 not in line
    assert "5" * 64 not in (tmp_path / "seen").read_text()


@pytest.mark.slow
def test_the_doctors_check_notices_a_server_that_serves_strangers(monkeypatch):
    assert check.strangers().error is None
    monkeypatch.setattr(http_server.secret, "check_signature", lambda *_: True)
    monkeypatch.setattr(http_server.secret, "check_body", lambda *_: True)
    monkeypatch.setattr(http_server.KVStoreHandler, "do_GET", lambda handler: handler.send_status_code(404))
    error = check.strangers().error
    assert error is not None
    assert "serves unsigned requests" in error


STRANGER = """
import base64, contextlib, os, pathlib, pickle, sys
import horovod.torch as hvd, torch
sys.path.insert(0, {tests!r})
from support.strangers import Creates, status


def work(state=None):
    if hvd.rank() == 0:
        port = os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
        body = base64.b64encode(pickle.dumps(Creates("created")))
        print("PUT", status(port, "PUT", "/worker_addresses/localhost:0", body))
        print("GET", status(port, "GET", "/rank_and_size/localhost:0"))
        lines = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # the process has ended
                lines.append(path.read_bytes())
        print("seen", any(os.environ[{secret!r}].encode() in line for line in lines))
    print("sum", hvd.allreduce(torch.ones(1), op=hvd.Sum, name="sum").item())


hvd.init()
if "HOROVOD_ELASTIC" in os.environ:
    hvd.elastic.run(work)(hvd.elastic.TorchState(torch.nn.Linear(1, 1)))
else:
    work()
"""


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("elastic", [False, True], ids=["static", "elastic"])
@pytest.mark.sample("static")
def test_a_job_ends_well_while_a_stranger_is_refused(tmp_path, elastic, monkeypatch):
    monkeypatch.delenv(signature_source.SECRET)
    script = STRANGER.format(tests=str(ROOT / "tests"), secret=signature_source.SECRET)
    job = hvd_slowmo_run(tmp_path, script, 2, hosts=["localhost", "127.0.0.1"] if elastic else None)
    try:
        output, errors = job.communicate(timeout=120)
    finally:
        job.kill()  # ends the workers too
    assert job.returncode == 0, errors[-3000:]
    assert "PUT 403" in output
    assert "GET 403" in output
    assert "seen False" in output
    assert output.count("sum 2.0") == 2
    assert errors.count("Refused a request without the signature of this job") == 2
    assert not (tmp_path / "created").exists()
