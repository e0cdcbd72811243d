# SPDX-License-Identifier: GPL-2.0-or-later
'''
The package list of an image, in the form of SPDX 2.3: all packages of its
lock, each with its hash, its source package and the licence that it
declares. It is a function of the build's inputs and outputs: whoever builds
the same bytes gets the same list.

The lock has what was fetched for the image. A few of these packages, or
files of them, were removed from it again; mkosi's manifest has the rest.
See https://spdx.github.io/spdx-spec/v2.3/ and, for the package URLs,
https://github.com/package-url/purl-spec.
'''

import hashlib
import json
import re
import urllib.parse
from datetime import datetime, timezone
from typing import Any, Dict, List, Mapping, Tuple

from . import lock as locks
from .build import Built, Job
from .declared import NONE, Declared
from .lock import Lock, Package

FILE = 'packages.spdx.json'

NAMESPACE = 'https://www.qemu.org/mkosi-images/packages'

SUPPLIERS = {'debian': 'Organization: Debian',
             'fedora': 'Organization: Fedora Project'}


def timestamp(seconds: float) -> str:
    '''@seconds since 1970 as SPDX and SLSA write times.'''
    return datetime.fromtimestamp(int(seconds), timezone.utc).strftime(
        '%Y-%m-%dT%H:%M:%SZ')


def _purl(lock: Lock, name: str, version: str, arch: str) -> str:
    epoch, colon, rest = version.rpartition(':')
    qualifiers = {'arch': arch}
    if lock.distribution == 'fedora':
        kind, distro = 'rpm', f'fedora-{lock.release}'
        version = rest
        if colon:
            qualifiers['epoch'] = epoch
    else:
        kind, distro = 'deb', f'{lock.distribution}-{lock.release}'
    qualifiers['distro'] = distro
    quoted = [urllib.parse.quote(word, safe=':') for word in (name, version)]
    return (f'pkg:{kind}/{lock.distribution}/{quoted[0]}@{quoted[1]}?'
            + '&'.join(f'{key}={urllib.parse.quote(value, safe="")}'
                       for key, value in sorted(qualifiers.items())))


def purl(lock: Lock, package: Package) -> str:
    '''The URL that names @package of @lock, wherever it is.'''
    return _purl(lock, package.name, package.version, package.architecture)


def source(lock: Lock, package: Package) -> Tuple[str, str]:
    '''Name and version of the source package of @package.'''
    if lock.distribution != 'fedora':
        name, _, version = package.source.partition('=')
        return name, version
    # NAME-VERSION-RELEASE.src.rpm, of which only the name may have more
    stem = re.sub(r'\.(no)?src\.rpm$', '', package.source)
    name, version, release = (['', '', *stem.rsplit('-', 2)])[-3:]
    return name or stem, f'{version}-{release}' if name else ''


def _identifier(kind: str, *words: str) -> str:
    return f'SPDXRef-{kind}-' + re.sub(r'[^A-Za-z0-9.]+', '-',
                                       '-'.join(words))


def _package(identifier: str, name: str, version: str,
             **more: Any) -> Dict[str, Any]:
    return {'SPDXID': identifier, 'name': name, 'versionInfo': version,
            # By hash, from any mirror
            'downloadLocation': NONE, 'filesAnalyzed': False,
            'licenseConcluded': NONE, 'licenseDeclared': NONE,
            'copyrightText': NONE,
            **{key: value for key, value in more.items() if value}}


def _checksum(sha256: str) -> List[Dict[str, str]]:
    return [{'algorithm': 'SHA256', 'checksumValue': sha256}]


def _reference(url: str) -> List[Dict[str, str]]:
    return [{'referenceCategory': 'PACKAGE-MANAGER',
             'referenceType': 'purl', 'referenceLocator': url}]


def _related(one: str, how: str, other: str) -> Dict[str, str]:
    return {'spdxElementId': one, 'relationshipType': how,
            'relatedSpdxElement': other}


def _binaries(lock: Lock, declared: Mapping[str, Declared],
              ) -> Tuple[List[Dict[str, Any]], List[Dict[str, str]]]:
    '''The packages of @lock and their sources, and how they are related.'''
    found: Dict[str, Dict[str, Any]] = {}
    related = []
    supplier = SUPPLIERS.get(lock.distribution, '')
    for package in lock.packages:
        identifier = _identifier('Package', package.name,
                                 package.sha256[:12])
        name, version = source(lock, package)
        # Names and versions may have what an identifier may not
        digest = hashlib.sha256(f'{name}={version}'.encode()).hexdigest()
        origin = _identifier('Source', name, digest[:12])
        found[identifier] = _package(
            identifier, package.name, package.version,
            packageFileName=package.file_name, supplier=supplier,
            checksums=_checksum(package.sha256),
            licenseDeclared=declared[package.sha256].expression,
            sourceInfo=f'built from the source package {package.source}',
            externalRefs=_reference(purl(lock, package)))
        arch = 'src' if lock.distribution == 'fedora' else 'source'
        found[origin] = _package(
            origin, name, version, supplier=supplier,
            primaryPackagePurpose='SOURCE',
            externalRefs=_reference(_purl(lock, name, version, arch)))
        related.append(_related(identifier, 'GENERATED_FROM', origin))
    return list(found.values()), related


def document(job: Job, artefacts: Mapping[str, Built],
             declared: Mapping[str, Declared]) -> Dict[str, Any]:
    '''
    The list for the @artefacts of @job; @declared is what
    declared.of_lock() returns for its lock.
    '''
    image = _identifier('Image', job.name)
    found = [_package(image, job.image.name, job.identity,
                      primaryPackagePurpose='OPERATING-SYSTEM',
                      summary=job.image.description)]
    related = [_related('SPDXRef-DOCUMENT', 'DESCRIBES', image)]
    for kind, built in sorted(artefacts.items()):
        identifier = _identifier('Artefact', kind)
        found.append(_package(
            identifier, f'{job.image.name}-{kind}', job.identity,
            packageFileName=built.path.name, primaryPackagePurpose='FILE',
            checksums=_checksum(built.sha256)))
        related.append(_related(image, 'CONTAINS', identifier))
    packages, origins = _binaries(job.lock, declared)
    related += [_related(image, 'GENERATED_FROM', package['SPDXID'])
                for package in packages
                if package.get('primaryPackagePurpose') != 'SOURCE']
    texts = {reference: text for one in declared.values()
             for reference, text in one.texts.items()}
    return {
        'spdxVersion': 'SPDX-2.3', 'dataLicense': 'CC0-1.0',
        'SPDXID': 'SPDXRef-DOCUMENT', 'name': job.name,
        'documentNamespace': f'{NAMESPACE}/{job.name}-{job.identity}',
        'comment': 'GENERATED_FROM: what was fetched to make the image; '
                   'files of some packages were removed from it',
        'creationInfo': {
            'created': timestamp(job.lock.epoch),
            'creators': [f'Tool: {locks.BUILDER.replace(" ", "-")}']},
        'packages': found + packages,
        'relationships': related + origins,
        'hasExtractedLicensingInfos': [
            {'licenseId': reference, 'name': name, 'extractedText': text}
            for reference, (name, text) in sorted(texts.items())]}


def render(content: Mapping[str, Any]) -> str:
    '''The text of a document.'''
    return json.dumps(content, indent=1, sort_keys=True) + '\n'
