"""`hvd-slowmo install-horovod`: from an environment with a framework to a Horovod that has summed a tensor in it."""

from __future__ import annotations

import importlib
import time
import zipfile
from collections.abc import Mapping
from email.parser import HeaderParser
from pathlib import Path

from hvd_slowmo.installer import build, check, patches, preflight, recipe, sdist
from hvd_slowmo.installer.cache import Cache
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import Framework, detect, supported
from hvd_slowmo.installer.options import Options
from hvd_slowmo.installer.pip import Pip, require_usable_environment
from hvd_slowmo.installer.reporter import Reporter


def install_horovod(options: Options, cache: Cache, env: Mapping[str, str], reporter: Reporter) -> None:
    """Build Horovod for the frameworks installed here, or take it from the cache; install it; sum a tensor with it.

    Raises:
        InstallError: something is missing or fails. Until a finished wheel is there, the environment is left as it was.
    """
    preflight.require_platform()
    require_usable_environment()
    found = detect()
    frameworks = supported(found)
    for framework in found:
        if framework not in frameworks:
            reporter.say(f"{framework.title} {framework.version} is too old, and Horovod is built without it")
    wanted = recipe.recipe(sdist.HOROVOD, frameworks, options, env)
    pip = Pip(cache.log(f"install-{wanted.key}"))
    pip.log.unlink(missing_ok=True)
    if recipe.installed() == wanted and not options.rebuild:
        reporter.say(f"Horovod {wanted.horovod} is installed already, built for {describe(frameworks)}")
    else:
        wheel = obtain_wheel(sdist.HOROVOD, wanted, frameworks, options, cache, env, pip, reporter)
        install_wheel(wheel, pip, reporter)
    verify(frameworks, reporter)


def obtain_wheel(
    source: sdist.Sdist,
    wanted: recipe.Recipe,
    frameworks: tuple[Framework, ...],
    options: Options,
    cache: Cache,
    env: Mapping[str, str],
    pip: Pip,
    reporter: Reporter,
    changes: tuple[patches.Patch, ...] = patches.PATCHES,
) -> Path:
    """Return the wheel of `wanted`: from the cache, or else built and put there.

    Raises:
        InstallError: a build is needed, and something is missing for it or it fails.
    """
    if not options.rebuild and (wheel := cache.find(wanted)) is not None:
        reporter.say(f"Horovod {wanted.horovod} for {describe(frameworks)} was built before: {wheel}")
        return wheel
    preflight.require_compiler(env, build.cxx_standard(frameworks))
    preflight.require_make(env)
    preflight.require_headers(frameworks)
    preflight.require_mpi(options, env)
    preflight.require_cuda(options, frameworks, env)
    preflight.require_space(cache.root)
    started = time.time()
    with cache.building(wanted, reporter) as work:
        wheel = cache.find(wanted)
        if wheel is not None and (not options.rebuild or wheel.stat().st_mtime > started):
            return wheel  # built by the process that was waited for
        tools = work / "tools"
        build.install_tools(tools, pip, reporter)
        archive = sdist.fetch(source, cache.sdists, work, build.tools_environment(tools, env), pip, reporter)
        unpacked = sdist.unpack(source, archive, work)
        log = cache.log(f"build-{wanted.key}")
        log.unlink(missing_ok=True)
        build_env = build.build_environment(tools, env, frameworks, options)
        return cache.put(wanted, build.build_wheel(unpacked, wanted, build_env, log, reporter, changes))


def install_wheel(wheel: Path, pip: Pip, reporter: Reporter) -> None:
    """Install a finished wheel; first what it needs, so that no failure leaves a Horovod that cannot start.

    Raises:
        InstallError: pip fails.
    """
    cure = "read the log; `pip install --no-deps` by hand of the wheel named there shows the same error."
    reporter.say("Installing Horovod and what it imports")
    pip.run(["install", "--quiet", *requirements(wheel)], reporter, what="installing what Horovod imports", cure=cure)
    arguments = ["install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    pip.run(arguments, reporter, what="installing Horovod", cure=cure)


def requirements(wheel: Path) -> list[str]:
    """Return what a wheel says it needs, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def verify(frameworks: tuple[Framework, ...], reporter: Reporter) -> None:
    """Let two workers sum a tensor with each framework.

    Raises:
        InstallError: one of them fails.
    """
    importlib.invalidate_caches()  # Horovod has just been installed, beside this running process
    for framework in frameworks:
        result = check.allreduce(framework.name)
        if result.error is not None:
            raise InstallError(
                f"Horovod is installed, and two workers could not sum a tensor with {framework.title}: {result.error}",
                "`hvd-slowmo doctor` examines the installation; `hvd-slowmo install-horovod --rebuild` builds it anew.",
            )
        reporter.say(f"Two workers summed a tensor with {framework.title} {framework.version} ({result.seconds:.1f} s)")


def describe(frameworks: tuple[Framework, ...]) -> str:
    """Return the frameworks' names and versions as text."""
    return " and ".join(f"{framework.title} {framework.version}" for framework in frameworks)
