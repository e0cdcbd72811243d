#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
'''
A Fedora that can be had without Fedora's mirrors: a signed repository of
the packages that fedora-min needs, under Fedora's names, with what matters
of their scripts. What is in them comes from the locked packages of
debian-min: a real kernel, its modules, and real programs.

    synthetic_fedora.py FOLDER [ARCH...]

makes FOLDER/ARCH, to be served over HTTP, and FOLDER/RPM-GPG-KEY.
'''

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import re
import shutil
import struct
import subprocess
import sys
from typing import Dict, List, Mapping, NamedTuple, Sequence, Union

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'scripts'))

# pylint: disable=wrong-import-position
from mkosi_build import lock as locks, sandbox, tools   # noqa: E402
from mkosi_build.cache import Cache     # noqa: E402
from mkosi_build.report import Report   # noqa: E402
from mkosi_build.store import Store     # noqa: E402

MKOSI = ROOT / 'tests/functional/mkosi'

RELEASE = '44'
# The repository's time and that of all that is in it
EPOCH = 1776000000
# The least of it, in the place of PCI ids
PCI_IDS = '1af4  Red Hat, Inc.\n\t1001  Virtio block device\n'

TRIPLETS = {'x86_64': 'x86_64-linux-gnu', 'aarch64': 'aarch64-linux-gnu'}
STUBS = {'x86_64': 'linuxx64.efi.stub', 'aarch64': 'linuxaa64.efi.stub'}


class Link(NamedTuple):
    '''A symbolic link.'''
    target: str


class Text(NamedTuple):
    '''A file with this text.'''
    text: str
    mode: int = 0o644
    kind: str = ''          # %doc, %license


class Folder(NamedTuple):
    '''A folder that a package owns.'''
    mode: int = 0o755


# A path is a file of Debian's
Content = Union[Link, Text, Folder, Path]


class Rpm(NamedTuple):
    '''
    A package. @more are further lines of the spec's header, @scripts its
    scripts, by section and options.
    '''
    name: str
    files: Mapping[str, Content] = {}
    more: str = ''
    scripts: Mapping[str, str] = {}
    noarch: bool = False


class Source(NamedTuple):
    '''A source package: what it is called, and what is built of it.'''
    name: str
    version: str            # with epoch: before it
    rpms: Sequence[Rpm]


def shell(text: str) -> Text:
    '''A program.'''
    return Text(f'#!/usr/bin/sh\n{text}', 0o755)


class Debian:
    '''The packages of debian-min, unpacked in the folder @root.'''

    def __init__(self, root: Path, arch: str) -> None:
        self.root = root
        self.arch = arch
        self.lib = f'usr/lib/{TRIPLETS[arch]}'
        [self.modules] = root.glob('usr/lib/modules/*')
        self.kernel = self.modules.name

    def files(self, *patterns: str) -> Dict[str, Content]:
        '''
        The files and links that match @patterns, where Fedora has them:
        libraries in lib64, no sbin.
        '''
        found: Dict[str, Content] = {}
        for pattern in patterns:
            paths = sorted(self.root.glob(pattern))
            assert paths, pattern
            for path in paths:
                name = str(path.relative_to(self.root))
                name = re.sub(f'^{self.lib}/', 'usr/lib64/', name)
                name = re.sub('^usr/sbin/', 'usr/bin/', name)
                if path.is_symlink():
                    found[f'/{name}'] = Link(os.readlink(path))
                elif path.is_file():
                    found[f'/{name}'] = path
        return found

    def programs(self, names: str) -> Dict[str, Content]:
        '''Those with @names, wherever Debian has them.'''
        return {f'/usr/bin/{name}': next(
            path for path in (self.root / 'usr/bin' / name,
                              self.root / 'usr/sbin' / name)
            if path.exists()).resolve() for name in names.split()}

    def libraries(self, *names: str) -> Dict[str, Content]:
        '''Those called "lib" and one of @names.'''
        return self.files(*(f'{self.lib}/lib{name}.so*' for name in names))


