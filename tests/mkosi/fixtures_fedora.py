# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the tests of fedora-min stand on: the synthetic Fedora behind a web
server, tools that have its key in the place of Fedora's, and copies of the
project that know no other mirror. Definition, registry and builder are the
very ones.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

from pathlib import Path
import re
import shutil
import subprocess
import threading
import time
from typing import Iterator, List, Optional, Tuple
import urllib.parse

import pytest

from fixtures_builder import AMBIENT, ROOT, FaultServer, Handler, Project
from fixtures_builder import ranged
from mkosi_build.cache import Cache
from mkosi_build.report import Report
from synthetic_fedora import RELEASE, Fedora, debian_packages

IMAGE = 'fedora-min'
# A whole image, and its boot, on a busy machine
PATIENCE = 600

KEY = f'RPM-GPG-KEY-fedora-{RELEASE}-primary'


class Mirror(FaultServer):
    '''A web server of the folder @root, which knows escapes.'''

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.thread = threading.Thread(
            target=self.http.serve_forever, daemon=True,
            kwargs={'poll_interval': 0.01})
        self.thread.start()

    def otherwise(self, handler: Handler) -> None:
        assert self.root
        path = self.root / urllib.parse.unquote(handler.path[1:])
        if path.is_file():
            ranged(path.read_bytes())(handler)
        else:
            handler.send(404)

    def close(self) -> None:
        '''Answer no more.'''
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class FedoraProject(Project):
    '''
    A copy of the project's own tree; @arch is the one that is built for.
    '''
    def __init__(self, root: Path, mirror: str, tools_tree: Path,
                 arch: str = 'x86_64') -> None:
        super().__init__(root, mirror, tools_tree)
        self.said: Optional['subprocess.CompletedProcess[str]'] = None
        self.seconds = 0.0
        self.definition = self.mkosi / IMAGE
        self.use(arch)

    def use(self, arch: str) -> None:
        '''Build for @arch from now on.'''
        self.arch = arch
        self.lock_path = self.definition / f'{arch}.lock'

    def copy(self) -> None:
        '''Make the tree: the builder, the registry and the definitions.'''
        for name in ('scripts', 'tests/functional/mkosi'):
            shutil.copytree(ROOT / name, self.tree / name, symlinks=True,
                            ignore=shutil.ignore_patterns('__pycache__'))
        # Fedora's own mirrors are not asked
        text = self.registry.read_text()
        self.registry.write_text(re.sub(
            r'^    mirrors:\n(      - .*\n)+', '', text, flags=re.M))

    def run(self, *arguments: str, wrapper: Tuple[str, ...] = (),
            **env: str) -> 'subprocess.CompletedProcess[str]':
        return subprocess.run(
            [*wrapper, *self.command(*arguments)], cwd=self.root,
            env=self.environment(**env), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding='utf-8', errors='replace',
            timeout=PATIENCE, stdin=subprocess.DEVNULL, check=False)

    def command(self, *arguments: str) -> List[str]:
        return [*self.python, self.script, self.arch, IMAGE, *arguments]


@pytest.fixture(name='fedora', scope='session')
def fixture_fedora(tmp_path_factory: pytest.TempPathFactory,
                   tools_tree: Path) -> Fedora:
    '''The synthetic Fedora, with a repository for x86_64.'''
    fedora = Fedora(tmp_path_factory.mktemp('fedora'), tools_tree)
    make(fedora, 'x86_64')
    return fedora


def make(fedora: Fedora, arch: str) -> None:
    '''Add a repository for @arch to @fedora.'''
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        packages = debian_packages(arch, Cache(), Report())
    fedora.make(arch, packages)


@pytest.fixture(name='fedora_tools', scope='session')
def fixture_fedora_tools(tmp_path_factory: pytest.TempPathFactory,
                         tools_tree: Path, fedora: Fedora) -> Path:
    '''The tools tree, but for one file: Fedora's key.'''
    tree = tmp_path_factory.mktemp('tools') / tools_tree.name
    if subprocess.run(['cp', '-a', '--link', tools_tree, tree], check=False,
                      stderr=subprocess.DEVNULL).returncode:
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(['cp', '-a', tools_tree, tree], check=True)
    [key] = (tree / 'usr/share/distribution-gpg-keys').rglob(KEY)
    # The old one is the other tree's, too
    key.unlink()
    shutil.copy(fedora.key('fedora'), key)
    return tree


@pytest.fixture(name='mirror', scope='session')
def fixture_mirror(fedora: Fedora) -> Iterator[Mirror]:
    '''The web server of the synthetic Fedora.'''
    server = Mirror(fedora.folder)
    yield server
    server.close()


@pytest.fixture(name='fresh')
def fixture_fresh(tmp_path: Path, mirror: Mirror,
                  fedora_tools: Path) -> FedoraProject:
    '''A project that knows the synthetic Fedora.'''
    project = FedoraProject(tmp_path / 'p', mirror.url + '/{arch}',
                            fedora_tools)
    project.copy()
    return project


@pytest.fixture(name='recorded', scope='session')
def fixture_recorded(tmp_path_factory: pytest.TempPathFactory,
                     mirror: Mirror, fedora_tools: Path) -> FedoraProject:
    '''A project that locked, built and recorded; only to be copied.'''
    project = FedoraProject(tmp_path_factory.mktemp('recorded') / 'p',
                            mirror.url + '/{arch}', fedora_tools)
    project.copy()
    start = time.monotonic()
    project.said = project.good('--update-lock', '--update', '--boot')
    project.seconds = time.monotonic() - start
    return project


@pytest.fixture(name='locked')
def fixture_locked(tmp_path: Path, recorded: FedoraProject,
                   fedora_tools: Path) -> FedoraProject:
    '''A project with lock and hashes, and nothing in its cache.'''
    root = tmp_path / 'p'
    shutil.copytree(recorded.tree, root / 'tree', symlinks=True)
    return FedoraProject(root, recorded.mirror, fedora_tools)
