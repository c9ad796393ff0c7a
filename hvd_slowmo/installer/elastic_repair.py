"""The repair of Horovod's elastic jobs over gloo: survivors notice a loss at once, and no start aborts the process."""

from __future__ import annotations

from hvd_slowmo.installer.patches import Patch, Repair

_CONTEXT = "horovod/common/gloo/gloo_context.cc"
_STORE = "horovod/common/gloo/http_store.cc"
_OPERATIONS = "horovod/common/operations.cc"
_PROCESS_SET = "horovod/common/process_set.cc"
_BASICS = "horovod/common/basics.py"
_HANDLER = "horovod/runner/elastic/rendezvous.py"
_LAUNCHER = "horovod/runner/gloo_run.py"
_DRIVER = "horovod/runner/elastic/driver.py"
_REGISTRY = "horovod/runner/elastic/registration.py"

ELASTIC_RECOVERY = Repair(
    name="elastic recovery",
    without="after the loss of a worker, an elastic job waits up to half a minute, and a worker that starts slowly "
    "aborts the others",
    patches=(
        Patch(
            path=_CONTEXT,
            before="  assert(global_context.IsEnabled());\n",
            after="  assert(global_context.IsEnabled());\n  enabled_ = true;\n",
            reason="Finalize() closes the connections of enabled contexts only; a survivor whose neighbors keep theirs "
            "open waits in its collective until the timeout of 30 s",
        ),
        Patch(
            path=_OPERATIONS,
            before="""    horovod_global.background_thread =
        std::thread(BackgroundThreadLoop, std::ref(horovod_global));
""",
            after="""    horovod_global.background_thread = std::thread([] {
      try {
        BackgroundThreadLoop(horovod_global);
      } catch (const std::exception& ex) {
        LOG(ERROR) << "Horovod could not be initialized: " << ex.what();
#if HAVE_GLOO
        if (horovod_global.control_operation == LibType::GLOO) {
          horovod_global.process_set_table.Finalize(global_gloo_context,
                                                    SHUT_DOWN_ERROR);
        }
        global_gloo_context.Finalize();
#endif
        horovod_global.initialization_failed = true;
      }
    });
""",
            reason="an exception that leaves a thread aborts the process; caught, it is an error of init() in Python",
        ),
        Patch(
            path=_OPERATIONS,
            before="    // Reset initialization flag\n",
            after="    // Reset initialization flags\n    horovod_global.initialization_failed = false;\n",
            reason="one failed init() would make every later one fail",
        ),
        Patch(
            path=_PROCESS_SET,
            before="""      InitializeRegisteredAndRemoveMarkedIfReady_(context, status);
      if (ProcessSetHasJustBeenRemoved()) {
""",
            after="""      try {
        InitializeRegisteredAndRemoveMarkedIfReady_(context, status);
      } catch (const std::exception& ex) {
        LOG(DEBUG) << "Process set " << id
                   << " is removed without the other processes: " << ex.what();
        id_to_process_set_[id].Finalize(status);
        DeregisterProcessSet(id);
        id_to_be_removed_ = SUCCESSFUL_REMOVAL;
      }
      if (ProcessSetHasJustBeenRemoved()) {
""",
            reason="all processes agree on the removal of a process set, which fails, and aborted, when one is gone",
        ),
        Patch(
            path=_STORE,
            before="""void HTTPStore::wait(const std::vector<std::string>& keys,
                     const std::chrono::milliseconds& timeout) {
""",
            after="""namespace {

// A worker that joins an elastic job first starts Python and its frameworks.
std::chrono::milliseconds WaitLimit(const std::chrono::milliseconds& timeout) {
  const char* elastic = std::getenv("HOROVOD_ELASTIC");
  if (elastic == nullptr || std::string(elastic) != "1" ||
      timeout == gloo::kNoTimeout) {
    return timeout;
  }
  const char* given = std::getenv("HOROVOD_ELASTIC_TIMEOUT");
  const long seconds = given == nullptr ? 0 : std::strtol(given, nullptr, 10);
  return std::max<std::chrono::milliseconds>(
      timeout, std::chrono::seconds(seconds > 0 ? seconds : 600));
}

} // namespace

void HTTPStore::wait(const std::vector<std::string>& keys,
                     const std::chrono::milliseconds& gloo_timeout) {
  const auto timeout = WaitLimit(gloo_timeout);
""",
            reason="a new worker may take longer than 30 s to start; the launcher waits HOROVOD_ELASTIC_TIMEOUT",
        ),
        Patch(
            path=_STORE,
            before="#include <cstring>\n",
            after="#include <algorithm>\n#include <cstdlib>\n#include <cstring>\n",
            reason="headers of the previous patch",
        ),
        Patch(
            path=_HANDLER,
            before="    class ElasticRendezvousHandler(RendezvousHandler):\n",
            after="""    class ElasticRendezvousHandler(RendezvousHandler):
        def do_GET(self):
            # A rendezvous that a worker has left cannot complete. 410 Gone ends the wait of the others, which must come
            # back for a new assignment.
            if driver.is_rendezvous_abandoned() and not self.path.startswith('/{}/'.format(GET_RANK_AND_SIZE)):
                self.send_status_code(410)
            else:
                super(ElasticRendezvousHandler, self).do_GET()

""",
            reason="the others would wait to the time limit for a worker that has failed before it joined",
        ),
        Patch(
            path=_DRIVER,
            before="    def world_size(self):\n",
            after="""    def is_rendezvous_abandoned(self):
        # Since the assignment, a worker has failed or has asked for a new one.
        return len(self._worker_registry.get_recorded_slots()) > 0

    def world_size(self):
""",
            reason="the handler's question of the previous patch",
        ),
        Patch(
            path=_BASICS,
            before="""                *process_set_args_via_ranks)
        else:
            if not self.mpi_built():
""",
            after="""                *process_set_args_via_ranks)
            # An elastic job forms anew when a worker fails while the others wait for it. A new worker ends instead, so
            # that the launcher does without it, and so does one that the job has removed: its rank is -1.
            attempts = 5 if self._has_run and os.environ.get('HOROVOD_ELASTIC') == '1' else 1
            getenv = ctypes.CDLL(None).getenv  # os.environ does not show what C++ has set
            getenv.restype = ctypes.c_char_p
            while not initialization_ok and attempts > 1 and getenv(b'HOROVOD_RANK') != b'-1':
                attempts -= 1
                self.MPI_LIB_CTYPES.horovod_shutdown()
                time.sleep(1)
                initialization_ok = self.MPI_LIB_CTYPES.horovod_init(
                    (ctypes.c_int * comm_size)(*comm), ctypes.c_int(comm_size),
                    *process_set_args_via_ranks)
        else:
            if not self.mpi_built():
""",
            reason="a start that fails because of another worker is tried again with the new assignment",
        ),
        Patch(
            path=_BASICS,
            before='    """Wrapper class for the basic Horovod API."""\n',
            after="""    \"\"\"Wrapper class for the basic Horovod API.\"\"\"

    _has_run = False  # whether init() has succeeded in this process
""",
            reason="only workers of a running job try again",
        ),
        Patch(
            path=_BASICS,
            before="        try:\n            _init_process_sets(process_sets)\n",
            after="        self._has_run = True\n        try:\n            _init_process_sets(process_sets)\n",
            reason="only workers of a running job try again",
        ),
        Patch(
            path=_CONTEXT,
            before="      // Signals that this host is not part of the job\n",
            after='      // Signals that this host is not part of the job\n      SetEnv(HOROVOD_RANK, "-1");\n',
            reason="tells init() not to try again, which would count as a worker of the next assignment",
        ),
        Patch(
            path=_BASICS,
            before="import os\nfrom typing import *\n",
            after="import os\nimport time\nfrom typing import *\n",
            reason="import of the previous patch",
        ),
        Patch(
            path=_LAUNCHER,
            before="""        run_command = get_run_command(command, server_ip, nics, global_rendezv_port, elastic=True)
""",
            after="""        run_command = get_run_command(command, server_ip, nics, global_rendezv_port, elastic=True)
        if settings.elastic_timeout:
            env = {**env, 'HOROVOD_ELASTIC_TIMEOUT': str(settings.elastic_timeout)}
""",
            reason="--elastic-timeout limits the workers' wait as well",
        ),
        Patch(
            path=_REGISTRY,
            before="    def record_ready(self, host, slot):\n",
            after="""    def record_ready(self, host, slot):
        if self.count(READY) == 0:
            # The workers' own time limit of an exchange, which has brought the first of them back.
            limit = absence_limit()
            if limit > 0:
                arguments = [self._rendezvous_id]
                timer = threading.Timer(limit, self._driver.end_absent_workers, arguments)
                timer.daemon = True
                timer.start()
""",
            reason="survivors would wait for ever for a worker that is stopped, or hangs where it can't end itself",
        ),
        Patch(
            path=_REGISTRY,
            before="class WorkerStateRegistry(object):\n",
            after="""def absence_limit():
    try:
        return float(os.environ.get('HVD_SLOWMO_TIMEOUT', 300))
    except ValueError:  # the workers refuse it
        return 0


class WorkerStateRegistry(object):
""",
            reason="the time of the previous patch",
        ),
        Patch(
            path=_REGISTRY,
            before="import logging\nimport threading\n",
            after="import logging\nimport os\nimport threading\n",
            reason="import of the previous patch",
        ),
        Patch(
            path=_DRIVER,
            before="    def get_worker_client(self, slot_info):\n",
            after="""    def end_absent_workers(self, rendezvous_id):
        # Workers that have started, and have not come back with the others. Their exit is recorded as a failure.
        registry = self._worker_registry
        if self.finished() or registry.last_rendezvous() != rendezvous_id:
            return
        recorded = set(registry.get_recorded_slots())
        for host, slots in list(self._host_assignments.items()):
            for key in [(host, slot_info.local_rank) for slot_info in slots]:
                if key in self._worker_clients and key not in recorded:
                    logging.error('{}[{}] has not come back with the others and is ended'.format(*key))
                    self._host_manager._hosts_state[host].set_event()

    def get_worker_client(self, slot_info):
""",
            reason="ends the workers that the timer has found",
        ),
        Patch(
            path=_DRIVER,
            before="        create_worker_fn = self._create_worker_fn\n",
            after="""        create_worker_fn = self._create_worker_fn
        self._worker_clients.pop((slot_info.hostname, slot_info.local_rank), None)  # of a former process
""",
            reason="a worker that is still starting is not absent",
        ),
    ),
)
