"""The repair of the launcher's services: they listen where the job is, and serve nobody without the job's secret."""

from __future__ import annotations

from hvd_slowmo.installer.patches import Patch, Repair
from hvd_slowmo.installer.signature_source import CPP, PYTHON, SECRET

_REQUEST = "third_party/HTTPRequest/include/HTTPRequest.hpp"
_SECRET = "horovod/runner/common/util/secret.py"
_SERVER = "horovod/runner/http/http_server.py"
_CLIENT = "horovod/runner/http/http_client.py"
_PORTS = "horovod/runner/util/network.py"
_SERVICES = "horovod/runner/common/util/network.py"
_GLOO_RUN = "horovod/runner/gloo_run.py"
_LAUNCH = "horovod/runner/launch.py"
_DRIVER = "horovod/runner/driver/driver_service.py"
_TASK = "horovod/runner/task_fn.py"
_REMOTE = "horovod/runner/util/remote.py"
_HANDLER = "horovod/runner/elastic/rendezvous.py"
_WORKER = "horovod/runner/elastic/worker.py"
_SPARK = "horovod/spark/gloo_run.py"
_RAY = "horovod/ray/runner.py"
_RAY_ELASTIC = ("horovod/ray/elastic.py", "horovod/ray/elastic_v2.py")

_SIGNED = "requests without the job's signature are refused before their body is read"
_BOUND = "the server listens at the address that the workers use, on this machine unless told otherwise"
_PRIVATE = "the secret reaches a worker through its environment, never on a command line, which any account can read"

_SSH_COMMAND = r"""    # Any account can read command lines, but not the output of a shell's own printf.
    options = f'{port_arg} {identity_file_arg} {timeout_arg}'
    return f'printf "%s\\n" "$_HOROVOD_SECRET_KEY" | {SSH_COMMAND_PREFIX} {host} {options} ' \
        f'"read -r _HOROVOD_SECRET_KEY; export _HOROVOD_SECRET_KEY;" {local_command}'
"""

_STORE: tuple[Patch, ...] = (
    Patch(
        path=_SECRET,
        before="def make_secret_key():\n",
        after=PYTHON + "def make_secret_key():\n",
        reason=_SIGNED,
    ),
    Patch(
        path=_REQUEST,
        before="#include <cstdint>\n",
        after="#include <cstdint>\n#include <cstdlib>\n",
        reason="header of the next patch",
    ),
    Patch(path=_REQUEST, before="namespace http\n{\n", after=CPP + "namespace http\n{\n", reason=_SIGNED),
    Patch(
        path=_REQUEST,
        before='            requestData += "Host: " + domain + "\\r\\n";\n',
        after="""            requestData += horovod_signature::header(method, path, body);
            requestData += "Host: " + domain + "\\r\\n";
""",
        reason=_SIGNED,
    ),
    Patch(
        path=_SERVER,
        before="from horovod.runner.util.network import find_port\n",
        after="from horovod.runner.common.util import secret\nfrom horovod.runner.util.network import find_port\n",
        reason="import of the following patches",
    ),
    Patch(
        path=_SERVER,
        before="BAD_REQUEST = 400\n",
        after="BAD_REQUEST = 400\nFORBIDDEN = 403\n",
        reason="constant of the following patches",
    ),
    Patch(
        path=_SERVER,
        before="    # Override GET handler\n",
        after="""    # Refuse a stranger's request before its body is read.
    def parse_request(self):
        if not super(KVStoreHandler, self).parse_request():
            return False
        self.signature = self.headers.get(secret.SIGNATURE_HEADER)
        if secret.check_signature(self.signature, self.command, self.path):
            return True
        logging.warning('Refused a request without the signature of this job: %r of %r from %s. Workers need the '
                        'environment variable %s of their launcher.', self.command, self.path,
                        self.client_address[0], secret.HOROVOD_SECRET_KEY)
        self.send_status_code(FORBIDDEN)
        return False

    # Override GET handler
""",
        reason=_SIGNED,
    ),
    Patch(
        path=_SERVER,
        before='            self.send_header("Content-Length", str(len(value)))\n',
        after="""            self.send_header("Content-Length", str(len(value)))
            self.send_header(secret.SIGNATURE_HEADER, secret.sign('RESPONSE', self.path, value))
""",
        reason="Python's clients unpickle the response",
    ),
    Patch(
        path=_SERVER,
        before="""        self._put_value(scope, key, value)
        self.send_status_code(OK)
""",
        after="""        if not secret.check_body(self.signature, value):
            logging.warning('Refused a request whose body is not the signed one: PUT of %r from %s.',
                            self.path, self.client_address[0])
            self.send_status_code(FORBIDDEN)
            return

        self._put_value(scope, key, value)
        self.send_status_code(OK)
""",
        reason="values of Python's clients are unpickled",
    ),
    Patch(
        path=_CLIENT,
        before="from horovod.runner.common.util import codec\n",
        after="from horovod.runner.common.util import codec, secret\n",
        reason="import of the following patches",
    ),
    Patch(
        path=_CLIENT,
        before="""        resp = urlopen(req)
        # TODO: remove base64 encoding because base64 is not efficient
        return codec.loads_base64(resp.read())
""",
        after="""        req.add_header(secret.SIGNATURE_HEADER, secret.sign('GET', req.selector))
        resp = urlopen(req)
        value = resp.read()
        signature = resp.headers.get(secret.SIGNATURE_HEADER)
        if not (secret.check_signature(signature, 'RESPONSE', req.selector) and secret.check_body(signature, value)):
            raise RuntimeError("The response of the KVStore server has no signature of this job.")
        # TODO: remove base64 encoding because base64 is not efficient
        return codec.loads_base64(value)
""",
        reason="no unsigned bytes are unpickled",
    ),
    Patch(
        path=_CLIENT,
        before='        req.get_method = lambda: "PUT"  # for urllib2 compatibility\n',
        after="""        req.get_method = lambda: "PUT"  # for urllib2 compatibility
        req.add_header(secret.SIGNATURE_HEADER, secret.sign('PUT', req.selector, req.data))
""",
        reason=_SIGNED,
    ),
    Patch(
        path=_WORKER,
        before="            secret_key = secret.make_secret_key()\n",
        after="            secret_key = secret.job_key()\n",
        reason="the key of the worker's own service would travel in clear",
    ),
    Patch(
        path=_WORKER,
        before="            value = (self._service.addresses(), secret_key)\n",
        after="            value = (self._service.addresses(), None)\n",
        reason="the launcher has the key",
    ),
    Patch(
        path=_HANDLER,
        before="                addresses, secret_key = codec.loads_base64(value)\n",
        after="                addresses, secret_key = codec.loads_base64(value)[0], secret.job_key()\n",
        reason="the worker sends no key",
    ),
    Patch(
        path=_HANDLER,
        before="from horovod.runner.common.util import codec\n",
        after="from horovod.runner.common.util import codec, secret\n",
        reason="import of the previous patch",
    ),
)