# -- What the packages are --------------------------------------------------

def base() -> List[Source]:
    '''The tree, the release, and users.'''
    folders = [
        '/usr', '/usr/bin', '/usr/lib', '/usr/lib64', '/usr/share',
        '/usr/libexec', '/usr/lib/modules', '/usr/lib/sysimage', '/etc',
        '/var', '/var/lib', '/var/log', '/var/cache', '/var/tmp', '/run',
        '/proc', '/sys', '/dev', '/home', '/opt', '/srv', '/mnt', '/media',
        '/boot', '/var/cache/ldconfig']
    tree: Dict[str, Content] = {name: Folder() for name in folders}
    tree.update({
        '/root': Folder(0o550), '/tmp': Folder(0o1777),
        '/bin': Link('usr/bin'), '/sbin': Link('usr/sbin'),
        '/lib': Link('usr/lib'), '/lib64': Link('usr/lib64'),
        '/usr/sbin': Link('bin'), '/var/run': Link('../run')})
    release = (f'NAME="Fedora Linux"\nVERSION="{RELEASE} (Synthetic)"\n'
               f'ID=fedora\nVERSION_ID={RELEASE}\n'
               f'PRETTY_NAME="Fedora Linux {RELEASE} (Synthetic)"\n')
    users = {
        '/etc/passwd': Text('root:x:0:0:Super User:/root:/bin/bash\n'
                            'nobody:x:65534:65534::/:/usr/sbin/nologin\n'),
        '/etc/group': Text('root:x:0:\ntty:x:5:\nnobody:x:65534:\n'),
        '/etc/shadow': Text('root:!unprovisioned::0:99999:7:::\n', 0o000),
        '/etc/gshadow': Text('root:::\n', 0o000),
        '/etc/shells': Text('/bin/sh\n/bin/bash\n')}
    return [
        Source('basesystem', '11-24', [
            Rpm('basesystem', noarch=True,
                more='Requires: filesystem\nRequires: setup\n')]),
        # Scripts in Lua run where there is no shell yet
        Source('filesystem', '3.18-52', [
            Rpm('filesystem', tree, 'Requires(pre): setup\n', {
                'pretrans -p <lua>': 'posix.mkdir("/proc")\n',
                'posttrans -p <lua>':
                    'local file = io.open("/etc/lua-ran", "w")\n'
                    'file:write("yes\\n")\nfile:close()\n'})]),
        Source('setup', '2.15.0-27', [
            Rpm('setup', users, 'Requires: system-release\n', noarch=True)]),
        Source('fedora-release', f'{RELEASE}-17', [
            Rpm('fedora-release-common', {
                '/usr/lib/os-release': Text(release),
                '/etc/os-release': Link('../usr/lib/os-release'),
                '/etc/fedora-release':
                    Text(f'Fedora release {RELEASE} (Synthetic)\n')},
                'Provides: system-release = %{evr}\n'
                f'Provides: system-release({RELEASE})\n', noarch=True)]),
    ]


