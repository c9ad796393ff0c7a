"""The repair of Horovod's launcher: it starts the workers without having imported their frameworks."""

from __future__ import annotations

from hvd_slowmo.installer.patches import Patch, Repair

_UTIL = "horovod/common/util.py"
_REASON = (
    "the launcher asks an extension whether it has MPI, and then whether it has gloo; each question imports the "
    "framework in a process of its own, which for TensorFlow takes two to six seconds of a processor"
)

LAUNCHER = Repair(
    name="launcher",
    without="horovodrun imports a framework twice before it starts the workers, which takes seconds",
    patches=(
        Patch(
            path=_UTIL,
            before="@_cache\ndef mpi_built(verbose=False):\n",
            after="""def _recorded_options():
    # hvd-slowmo's record of the build, which always has gloo.
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'hvd_slowmo_build.json')
    try:
        with open(path, encoding='utf-8') as record:
            return json.load(record)['options']
    except FileNotFoundError:
        return None


@_cache
def mpi_built(verbose=False):
    options = _recorded_options()
    if options is not None:
        return options['mpi']
""",
            reason=_REASON,
        ),
        Patch(
            path=_UTIL,
            before="@_cache\ndef gloo_built(verbose=False):\n",
            after="""@_cache
def gloo_built(verbose=False):
    if _recorded_options() is not None:
        return True
""",
            reason=_REASON,
        ),
    ),
)
