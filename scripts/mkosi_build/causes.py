# SPDX-License-Identifier: GPL-2.0-or-later
'''
The known causes of differences between two builds of one definition, how
to tell each from what differs, and its mend.
'''

import re
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from .compare import Finding, is_text


@dataclass(frozen=True)
class Cause:
    '''A known cause, under a @key that stays; @mend says what to do.'''
    key: str
    title: str
    mend: str


Rule = Tuple[Cause, Callable[[Finding], bool]]

# What a file's being there, or what is in it, depends on its path
_OF_FILES = ('content', 'presence', 'name', 'kind')


# -- What a finding is like -------------------------------------------------

def _at(pattern: str) -> Callable[[Finding], bool]:
    '''Whether it is a file, or what is in one, whose path matches.'''
    compiled = re.compile(pattern)

    def matches(finding: Finding) -> bool:
        if finding.aspect in _OF_FILES and finding.path:
            return bool(compiled.match(finding.path))
        # The file itself has a form, which is a layer
        return any(compiled.match(layer) for layer in finding.layers
                   if layer.startswith('/'))
    return matches


def _aspect(*aspects: str, form: str = '') -> Callable[[Finding], bool]:
    def matches(finding: Finding) -> bool:
        return finding.aspect in aspects and finding.form.startswith(form)
    return matches


def _lines(finding: Finding) -> Optional[Tuple[List[bytes], List[bytes]]]:
    if finding.aspect != 'content' or finding.data is None:
        return None
    if not all(is_text(data) for data in finding.data):
        return None
    return finding.data[0].splitlines(), finding.data[1].splitlines()


def _reordered(finding: Finding) -> bool:
    lines = _lines(finding)
    return (lines is not None and lines[0] != lines[1]
            and sorted(lines[0]) == sorted(lines[1]))


def _same_but(pattern: bytes) -> Callable[[Finding], bool]:
    '''Whether two texts are the same but for what @pattern matches.'''
    compiled = re.compile(pattern)

    def matches(finding: Finding) -> bool:
        if _lines(finding) is None or finding.data is None:
            return False
        plain = [compiled.sub(b'\0', data) for data in finding.data]
        return plain[0] == plain[1]
    return matches


def _shadow(index: int) -> Callable[[Finding], bool]:
    '''Whether the field @index of one account's line differs.'''
    def matches(finding: Finding) -> bool:
        lines = _lines(finding)
        if lines is None or finding.path != '/etc/shadow':
            return False
        ones, others = ({line.split(b':')[0]: line.split(b':')
                         for line in side} for side in lines)
        return any(len(one) > index and len(others.get(name, ())) > index
                   and one[index] != others[name][index]
                   for name, one in ones.items())
    return matches


def _all(*tests: Callable[[Finding], bool]) -> Callable[[Finding], bool]:
    return lambda finding: all(test(finding) for test in tests)


_DATE = (
    rb'(?:\d{4}-\d\d-\d\d|(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? )?'
    rb'(?:(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* +\d{1,2}'
    rb'|\d{1,2} (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*)'
    rb'(?:,? \d{4})?|\d{1,2}/\d{1,2}/\d{2,4})')
_CLOCK = rb'\d{1,2}:\d\d(?::\d\d)?(?:[.,]\d+)?(?: ?[AP]M)?'
_ZONE = rb'(?: ?(?:Z|UTC|GMT|[A-Z]{3,4}|[+-]\d\d:?\d\d))?'
TIME = (rb'(?:' + _DATE + rb'[T ]?(?:' + _CLOCK + rb')?' + _ZONE
        + rb'(?: \d{4})?|' + _CLOCK + _ZONE + rb'|\b1[0-9]{9}(?:\.\d+)?\b)')
PATH = rb'/(?:[\w.+@=~-]+/)+[\w.+@=~-]*'


# -- The table --------------------------------------------------------------

def _seed(finding: Finding) -> bool:
    return (finding.aspect in ('disk GUID', 'GUID', 'UUID', 'journal UUID',
                               'volume id')
            and finding.form.startswith(('GPT', 'ext4', 'FAT', 'erofs')))