def system(debian: Debian) -> List[Source]:
    '''systemd's part: scripts that find users, kernels and triggers.'''
    stub = STUBS[debian.arch]
    return [
        Source('systemd', '259-1', [
            Rpm('systemd', {
                # rpm itself makes the users that a package provides
                '/usr/lib/sysusers.d/guest-test.conf':
                    Text('g guest-test 800\nu guest-test 800 "Test" -\n'),
                '/usr/share/doc/systemd/NEWS': Text('news\n', kind='%doc'),
                '/usr/share/licenses/systemd/LICENSE':
                    Text('MIT\n', kind='%license')},
                'Recommends: systemd-networkd = %{evr}\n'
                'Requires: bash\nRequires: coreutils\n'),
            Rpm('systemd-libs', debian.libraries('systemd', 'udev')),
            Rpm('systemd-udev', {'/usr/bin/kernel-install': shell(
                # As the real one: it says that it did nothing, or writes
                # what is different at each installation
                '[ "$KERNEL_INSTALL_BYPASS" = 1 ] && exit 0\n'
                'mkdir -p /boot/loader/entries\n'
                'cat /proc/sys/kernel/random/uuid '
                '>/etc/kernel-install-ran\n')},
                'Requires: systemd = %{evr}\nRequires: kmod\n'
                'Requires: dracut\n'),
            Rpm('systemd-networkd',
                {'/usr/lib/systemd/systemd-networkd': shell('exit 1\n')}),
            Rpm('systemd-boot-unsigned', debian.files(
                f'usr/lib/systemd/boot/efi/{stub}'),
                'Provides: systemd-boot = %{evr}\n')]),
        Source('dracut', '109-1', [
            Rpm('dracut', {'/usr/bin/dracut': shell('exit 1\n')})]),
        # Of OpenSSL's libraries; its script writes down the time
        Source('ca-certificates', '2025.2.80-2', [Rpm('ca-certificates', {
            '/etc/pki/ca-trust/README': Text('read me\n')}, noarch=True,
            more='Requires(post): coreutils\n', scripts={
                'post': 'mkdir -p /etc/pki/java\n'
                        'date +%%N >/etc/pki/java/cacerts\n'})]),
    ]


def c_library(debian: Debian) -> Source:
    '''
    glibc, with its file trigger: whoever brings a library has it found.
    '''
    libc = debian.libraries('c', 'm', 'mvec', 'dl', 'pthread', 'rt',
                            'resolv', 'util', 'nss_*')
    [loader] = (debian.root / debian.lib).glob('ld-linux*')
    # Debian's looks in other folders than Fedora's
    program = loader.read_bytes()
    for old, new in ((f'/{debian.lib}/', '/usr/lib64/'),
                     (f'/{debian.lib[4:]}/', '/lib64/')):
        program = program.replace(f'\0{old}\0'.encode(), b'\0%s\0'
                                  % new.ljust(len(old), '/').encode())
    patched = debian.root / loader.name
    patched.write_bytes(program)
    patched.chmod(0o755)
    # Programs for x86_64 name the loader in lib64, those for aarch64 in lib
    libc[f'/usr/lib64/{loader.name}'] = patched
    if debian.arch == 'aarch64':
        libc[f'/usr/lib/{loader.name}'] = Link(f'../lib64/{loader.name}')
    return Source('glibc', '2.43-1', [
        Rpm('glibc', {**libc, **debian.programs('ldconfig'),
                      '/etc/ld.so.conf': Text('include ld.so.conf.d/*.conf\n'),
                      '/etc/ld.so.conf.d/lib64.conf': Text('/usr/lib64\n')},
            'Requires: glibc-common = %{evr}\n'
            'Requires: glibc-langpack = %{evr}\n'
            'Requires: filesystem\nRequires: basesystem\n'
            'Provides: /usr/sbin/ldconfig\n'
            'Provides: rtld(GNU_HASH)\n', {
                'post -p /usr/sbin/ldconfig': ''}),
        Rpm('glibc-common', debian.programs('getent'), scripts={
            'transfiletriggerin -P 2000000 -- '
            '/lib /usr/lib /lib64 /usr/lib64': '/usr/sbin/ldconfig\n'}),
        Rpm('glibc-minimal-langpack',
            more='Provides: glibc-langpack = %{evr}\n'),
        # What a definition that names none gets
        Rpm('glibc-all-langpacks', {
            '/usr/lib/locale/locale-archive': Text('large\n')},
            'Provides: glibc-langpack = %{evr}\n')])


