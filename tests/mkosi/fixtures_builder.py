# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the builder's tests stand on: a server with faults, a Debian of a few
tiny packages, and copies of the builder's tree that build an image of them
with the real mkosi, apt and dpkg of the tools tree in some seconds.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

from functools import partial
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import os
from pathlib import Path
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import (Any, Callable, Dict, Iterator, List, Mapping, Optional,
                    Tuple)

import pytest

from mkosi_build import build, lock as locks, resolve, tools
from mkosi_build.cache import Cache
from mkosi_build.lock import Lock, Package
from mkosi_build.report import Report
from mkosi_build.store import GoneError, Store

ROOT = Path(__file__).resolve().parents[2]
TREE_LOCKS = ROOT / 'tests/functional/mkosi/tools'

# What the caller's environment said before conftest.py cleaned it
AMBIENT = {name: os.environ[name]
           for name in ('QEMU_MKOSI_DIR', 'QEMU_MKOSI_MIRROR')
           if name in os.environ}

PATIENCE = 400
EPOCH = 1700000000


# The server

class Handler(BaseHTTPRequestHandler):
    '''Answers as the test said, else from the server's folder.'''

    def __init__(self, faults: 'FaultServer', *args: Any) -> None:
        self.faults = faults
        super().__init__(*args)

    def do_GET(self) -> None:       # pylint: disable=invalid-name
        '''Take the next answer for this path.'''
        with self.faults.guard:
            self.faults.asked.append(self.path)
            self.faults.headers.append(dict(self.headers))
            answers = self.faults.answers.get(self.path, [])
            answer = answers[0] if answers else self.faults.otherwise
            if len(answers) > 1:
                answers.pop(0)
        try:
            answer(self)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def send(self, code: int, body: bytes = b'',
             headers: Optional[Mapping[str, str]] = None) -> None:
        '''Send one response.'''
        self.send_response(code)
        for name, value in {'Content-Length': str(len(body)),
                            **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        # pylint: disable=arguments-differ
        '''Stay silent.'''


Answer = Callable[[Handler], None]


def whole(body: bytes) -> Answer:
    '''The whole @body, whatever range was asked for.'''
    return lambda handler: handler.send(200, body)


def ranged(body: bytes) -> Answer:
    '''@body, or the range of it that was asked for.'''
    def answer(handler: Handler) -> None:
        wanted = handler.headers.get('Range')
        if not wanted:
            handler.send(200, body)
            return
        start = int(wanted[len('bytes='):].partition('-')[0])
        if start >= len(body):
            handler.send(416)
        else:
            handler.send(206, body[start:], {
                'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}'})
    return answer


def wrong_range(body: bytes) -> Answer:
    '''Another range than the one that was asked for, and says so.'''
    return lambda handler: handler.send(206, body[1:3], {
        'Content-Range': f'bytes 1-2/{len(body)}'})


def short(body: bytes, length: int) -> Answer:
    '''@length bytes of @body, of which all were promised.'''
    return lambda handler: handler.send(200, body[:length], {
        'Content-Length': str(len(body))})


def unsized(body: bytes) -> Answer:
    '''@body, without saying how long it is.'''
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def status(code: int) -> Answer:
    '''The bare status @code.'''
    return lambda handler: handler.send(code)


def redirect(url: str) -> Answer:
    '''Elsewhere.'''
    return lambda handler: handler.send(302, headers={'Location': url})


def reset(handler: Handler) -> None:
    '''The connection is cut, without goodbye.'''
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                  struct.pack('ii', 1, 0))
    handler.connection.close()


def trickle(body: bytes, length: int) -> Answer:
    '''@length bytes of @body, and then silence until the server ends.'''
    def answer(handler: Handler) -> None:
        handler.send(200, body[:length], {'Content-Length': str(len(body))})
        handler.wfile.flush()
        handler.faults.ending.wait(PATIENCE)
    return answer


def silence(handler: Handler) -> None:
    '''No answer at all until the server ends.'''
    handler.faults.ending.wait(PATIENCE)


