# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the tests of publishing stand on: a signed Debian of a few packages
with their sources, a tree with an image that counts as built (nothing here
needs mkosi), and servers to publish to.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

from functools import partial
import gzip
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
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

from fixtures_builder import (
    APT_CONF, CONF, EPOCH, PATIENCE, REGISTRY, ROOT, FaultServer,
    make_package)
from mkosi_build import lock as locks, packages as spdx, provenance, record
from mkosi_build import registry as registries
from mkosi_build.build import Built, host_architecture, prepare
from mkosi_build.declared import NONE, Declared
from mkosi_build.lock import Lock, Package

NEEDS_GPG = pytest.mark.skipif(
    not (shutil.which('gpg') and shutil.which('gpgv')),
    reason='needs gpg and gpgv')


# A Debian with sources

class Archive:
    '''
    A repository below @folder, signed with a key of its own; @keyring is
    for those who check that.

    @packages are its binary packages by name. Each has a source of its own
    name, but for beta, which is made from gamma (version 1:2.0-1+b1 from
    1:2.0-1), and into which delta was linked.
    '''
    SOURCES = {'alpha': '1', 'gamma': '1:2.0-1', 'delta': '0.3'}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages: Dict[str, Package] = {}
        self.keyring = folder / 'keyring.gpg'
        self.home = folder / 'gnupg'
        self.home.mkdir(parents=True, mode=0o700)

    def create(self) -> None:
        '''Make packages, sources, indices and signatures.'''
        self._gpg('--quick-gen-key', 'A Test <test@example.org>', 'ed25519',
                  'sign', 'never')
        self.keyring.write_bytes(self._gpg('--export'))
        for name, source, version, fields in (
                ('alpha', 'alpha=1', '1', ''),
                ('beta', 'gamma=1:2.0-1', '1:2.0-1+b1',
                 'Source: gamma (1:2.0-1)\n'
                 'Built-Using: delta (= 0.3)\n')):
            made = make_package(
                self.folder, name, version, fields=fields,
                copyright_=f'© {name}\nGPL-2+\n')
            self.packages[name] = Package(
                name, version, made.location, made.sha256, made.size,
                'amd64', source)
        for name, version in self.SOURCES.items():
            self.add_source(name, version)
        self.index(self.SOURCES)

    def _gpg(self, *arguments: str) -> bytes:
        return subprocess.run(
            ['gpg', '--homedir', self.home, '--batch', '--passphrase', '',
             '--pinentry-mode', 'loopback', *arguments], check=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout

    def add_source(self, name: str, version: str) -> None:
        '''Put the files of a source package into the pool.'''
        folder = self.folder / self.pool(name)
        folder.mkdir(parents=True, exist_ok=True)
        plain = version.rpartition(':')[2]
        files = [f'{name}_{plain.partition("-")[0]}.orig.tar.xz',
                 f'{name}_{plain}.debian.tar.xz']
        lines = ''
        for file in files:
            data = f'the source {file}\n'.encode() * 100
            (folder / file).write_bytes(data)
            lines += (f' {hashlib.sha256(data).hexdigest()} {len(data)} '
                      f'{file}\n')
        (folder / f'{name}_{plain}.dsc').write_text(
            '-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n'
            f'Format: 3.0 (quilt)\nSource: {name}\nBinary: {name}\n'
            f'Version: {version}\nChecksums-Sha256:\n{lines}'
            '-----BEGIN PGP SIGNATURE-----\n\nnobody\n'
            '-----END PGP SIGNATURE-----\n')

    def pool(self, name: str) -> str:
        '''The folder of a source package.'''
        # gamma's is where the lock has beta, which is made from it
        return f'pool/main/{"b/beta" if name == "gamma" else name[0]}' + (
            '' if name == 'gamma' else f'/{name}')

    def index(self, sources: Dict[str, str]) -> None:
        '''Write the signed index, of @sources alone.'''
        suite = self.folder / 'dists/trixie'
        (suite / 'main/source').mkdir(parents=True, exist_ok=True)
        text = ''
        for name, version in sources.items():
            plain = version.rpartition(':')[2]
            folder = self.folder / self.pool(name)
            text += (f'Package: {name}\nBinary: {name}\n'
                     f'Version: {version}\nFormat: 3.0 (quilt)\n'
                     f'Directory: {self.pool(name)}\nChecksums-Sha256:\n')
            for path in sorted(folder.glob(
                    f'{name}_{plain.partition("-")[0]}*')):
                if path.suffix in ('.dsc', '.xz'):
                    text += (f' {hash_of(path)} {path.stat().st_size} '
                             f'{path.name}\n')
            text += '\n'
        packed = gzip.compress(text.encode(), mtime=0)
        (suite / 'main/source/Sources.gz').write_bytes(packed)
        release = ('Suite: stable\nCodename: trixie\n'
                   'Date: Sat, 11 Nov 2023 10:00:00 UTC\n'
                   'Architectures: amd64\nComponents: main\nSHA256:\n')
        for name, data in (('Sources.gz', packed),
                           ('Sources', text.encode())):
            release += (f' {hashlib.sha256(data).hexdigest()} {len(data)} '
                        f'main/source/{name}\n')
        (suite / 'Release').write_text(release)
        (suite / 'InRelease').unlink(missing_ok=True)
        self._gpg('--clearsign', '--output', str(suite / 'InRelease'),
                  str(suite / 'Release'))


def hash_of(path: Path) -> str:
    '''The SHA-256 of a file.'''
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(name='pristine', scope='session')
def fixture_pristine(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    '''An archive, only to be copied.'''
    archive = Archive(tmp_path_factory.mktemp('archive') / 'a')
    archive.create()
    return archive


@pytest.fixture(name='archive')
def fixture_archive(pristine: Archive, tmp_path: Path) -> Archive:
    '''An archive of the test's own.'''
    shutil.copytree(pristine.folder, tmp_path / 'archive',
                    ignore=shutil.ignore_patterns('gnupg'))
    archive = Archive(tmp_path / 'archive')
    archive.home.rmdir()
    archive.home = pristine.home
    archive.packages = dict(pristine.packages)
    return archive


# A tree with an image

class Works:
    '''
    A tree with the builder and the image mini, below @root, and a cache in
    which it counts as built. @mirror has its packages.
    '''
    CONTENT = {'kernel': ('vmlinuz', b'kernel\n' * 1000),
               'initrd': ('initrd.cpio', b'initrd\n' * 2000),
               'disk': ('disk.qcow2', bytes(range(256)) * 1000)}

    def __init__(self, root: Path, archive: Archive, mirror: str) -> None:
        self.root = root
        self.mirror = mirror
        self.tree = root / 'tree'
        self.mkosi = self.tree / 'tests/functional/mkosi'
        self.definition = self.mkosi / 'mini'
        self.registry = self.mkosi / 'registry.yaml'
        self.cache = root / 'cache'
        self.assets = root / 'assets'
        # With what Python has compiled, which saves half of each call
        shutil.copytree(ROOT / 'scripts', self.tree / 'scripts')
        resolver = self.tree / 'scripts/mkosi_build/resolve.py'
        text = resolver.read_text()
        known = '/usr/share/keyrings/debian-archive-keyring.gpg'
        assert text.count(known) == 1
        resolver.write_text(text.replace(known, str(archive.keyring)))
        (root / 'apt.conf').write_text(APT_CONF)
        self.identity = self._write_tree(archive)
        self.folder = self.cache / 'images/mini/x86_64' / self.identity
        self._build()

    def _write_tree(self, archive: Archive) -> str:
        for folder, names in ((self.definition, ('alpha', 'beta')),
                              (self.mkosi / 'tools', ('alpha',))):
            folder.mkdir(parents=True)
            (folder / 'mkosi.conf').write_text(CONF)
            arch = ('x86_64' if folder == self.definition
                    else host_architecture())
            lock = Lock(locks.definition_digest(folder), 'debian', 'trixie',
                        arch, EPOCH, tuple(sorted(
                            archive.packages[name] for name in names)))
            (folder / f'{arch}.lock').write_text(locks.render(lock))
        identity = locks.identity(
            locks.definition_digest(self.definition), self.lock,
            [locks.load(self.mkosi / f'tools/{host_architecture()}.lock')])
        self.registry.write_text(record.record(
            REGISTRY, 'mini', 'x86_64', identity,
            {kind: (hashlib.sha256(data).hexdigest(), len(data))
             for kind, (_, data) in self.CONTENT.items()}))
        return identity

    @property
    def lock(self) -> Lock:
        '''The image's lock.'''
        return locks.load(self.definition / 'x86_64.lock')

    def _build(self) -> None:
        '''Put into the cache what a build leaves there.'''
        self.folder.mkdir(parents=True)
        (self.assets / 'download').mkdir(parents=True)
        (self.cache / 'log').mkdir()
        (self.cache / 'log/mini-x86_64.log').write_text('mkosi was here\n')
        artefacts: Dict[str, Any] = {}
        for kind, (name, data) in self.CONTENT.items():
            digest = hashlib.sha256(data).hexdigest()
            (self.folder / name).write_bytes(data)
            (self.assets / 'download' / digest).write_bytes(data)
            artefacts[kind] = {'file': name, 'sha256': digest,
                               'size': len(data), 'verified': []}
        (self.folder / 'record.json').write_text(json.dumps({
            'identity': self.identity, 'locked': True,
            'artefacts': artefacts}))
        self._describe({
            kind: Built(self.folder / known['file'], known['sha256'],
                        known['size']) for kind, known in artefacts.items()})

    def _describe(self, artefacts: Dict[str, Built]) -> None:
        '''As a build does, of packages that do not declare a licence.'''
        registry = registries.load(self.registry)
        job = prepare(registry, registry.image('mini'), 'x86_64')
        for name, content in (
                (spdx.FILE, spdx.document(job, artefacts, {
                    p.sha256: Declared(NONE, {}) for p in job.lock.packages})),
                (provenance.FILE, provenance.statement(
                    job, artefacts, time.time(), {}))):
            (self.folder / name).write_text(spdx.render(content))

    def environment(self, **env: str) -> Dict[str, str]:
        '''The builder's environment.'''
        return {'PATH': os.environ['PATH'], 'HOME': str(self.root),
                'APT_CONFIG': str(self.root / 'apt.conf'),
                'PYTHONDONTWRITEBYTECODE': '1', 'no_proxy': '*',
                'QEMU_MKOSI_DIR': str(self.cache),
                'QEMU_TEST_CACHE_DIR': str(self.assets),
                'QEMU_MKOSI_MIRROR': self.mirror, **env}

    def command(self, *arguments: str) -> List[str]:
        '''The builder's command line.'''
        return [sys.executable, str(self.tree / 'scripts/mkosi-build.py'),
                'x86_64', *arguments]

    def run(self, *arguments: str,
            **env: str) -> 'subprocess.CompletedProcess[str]':
        '''Run the builder to its end.'''
        return subprocess.run(
            self.command(*arguments), cwd=self.root,
            env=self.environment(**env), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding='utf-8', timeout=PATIENCE,
            stdin=subprocess.DEVNULL, check=False)

    def good(self, *arguments: str, **env: str) -> str:
        '''Run the builder; it must succeed. Returns what it said.'''
        result = self.run(*arguments, **env)
        assert result.returncode == 0, result.stderr + result.stdout
        return result.stderr + result.stdout

    def bad(self, code: int, *arguments: str, **env: str) -> str:
        '''
        Run the builder; it must fail with the exit code @code and say what
        to do next. Returns what it said.
        '''
        result = self.run(*arguments, **env)
        said = result.stderr
        assert result.returncode == code, said + result.stdout
        assert len(re.findall('^error: ', said, re.M)) == 1, said
        assert said.count('\n  next: ') == 1, said
        assert 'Traceback' not in said
        return said

    def events(self, kind: str, text: str) -> List[Dict[str, Any]]:
        '''What the builder told of @kind as JSON lines.'''
        return [event for event in map(json.loads, text.splitlines())
                if event['event'] == kind]


@pytest.fixture(name='works')
def fixture_works(tmp_path: Path, archive: Archive,
                  faults: FaultServer) -> Works:
    '''A tree whose mirror is @archive, by way of the server @faults.'''
    faults.root = archive.folder
    (tmp_path / 'w').mkdir()
    return Works(tmp_path / 'w', archive, faults.url)


# Servers to publish to

TOKEN = 'glpat-0Secret.Token_1'
PREFIX = '/api/v4/projects/1/packages/generic/images/1'


class PutHandler(BaseHTTPRequestHandler):
    '''Does as its server was told, else what is documented.'''
    protocol_version = 'HTTP/1.1'

    def __init__(self, server_: 'PutServer', *args: Any) -> None:
        self.put = server_
        self.name = ''
        self.close_connection = True
        super().__init__(*args)

    def answer(self, code: int, body: bytes = b'',
               headers: Optional[Mapping[str, str]] = None) -> None:
        '''Send a response, and end the connection.'''
        self.send_response(code)
        for name, value in {'Content-Length': str(len(body)),
                            'Connection': 'close',
                            **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
        self.close_connection = True

    def said(self, code: int, message: str) -> None:
        '''What GitLab's API says.'''
        self.answer(code, json.dumps({'message': message}).encode(),
                    {'Content-Type': 'application/json'})

    def body(self, most: Optional[int] = None) -> bytes:
        '''What is sent, or the first @most bytes of it.'''
        length = int(self.headers['Content-Length'])
        return self.rfile.read(length if most is None else min(most, length))

    def handle_one_request(self) -> None:
        '''A client that has gone is no error.'''
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _handle(self) -> None:
        path, _, query = self.path.partition('?')
        prefix, _, self.name = path.rpartition('/')
        with self.put.guard:
            self.put.asked.append((self.command, self.name, query))
            self.put.headers.append(dict(self.headers))
            faults = self.put.faults.get(self.command, [])
            fault = faults.pop(0) if faults else None
        if fault:
            fault(self)
        elif prefix != self.put.prefix:
            self.said(404, '404 Project Not Found')
        elif not self.put.allows(self):
            self.said(401, '401 Unauthorized')
        else:
            getattr(self, f'_{self.command.lower()}')()

    do_GET = do_HEAD = do_PUT = do_MOVE = do_DELETE = _handle

    def _get(self) -> None:
        found = self.put.files.get(self.name)
        if not found:
            self.said(404, '404 Not Found')
        elif self.put.storage:
            # As object storage does: signed, and elsewhere
            self.answer(302, headers={
                'Location': f'{self.put.storage}/{self.name}?signature=s1g'})
        else:
            self.answer(200, found[-1])

    _head = _get

    def _put(self) -> None:
        length = int(self.headers['Content-Length'])
        new = self.name not in self.put.files
        if self.put.kind == 'plain':
            if self.headers.get('If-None-Match') == '*' and not new:
                self.body()
                self.answer(412)
                return
            # Nothing is hidden: each byte is there at once
            self.put.files[self.name] = [b'']
            while data := self.rfile.read1(min(length, 1 << 16)) \
                    if length else b'':
                self.put.files[self.name][0] += data
                length -= len(data)
            if not length:
                self.answer(201 if new else 204)
            return
        data = self.body()
        if len(data) < length:
            return
        self.put.store(self.name, data)
        if self.put.kind == 'dav':
            self.answer(201 if new else 204)
        elif new or self.put.duplicates:
            self.said(201, '201 Created')
        else:
            self.said(400, 'Duplicate package is not allowed')

    def _move(self) -> None:
        to = self.headers['Destination'].rpartition('/')[2]
        if self.put.kind != 'dav':
            self.answer(405)
        elif self.name not in self.put.files:
            self.answer(404)
        elif to in self.put.files and self.headers['Overwrite'] == 'F':
            self.answer(412)
        else:
            self.put.files[to] = self.put.files.pop(self.name)
            self.answer(201)

    def _delete(self) -> None:
        if self.put.kind == 'gitlab' or not self.put.deletes:
            self.answer(405)
        else:
            self.put.files.pop(self.name, None)
            self.answer(204)

    def log_message(self, *args: object) -> None:
        # pylint: disable=arguments-differ
        '''Stay silent.'''


Fault = Callable[[PutHandler], None]


class PutServer:
    '''
    A server to publish to, on the loopback interface.

    @params kind: 'gitlab', a generic package registry as documented; 'dav',
                  which can rename; 'plain', which can't, and whose files
                  grow before everybody's eyes

    @files has all that was ever stored under a name, the newest last;
    @faults, by method, what happens in turn in place of the usual.
    @duplicates: whether GitLab takes a second file of a name.
    '''
    def __init__(self, kind: str, address: str = '127.0.0.1') -> None:
        self.kind = kind
        self.prefix = PREFIX if kind == 'gitlab' else '/images'
        self.files: Dict[str, List[bytes]] = {}
        self.faults: Dict[str, List[Fault]] = {}
        self.asked: List[Tuple[str, str, str]] = []
        self.headers: List[Dict[str, str]] = []
        self.tokens: Dict[str, str] = {}
        self.public = True
        self.duplicates = True
        self.deletes = True
        self.storage = ''
        self.guard = threading.Lock()

        class Http(ThreadingHTTPServer):
            '''As many at once as come.'''
            daemon_threads = True
            request_queue_size = 50
            address_family = (socket.AF_INET6 if ':' in address
                              else socket.AF_INET)

        self.http = Http((address, 0), partial(PutHandler, self))
        host = f'[{address}]' if ':' in address else address
        self.root = f'http://{host}:{self.http.server_port}'
        self.where = self.root + self.prefix
        self.thread = threading.Thread(
            target=self.http.serve_forever, daemon=True,
            kwargs={'poll_interval': 0.01})
        self.thread.start()

    def end(self) -> None:
        '''Gone.'''
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def allows(self, handler: PutHandler) -> bool:
        '''Whether the token is right, where one is needed.'''
        if self.public and handler.command in ('GET', 'HEAD'):
            return True
        return all(handler.headers.get(name) == value
                   for name, value in self.tokens.items())

    def store(self, name: str, data: bytes) -> None:
        '''Take @data for the file @name, if the owner lets duplicates in.'''
        with self.guard:
            if name not in self.files:
                self.files[name] = [data]
            elif self.kind == 'dav' or self.duplicates:
                self.files[name].append(data)

    def visible(self) -> Dict[str, bytes]:
        '''What others see.'''
        return {name: versions[-1] for name, versions in self.files.items()}

    def count(self, method: str) -> int:
        '''How often @method was asked for.'''
        return sum(1 for asked in self.asked if asked[0] == method)


def answers(code: int, message: str = '',
            headers: Optional[Mapping[str, str]] = None) -> Fault:
    '''Read all, and then say @code.'''
    def fault(handler: PutHandler) -> None:
        if handler.command == 'PUT':
            handler.body()
        handler.answer(code, message.encode(), headers)
    return fault


def refuses(code: int) -> Fault:
    '''Say @code at once, and listen no longer.'''
    return lambda handler: handler.said(code, f'{code} no')


def dies(after: int) -> Fault:
    '''Cut the connection after @after bytes of what is sent.'''
    def fault(handler: PutHandler) -> None:
        if handler.command == 'PUT':
            data = handler.body(after)
            if handler.put.kind == 'plain':
                handler.put.files[handler.name] = [data]
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                      struct.pack('ii', 1, 0))
        handler.close_connection = True
        handler.connection.close()
        handler.rfile.close()
        handler.wfile = io.BytesIO()
    return fault


def corrupts(handler: PutHandler) -> None:
    '''Store other bytes than those that were sent, of the same length.'''
    data = bytearray(handler.body())
    data[len(data) // 2] ^= 1
    handler.put.store(handler.name, bytes(data))
    handler.said(201, '201 Created')


def loses(handler: PutHandler) -> None:
    '''Say that all is well, and store nothing.'''
    handler.body()
    handler.said(201, '201 Created')


def stores_and_dies(handler: PutHandler) -> None:
    '''Store it, and then say nothing.'''
    handler.put.store(handler.name, handler.body())
    dies(0)(handler)


def sends_half(handler: PutHandler) -> None:
    '''Half of the object, of which all was promised.'''
    data = handler.put.files[handler.name][-1]
    handler.answer(200, data[:len(data) // 2],
                   {'Content-Length': str(len(data))})


@pytest.fixture(name='put_server')
def fixture_put_server() -> Iterator[Callable[..., PutServer]]:
    '''Makes servers, gone when the test ends.'''
    servers = []

    def make(*args: str) -> PutServer:
        servers.append(PutServer(*args))
        return servers[-1]

    yield make
    for server in servers:
        server.end()


@pytest.fixture(name='gitlab')
def fixture_gitlab(put_server: Callable[..., PutServer]) -> PutServer:
    '''A GitLab where one needs a token to write.'''
    server = put_server('gitlab')
    server.tokens = {'PRIVATE-TOKEN': TOKEN}
    return server


NGINX_CONF = '''\
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ }}
http {{
    access_log {root}/access.log;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root}/files;
        client_max_body_size 0;
        location / {{ dav_methods {methods}; }}
    }}
}}
'''


class Nginx:
    '''The real one, with WebDAV, below @root.'''

    def __init__(self, root: Path, methods: str) -> None:
        self.files = root / 'files/images'
        self.files.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        (root / 'nginx.conf').write_text(NGINX_CONF.format(
            root=root, port=port, methods=methods))
        self.where = f'http://127.0.0.1:{port}/images'
        self.log = root / 'access.log'
        # pylint: disable-next=consider-using-with
        self.program = subprocess.Popen(
            [NGINX, '-p', root, '-c', root / 'nginx.conf', '-e',
             root / 'error.log'], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(('127.0.0.1', port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError((root / 'error.log').read_text())

    def visible(self) -> Dict[str, bytes]:
        '''What others see.'''
        return {path.name: path.read_bytes()
                for path in self.files.iterdir()}

    def end(self) -> None:
        '''Gone.'''
        self.program.terminate()
        self.program.wait()


NGINX = shutil.which('nginx', path=f'{os.environ["PATH"]}:/usr/sbin') or ''
NEEDS_NGINX = pytest.mark.skipif(not NGINX, reason='needs nginx')


@pytest.fixture(name='nginx')
def fixture_nginx(tmp_path: Path) -> Iterator[Nginx]:
    '''An nginx that takes PUT, MOVE and DELETE.'''
    nginx = Nginx(tmp_path / 'nginx', 'PUT DELETE MOVE')
    yield nginx
    nginx.end()


@pytest.fixture(name='small_nginx')
def fixture_small_nginx(tmp_path: Path) -> Iterator[Nginx]:
    '''An nginx that takes PUT alone.'''
    nginx = Nginx(tmp_path / 'nginx', 'PUT')
    yield nginx
    nginx.end()