LIBRARIES = [
    # Source, version, package, and its libraries' names
    ('acl', '2.3.2-4', 'libacl', 'acl'),
    ('attr', '2.5.2-6', 'libattr', 'attr'),
    ('bzip2', '1.0.8-21', 'bzip2-libs', 'bz2'),
    ('elfutils', '0.194-1', 'elfutils-libelf', 'elf*'),
    ('expat', '2.7.3-1', 'expat', 'expat'),
    ('gmp', '1:6.3.0-4', 'gmp', 'gmp'),
    ('libbpf', '2:1.6.1-2', 'libbpf', 'bpf'),
    ('libcap', '2.77-1', 'libcap', 'cap psx'),
    ('libffi', '3.5.2-1', 'libffi', 'ffi'),
    ('libmnl', '1.0.5-9', 'libmnl', 'mnl'),
    ('libselinux', '3.10-1', 'libselinux', 'selinux'),
    ('libxcrypt', '4.5.2-1', 'libxcrypt', 'crypt'),
    ('pcre2', '10.47-1', 'pcre2', 'pcre2-8'),
    ('readline', '8.3-2', 'readline', 'readline history'),
    ('sqlite', '3.51.0-1', 'sqlite-libs', 'sqlite3'),
    ('zlib-ng', '2.3.2-1', 'zlib-ng-compat', 'z'),
    ('zstd', '1.5.7-3', 'libzstd', 'zstd'),
]


def libraries(debian: Debian) -> List[Source]:
    '''A package each, but for those that come with programs.'''
    ncurses = debian.libraries('tinfo', 'tic', 'ncursesw', 'panelw', 'menuw',
                               'formw')
    return [
        *(Source(source, version, [
            Rpm(name, debian.libraries(*names.split()))])
          for source, version, name, names in LIBRARIES),
        Source('openssl', '1:3.5.4-1', [
            Rpm('openssl-libs', debian.libraries('crypto', 'ssl'),
                'Requires: ca-certificates\n')]),
        Source('ncurses', '6.5-7.20250614', [
            Rpm('ncurses-libs', ncurses, 'Requires: ncurses-base\n'),
            Rpm('ncurses-base', {'/usr/share/terminfo/README':
                                 Text('none\n')}, noarch=True)]),
    ]


COREUTILS = '''
    basename cat chgrp chmod chown chroot cp cut date dd df dirname du echo
    env expr false head id install ln ls md5sum mkdir mkfifo mknod mktemp mv
    nproc od paste printf pwd readlink realpath rm rmdir seq sha256sum sleep
    sort split stat stty sync tail tee test timeout touch tr true truncate
    tty uname uniq wc who
'''