class FaultServer:
    '''
    An HTTP server on the loopback interface.

    @answers has, for a path, what is answered in turn, the last one again
    and again; @root the files for all other paths. @asked and @headers are
    what came in.
    '''
    def __init__(self) -> None:
        self.answers: Dict[str, List[Answer]] = {}
        self.asked: List[str] = []
        self.headers: List[Dict[str, str]] = []
        self.root: Optional[Path] = None
        self.guard = threading.Lock()
        self.ending = threading.Event()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0),
                                        partial(Handler, self))
        self.http.daemon_threads = True
        self.host = f'127.0.0.1:{self.http.server_port}'
        self.url = f'http://{self.host}'

    def otherwise(self, handler: Handler) -> None:
        '''A file of the folder, or 404.'''
        path = self.root / handler.path[1:] if self.root else None
        if path and path.is_file():
            ranged(path.read_bytes())(handler)
        else:
            handler.send(404)


@pytest.fixture(name='faults')
def fixture_faults() -> Iterator[FaultServer]:
    '''A FaultServer, gone when the test ends.'''
    server = FaultServer()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True,
                              kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.ending.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


# Debian in miniature

CONTROL = '''\
Package: {name}
Version: {version}
Architecture: amd64
Maintainer: Zoë Nobody <nobody@example.org>
{fields}Description: a test’s package
'''


def make_package(mirror: Path, name: str, version: str = '1', *,
                 fields: str = '', files: Optional[Mapping[str, Path]] = None,
                 text: str = '', postinst: str = '',
                 copyright_: str = '') -> Package:
    '''
    Make a package below the folder @mirror with dpkg-deb, and what a lock
    says of it. It has @files, a file with @text, the script @postinst and
    the text @copyright_ where Debian has it.
    '''
    folder = mirror / 'tmp' / name
    (folder / 'DEBIAN').mkdir(parents=True)
    (folder / 'DEBIAN/control').write_text(CONTROL.format(
        name=name, version=version, fields=fields), encoding='utf-8')
    if postinst:
        script = folder / 'DEBIAN/postinst'
        script.write_text(f'#!/bin/sh -e\n{postinst}\n')
        script.chmod(0o755)
    for path, source in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / path)
        (folder / path).chmod(0o755)
    path = ('usr/lib/os-release' if name == 'base-files'
            else f'usr/share/{name}')
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text or f'{name} {version}\n')
    if copyright_:
        path = f'usr/share/doc/{name}/copyright'
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(copyright_, encoding='utf-8')
    location = f'pool/main/{name[0]}/{name}/{name}_{version}_amd64.deb'
    file = mirror / location
    file.parent.mkdir(parents=True, exist_ok=True)
    # Modes of what is packed are not the caller's umask's
    subprocess.run(['chmod', '-R', 'u=rwX,go=rX', folder], check=True)
    subprocess.run(['dpkg-deb', '--root-owner-group', '-Zgzip', '--build',
                    folder, file], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder)
    data = file.read_bytes()
    return Package(name, version, location,
                   hashlib.sha256(data).hexdigest(), len(data), 'amd64',
                   f'{name}={version}')


OS_RELEASE = 'ID=debian\nVERSION_ID=13\nVERSION_CODENAME=trixie\n'


class Debian:
    '''
    A mirror of some packages: @mirror is its folder, @packages what is in
    it by name. Those of MINIMAL make an image with a shell.
    '''
    MINIMAL = ('base-files', 'mini-hello', 'mini-lib', 'mini-shell')

    def __init__(self, mirror: Path, tree: Path) -> None:
        self.mirror = mirror
        shell = {path: tree / path for path in (
            'usr/bin/sh', 'usr/lib64/ld-linux-x86-64.so.2',
            'usr/lib/x86_64-linux-gnu/libc.so.6')}
        self.packages = {package.name: package for package in (
            make_package(mirror, 'base-files', fields='Essential: yes\n',
                         text=OS_RELEASE),
            make_package(mirror, 'mini-shell', fields='Essential: yes\n',
                         files=shell),
            make_package(mirror, 'mini-lib'),
            make_package(mirror, 'mini-hello', fields='Depends: mini-lib\n',
                         postinst='echo yes >/usr/share/mini-configured'),
            make_package(mirror, 'mini-outside',
                         fields='Depends: not-in-the-lock (>= 2)\n'),
            make_package(mirror, 'mini-broken', postinst='exit 3'))}