_LISTEN: tuple[Patch, ...] = (
    Patch(
        path=_PORTS,
        before="def find_port(server_factory):\n",
        after="def find_port(server_factory, address=''):\n",
        reason=_BOUND,
    ),
    Patch(
        path=_PORTS,
        before="            addr = ('', port)\n",
        after="            addr = (address, port)\n",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVER,
        before="    def start(self, handler_cls=RendezvousHandler):\n",
        after="""    def start(self, handler_cls=RendezvousHandler, address='127.0.0.1'):
        secret.job_key()  # the workers inherit it
""",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVER,
        before="                addr, handler_cls, self._verbose))\n",
        after="                addr, handler_cls, self._verbose), address)\n",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVER,
        before="    def start_server(self):\n",
        after="""    def start_server(self, address='127.0.0.1'):
        secret.job_key()  # the workers inherit it
""",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVER,
        before="                addr, KVStoreHandler, self.verbose))\n",
        after="                addr, KVStoreHandler, self.verbose), address)\n",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVICES,
        before="                addr, self._make_handler()))\n",
        after="                addr, self._make_handler()), self._listen_address())\n",
        reason=_BOUND,
    ),
    Patch(
        path=_SERVICES,
        before="    def _make_handler(self):\n",
        after="""    def _listen_address(self):
        # All addresses where no interface is given: then the service helps to find it out.
        addresses = {addr.address for intf, addrs in psutil.net_if_addrs().items()
                     if self._nics and intf in self._nics
                     for addr in addrs if addr.family == socket.AF_INET}
        return addresses.pop() if len(addresses) == 1 else ''

    def _make_handler(self):
""",
        reason=_BOUND,
    ),
    Patch(
        path=_GLOO_RUN,
        before="    global_rendezv_port = rendezvous.start()\n",
        after="    global_rendezv_port = rendezvous.start(address=server_ip)\n",
        reason=_BOUND,
    ),
    Patch(
        path=_GLOO_RUN,
        before="""    global_rendezv_port = rendezvous.start(handler)
    driver.wait_for_available_slots(settings.num_proc)

    nics = get_common_interfaces(driver)
    server_ip = network.get_driver_ip(nics)
""",
        after="""    driver.wait_for_available_slots(settings.num_proc)

    nics = get_common_interfaces(driver)
    server_ip = network.get_driver_ip(nics)
    global_rendezv_port = rendezvous.start(handler, server_ip)
""",
        reason=_BOUND,
    ),
    Patch(
        path=_GLOO_RUN,
        before="run_func_server.start_server()",
        after="run_func_server.start_server(server_ip)",
        reason=_BOUND,
    ),
    Patch(
        path=_LAUNCH,
        before="run_func_server.start_server()",
        after="run_func_server.start_server(driver_ip)",
        reason=_BOUND,
    ),
)