RULES: Sequence[Rule] = (
    # Tables and file systems
    (Cause('uuid', 'a UUID of a disk, partition or file system that was '
           'drawn at random', 'set Seed= in mkosi.conf: all are derived from '
           'it'), _seed),
    (Cause('ext4-hash-seed', 'the random hash seed of ext4 directories, '
           'which systemd-repart 257 does not derive from Seed=',
           'Environment="SYSTEMD_REPART_MKFS_OPTIONS_EXT4=-E '
           '...,hash_seed=<uuid>", with every option in one -E (mke2fs '
           'keeps only the last)'),
     _aspect('directory hash seed', form='ext4')),
    (Cause('ext4-char', 'ext4 notes whether char is signed where mke2fs '
           'runs', 'in mkosi.postoutput: debugfs -w -R "set_super_value '
           'flags 1", then tune2fs -L, as common/mkosi.postoutput does'),
     _aspect('flags', form='ext4')),
    (Cause('ext4-written', 'how much mke2fs has written, which depends on '
           'the order in which it read folders', 'in mkosi.postoutput: '
           'debugfs -w -R "set_super_value kbytes_written 0", then tune2fs '
           '-L, as common/mkosi.postoutput does'),
     _aspect('written', form='ext4')),
    (Cause('ext4-time', 'times that mke2fs took from the clock',
           'an e2fsprogs of 1.47.1 or later in the tools tree, which honours '
           'SOURCE_DATE_EPOCH'),
     lambda f: f.form == 'ext4' and (
         f.aspect in ('write time', 'check time', 'creation time',
                      'mount time', 'ctime', 'crtime')
         # mke2fs makes these two itself
         or f.aspect in ('mtime', 'atime')
         and f.path in ('/', '/lost+found'))),
    (Cause('btrfs', 'mkfs.btrfs is not reproducible', 'name ext4, erofs or '
           'squashfs as Format= in mkosi.repart/'),
     lambda f: f.form == 'btrfs'),
    (Cause('fat-time', 'times in a FAT file system from the clock or the '
           'time zone', 'a dosfstools and an mtools that honour '
           'SOURCE_DATE_EPOCH (Debian 13\'s do), TZ=UTC; or no ESP'),
     _aspect('mtime', 'crtime', 'atime', form='FAT')),
    (Cause('readdir-order', 'the order in which the workspace\'s file system '
           'lists names', 'sort what is copied; for squashfs and erofs also '
           '-no-hardlinks or --hard-dereference; check with a shuffled '
           'readdir'),
     lambda f: f.aspect == 'order' and not f.form.startswith('cpio')
     or f.form in ('squashfs', 'erofs') and f.aspect in ('content',
                                                         'layout')),

    # Archives and compression
    (Cause('cpio-order', 'cpio took names in the order of readdir',
           'find . -printf "%P\\0" | LC_ALL=C sort -z | cpio --null'),
     _aspect('order', form='cpio')),
    (Cause('cpio-inode', 'inode and device numbers of the build\'s host in '
           'a cpio archive', 'cpio --create --reproducible'),
     _aspect('inode', 'links', 'device major', 'device minor',
             form='cpio')),
    (Cause('gzip-header', 'gzip keeps the time and the name of the file',
           'gzip -n'), lambda f: f.aspect in ('time', 'name')
     and f.form in ('gzip', 'cpio (gzip)') and not f.path),
    (Cause('pe-time', 'the time at which an EFI program was linked',
           'run ukify, or what else made it, with SOURCE_DATE_EPOCH set'),
     _aspect('time', form='PE')),
    (Cause('qcow2', 'qemu-img wrote clusters in another order or compressed '
           'them otherwise', 'qemu-img convert -c without -W, of the locked '
           'tools tree and never of the QEMU under test'),
     lambda f: f.form == 'qcow2' and f.aspect not in ('size', 'content')),
    (Cause('compressor', 'another compressor, version or set of flags: the '
           'content is the same', 'that of the tools tree; zstd -T0 or xz '
           '-T0, which give the same bytes on any number of CPUs, and not '
           'zstd --single-thread'),
     lambda f: f.aspect in ('compression', 'level', 'system')),

    # What a member has beside its content
    (Cause('xattr-order', 'extended attributes in the order in which they '
           'were set or listed', 'remove them in mkosi.finalize, or set '
           'them there in sorted order'),
     _aspect('attribute order')),
    (Cause('xattr', 'extended attributes that the build\'s host, its '
           'security module or its user decides', 'remove or set them in '
           'mkosi.finalize'), _aspect('attributes', form='ext4')),
    (Cause('mtime', 'times of files that no package decides; '
           'SourceDateEpoch= only lowers newer ones', 'in the last '
           'mkosi.finalize script: find . -exec touch -h -d '
           '"@$SOURCE_DATE_EPOCH" {} +, and an epoch older than any '
           'checkout'),
     _aspect('mtime', 'atime', 'ctime', 'crtime', 'build time',
             'build time, fraction')),
    (Cause('mode', 'permissions by the umask or the modes of the checkout',
           'umask 022, and normalise modes in mkosi.finalize: git keeps '
           'the x bit alone'), _aspect('mode')),
    (Cause('owner', 'owners that an unprivileged build can\'t give (setgid '
           'unix_chkpwd, /var/mail), or those of the checkout',
           'in mkosi.finalize: chown -hR, and chmod ug-s'),
     _aspect('owner', 'group')),

    # What is in files, known by their paths
    (Cause('machine-id', 'an id that is made once a machine',
           'in mkosi.finalize: : > etc/machine-id, so that the guest makes '
           'one when it boots'),
     _at(r'/(etc|var/lib/dbus)/machine-id$')),
    (Cause('account-order', 'accounts in the order in which packages were '
           'configured', 'pwck --sort and grpck --sort, or sort the lines '
           'in mkosi.finalize'),
     _all(_at(r'/etc/(passwd|group|shadow|gshadow|sub[ug]id)$'),
          _reordered)),
    (Cause('root-password', 'a clear RootPassword= is salted anew by each '
           'build', 'RootPassword=hashed:..., or an empty one'), _shadow(1)),
    (Cause('shadow-day', 'the day of the last change in /etc/shadow',
           'a mkosi of 2026 or later, or chage -d in mkosi.finalize'),
     _shadow(2)),
    (Cause('account-backup', 'backups of the files of accounts',
           'delete /etc/passwd- and its like in mkosi.finalize'),
     _at(r'/etc/(passwd|group|shadow|gshadow|sub[ug]id)-$')),
    (Cause('aux-cache', 'ldconfig\'s cache of inodes and times',
           'RemoveFiles=/var/cache/ldconfig/aux-cache'),
     _at(r'/var/cache/ldconfig/')),
    (Cause('package-state', 'the package manager\'s lists, databases and '
           'backups (apt, dpkg, debconf, ucf)', 'CleanPackageMetadata=yes, '
           'and remove what is left'),
     _at(r'/var/(lib/(apt|dpkg|ucf)|cache/(apt|debconf)|backups)(/|$)')),
    (Cause('rpm-state', 'rpmdb: install time and id, order of rows, WAL '
           'files; history of dnf', 'CleanPackageMetadata=yes, and the '
           'package list as an artefact of its own; rpm 4.18 or later '
           'honours SOURCE_DATE_EPOCH'),
     _at(r'/(usr/lib/sysimage/(rpm|libdnf5)|var/(lib|cache)/'
         r'(rpm|dnf|libdnf5))(/|$)')),
    (Cause('log', 'logs of what ran during the build',
           'RemoveFiles=/var/log/*'), _at(r'/var/log/')),
    (Cause('cache', 'caches of what ran during the build',
           'RemoveFiles=/var/cache/*'), _at(r'/var/cache/')),
    (Cause('byte-code', 'byte code of Python, with the time of its source',
           'delete __pycache__ in mkosi.finalize'),
     _at(r'.*(/__pycache__(/|$)|\.pyc$)')),
    (Cause('generated', 'files that scripts of packages generate (trust '
           'store of Java, authselect, SELinux policy)', 'leave these '
           'packages out, else remove the files'),
     _at(r'/etc/(pki/.*cacerts$|authselect/|selinux/)')),
    (Cause('secret', 'a key or a seed that is drawn at random', 'remove it '
           'in mkosi.finalize: the guest makes its own'),
     _at(r'/(etc/ssh/ssh_host_|var/lib/systemd/(random-seed|credential)'
         r'|etc/ssl/private/)')),
    (Cause('repository', 'metadata of a repository made during the build',
           'createrepo_c --revision 0 --set-timestamp-to-revision; '
           'a sorted Packages'),
     _at(r'.*/(repodata/|dists/.*(Packages|Release)|repomd\.xml$)')),
    (Cause('random-name', 'a name that was drawn at random',
           'give it a fixed name, or remove it in mkosi.finalize'),
     _aspect('name')),

    # What is in files, known by how it differs
    (Cause('timestamp', 'a date or a time in a file', 'have what writes it '
           'honour SOURCE_DATE_EPOCH, else remove the line in '
           'mkosi.finalize'), _same_but(TIME)),
    (Cause('line-order', 'lines in another order: that of readdir, of a '
           'locale or of processes', 'LC_ALL=C sort in mkosi.finalize, or '
           'fix the order where the file is made'), _reordered),
    (Cause('build-path', 'a path of the build\'s host in a file',
           'build in a folder that has the same name everywhere, or remove '
           'it in mkosi.finalize'), _same_but(PATH)),
)


def match(finding: Finding) -> Optional[Cause]:
    '''The known cause of @finding, if there is one.'''
    return next((cause for cause, test in RULES if test(finding)), None)