def programs(debian: Debian) -> List[Source]:
    '''What has a package of its own in the image.'''
    def simple(name: str, version: str, names: str,
               more: str = '') -> Source:
        return Source(name, version,
                      [Rpm(name, debian.programs(names), more)])

    return [
        Source('bash', '5.3.0-3', [Rpm('bash', {
            **debian.programs('bash'), '/usr/bin/sh': Link('bash'),
            '/usr/share/doc/bash/README': Text('read me\n', kind='%doc')},
            'Provides: /bin/sh\nProvides: /usr/bin/sh\n'
            'Provides: /bin/bash\n')]),
        Source('busybox', '1:1.37.0-7', [Rpm(
            'busybox', debian.programs('busybox'))]),
        simple('coreutils', '9.9-2', COREUTILS),
        simple('dash', '0.5.13-1', 'dash', 'Requires: filesystem\n'),
        simple('diffutils', '3.12-3', 'diff cmp'),
        simple('ethtool', '2:6.15-2', 'ethtool'),
        simple('findutils', '1:4.10.0-6', 'find xargs'),
        simple('grep', '3.12-2', 'grep'),
        simple('gzip', '1.14-1', 'gzip'),
        simple('sed', '4.9-5', 'sed'),
        simple('tar', '2:1.35-6', 'tar'),
        simple('iproute', '6.17.0-1', 'ip bridge'),
        Source('util-linux', '2.41.3-3', [
            Rpm('util-linux', debian.programs('lsblk wall'),
                'Requires: util-linux-core = %{evr}\n'),
            Rpm('util-linux-core', debian.programs('mount umount')),
            Rpm('libblkid', debian.libraries('blkid')),
            Rpm('libmount', debian.libraries('mount')),
            Rpm('libsmartcols', debian.libraries('smartcols')),
            Rpm('libuuid', debian.libraries('uuid'))]),
        Source('xz', '1:5.8.1-4', [
            Rpm('xz', debian.programs('xz')),
            Rpm('xz-libs', debian.libraries('lzma'))]),
        # A caret in a version comes after a release
        Source('kmod', '34.2^20260101git1-1', [
            Rpm('kmod', {**debian.programs('kmod'), **{
                f'/usr/bin/{name}': Link('kmod') for name in
                'depmod insmod lsmod modinfo modprobe rmmod'.split()}}),
            Rpm('kmod-libs', debian.libraries('kmod'))]),
        Source('pciutils', '3.14.0-2', [
            Rpm('pciutils', debian.programs('lspci'),
                'Requires: hwdata\n'),
            Rpm('pciutils-libs', debian.libraries('pci'))]),
        Source('hwdata', '0.400-1', [Rpm('hwdata', {
            '/usr/share/hwdata/pci.ids': Text(PCI_IDS),
            # Where Debian's libpci looks
            '/usr/share/misc/pci.ids': Link('../hwdata/pci.ids')},
            noarch=True)]),
        python(debian)]


def python(debian: Debian) -> Source:
    '''Python, in lib64, as Fedora has it.'''
    [stdlib] = debian.root.glob('usr/lib/python3.*')
    name = stdlib.name
    files: Dict[str, Content] = {}
    for path in sorted(stdlib.rglob('*')):
        inside = path.relative_to(stdlib)
        # Links to folders of Debian's are left out, and what needs Berkeley DB
        if (inside.parts[0] != 'test' and path.is_file()
                and not path.name.startswith('_dbm.')):
            files[f'/usr/lib64/{name}/{inside}'] = (
                Link(os.readlink(path)) if path.is_symlink() else path)
    # Where Debian's interpreter looks
    files[f'/usr/lib/{name}'] = Link(f'../lib64/{name}')
    return Source('python3.14', '3.14.2-1', [
        Rpm('python3', {**debian.programs(name),
                        '/usr/bin/python3': Link(name)},
            'Requires: python3-libs = %{evr}\n'),
        Rpm('python3-libs', files)])


# The beginnings of the names of the modules that QEMU's tests may need
CORE = ('arch', 'crypto', 'drivers/ata', 'drivers/block', 'drivers/cdrom',
        'drivers/char', 'drivers/dca', 'drivers/gpu/drm/drm',
        'drivers/gpu/drm/virtio', 'drivers/i2c', 'drivers/input',
        'drivers/iommu', 'drivers/net/ethernet/intel', 'drivers/net/mdio',
        'drivers/net/net_failover', 'drivers/net/phy', 'drivers/net/virtio',
        'drivers/nvme', 'drivers/pps', 'drivers/ptp', 'drivers/scsi',
        'drivers/usb', 'drivers/video', 'drivers/virtio', 'fs', 'lib',
        'net/9p', 'net/core')
FURTHER = ('drivers/net/dummy', 'drivers/net/wireguard', 'net/ipv4')


