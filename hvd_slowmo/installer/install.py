"""`hvd-slowmo install-horovod`: build, install and verify Horovod for the frameworks of the running environment."""

from __future__ import annotations

import importlib
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from hvd_slowmo.installer import build, check, patches, preflight, recipe, repairs, sdist
from hvd_slowmo.installer.cache import Cache
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import Framework, detect, supported
from hvd_slowmo.installer.options import Options, default_jobs
from hvd_slowmo.installer.pip import Pip, require_usable_environment
from hvd_slowmo.installer.reporter import Reporter


def install_horovod(options: Options, cache: Cache, env: Mapping[str, str], reporter: Reporter) -> None:
    """Install Horovod for the installed frameworks, and sum a tensor with it.

    The wheel comes from the cache if possible, and is built otherwise.

    Args:
        options: settings of the build.
        cache: cache of wheels.
        env: the user's environment variables.
        reporter: receives the progress.

    Raises:
        InstallError: a requirement is missing or a step fails. The environment is unchanged until the wheel is
            finished.
    """
    preflight.require_platform()
    require_usable_environment()
    found = detect()
    frameworks = supported(found)
    for framework in found:
        if framework not in frameworks:
            reporter.say(f"{framework.title} {framework.version} is too old: Horovod is built without it")
    wanted = recipe.recipe(sdist.HOROVOD, frameworks, options, env)
    cache.make_private()
    pip = Pip(cache.log(f"install-{wanted.key}"))
    pip.log.unlink(missing_ok=True)
    if recipe.installed() == wanted and not options.rebuild:
        reporter.say(f"Horovod {wanted.horovod} is installed already, built for {describe(frameworks)}")
    else:
        wheel = obtain_wheel(sdist.HOROVOD, wanted, frameworks, Workshop(options, cache, env, pip, reporter))
        install_wheel(wheel, pip, reporter)
    verify(frameworks, reporter)


@dataclass(frozen=True)
class Workshop:
    """The surroundings of a build.

    Attributes:
        options: settings of the build; `rebuild` ignores existing wheels.
        cache: cache of wheels and sources.
        env: the user's environment variables.
        pip: pip of the running environment.
        reporter: receives the progress.
    """

    options: Options
    cache: Cache
    env: Mapping[str, str]
    pip: Pip
    reporter: Reporter


def obtain_wheel(
    source: sdist.Sdist,
    wanted: recipe.Recipe,
    frameworks: tuple[Framework, ...],
    workshop: Workshop,
    changes: tuple[patches.Patch, ...] = repairs.PATCHES,
) -> Path:
    """Return the path of the wheel of `wanted` in the cache, and build it first if it is missing.

    Args:
        source: Horovod's source distribution.
        wanted: recipe of the wheel.
        frameworks: the frameworks to build for.
        workshop: options, cache, environment, pip and reporter.
        changes: patches to apply to the sources.

    Raises:
        InstallError: a build is needed, and it fails or one of its requirements is missing.
    """
    options, cache, env = workshop.options, workshop.cache, workshop.env
    pip, reporter = workshop.pip, workshop.reporter
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
            return wheel  # built by the process for which this one waited
        tools = work / "tools"
        build.install_tools(tools, pip, reporter)
        archive = sdist.fetch(source, cache.sdists, work, build.tools_environment(tools, env), pip, reporter)
        unpacked = sdist.unpack(source, archive, work)
        log = cache.log(f"build-{wanted.key}")
        log.unlink(missing_ok=True)
        build_env = build.build_environment(tools, env, frameworks, options)
        jobs = options.jobs or default_jobs()
        return cache.put(wanted, build.build_wheel(unpacked, wanted, build_env, jobs, log, reporter, changes))


def install_wheel(wheel: Path, pip: Pip, reporter: Reporter) -> None:
    """Install the requirements of `wheel`, then `wheel`.

    In this order, a failure does not leave a Horovod that cannot be imported.

    Raises:
        InstallError: pip fails.
    """
    fix = f"read the log; `pip install {wheel}` by hand shows the same error."
    reporter.say("Installing Horovod and its requirements")
    pip.run(["install", "--quiet", *requirements(wheel)], reporter, what="installing Horovod's requirements", fix=fix)
    arguments = ["install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    pip.run(arguments, reporter, what="installing Horovod", fix=fix)


def requirements(wheel: Path) -> list[str]:
    """Return the requirements of `wheel` as pip takes them, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def verify(frameworks: tuple[Framework, ...], reporter: Reporter) -> None:
    """Sum a tensor over two workers with each framework.

    Raises:
        InstallError: the sum fails with one of them.
    """
    importlib.invalidate_caches()  # Horovod was installed while this process was running
    for framework in frameworks:
        result = check.allreduce(framework.name)
        if result.error is not None:
            raise InstallError(
                f"Horovod is installed, but two workers could not sum a tensor with {framework.title}: {result.error}",
                "examine the installation with `hvd-slowmo doctor`, or run `hvd-slowmo install-horovod --rebuild`.",
            )
        reporter.say(f"Two workers summed a tensor with {framework.title} {framework.version} ({result.seconds:.1f} s)")


def describe(frameworks: tuple[Framework, ...]) -> str:
    """Return the frameworks' names and versions, such as "PyTorch 2.13.0 and TensorFlow 2.20.0"."""
    return " and ".join(f"{framework.title} {framework.version}" for framework in frameworks)