@pytest.fixture(name='tools_tree', scope='session')
def fixture_tools_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    '''
    The real tools tree: the one in the user's cache, else the builder
    makes it, once, of packages from the network; of newer ones if the
    locked ones are gone, and then their lock is beside it.
    '''
    host = build.host_architecture()
    lock = locks.load(TREE_LOCKS / f'{host}.lock')
    report = Report()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        cache = Cache()
        if (cache.tools / lock.digest).is_dir():
            return cache.tools / lock.digest
        patch.setenv('QEMU_MKOSI_DIR', str(tmp_path_factory.mktemp('tools')))
        cache = Cache()
        try:
            return tools.ensure(lock, cache, Store(cache, report), report)
        except GoneError:
            lock = resolve.tools_lock(TREE_LOCKS, host, cache, report)
            tree = tools.ensure(lock, cache, Store(cache, report), report)
            tree.with_suffix('.lock').write_text(locks.render(lock))
            return tree


@pytest.fixture(name='debian', scope='session')
def fixture_debian(tmp_path_factory: pytest.TempPathFactory,
                   tools_tree: Path) -> Debian:
    '''A mirror in a folder.'''
    return Debian(tmp_path_factory.mktemp('mirror'), tools_tree)


# The builder's tree

CONF = '''\
[Distribution]
Distribution=debian
Release=trixie

[Output]
Format=cpio
Output=image
CompressOutput=none
ManifestFormat=json
Seed=7d1c6f2e-8a5b-4b0e-9f25-0c9d9f6c1a11

[Content]
Bootable=no
CleanPackageMetadata=yes
Packages=mini-hello
'''

POSTOUTPUT = '''\
#!/bin/sh -e
cd "$OUTPUTDIR"
echo kernel >vmlinuz
echo initrd >initrd.cpio
cp image disk.qcow2
'''

REGISTRY = '''\
# Comments stay
schema: 1
images:
  mini:
    description: A tiny thing
    definition: mini
    distribution: debian
    release: trixie
    architectures:
      x86_64:
        artefacts:
          kernel:
            file: vmlinuz    # not a kernel
            format: bzimage
          initrd:
            file: initrd.cpio
            format: cpio
          disk:
            file: disk.qcow2
            format: qcow2
        boot:
          console: ttyS0
          cmdline:
            - console=ttyS0
          disk-cmdline: []
          disk-device: virtio-blk-pci
          ready: 'READY'
          prompt: 'root# '
        budget:
          kernel-initrd-bytes: 1000
          disk-bytes: 10000000
          packages: 10
          initrd-boot-ratio: 1.2
          disk-boot-ratio: 2.0
'''

APT_CONF = '''\
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "/dev/null";
'''


def processes(path: Path) -> List[int]:
    '''The processes that have to do with @path, but for our own.'''
    ours = {os.getpid(), os.getppid()}
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            words = [(folder / name).read_bytes().decode(errors='replace')
                     for name in ('cmdline', 'environ')]
            words.append(os.readlink(folder / 'cwd'))
            zombie = ') Z ' in (folder / 'stat').read_text()
        except OSError:
            continue
        if int(folder.name) not in ours and not zombie:
            if any(str(path) in word for word in words):
                found.append(int(folder.name))
    return found