def kernel(debian: Debian, image: Path) -> Source:
    '''The kernel in @image, and its modules as Fedora divides them.'''
    where = f'/usr/lib/modules/{debian.kernel}'
    uname = debian.kernel
    modules: Dict[str, Dict[str, Content]] = {'core': {}, 'further': {}}
    for path in sorted((debian.modules / 'kernel').rglob('*.ko*')):
        name = str(path.relative_to(debian.modules / 'kernel'))
        for kind, begin in (('core', CORE), ('further', FURTHER)):
            if name.startswith(begin):
                modules[kind][f'{where}/kernel/{name}'] = path
                break
    depmod = f'/usr/sbin/depmod -a {uname}\n'
    return Source('kernel', '6.19.6-300', [
        Rpm('kernel-core', {
            f'{where}/vmlinuz': image,
            f'{where}/config': Text('# CONFIG_IS_NOT_SET is not set\n'),
            f'{where}/System.map': Text('0 _text\n')},
            'Provides: kernel = %{evr}\n'
            f'Provides: kernel-core-uname-r = {uname}\n'
            'Provides: installonlypkg(kernel)\n'
            f'Requires: kernel-modules-core-uname-r = {uname}\n'
            'Requires(pre): /usr/bin/kernel-install\n'
            'Requires(pre): coreutils\n'
            'Recommends: linux-firmware\n',
            {'posttrans': f'{depmod}/usr/bin/kernel-install add {uname} '
             f'{where}/vmlinuz || exit $?\n'}),
        Rpm('kernel-modules-core', {
            **modules['core'],
            **{f'{where}/{name}': debian.modules / name for name in
               ('modules.builtin', 'modules.builtin.modinfo',
                'modules.order')}},
            f'Provides: kernel-modules-core-uname-r = {uname}\n'
            'Provides: installonlypkg(kernel-module)\n'
            'Requires(pre): kmod\n', {'posttrans': depmod}),
        Rpm('kernel-modules', modules['further'],
            f'Provides: kernel-modules-uname-r = {uname}\n'
            'Provides: installonlypkg(kernel-module)\n'
            f'Requires: kernel-modules-core-uname-r = {uname}\n',
            {'posttrans': depmod})])


def sources(debian: Debian, image: Path) -> List[Source]:
    '''All of it.'''
    return [*base(), *system(debian), c_library(debian),
            *libraries(debian), *programs(debian), kernel(debian, image),
            # Nobody asked for it
            Source('linux-firmware', '20260110-1', [Rpm(
                'linux-firmware', {'/usr/lib/firmware/large': Text('x\n')},
                noarch=True)])]


# -- Making them ------------------------------------------------------------

HEADER = '''\
%global debug_package %{{nil}}
%global __os_install_post %{{nil}}
%global _build_id_links none
Name: {name}
{epoch}Version: {version}
Release: {release}.fc{fedora}
Summary: {summary}
License: MIT
%global evr %{{?epoch:%{{epoch}}:}}%{{version}}-%{{release}}
%description
{summary}
%install
mkdir -p %{{buildroot}}
cp -a --link {root}/. %{{buildroot}}/
'''
SUMMARY = 'A stand-in for the package of this name'


def put(root: Path, name: str, content: Content) -> None:
    '''Write @content to the file @name below @root.'''
    path = root / name[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Link):
        path.symlink_to(content.target)
    elif isinstance(content, Folder):
        path.mkdir(exist_ok=True)
    elif isinstance(content, Text):
        path.write_text(content.text, encoding='utf-8')
    else:
        os.link(content, path)


# What an ordinary user's build has trouble with
MODES = {
    '/usr/bin/mount': '%attr(4755,root,root)',
    '/usr/bin/umount': '%attr(4755,root,root)',
    '/usr/bin/wall': '%attr(2755,root,tty)',
    '/usr/bin/ethtool': '%attr(0755,root,root) %caps(cap_net_raw=p)'}


def listed(name: str, content: Content) -> str:
    '''The line of a spec's list of files.'''
    if isinstance(content, Link):
        return name
    if isinstance(content, Folder):
        return f'%dir %attr({content.mode:04o},root,root) {name}'
    if isinstance(content, Text):
        return f'{content.kind} %attr({content.mode:04o},root,root) {name}'
    mode = 0o755 if os.access(content, os.X_OK) else 0o644
    return f'{MODES.get(name, f"%attr({mode:04o},root,root)")} "{name}"'