_SECRET_TO_WORKERS: tuple[Patch, ...] = (
    Patch(
        path=_LAUNCH,
        before="""key=secret.make_secret_key(),
                                     start_timeout=""",
        after="""key=secret.job_key(),
                                     start_timeout=""",
        reason="one secret for all services of a job",
    ),
    Patch(
        path=_LAUNCH,
        before="""key=secret.make_secret_key(),
                                                start_timeout=""",
        after="""key=secret.job_key(),
                                                start_timeout=""",
        reason="one secret for all services of a job",
    ),
    Patch(
        path=_DRIVER,
        before="    args_list = []\n    num_hosts = len(all_host_names)\n",
        after="""    settings = copy.copy(settings)
    settings.key = None  # of the command line; task_fn has it from its environment
    args_list = []
    num_hosts = len(all_host_names)
""",
        reason=_PRIVATE,
    ),
    Patch(path=_DRIVER, before="import io\n", after="import copy\nimport io\n", reason="import of the previous patch"),
    Patch(
        path=_TASK,
        before="    settings = codec.loads_base64(sys.argv[4])\n",
        after="    settings = codec.loads_base64(sys.argv[4])\n    settings.key = secret.job_key()\n",
        reason=_PRIVATE,
    ),
    Patch(
        path=_TASK,
        before="from horovod.runner.common.util import codec, host_hash\n",
        after="from horovod.runner.common.util import codec, host_hash, secret\n",
        reason="import of the previous patch",
    ),
    Patch(
        path=_REMOTE,
        before="""    return f'{SSH_COMMAND_PREFIX} {host} {port_arg} {identity_file_arg} {timeout_arg} {local_command}'
""",
        after=_SSH_COMMAND,
        reason=_PRIVATE,
    ),
    Patch(
        path="horovod/runner/mpi_run.py",
        before="for key in sorted(env.keys()) if env_util.is_exportable(key))\n",
        after=f"""for key in sorted(env.keys())
                    if env_util.is_exportable(key) or key == '{SECRET}')  # the name only
""",
        reason="a function that MPI's workers run comes from a signed store",
    ),
    Patch(
        path=_SPARK,
        before="import sys\nimport time\n",
        after="import os\nimport sys\nimport time\n",
        reason="import of the following patches",
    ),
    Patch(
        path=_SPARK,
        before="    launch_gloo(command, exec_command, settings, nics, {}, server_ip)\n",
        after="""    os.environ[secret.HOROVOD_SECRET_KEY] = codec.dumps_base64(key)  # as SparkTaskService has it
    launch_gloo(command, exec_command, settings, nics, {}, server_ip)
""",
        reason="Spark's workers have their secret from Spark's task services",
    ),
    Patch(
        path=_SPARK,
        before="    env[secret.HOROVOD_SECRET_KEY] = codec.dumps_base64(settings.key)\n",
        after="""    env[secret.HOROVOD_SECRET_KEY] = codec.dumps_base64(settings.key)
    os.environ[secret.HOROVOD_SECRET_KEY] = env[secret.HOROVOD_SECRET_KEY]
""",
        reason="Spark's workers have their secret from Spark's task services",
    ),
    Patch(
        path=_RAY,
        before="        self.global_rendezv_port = self.rendezvous.start()\n",
        after="        self.global_rendezv_port = self.rendezvous.start(address=ray.util.get_node_ip_address())\n",
        reason=_BOUND,
    ),
    Patch(
        path=_RAY,
        before='            "HOROVOD_CONTROLLER": "gloo",\n',
        after="""            secret.HOROVOD_SECRET_KEY: secret.job_key().decode(),
            "HOROVOD_CONTROLLER": "gloo",
""",
        reason="Ray's workers have their environment from the coordinator",
    ),
    *(
        patch
        for path in _RAY_ELASTIC
        for patch in (
            Patch(
                path=path,
                before="self.rendezvous.start(handler)\n",
                after="self.rendezvous.start(handler, socket.gethostbyname(socket.gethostname()))\n",
                reason=_BOUND,
            ),
            Patch(
                path=path,
                before="            server_ip, nics, global_rendezv_port, elastic=True)\n",
                after=f"""            server_ip, nics, global_rendezv_port, elastic=True)
        self.run_env_vars['{SECRET}'] = os.environ['{SECRET}']
""",
                reason="Ray's workers have their environment from the coordinator",
            ),
        )
    ),
)

SIGNED_SERVICES = Repair(
    name="signed services",
    without="any account of this machine, and on an open network any machine, can run code as the user who starts an "
    "elastic job, and disturb every other job",
    patches=(*_STORE, *_LISTEN, *_SECRET_TO_WORKERS),
)