class Project:
    '''
    A tree with the builder and one image, mini, and a cache of its own,
    all below @root. @mirror is where its packages come from: this host's
    own mirrors are not asked.
    '''
    def __init__(self, root: Path, mirror: str, tools_tree: Path) -> None:
        self.root = root
        self.mirror = mirror
        self.tree = root / 'tree'
        self.mkosi = self.tree / 'tests/functional/mkosi'
        self.definition = self.mkosi / 'mini'
        self.registry = self.mkosi / 'registry.yaml'
        self.lock_path = self.definition / 'x86_64.lock'
        self.cache = root / 'cache'
        self.assets = root / 'assets'
        self.python = [sys.executable]
        self.script = str(self.tree / 'scripts/mkosi-build.py')
        self.env = {'PATH': os.environ['PATH'], 'HOME': str(root / 'home'),
                    'APT_CONFIG': str(root / 'apt.conf'),
                    'PYTHONDONTWRITEBYTECODE': '1',
                    'no_proxy': '*',
                    'QEMU_MKOSI_DIR': str(self.cache),
                    'QEMU_TEST_CACHE_DIR': str(self.assets)}
        root.mkdir(parents=True, exist_ok=True)
        (root / 'apt.conf').write_text(APT_CONF)
        self.newer_tools = tools_tree.with_suffix('.lock')
        tree = self.cache / 'tools' / tools_tree.name
        if not tree.exists():
            tree.parent.mkdir(parents=True)
            tree.symlink_to(tools_tree)

    def create(self, debian: Debian) -> None:
        '''Write the tree, with an image that was never built.'''
        for name in ('mkosi-build.py', 'mkosi_build'):
            source, dest = ROOT / 'scripts' / name, self.tree / 'scripts'
            dest.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, dest / name)
            else:
                shutil.copy(source, dest / name)
        shutil.copytree(TREE_LOCKS, self.mkosi / 'tools')
        if self.newer_tools.exists():
            shutil.copy(self.newer_tools, self.mkosi / 'tools'
                        / f'{build.host_architecture()}.lock')
        self.definition.mkdir()
        (self.definition / 'mkosi.conf').write_text(CONF)
        self.add_script('mkosi.postoutput', POSTOUTPUT)
        self.registry.write_text(REGISTRY)
        self.write_lock(debian, *debian.MINIMAL)

    def add_script(self, name: str, text: str) -> None:
        '''Give the definition an executable file.'''
        (self.definition / name).write_text(text)
        (self.definition / name).chmod(0o755)

    def write_lock(self, debian: Debian, *names: str) -> Lock:
        '''Lock the packages with @names for the definition as it is.'''
        lock = Lock(locks.definition_digest(self.definition), 'debian',
                    'trixie', 'x86_64', EPOCH,
                    tuple(sorted(debian.packages[name] for name in names)))
        self.lock_path.write_text(locks.render(lock))
        return lock

    def edit(self, path: Path, old: str, new: str) -> None:
        '''Replace the one @old in the file @path by @new.'''
        text = path.read_text()
        assert text.count(old) == 1, text
        path.write_text(text.replace(old, new))

    def command(self, *arguments: str) -> List[str]:
        '''The command line of the builder.'''
        return [*self.python, self.script, 'x86_64', *arguments]

    def environment(self, **env: str) -> Dict[str, str]:
        '''The builder's environment.'''
        mirror = {'QEMU_MKOSI_MIRROR': self.mirror} if self.mirror else {}
        return {**self.env, **mirror, **env}

    def run(self, *arguments: str, wrapper: Tuple[str, ...] = (),
            **env: str) -> 'subprocess.CompletedProcess[str]':
        '''Run the builder to its end.'''
        return subprocess.run(
            [*wrapper, *self.command(*arguments)], cwd=self.root,
            env=self.environment(**env), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding='utf-8', timeout=PATIENCE,
            stdin=subprocess.DEVNULL, check=False)

    def start(self, *arguments: str,
              **env: str) -> 'subprocess.Popen[str]':
        '''Start the builder, the leader of a session of its own.'''
        return subprocess.Popen(
            self.command(*arguments), cwd=self.root,
            env=self.environment(**env), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding='utf-8',
            stdin=subprocess.DEVNULL, start_new_session=True)

    def good(self, *arguments: str,
             **env: str) -> 'subprocess.CompletedProcess[str]':
        '''Run the builder; it must succeed and leave nothing behind.'''
        result = self.run(*arguments, wrapper=(), **env)
        assert result.returncode == 0, result.stderr + result.stdout
        self.assert_clean()
        return result

    def bad(self, code: int, *arguments: str, wrapper: Tuple[str, ...] = (),
            **env: str) -> str:
        '''
        Run the builder; it must fail with the exit code @code, say what to
        do next, not more than fits on a screen, and leave nothing behind.
        Returns what it said.
        '''
        result = self.run(*arguments, wrapper=wrapper, **env)
        said = result.stderr
        assert result.returncode == code, said + result.stdout
        assert len(re.findall('^error: ', said, re.M)) == 1, said
        # The registry's errors name the line to edit
        next_steps = 0 if 'error: registry.yaml:' in said else 1
        assert said.count('\n  next: ') == next_steps, said
        assert 'Traceback' not in said
        assert len(said.splitlines()) <= 25, said
        self.assert_clean()
        return said

    def events(self, text: str) -> List[Dict[str, Any]]:
        '''What the builder told as JSON lines.'''
        return [json.loads(line) for line in text.splitlines()]

    def files(self) -> List[str]:
        '''All files below the project, but the tools.'''
        return [str(Path(folder, name).relative_to(self.root))
                for folder, _, names in os.walk(self.root)
                for name in names]

    def artefacts(self) -> List[Path]:
        '''The files in images/ that are artefacts.'''
        return [path for name in ('vmlinuz', 'initrd.cpio', 'disk.qcow2')
                for path in sorted(self.cache.glob(f'images/**/{name}'))]

    def asset_hashes(self) -> List[str]:
        '''The asset cache: each file's name is checked to be its hash.'''
        names = sorted(path.name for path in
                       (self.assets / 'download').glob('*')
                       if path.suffix != '.stamp')
        for name in names:
            data = (self.assets / 'download' / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == name
        return names

    def assert_clean(self) -> None:
        '''No process, no mount and no half-made file is left.'''
        self.assert_gone()
        work = self.cache / 'work'
        assert not (work.is_dir() and list(work.iterdir()))
        stray = [name for name in self.files()
                 if name.endswith(('.tmp', '.part')) or '.probe' in name]
        assert not stray
        assert not list(self.cache.glob('images/**/*.tmp'))
        self.asset_hashes()

    def assert_gone(self) -> None:
        '''No process is left within a second, and no mount.'''
        deadline = time.monotonic() + 1
        while processes(self.root) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = processes(self.root)
        assert not left, [Path(f'/proc/{pid}/cmdline').read_bytes()
                          for pid in left]
        mounts = Path('/proc/self/mountinfo').read_bytes().decode()
        assert str(self.root) not in mounts


@pytest.fixture(name='unbuilt')
def fixture_unbuilt(tmp_path: Path, debian: Debian,
                    tools_tree: Path) -> Project:
    '''A project whose image was never built.'''
    project = Project(tmp_path / 'p', f'file://{debian.mirror}', tools_tree)
    project.create(debian)
    return project


@pytest.fixture(name='template', scope='session')
def fixture_template(tmp_path_factory: pytest.TempPathFactory,
                     debian: Debian, tools_tree: Path) -> Project:
    '''A project that was built and recorded once; only to be copied.'''
    project = Project(tmp_path_factory.mktemp('template') / 'p',
                      f'file://{debian.mirror}', tools_tree)
    project.create(debian)
    project.good('--update')
    return project


@pytest.fixture(name='project')
def fixture_project(tmp_path: Path, template: Project,
                    tools_tree: Path) -> Project:
    '''A project with hashes in the registry, and nothing in its cache.'''
    root = tmp_path / 'p'
    shutil.copytree(template.tree, root / 'tree', symlinks=True)
    return Project(root, template.mirror, tools_tree)


@pytest.fixture(name='built')
def fixture_built(tmp_path: Path, template: Project,
                  tools_tree: Path) -> Project:
    '''A project whose image is in its cache.'''
    shutil.copytree(template.root, tmp_path / 'p', symlinks=True)
    return Project(tmp_path / 'p', template.mirror, tools_tree)