def spec(source: Source, root: Path) -> str:
    '''The spec of @source, whose files are below @root.'''
    epoch, _, version = source.version.rpartition(':')
    version, _, release = version.rpartition('-')
    text = HEADER.format(name=source.name, version=version, release=release,
                         fedora=RELEASE, root=root, summary=SUMMARY,
                         epoch=f'Epoch: {epoch}\n' if epoch else '')
    for rpm in source.rpms:
        same = rpm.name == source.name
        name = '' if same else f' -n {rpm.name}'
        more = ('BuildArch: noarch\n' if rpm.noarch else '') + rpm.more
        if same:
            text = text.replace('%description', f'{more}%description', 1)
        else:
            text += (f'%package{name}\nSummary: {SUMMARY}\n{more}'
                     f'%description{name}\n{SUMMARY}\n')
        for section, script in rpm.scripts.items():
            words = section.split(' ', 1)
            options = f' {words[1]}' if len(words) > 1 else ''
            text += f'%{words[0]}{name}{options}\n{script}\n'
        text += f'%files{name}\n' + ''.join(
            f'{listed(*item)}\n' for item in rpm.files.items())
    return text


# The key $1, made if it is not there yet
KEY = r'''
export GNUPGHOME=/work/keys/$1
[ -e "$GNUPGHOME.asc" ] || {
    mkdir -p -m 700 "$GNUPGHOME"
    gpg --batch --quiet --faked-system-time 20240101T000000 --passphrase "" \
        --quick-gen-key "Synthetic Fedora ($1)" rsa3072 sign never
    gpg --batch --export --armor >"$GNUPGHOME.asc"
}
'''

# Sign the packages $2... with the key $1
SIGN = KEY + r'''
name=$1; shift
rpmsign --resign --define "_gpg_name Synthetic Fedora ($name)" \
    --define "_gpg_sign_cmd_extra_args --batch --faked-system-time \
              20250101T000000" "$@" >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
'''

# The metadata of the repository $1
INDEX = '''
find "$1/Packages" -name '*.rpm' -exec touch -d "@$2" {} +
createrepo_c --quiet --revision "$2" --set-timestamp-to-revision \
    --general-compress-type=zstd "$1"
'''

# The packages of the specs in $1, for the architecture $2
BUILD = r'''
export SOURCE_DATE_EPOCH=$3
printf '%s\n' "$1"/specs/*.spec | xargs -P "$(nproc)" -I{} sh -c '
    rpmbuild -bb --quiet --target "$2-redhat-linux-gnu" \
        --define "_topdir /work/$1/top" --define "_dbpath /tmp/rpmdb" \
        --define "_rpmdir /work/$2/Packages" \
        --define "_build_name_fmt \
            %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
        --define "_buildhost synthetic" \
        --define "use_source_date_epoch_as_buildtime 1" \
        --define "build_mtime_policy clamp_to_source_date_epoch" \
        --define "_binary_payload w1.zstdio" \
        "$3" >"$3.log" 2>&1 || { cat "$3.log"; exit 255; }
    ' sh "$1" "$2" {}
'''


class Fedora:
    '''
    Repositories in @folder, made and changed with the tools @tree.
    '''
    def __init__(self, folder: Path, tree: Path) -> None:
        self.folder = folder
        self.tree = tree

    def run(self, script: str, *arguments: str) -> None:
        '''Run a shell script of the tools tree in the folder.'''
        log = self.folder / 'log'
        if sandbox.run(self.tree, ['sh', '-ec', script, 'sh', *arguments],
                       self.folder, log):
            raise RuntimeError(log.read_text(errors='replace'))

    def key(self, name: str) -> Path:
        '''The public key @name, made if need be.'''
        self.run(KEY, name)
        return self.folder / f'keys/{name}.asc'

    def sign(self, name: str, *packages: Path) -> None:
        '''Sign packages below the folder with the key @name.'''
        self.run(SIGN, name, *(str(path.relative_to(self.folder))
                               for path in packages))

    def unsign(self, *packages: Path) -> None:
        '''Take the signatures of packages below the folder away.'''
        self.run('rpmsign --delsign "$@"',
                 *(str(path.relative_to(self.folder)) for path in packages))

    def index(self, repository: str) -> None:
        '''Make the metadata of a repository in the folder.'''
        self.run(INDEX, repository, str(EPOCH))

    def make(self, arch: str, packages: Sequence[Path]) -> Path:
        '''
        Make the repository for @arch, of what is in Debian's @packages.
        '''
        work = self.folder / f'build-{arch}'
        debian = Debian(unpack(packages, work / 'debian'), arch)
        (work / 'specs').mkdir()
        for source in sources(debian, self._image(debian)):
            root = Path(f'build-{arch}') / 'roots' / source.name
            for rpm in source.rpms:
                for name, content in rpm.files.items():
                    put(self.folder / root, name, content)
            (self.folder / root).mkdir(parents=True, exist_ok=True)
            (work / f'specs/{source.name}.spec').write_text(
                spec(source, Path(sandbox.FOLDER, root)), encoding='utf-8')
        self.run(BUILD, work.name, arch, str(EPOCH))
        shutil.rmtree(work)
        repository = self.folder / arch
        self.sign('fedora', *sorted(repository.rglob('*.rpm')))
        self.index(arch)
        return repository

    def _image(self, debian: Debian) -> Path:
        '''The kernel as Fedora packs it: for aarch64 in an EFI zboot.'''
        [image] = debian.root.glob('boot/vmlinuz-*')
        if debian.arch == 'x86_64':
            return image
        packed = image.with_name('packed')
        self.run('zstd -q -3 -o "$2" "$1"',
                 *(str(p.relative_to(self.folder)) for p in (image, packed)))
        payload = packed.read_bytes()
        header = struct.pack('<4s4sII8s32s8x', b'MZ', b'zimg', 64,
                             len(payload), b'', b'zstd')
        packed.write_bytes(header + payload
                           + struct.pack('<I', image.stat().st_size))
        return packed


def unpack(packages: Sequence[Path], folder: Path) -> Path:
    '''Unpack Debian's @packages, the one with the links in / first.'''
    def extract(path: Path) -> None:
        subprocess.run(['dpkg-deb', '--extract', path, folder], check=True)

    folder.mkdir(parents=True)
    for name in ('bin', 'sbin', 'lib', 'lib64'):
        (folder / 'usr' / name).mkdir(parents=True)
        (folder / name).symlink_to(f'usr/{name}')
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(extract, packages))
    return folder


def debian_packages(arch: str, cache: Cache, report: Report) -> List[Path]:
    '''The packages of debian-min, fetched if need be.'''
    lock = locks.load(MKOSI / f'debian-min/{arch}.lock')
    store = Store(cache, report)
    store.fetch(lock.packages, lock.distribution, f'debian-min {arch}')
    return [store.path(package) for package in lock.packages
            if package.name != 'base-files']


def main(folder: str, *archs: str) -> None:
    '''Make the repositories in @folder.'''
    cache, report = Cache(), Report()
    lock = locks.load(MKOSI / f'tools/{os.uname().machine}.lock')
    tree = tools.ensure(lock, cache, Store(cache, report), report)
    path = Path(folder).absolute()
    path.mkdir(parents=True)
    fedora = Fedora(path, tree)
    for arch in archs or tuple(TRIPLETS):
        with report.stage(f'making {path / arch}'):
            fedora.make(arch, debian_packages(arch, cache, report))
    shutil.copy(fedora.key('fedora'), path / 'RPM-GPG-KEY')


if __name__ == '__main__':
    main(*sys.argv[1:])
